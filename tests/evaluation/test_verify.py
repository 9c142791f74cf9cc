"""Verify finds one flipped bit anywhere, and says which file it is in."""

import hashlib
import json
import os
import random
import tempfile
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.evaluation.verify import verify
from support import tiny
from support.folders import MANIFEST, WEIGHTS, nothing_changes
from support.shares import share, spoil


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def passes(folder: Path, against: Path | None = None) -> bool:
    """Whether it opens and verifies."""
    try:
        with hs.open_checkpoint(folder) as shared:
            return verify(shared, None if against is None else hs.open_checkpoint(against), logits=False).ok
    except hs.HeadshareError:
        return False


@pytest.mark.parametrize("manifest", [True, False], ids=["by its digest", "against the dense model"])
def test_one_flipped_bit_anywhere_in_the_weights_is_found(manifest: bool, llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    if not manifest:
        hs.load(shared).save_pretrained(tmp_path / "again")
        shared = tmp_path / "again"
    size, chance = (shared / WEIGHTS).stat().st_size, random.Random(0)
    header = 8 + int.from_bytes((shared / WEIGHTS).read_bytes()[:8], "little")
    places = [header, size // 2, size - 1, *(chance.randrange(header, size) for _ in range(20))]
    for place in places:
        bit = chance.randrange(8)
        flip(shared / WEIGHTS, place, bit)
        assert not passes(shared, None if manifest else llama), (place, bit)
        flip(shared / WEIGHTS, place, bit)
    assert passes(shared, llama)


def test_a_flipped_bit_loads_like_any_other_number_so_verify_names_the_file(llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    flip(shared / WEIGHTS, -1)
    transformers.AutoModelForCausalLM.from_pretrained(shared)
    found = verify(hs.open_checkpoint(shared))
    assert not found.ok
    assert found.max_logit_diff is None
    assert found.problems == [f"{WEIGHTS} is not as it was written: its digest differs. Restore it, or share again"]


def test_a_flipped_bit_in_a_header_or_a_configuration_is_found(llama: Path, tmp_path: Path) -> None:
    shared, chance = share(llama, tmp_path / "shared"), random.Random(1)
    header = 8 + int.from_bytes((shared / WEIGHTS).read_bytes()[:8], "little")
    for file, size in ((WEIGHTS, header), ("config.json", (shared / "config.json").stat().st_size)):
        for place in [0, 7, 8, *(chance.randrange(size) for _ in range(25))]:
            bit = chance.randrange(8)
            flip(shared / file, place, bit)
            assert not passes(shared), (file, place, bit)
            flip(shared / file, place, bit)
    assert passes(shared)


def test_a_flipped_bit_in_a_sharded_checkpoint_names_its_shard(tmp_path: Path) -> None:
    dense = tiny.make_llama(tmp_path / "dense", save={"max_shard_size": "80KB"})
    shared = share(dense, tmp_path / "shared")
    shard = sorted(shared.glob("*.safetensors"))[-1]
    flip(shard, -5, 3)
    found = verify(hs.open_checkpoint(shared))
    assert len(found.problems) == 1
    assert found.problems[0].startswith(shard.name)


@pytest.mark.parametrize("old", [True, False], ids=["written long ago", "saved by transformers"])
def test_missing_digests_are_a_note_where_none_were_written(old: bool, llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    if old:
        save_file(load_file(shared / WEIGHTS), shared / WEIGHTS, metadata={"format": "pt"})
        (shared / MANIFEST).unlink()
    else:
        hs.load(shared).save_pretrained(tmp_path / "again")
        shared = tmp_path / "again"
    found = verify(hs.open_checkpoint(shared), hs.open_checkpoint(llama))
    assert found.ok
    assert found.max_logit_diff == 0.0
    assert found.notes == ["no digests: headshare.json is not there, as after save_pretrained"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"model.safetensors": 7}}'])
def test_damaged_digests_are_a_problem_that_is_reported(text: str, llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    (shared / MANIFEST).write_text(text)
    found = verify(hs.open_checkpoint(shared))
    assert not found.ok
    assert found.problems


def test_digests_that_leave_a_weight_file_out_do_not_pass_for_a_check_of_it(llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    manifest = json.loads((shared / MANIFEST).read_text())
    del manifest["files"][WEIGHTS]
    (shared / MANIFEST).write_text(json.dumps(manifest))
    flip(shared / WEIGHTS, -1)
    found = verify(hs.open_checkpoint(shared), logits=False)
    assert not found.ok or WEIGHTS in " ".join(found.notes)


@pytest.mark.parametrize("in_its_place", ["nothing", "a fifo", "a folder", "a link to nowhere"])
def test_digests_that_were_written_and_are_gone_are_a_problem(in_its_place: str, llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    (shared / MANIFEST).unlink()
    if in_its_place == "a fifo":
        os.mkfifo(shared / MANIFEST)
    elif in_its_place == "a folder":
        (shared / MANIFEST).mkdir()
    elif in_its_place != "nothing":
        (shared / MANIFEST).symlink_to("nowhere")
    found = verify(hs.open_checkpoint(shared))
    assert not found.ok
    assert found.problems == [
        f"{MANIFEST} is missing, which was written with these weights. Restore it, or share again"
    ]


def test_digests_of_another_checkpoint_are_a_problem(llama: Path, tmp_path: Path) -> None:
    shared, other = (share(llama, tmp_path / name, ratio) for name, ratio in (("shared", 0.5), ("other", 0.3)))
    (shared / MANIFEST).write_bytes((other / MANIFEST).read_bytes())
    found = verify(hs.open_checkpoint(shared))
    assert not found.ok
    assert f"{MANIFEST} was written with another plan than config.json holds" in " ".join(found.problems)


def test_digests_that_leave_the_configuration_out_are_a_problem(llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    manifest = json.loads((shared / MANIFEST).read_text())
    assert manifest["plan"] == hs.open_checkpoint(shared).plan.digest
    del manifest["files"]["config.json"]
    (shared / MANIFEST).write_text(json.dumps(manifest))
    assert verify(hs.open_checkpoint(shared)).problems == [f"{MANIFEST} has no digest of config.json"]


def test_digests_name_no_file_outside_the_folder(llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    (tmp_path / "secret").write_text("secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    (shared / MANIFEST).write_text(json.dumps({"files": {"../secret": {"sha256": digest}}}))
    assert "../secret is missing" in verify(hs.open_checkpoint(shared)).problems


def test_verify_leaves_nothing_in_the_temporary_folder(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = share(llama, tmp_path / "shared")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with nothing_changes(shared), nothing_changes(llama):
        assert verify(hs.open_checkpoint(shared)).ok
        assert verify(hs.open_checkpoint(shared), hs.open_checkpoint(llama)).ok
        monkeypatch.setattr("headshare.evaluation.verify.load_model", None)
        with pytest.raises(TypeError):
            verify(hs.open_checkpoint(shared))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_stranger_does_not_verify_against_another_dense_model(llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    other = tiny.make_llama(tmp_path / "other", seed=1)
    found = verify(hs.open_checkpoint(shared), hs.open_checkpoint(other))
    assert not found.ok
    assert any("differs from the dense model's" in problem for problem in found.problems)
    assert not verify(hs.open_checkpoint(shared), hs.open_checkpoint(shared)).ok


def test_a_model_whose_logits_are_not_finite_does_not_verify(llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    spoil(shared, "model.layers.0.mlp.up_proj.weight", float("nan"))
    (shared / MANIFEST).unlink()  # else the digest tells
    found = verify(hs.open_checkpoint(shared))
    assert not found.ok
    assert "NaN" in found.problems[0]
