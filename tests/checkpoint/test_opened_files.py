"""What is read stays what was opened: a folder that is replaced or changed meanwhile is refused, never mixed."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import headshare as hs
import headshare.checkpoint.opening
import headshare.sharing.writer
from headshare.errors import CheckpointError
from headshare.integrations.transformers.loading import load_model
from support import tiny
from support.folders import WEIGHTS, contents, left_behind
from support.shares import a_plan

CHANGED = "was replaced or changed while it was in use"
NORM = "model.norm.weight"


def put_in_place(folder: Path, other: Path) -> None:
    """Another folder in the place of this one, as a program does that writes it anew."""
    folder.rename(folder.with_name("gone"))
    shutil.copytree(other, folder)


def written_in_place(folder: Path, other: Path) -> None:
    """Another model's bytes in the same file: nothing but its time tells."""
    with (folder / WEIGHTS).open("r+b") as file:
        file.write((other / WEIGHTS).read_bytes())
    os.utime(folder / WEIGHTS, ns=(1, 1))


CHANGES = pytest.mark.parametrize("change", [put_in_place, written_in_place])


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model of the same shapes, so that every offset fits, and of other numbers."""
    return tiny.make_llama(tmp_path / "other", seed=5)


@CHANGES
def test_a_folder_that_is_replaced_between_opening_and_reading_is_refused(
    change: Callable[[Path, Path], None], llama: Path, other: Path
) -> None:
    with hs.open_checkpoint(llama) as checkpoint:
        change(llama, other)
        with pytest.raises(CheckpointError, match=CHANGED):
            checkpoint.read(NORM)


def test_a_file_that_is_replaced_after_it_was_read_from_is_still_the_one_that_was_opened(
    llama: Path, other: Path
) -> None:
    before = load_file(llama / WEIGHTS)
    name = "model.layers.1.mlp.down_proj.weight"
    with hs.open_checkpoint(llama) as checkpoint:
        checkpoint.read(NORM)
        put_in_place(llama, other)
        assert torch.equal(checkpoint.read(name), before[name])


def test_a_file_that_is_written_to_after_it_was_read_from_is_refused(llama: Path, other: Path) -> None:
    with hs.open_checkpoint(llama) as checkpoint:
        checkpoint.read(NORM)
        written_in_place(llama, other)
        with pytest.raises(CheckpointError, match=CHANGED):
            checkpoint.read(NORM)


def test_a_configuration_of_one_checkpoint_is_not_taken_with_the_headers_of_another(
    llama: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = headshare.checkpoint.opening.read_whole_header

    def replaced_before(path: Path) -> Any:
        if not llama.with_name("gone").exists():
            put_in_place(llama, other)
        return headers(path)

    monkeypatch.setattr(headshare.checkpoint.opening, "read_whole_header", replaced_before)
    with pytest.raises(CheckpointError, match=CHANGED):
        hs.open_checkpoint(llama)


@pytest.mark.parametrize("verb", ["share", "expand"])
def test_an_output_of_two_checkpoints_mixed_is_never_written(
    verb: str, llama: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other folder comes when the first weights were read: what is copied beside them would be the other's."""
    plan = a_plan(llama)
    source = llama
    if verb == "expand":
        source = hs.share(hs.open_checkpoint(llama), plan).save(tmp_path / "shared")
        other = hs.share(hs.open_checkpoint(other), plan).save(tmp_path / "other shared")
    pieces = headshare.sharing.writer.stream

    def stream(*arguments: Any) -> Iterator[torch.Tensor]:
        for piece in pieces(*arguments):
            if not source.with_name("gone").exists():
                put_in_place(source, other)
            yield piece

    monkeypatch.setattr(headshare.sharing.writer, "stream", stream)
    opened = hs.open_checkpoint(source)
    with pytest.raises(CheckpointError, match=CHANGED):
        if verb == "share":
            hs.share(opened, plan).save(tmp_path / "out")
        else:
            hs.expand(opened, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert left_behind(tmp_path) == []


def test_a_model_is_loaded_and_verified_as_the_checkpoint_that_was_opened(
    llama: Path, other: Path, tmp_path: Path
) -> None:
    plan = a_plan(llama)
    shared = hs.share(hs.open_checkpoint(llama), plan).save(tmp_path / "shared")
    opened = hs.open_checkpoint(shared)
    whole = contents(shared)
    put_in_place(shared, hs.share(hs.open_checkpoint(other), plan).save(tmp_path / "other shared"))
    assert contents(shared) != whole
    with pytest.raises(CheckpointError, match=CHANGED):
        load_model(opened, storage="owner")
    report = hs.verify(opened, logits=False)
    assert not report.ok
    assert CHANGED in report.problems[0]


def test_checkpoints_that_nobody_holds_any_more_leave_no_file_open(llama: Path, tmp_path: Path) -> None:
    shared = hs.share(hs.open_checkpoint(llama), a_plan(llama)).save(tmp_path / "shared")

    def opened() -> set[str]:
        links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return {os.readlink(path) for path in links}  # noqa: PTH115 - what is behind one may be gone

    hs.verify(hs.open_checkpoint(shared), hs.open_checkpoint(llama))
    assert not [name for name in opened() if str(tmp_path) in name]
