"""The state that a stopped run leaves stands beside its output, and nowhere else."""

from pathlib import Path

import pytest
import torch

from headshare.errors import CalibrationError, OutputError
from headshare.files.resume import ResumableRun, discard_committed, run_folder
from headshare.files.state_files import Workspace


def test_no_name_of_a_tensor_reaches_outside_the_state(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "state", CalibrationError)
    work.folder.mkdir()
    tensors = work.tensors("some")
    names = ["../../up", "a/b", "plain.weight", ".."]
    for number, name in enumerate(names):
        tensors[name] = torch.full((2,), float(number))
    assert sorted(tensors) == sorted(names)
    assert [float(tensors[name][0]) for name in names] == [0, 1, 2, 3]
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {work.folder / "some"}
    del tensors[".."]
    assert ".." not in tensors
    with pytest.raises(KeyError):
        tensors[".."]


@pytest.mark.parametrize("length", [120, 240])
def test_a_long_name_has_a_state_of_its_own(length: int, tmp_path: Path) -> None:
    one, other = (run_folder(tmp_path / ("x" * length + end), "calibrating") for end in "ab")
    assert one != other
    with ResumableRun(one, {}, refused=CalibrationError):
        assert one.is_dir()


def test_discarding_where_nothing_was_stopped_does_nothing(tmp_path: Path) -> None:
    assert not discard_committed(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_state_cannot_stand_where_a_file_is(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "out", "calibrating")
    folder.write_text("a file")
    with pytest.raises(OutputError), ResumableRun(folder, {}, refused=CalibrationError):
        pass
