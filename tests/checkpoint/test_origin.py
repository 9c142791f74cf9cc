"""A dense model is known again by what it holds: wherever it lies, however it is spread over files, and not by name."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.checkpoint.fingerprint import check_origin, content_digest, origin_of
from headshare.errors import CheckpointError
from support import tiny
from support.folders import WEIGHTS
from support.shares import share, spoil


def digest(folder: Path) -> str:
    with hs.open_checkpoint(folder) as checkpoint:
        return content_digest(checkpoint)


def test_a_copy_and_other_files_of_the_same_tensors_are_the_same_model(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    (copy / WEIGHTS).touch()
    shards = tiny.make_llama(tmp_path / "shards", save={"max_shard_size": "30KB"})
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert digest(llama) == digest(copy) == digest(shards)


def test_one_number_of_a_small_tensor_makes_another_model(llama: Path) -> None:
    before = digest(llama)
    for name, tensor in load_file(llama / WEIGHTS).items():
        changed = load_file(llama / WEIGHTS)
        changed[name].view(-1)[tensor.numel() // 3] += 1
        save_file(changed, llama / WEIGHTS)
        assert digest(llama) != before, name
        save_file({**changed, name: tensor}, llama / WEIGHTS)
        assert digest(llama) == before


@pytest.mark.parametrize("tensors", [1, 3000], ids=["of one tensor", "of thousands"])
def test_a_large_tensor_that_differs_all_over_makes_another_model_and_is_hardly_read(
    tensors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = []
    for seed in (0, 1):
        drawn = torch.rand(100_000, generator=torch.Generator().manual_seed(seed))
        others = {f"small.{n}": torch.zeros(2) for n in range(tensors - 1)}
        save_file({"large": drawn, **others}, tmp_path / WEIGHTS)
        found.append(digest(tmp_path))
    assert found[0] != found[1]
    read = []
    real = hs.Checkpoint.read_into
    monkeypatch.setattr(hs.Checkpoint, "read_into", lambda self, b, *rest: (read.append(len(b)), real(self, b, *rest)))
    assert digest(tmp_path) == found[1]
    assert sum(read) <= 16 * 4096 + 8 * tensors < drawn.nbytes


def test_share_records_what_the_dense_model_was(llama: Path, tmp_path: Path) -> None:
    shared = hs.open_checkpoint(share(llama, tmp_path / "shared"))
    dense = hs.open_checkpoint(llama)
    origin = shared.require_sharing().origin
    assert origin == origin_of(dense)
    assert origin.commit is None
    assert check_origin(shared, dense, "say so") is None
    spoil(llama, "model.layers.3.self_attn.q_proj.weight", 1.0)
    dense = hs.open_checkpoint(llama)
    with pytest.raises(CheckpointError, match=r"is not the model that .* came from.*or say so to take this one"):
        check_origin(shared, dense, "say so")
    assert "is not the model that" in check_origin(shared, dense, None)


def test_a_folder_without_the_record_is_not_checked_and_that_is_said(llama: Path) -> None:
    old = hs.open_checkpoint(Path(__file__).parents[1] / "sharing" / "format" / "ties")
    assert "was not checked" in check_origin(old, hs.open_checkpoint(llama), "say so")


def test_a_model_of_the_hub_is_found_again_at_its_commit(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from headshare.checkpoint.opening import open_base

    commits = {None: "a" * 40, "a" * 40: "a" * 40, "b" * 40: "b" * 40}
    shutil.copytree(llama, tmp_path / "snapshots" / ("a" * 40))
    shutil.copytree(tiny.make_llama(tmp_path / "newer", seed=1), tmp_path / "snapshots" / ("b" * 40))
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda _, *, revision, **__: str(tmp_path / "snapshots" / commits[revision]),
    )
    dense = hs.open_checkpoint("someone/dense")
    shared = hs.open_checkpoint(hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "shared"))
    assert shared.require_sharing().origin.commit == "a" * 40
    commits[None] = "b" * 40
    assert check_origin(shared, open_base(shared), "say so") is None
    with pytest.raises(CheckpointError, match=rf"someone/dense is not the model .*commit {'a' * 40}"):
        check_origin(shared, hs.open_checkpoint("someone/dense"), "say so")


def test_a_record_survives_loading_and_saving(llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    hs.load(shared).save_pretrained(tmp_path / "again")
    found = [hs.open_checkpoint(folder).require_sharing() for folder in (shared, tmp_path / "again")]
    assert found[0] == found[1]
    assert found[0].origin == origin_of(hs.open_checkpoint(llama))
