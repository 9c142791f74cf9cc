"""A refit of a folder: the record that it leaves, and what it may not lose."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import headshare as hs
import headshare.calibration.refit.steps.block_steps
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CheckpointError
from headshare.evaluation.verify import verify
from support.calibrated import BY_OUTPUT, REFIT, TEXT, copy_of, edit, entry_of
from support.command_line import Run, assert_one_error_line
from support.folders import WEIGHTS, contents, left_behind
from support.texts import a_text, add_tokenizer

# ---- the record of a refit


def test_a_refit_names_what_it_changed_and_verify_says_what_it_did_not_compare(things: Path, run: Run) -> None:
    assert run(*REFIT).status == 0
    words = run("inspect", "shared").out
    assert words.rstrip().splitlines()[-1].endswith("tensors refitted on 256 tokens of text")
    data = run("inspect", "shared", "--json").data
    assert (data["refit"]["tokens"], data["refit"]["window"], data["base_model"]) == (256, 16, "model")
    found = verify(hs.open_checkpoint("shared"), hs.open_checkpoint("model"))
    assert found.ok
    assert any("not compared" in note and "refitted on 256 tokens" in note for note in found.notes)
    dense, shared = (load_file(things / name / WEIGHTS) for name in ("model", "shared"))
    changed = {name for name, tensor in shared.items() if not torch.equal(tensor, dense[name][: len(tensor)])}
    assert set(entry_of(things / "shared")["refit"]["tensors"]) == {name for name in changed if "_proj" in name} - {
        name for name in changed if any(part in name for part in ("q_proj", "k_proj", "v_proj"))
    }


def test_verify_finds_a_changed_tensor_that_was_not_refitted(things: Path, run: Run) -> None:
    assert run(*REFIT).status == 0
    tensors = load_file(things / "shared" / WEIGHTS)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, things / "shared" / WEIGHTS, metadata={"format": "pt"})
    (things / "shared" / "headshare.json").unlink()
    found = verify(hs.open_checkpoint("shared"), hs.open_checkpoint("model"))
    assert not found.ok
    assert "model.norm.weight" in found.problems[0]


def test_verify_does_not_believe_a_record_that_names_what_no_refit_changes(things: Path, run: Run) -> None:
    assert run(*REFIT).status == 0
    tensors = load_file(things / "shared" / WEIGHTS)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, things / "shared" / WEIGHTS, metadata={"format": "pt"})
    edit(things / "shared", lambda entry: entry["refit"]["tensors"].append("model.norm.weight"))
    (things / "shared" / "headshare.json").unlink()
    found = verify(hs.open_checkpoint("shared"), hs.open_checkpoint("model"))
    assert not found.ok
    assert "model.norm.weight" in found.problems[0]


def test_a_second_refit_starts_from_the_first_and_remembers_what_that_changed(things: Path, run: Run) -> None:
    a_text(things / "other", 600, seed=5)
    assert run(*REFIT, "--out", "once").status == 0
    assert run("refit", "once", *REFIT[2:], "--calibration", "other", "--no-refit-ffn", "--out", "twice").status == 0
    once, twice = (load_file(things / name / WEIGHTS) for name in ("once", "twice"))
    changed = {name for name in once if not torch.equal(once[name], twice[name])}
    assert changed
    assert all(name.endswith("o_proj.weight") for name in changed)
    records = [entry_of(things / name)["refit"] for name in ("once", "twice")]
    assert set(records[1]["tensors"]) >= set(records[0]["tensors"])
    assert (records[0]["text"], records[1]["text"]) == ("text", "other")
    assert verify(hs.open_checkpoint("twice"), hs.open_checkpoint("model")).ok
    assert run("refit", "once", *REFIT[2:], "--calibration", "other", "--no-refit-ffn").status == 0  # in place
    assert contents(things / "once") == contents(things / "twice")
    assert left_behind(things) == []


def test_gradient_steps_change_more_than_readouts_and_the_record_says_which(
    things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = itertools.count(1)  # every look is better than the last: the text is too short for real ones
    monkeypatch.setattr(headshare.calibration.refit.steps.block_steps, "_held_out", lambda *_: 1 / next(errors))
    share = [*BY_OUTPUT[:2], "stepped", *BY_OUTPUT[3:], "--refine", "8"]
    assert run(*share).status == 0
    assert run(*REFIT, "--refine", "8", "--out", "again").status == 0
    for name in ("stepped", "again"):
        named = set(entry_of(things / name)["refit"]["tensors"])
        assert any(tensor.endswith("up_proj.weight") for tensor in named)
        assert any(tensor.endswith("input_layernorm.weight") for tensor in named)
        found = verify(hs.open_checkpoint(name), hs.open_checkpoint("model"))
        assert found.ok, found.problems
        assert found.tensors_checked  # embeddings, norms, and layers before the first that gives something up
    found = run(*REFIT, "--refine", "slow")
    assert found.status != 0
    assert "--refine" in found.err


def test_a_record_and_the_dense_models_name_survive_loading_and_saving(things: Path, run: Run) -> None:
    assert run(*REFIT).status == 0
    transformers.AutoModelForCausalLM.from_pretrained("shared").save_pretrained("again")
    before, after = entry_of(things / "shared"), entry_of(things / "again")
    assert after == before
    records = [hs.open_checkpoint(name).require_sharing().refit for name in ("again", "shared")]
    assert records[0] == records[1] is not None
    add_tokenizer(things / "again")
    assert verify(hs.open_checkpoint("again"), hs.open_checkpoint("model")).ok
    assert run("refit", "again", *TEXT).status == 0


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list": lambda entry: entry.update(refit=[]),
    "a text": lambda entry: entry.update(refit="x"),
    "a number": lambda entry: entry.update(refit=5),
    "nothing in it": lambda entry: entry.update(refit={}),
    "another key": lambda entry: entry["refit"].update(more=1),
    "tokens below zero": lambda entry: entry["refit"].update(tokens=-1),
    "tokens as text": lambda entry: entry["refit"].update(tokens="5"),
    "tokens without end": lambda entry: entry["refit"].update(tokens=float("inf")),
    "a seed without end": lambda entry: entry["refit"].update(seed=10**400),
    "a terminal's escape": lambda entry: entry["refit"].update(text="\x1b[2Jgone"),
    "two lines": lambda entry: entry["refit"].update(text="one\ntwo"),
    "half a character": lambda entry: entry["refit"].update(text="\ud800"),
    "a long text": lambda entry: entry["refit"].update(text="x" * 513),
    "no digest": lambda entry: entry["refit"].update(text_digest="x" * 64),
    "a tensor that is a list": lambda entry: entry["refit"].update(tensors=[[]]),
    "tensors that are a text": lambda entry: entry["refit"].update(tensors="abc"),
    "a tensor of two lines": lambda entry: entry["refit"].update(tensors=["a\nb"]),
    "deep": lambda entry: entry["refit"].update(tensors=json.loads("[" * 100 + "]" * 100)),
    "a key of two lines": lambda entry: entry["refit"].update({"a\nb\x1b": 1}),
}


@pytest.fixture(scope="module")
def recorded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_of(source / "shared", tmp_path_factory.mktemp("recorded") / "shared")
    record = RefitRecord.of(["a.weight"], "text", "0" * 64, windows=(2, 16), seed=0)
    edit(folder, lambda entry: entry.update(refit=record.model_dump(mode="json")))
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_is_one_error_wherever_it_is_read(name: str, recorded: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    for path in recorded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit(folder, HOSTILE[name])
    for command in ("inspect", "verify"):
        found = run(command, folder)
        assert_one_error_line(found)
        assert "refit" in found.err
        assert found.err.rstrip("\n").isprintable()
    with pytest.raises(CheckpointError, match="refit"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", [5, [], {"a": 1}, "x" * 600, "two\nlines", "\x1b[2J"])
def test_a_hostile_name_of_the_dense_model_is_no_name(name: object, recorded: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    for path in recorded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit(folder, lambda entry: entry.update(base_model=name))
    a_text(tmp_path / "text", 300)
    found = run("refit", folder, *TEXT)
    assert_one_error_line(found)
    assert "--dense" in found.err
    assert hs.load(folder).config.quantization_config.sharing.base_model is None


def test_what_cannot_be_shown_of_a_texts_name_is_left_out_of_the_record() -> None:
    record = RefitRecord.of(["a"], "a\n\x1b\udcff" + "b" * 600, "0" * 64, windows=(1, 2), seed=3)
    assert record.text.startswith("a???b")
    assert len(record.text) == 512
    assert RefitRecord.from_dict(record.model_dump(mode="json")) == record


# ---- refit, and what it may not lose


def test_a_refit_that_fails_keeps_the_old_folder(things: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(things / "shared")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("headshare.sharing.writer.write_safetensors", full)
        found = run(*REFIT)
        assert_one_error_line(found)
        assert contents(things / "shared") == before
    assert run(*REFIT).status == 0
    assert left_behind(things) == []


@pytest.mark.parametrize("name", ["optimizer.pt", ".git/config", "more/model.safetensors"])
def test_a_refit_in_place_refuses_to_lose_files_that_would_not_come_along(name: str, things: Path, run: Run) -> None:
    (things / "shared" / name).parent.mkdir(exist_ok=True)
    (things / "shared" / name).write_bytes(b"precious")
    (things / "shared" / "LICENSE.md").write_text("too")
    before = contents(things / "shared")
    found = run(*REFIT)
    assert_one_error_line(found)
    assert name in found.err
    assert "--out" in found.err
    assert contents(things / "shared") == before
    assert left_behind(things) == []
    assert run(*REFIT, "--out", "new").status == 0
    assert (things / "new" / "LICENSE.md").read_text() == "too"


def test_a_refit_in_place_follows_a_link_and_keeps_it(things: Path, run: Run) -> None:
    (things / "link").symlink_to("shared")
    before = contents(things / "shared")
    assert run("refit", "link", *TEXT).status == 0
    assert (things / "link").is_symlink()
    assert contents(things / "shared") != before


def test_a_refit_with_dense_remembers_it_where_nothing_was_named(things: Path, run: Run) -> None:
    edit(things / "shared", lambda entry: entry.pop("base_model"))
    found = run(*REFIT)
    assert_one_error_line(found)
    assert "--dense" in found.err
    assert run(*REFIT, "--dense", "model").status == 0
    assert entry_of(things / "shared")["base_model"] == "model"
    assert run(*REFIT).status == 0
