"""A dense model that a command finds again by its name is the one that was shared, or is refused, unless it is told."""

from pathlib import Path

import pytest

from support import tiny
from support.calibrated import TEXT, entry_of
from support.command_line import Run, assert_one_error_line
from support.folders import contents
from support.texts import a_text, add_tokenizer

TRAINING = ["--context", "16", "--held-out", "2", "--max_steps", "1", "--use_cpu", "true"]


@pytest.fixture
def changed(model: Path, shared: Path, tmp_path: Path) -> Path:
    """The dense model with other numbers in the same shapes under the same name, after it was shared."""
    a_text(tmp_path / "text", 600)
    tiny.make_llama(model, seed=1)
    return add_tokenizer(model)


def test_a_refit_is_not_towards_a_model_that_changed_since(changed: Path, shared: Path, run: Run) -> None:
    before = contents(shared)
    found = run("refit", shared, *TEXT)
    assert_one_error_line(found)
    assert f"{changed} is not the model that {shared} came from" in found.err
    assert "--any-base" in found.err
    assert_one_error_line(run("refit", shared, *TEXT, "--dense", changed))
    assert contents(shared) == before
    told = run("refit", shared, *TEXT, "--any-base")
    assert told.status == 0
    assert "is not the model that" in told.err
    assert run("refit", shared, *TEXT).status == 1  # it still came from the first


def test_the_same_model_under_another_name_is_the_same(model: Path, shared: Path, run: Run, tmp_path: Path) -> None:
    a_text(tmp_path / "text", 600)
    model.rename(tmp_path / "moved")
    assert run("refit", shared, *TEXT, "--dense", "moved").status == 0
    assert run("verify", shared, "--against", "moved").status == 0


def test_distillation_is_not_from_a_model_that_changed_since(changed: Path, shared: Path, run: Run) -> None:
    words = ["train", shared, "out", "--method", "recover", "--data", "text", "--distill", "0.5", *TRAINING]
    found = run(*words)
    assert_one_error_line(found)
    assert f"{changed} is not the model that {shared} came from" in found.err
    assert "teacher" in found.err
    assert not Path("out").exists()
    assert not list(Path().glob(".*"))
    assert run(*words, "--teacher", changed).status == 0
    assert entry_of(Path("out"))["origin"] == entry_of(shared)["origin"]


@pytest.mark.parametrize("method", ["postshare", "both"])
def test_a_trained_model_names_the_dense_model_before_training(
    method: str, model: Path, run: Run, tmp_path: Path
) -> None:
    a_text(tmp_path / "text", 600)
    assert run("train", model, "out", "--method", method, "--data", "text", *TRAINING).status == 0
    assert run("refit", "out", *TEXT, "--out", "again").status == 0
    tiny.make_llama(model, seed=1)
    assert "is not the model that" in run("refit", "out", *TEXT).err


def test_verify_names_a_dense_model_that_is_another(changed: Path, shared: Path, run: Run) -> None:
    found = run("verify", shared, "--against", changed, "--no-logits")
    assert found.status == 1
    assert f"{changed} is not the model that {shared} came from" in found.out


def test_verify_notices_a_difference_in_numbers_that_are_not_kept(model: Path, shared: Path, run: Run) -> None:
    """All that is left of the dense model is equal, so only the record tells."""
    from safetensors.torch import load_file, save_file

    from support.folders import WEIGHTS

    tensors = load_file(model / WEIGHTS)
    (selection,) = run("inspect", shared, "--json").data["selections"]
    layer, group, _, _ = selection["ties"][0]
    rows = tensors[f"model.layers.{layer}.self_attn.k_proj.weight"]
    rows[group * (len(rows) // 2)] += 1
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    found = run("verify", shared, "--against", model, "--json")
    assert found.status == 1
    assert len(found.data["problems"]) == 1
    assert "is not the model that" in found.data["problems"][0]
    told = run("verify", shared, "--against", model, "--any-base", "--json")
    assert told.status == 0
    assert any("is not the model that" in note for note in told.data["notes"])


def test_a_bench_is_not_beside_another_model(changed: Path, shared: Path, run: Run) -> None:
    words = ["bench", shared, "--against", changed, "--repeats", "1", "--loads", "1", "--tokens", "4"]
    found = run(*words)
    assert_one_error_line(found)
    assert "is not the model that" in found.err
    assert run(*words, "--any-base").status == 0


def test_embeddings_are_not_compared_with_another_model(run: Run, tmp_path: Path) -> None:
    folder = add_tokenizer(tiny.make("bert", tmp_path / "bert"), bos=False)
    assert run("share", folder, "out").status == 0
    tiny.make("bert", folder, seed=1)
    words = ["eval", "out", "--text", a_text(tmp_path / "text"), "--window", "32", "--against", folder]
    found = run(*words)
    assert_one_error_line(found)
    assert "is not the model that out came from" in found.err
    assert run(*words, "--any-base").status == 0
