"""What is made for a time is locked while its maker lives, and removed by the next once it is dead."""

import errno
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import headshare as hs
from headshare.files.atomic import write_whole
from headshare.files.scratch import PREFIX, remove_dead, scratch_file, scratch_folder
from support.folders import left_behind
from support.processes import in_child
from support.shares import a_plan, share


def killed_within(work: Callable[[], object]) -> None:
    """Run this in a child that is killed where the work calls `die`."""
    assert in_child(work) == -signal.SIGKILL


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_small_files_that_a_kill_left_half_written_are_removed_by_the_next_that_is_written(tmp_path: Path) -> None:
    def work() -> None:
        os.fsync = die
        write_whole(tmp_path / "plan.json", b"half")

    killed_within(work)
    assert len(left_behind(tmp_path)) == 1
    write_whole(tmp_path / "other.json", b"whole")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("made", [scratch_file, scratch_folder])
def test_what_a_living_run_uses_is_left_alone(made: Callable[..., object], tmp_path: Path) -> None:
    with made(tmp_path) as mine:  # type: ignore[attr-defined]
        assert in_child(lambda: remove_dead(tmp_path)) == 0
        assert mine.exists()
        with made(tmp_path) as second:  # type: ignore[attr-defined]
            assert second != mine
        assert left_behind(tmp_path) == [mine.name]
    assert left_behind(tmp_path) == []


def test_links_and_pipes_of_that_name_are_nobodys_scratch(tmp_path: Path) -> None:
    """In a temporary folder that all may write to, somebody could lay a link to what is not theirs."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("months of work")
    (tmp_path / f"{PREFIX}link").symlink_to(precious)
    os.mkfifo(tmp_path / f"{PREFIX}pipe")
    remove_dead(tmp_path)
    assert (precious / "thesis.txt").is_file()
    assert (tmp_path / f"{PREFIX}pipe").exists()


def test_scratch_that_another_run_removed_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir
    made: list[Path] = []

    def swept_at_first(self: Path, mode: int = 0o777) -> None:
        mkdir(self, mode)
        made.append(self)
        if len(made) == 1:
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", swept_at_first)
    with scratch_folder(tmp_path) as folder:
        assert folder.is_dir()
        assert folder != made[0]
    assert left_behind(tmp_path) == []


def test_a_killed_verify_leaves_its_dense_copy_for_the_next_to_remove(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = share(llama, tmp_path / "shared")
    room = tmp_path / "temporary"
    room.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(room))

    def work() -> None:
        sys.modules["headshare.evaluation.verify"]._outputs = die  # type: ignore[attr-defined]
        hs.verify(hs.open_checkpoint(shared))

    killed_within(work)
    (copy,) = room.iterdir()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o700
    assert hs.verify(hs.open_checkpoint(shared)).ok
    assert list(room.iterdir()) == []


def test_the_mask_of_permissions_is_never_set_for_the_whole_process(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread would make files that anybody may write, for that instant."""
    monkeypatch.setattr(os, "umask", None)
    share(llama, tmp_path / "out")
    a_plan(llama).save(tmp_path / "plan.json")


@pytest.mark.parametrize("why", ["no room", "no folder"])
def test_a_copy_that_verify_has_no_room_for_is_a_check_that_was_not_made(
    why: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wrong with the checkpoint."""
    shared = share(llama, tmp_path / "shared")

    def full(*_: object) -> object:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    if why == "no room":
        monkeypatch.setattr("headshare.sharing.writer.write_safetensors", full)
    else:
        monkeypatch.setattr("tempfile.gettempdir", nowhere)
    report = hs.verify(hs.open_checkpoint(shared), hs.open_checkpoint(llama))
    assert report.ok
    assert report.max_logit_diff is None
    (note,) = report.notes
    assert "logits not compared" in note
    assert "TMPDIR" in note
