"""A folder's manifest says by which digest its files were listed: today's, that of folders from before, or neither."""

import hashlib
import json
from pathlib import Path

import pytest

import headshare as hs
from headshare.errors import OutputError
from headshare.evaluation.verify import verify
from headshare.files.digests import BLAKE3, SHA256, file_digest
from support.command_line import Run
from support.folders import MANIFEST, WEIGHTS, nothing_changes
from support.shares import share


def listed_by_sha256(folder: Path) -> Path:
    """The folder with its manifest as it was written before there was a choice of digests."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    for name, one in manifest["files"].items():
        manifest["files"][name] = {"bytes": one["bytes"], "sha256": sha256(folder / name)}
    manifest["beside"] = {name: sha256(folder / name) for name in manifest["beside"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def spoil_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.fixture
def shared(llama: Path, tmp_path: Path) -> Path:
    (llama / "README.md").write_text("the dense model's card")
    return share(llama, tmp_path / "out")


def test_digests_are_those_of_the_published_vectors(tmp_path: Path) -> None:
    """BLAKE3's test_vectors.json: 0, 1, 2, ... 250, 0, 1, ... of some lengths; and FIPS 180-2's of 'abc'."""
    published = {
        0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    }
    for length, digest in published.items():
        (tmp_path / "file").write_bytes(bytes(number % 251 for number in range(length)))
        assert file_digest(tmp_path / "file", BLAKE3) == digest
    (tmp_path / "file").write_text("abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "file", SHA256) == known


def test_a_folder_from_before_is_checked_by_its_own_digests(shared: Path) -> None:
    listed_by_sha256(shared)
    assert verify(hs.open_checkpoint(shared), logits=False).ok
    spoil_last_byte(shared / WEIGHTS)
    found = verify(hs.open_checkpoint(shared), logits=False)
    assert found.problems == [f"{WEIGHTS} is not as it was written: its digest differs. Restore it, or share again"]


def test_a_folder_from_before_is_overwritten_only_where_all_is_as_it_was_written(shared: Path, llama: Path) -> None:
    card = (shared / "README.md").read_text()
    listed_by_sha256(shared)
    (shared / "README.md").write_text("my own card")
    with nothing_changes(shared), pytest.raises(OutputError, match=r"also holds README\.md"):
        share(llama, shared, overwrite=True)
    (shared / "README.md").write_text(card)
    share(llama, shared, overwrite=True)
    assert json.loads((shared / MANIFEST).read_text())["digest"] == BLAKE3


@pytest.mark.parametrize("digest", ["md5", "x" * 300, 7, None, ["blake3"], {"sha256": 1}])
def test_digests_of_a_kind_that_is_not_known_are_one_clear_error(
    digest: object, shared: Path, llama: Path, run: Run
) -> None:
    manifest = json.loads((shared / MANIFEST).read_text())
    (shared / MANIFEST).write_text(json.dumps({**manifest, "digest": digest}))
    (problem,) = verify(hs.open_checkpoint(shared), logits=False).problems
    assert "which headshare does not know; it knows sha256, blake3. Install a newer" in problem
    with nothing_changes(shared):
        done = run("share", llama, shared, "--overwrite")
    assert done.status == 1
    assert "which headshare does not know" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_the_digest_that_is_named_is_the_one_that_counts(shared: Path, run: Run) -> None:
    """A file listed under another digest than the manifest names has none."""
    manifest = json.loads((shared / MANIFEST).read_text())
    (shared / MANIFEST).write_text(json.dumps({**manifest, "digest": SHA256}))
    done = run("verify", shared)
    assert done.status == 1
    assert f"{WEIGHTS} is not as it was written" in done.out + done.err
