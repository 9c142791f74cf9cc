"""The mechanism of runs that can be stopped: one at a time, each from its own state, killed at any moment."""

import itertools
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from headshare.errors import CalibrationError, HeadshareError, OutputError, TrainingError
from headshare.files.folder import check_vacant, whole_folder
from headshare.files.lock import claimed, inode_of, locked
from headshare.files.resume import DISCARDED, HEADER, ResumableRun, discard_committed, run_folder
from headshare.files.state_files import Workspace, check_readable
from support.folders import contents, left_behind
from support.processes import in_child, killed_before_step

IDENTITY = {"model": "this", "text": "that"}
OTHER = {"model": "this", "text": "another"}
STEPS = ("one", "two", "three")


class StoppedError(Exception):
    """Something that goes wrong in the middle of a run."""


def a_run(out: Path, identity: dict[str, str] = IDENTITY, **more: Any) -> ResumableRun:
    return ResumableRun(run_folder(out, "trying"), identity, **{"refused": CalibrationError, **more})


def stopped(out: Path, *files: str, **more: Any) -> Path:
    """The folder of a run that wrote these files and was stopped."""
    with pytest.raises(StoppedError), a_run(out, **more) as run:
        for name in files:
            run.workspace.write(name, name.encode())
        raise StoppedError
    return run.workspace.folder


def killed(out: Path, *files: str, committing: bool = False, written: bool = False, holds: str = "") -> Path:
    """The folder of a run that was killed when it had written these files, and noted and written its output."""

    def work() -> None:
        with a_run(out) as run:
            for name in files:
                run.workspace.write(name, name.encode())
            if committing:
                run.mark_committing(out, holds=holds)
            if written:
                write(out)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL
    return run_folder(out, "trying")


def write(out: Path, content: str = "new") -> None:
    """Write an output as commands do, whole or not at all, in the place of one that is there."""
    with whole_folder(out, overwrite=True, expected_bytes=0) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "headshare.json").write_text(content)


def is_new(out: Path) -> bool:
    return (out / "headshare.json").read_text() == "new"


# ---- one run at a time


def test_one_run_at_a_time_works_on_an_output(tmp_path: Path) -> None:
    with a_run(tmp_path / "out") as run:
        for restart in (False, True):
            second = a_run(tmp_path / "out", restart=restart)
            with pytest.raises(OutputError, match="another run is working on the same output"), second:
                pass
        with a_run(tmp_path / "other"):
            pass
        run.workspace.write("work", b"")  # nobody removed the folder
    assert left_behind(tmp_path) == []


def test_a_run_that_was_killed_holds_no_lock_and_is_gone_on_with(tmp_path: Path) -> None:
    killed(tmp_path / "out", "work")
    with a_run(tmp_path / "out") as run:
        assert run.workspace.read("work") == b"work"
        assert run.committed is None
    assert left_behind(tmp_path) == []


def test_a_folder_that_its_run_removed_while_it_was_being_locked_is_made_and_locked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, times = tmp_path / "state", itertools.count()

    @contextmanager
    def removed_at_first(path: Path, *, wait: bool) -> Iterator[int]:
        with locked(path, wait=wait) as descriptor:
            if next(times) == 0:
                path.rmdir()
            yield descriptor

    monkeypatch.setattr("headshare.files.lock.locked", removed_at_first)
    with claimed(folder), pytest.raises(BlockingIOError), locked(folder, wait=False):
        pass
    assert next(times) == 2


def test_whoever_waits_for_a_lock_has_it_next(tmp_path: Path) -> None:
    came_in = threading.Event()

    def wait() -> None:
        with locked(tmp_path):
            came_in.set()

    waiting = threading.Thread(target=wait)
    with locked(tmp_path):
        waiting.start()
        assert not came_in.wait(0.2)
    waiting.join()
    assert came_in.is_set()


@pytest.mark.parametrize("place", ["a file", "gone/state"])
def test_a_state_that_cannot_have_a_folder_is_an_output_error(place: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(OutputError), ResumableRun(tmp_path / place, {}, refused=CalibrationError):
        pass


# ---- whose state it is


@pytest.mark.parametrize("refused", [CalibrationError, TrainingError])
def test_another_runs_state_is_refused_by_naming_what_differs_and_stays(
    refused: type[HeadshareError], tmp_path: Path
) -> None:
    folder = stopped(tmp_path / "out", "work")
    before = contents(folder)
    other = {"model": "that", "text": "that", "seed": "0"}
    message = r"state of another run: it had another model and another seed\. .*--restart"
    with pytest.raises(refused, match=message), a_run(tmp_path / "out", other, refused=refused):
        pass
    assert contents(folder) == before
    with a_run(tmp_path / "out") as run:
        assert run.workspace.read("work") == b"work"


def test_restart_throws_away_whatever_state_is_there(tmp_path: Path) -> None:
    for identity in (IDENTITY, OTHER):
        stopped(tmp_path / "out", "work")
        (run_folder(tmp_path / "out", "trying") / "tensors").mkdir()
        with a_run(tmp_path / "out", identity, restart=True) as run:
            assert list(contents(run.workspace.folder)) == [HEADER]
            run.workspace.write("more", b"")
    assert left_behind(tmp_path) == []


def test_killed_at_any_step_a_restart_leaves_the_old_state_or_none_to_go_on_from(tmp_path: Path) -> None:
    out, found = tmp_path / "out", set()

    def restart() -> None:
        with a_run(out, OTHER, restart=True):
            pass

    for step in itertools.count():
        folder = stopped(out, *STEPS)
        before = contents(folder)
        if not killed_before_step(step, restart):
            break
        try:
            with a_run(out, OTHER) as run:
                found.add("none")
                assert list(contents(run.workspace.folder)) == [HEADER]
        except CalibrationError:
            found.add("old")
            assert contents(folder) == before
            shutil.rmtree(folder)
    assert step > 5
    assert found == {"none", "old"}


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "out", "trying")
    folder.mkdir()
    (folder / "letter.txt").write_text("precious")
    for restart in (False, True):
        with (
            pytest.raises(CalibrationError, match="is in the way and is no state"),
            a_run(tmp_path / "out", restart=restart),
        ):
            pass
    assert not discard_committed(tmp_path / "out")
    assert (folder / "letter.txt").read_text() == "precious"


def test_a_long_name_has_a_folder_of_its_own(tmp_path: Path) -> None:
    outs = [tmp_path / ("x" * length + end) for length in (120, 240) for end in "ab"]
    assert len({run_folder(out, "trying") for out in outs}) == 4
    for out in outs:
        killed(out, committing=True, written=True)
        assert discard_committed(out)
    assert left_behind(tmp_path) == []


# ---- what is kept


def test_a_state_in_which_nothing_was_done_is_not_kept(tmp_path: Path) -> None:
    assert not stopped(tmp_path / "out").exists()
    killed(tmp_path / "out")
    with a_run(tmp_path / "out", OTHER):  # which stands in nobody's way either
        pass
    assert left_behind(tmp_path) == []


def test_the_caller_says_what_is_worth_keeping(tmp_path: Path) -> None:
    def has_result(folder: Path) -> bool:
        return (folder / "result").exists()

    assert not stopped(tmp_path / "out", "log", has_work=has_result).exists()
    assert stopped(tmp_path / "out", "log", "result", has_work=has_result).exists()
    with pytest.raises(CalibrationError), a_run(tmp_path / "out", OTHER, has_work=has_result):
        pass
    (run_folder(tmp_path / "out", "trying") / "result").unlink()
    with a_run(tmp_path / "out", OTHER, has_work=has_result) as run:
        assert run.workspace.read("log") is None


def test_a_state_that_is_kept_for_other_runs_stays_if_there_is_anything_in_it(tmp_path: Path) -> None:
    with a_run(tmp_path / "out", kept=True) as run:
        pass
    assert not run.workspace.folder.exists()
    with a_run(tmp_path / "out", kept=True) as run:
        run.workspace.write_json("prices", {"of": 1})
    with a_run(tmp_path / "out", kept=True) as again:
        assert again.workspace.read_json("prices") == {"of": 1}
    with pytest.raises(CalibrationError, match="another text"), a_run(tmp_path / "out", OTHER, kept=True):
        pass


def test_files_that_a_kill_left_half_written_are_removed(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "out", "work")
    (folder / "tensors").mkdir()
    for place in (folder, folder / "tensors"):
        (place / ".headshare-partial-x").write_text("ha")
    with a_run(tmp_path / "out") as run:
        assert [name for name in contents(run.workspace.folder) if "partial" in name] == []


# ---- the output is in its place, or not


def work(out: Path) -> None:
    """A run of three steps that replaces its output in the end."""
    with a_run(out) as run:
        for step in STEPS:
            if run.workspace.read(step) is None:
                run.workspace.write(step, step.encode())
        run.mark_committing(out)
        write(out)


def test_killed_at_any_step_a_run_goes_on_or_is_known_to_be_done(tmp_path: Path) -> None:
    out, folder, known = tmp_path / "out", run_folder(tmp_path / "out", "trying"), set()
    for step in itertools.count():
        write(out, "old")
        if not killed_before_step(step, lambda: work(out)):
            break
        has_header = any((folder / name).exists() for name in (HEADER, DISCARDED))
        done = [name for name in STEPS if (folder / name).exists()]
        with pytest.raises(StoppedError), a_run(out) as run:
            # done is known as such, but for the last moment, when no state is left
            assert (run.committed == IDENTITY) is (is_new(out) and has_header)
            known.add(run.committed is not None)
            if not is_new(out):
                assert [name for name in STEPS if run.workspace.read(name)] == done
            raise StoppedError
        work(out)
        assert is_new(out)
        assert left_behind(tmp_path) == []
    assert step > 30
    assert known == {True, False}


def test_a_marker_without_its_output_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    killed(tmp_path / "out", "work", committing=True)
    assert not discard_committed(tmp_path / "out")
    with a_run(tmp_path / "out") as run:
        assert run.committed is None
        assert run.workspace.read("work") == b"work"


def test_an_output_that_was_there_before_or_is_gone_is_not_the_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    folder = killed(out, "work", committing=True)
    out.rename(tmp_path / "moved")
    assert not discard_committed(out)
    (tmp_path / "moved").rename(out)
    assert not discard_committed(out)
    assert (folder / "work").is_file()


def test_something_else_in_the_place_of_the_output_is_not_the_runs_if_it_says_what_that_holds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(out, "work", committing=True, holds="record.json")
    write(out)
    assert not discard_committed(out)
    (out / "record.json").write_text("{}")
    assert discard_committed(out)
    assert left_behind(tmp_path) == []


def test_a_run_that_follows_one_that_was_done_is_told_whose_that_was(tmp_path: Path) -> None:
    killed(tmp_path / "out", "work", committing=True, written=True)
    with a_run(tmp_path / "out", OTHER) as run:
        assert run.committed == IDENTITY
        assert run.workspace.read("work") is None
    assert left_behind(tmp_path) == []


def test_an_output_that_is_refused_as_it_exists_takes_what_is_left_of_its_run_along(tmp_path: Path) -> None:
    killed(tmp_path / "out", "work", committing=True, written=True)
    with pytest.raises(OutputError, match="exists; it was whole when the run that wrote it was stopped"):
        check_vacant(tmp_path / "out", overwrite=False)
    assert left_behind(tmp_path) == []
    with pytest.raises(OutputError, match=r"out exists\."):
        check_vacant(tmp_path / "out", overwrite=False)


def test_whoever_replaces_an_output_removes_what_is_left_of_its_run(tmp_path: Path) -> None:
    killed(tmp_path / "out", "work", committing=True, written=True)
    write(tmp_path / "out", "newer")
    assert left_behind(tmp_path) == []


def test_a_file_can_be_an_output_too(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    with pytest.raises(StoppedError), a_run(out) as run:
        run.workspace.write("work", b"")
        run.mark_committing(out)
        out.write_text("{}")
        raise StoppedError
    assert discard_committed(out)
    assert left_behind(tmp_path) == []


def test_states_of_other_outputs_and_of_runs_on_their_way_are_not_discarded(tmp_path: Path) -> None:
    write(tmp_path / "out")
    others = [killed(tmp_path / name, "work", committing=True) for name in ("out2", "out.headshare-b", "ou")]
    partial = tmp_path / ".out.headshare-partial-of-a-writer"
    partial.mkdir()
    with a_run(tmp_path / "out") as run:
        run.workspace.write("work", b"")
        run.mark_committing(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / "before")
        (tmp_path / "out").mkdir()
        assert not discard_committed(tmp_path / "out")
        assert run.workspace.read("work") == b""
    assert partial.is_dir()
    assert all((folder / "work").is_file() for folder in others)


def test_states_of_all_kinds_of_runs_are_discarded_once_their_output_is_there(tmp_path: Path) -> None:
    for kind in ("one", "other"):
        folder = run_folder(tmp_path / "out", kind)
        with pytest.raises(StoppedError), ResumableRun(folder, IDENTITY, refused=TrainingError) as run:
            run.workspace.write("work", b"")
            run.mark_committing(tmp_path / "out")
            raise StoppedError
    write(tmp_path / "out")
    assert discard_committed(tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_an_inode_tells_what_is_put_in_a_place_from_what_was_there(tmp_path: Path) -> None:
    assert inode_of(tmp_path / "out") == ""
    write(tmp_path / "out", "old")
    before = inode_of(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("")
    assert inode_of(tmp_path / "out") == before
    write(tmp_path / "out")
    assert inode_of(tmp_path / "out") not in ("", before)


# ---- damage


def read_all(files: Workspace) -> None:
    files.read("work")
    files.read_json("json")
    files.read_tensors("tensors")
    check_readable(files.tensors("folder"))


@pytest.mark.parametrize("name", [HEADER, "work", "json", "tensors", "folder/a%2Fb.safetensors"])
@pytest.mark.parametrize("damage", ["cut off", "empty", "a bit"])
def test_a_damaged_state_is_one_line_that_says_restart(name: str, damage: str, tmp_path: Path) -> None:
    with pytest.raises(StoppedError), a_run(tmp_path / "out") as run:
        run.workspace.write("work", b"work")
        run.workspace.write_json("json", {"a": 1})
        run.workspace.write_tensors("tensors", {"a": torch.zeros(2)})
        run.workspace.tensors("folder")["a/b"] = torch.ones(2)
        raise StoppedError
    path = run.workspace.folder / name
    whole = path.read_bytes()
    path.write_bytes({"cut off": whole[:-1], "empty": b"", "a bit": bytes([whole[0] ^ 1]) + whole[1:]}[damage])
    before = contents(run.workspace.folder)
    message = rf"damaged: .*{path.name}.*--restart"
    with pytest.raises(TrainingError, match=message) as refused, a_run(tmp_path / "out", refused=TrainingError) as run:
        read_all(run.workspace)
    assert "\n" not in str(refused.value)
    assert not discard_committed(tmp_path / "out")
    assert contents(run.workspace.folder) == before
    with a_run(tmp_path / "out", refused=TrainingError, restart=True) as run:
        read_all(run.workspace)
    assert left_behind(tmp_path) == []


def test_what_is_whole_and_no_json_or_tensors_is_damage_too(tmp_path: Path) -> None:
    files = Workspace(tmp_path, TrainingError)
    for content in (b"{", b"[1]", b"[" * 100_000):
        files.write("some", content)
        with pytest.raises(TrainingError, match=r"some: .*--restart"):
            files.read_json("some")
        with pytest.raises(TrainingError, match=r"some: .*--restart"):
            files.read_tensors("some")
    assert files.read_json("none") is None
    assert files.read_tensors("none") is None


def test_tensors_in_a_folder_are_as_they_were_put_there(tmp_path: Path) -> None:
    tensors = Workspace(tmp_path, TrainingError).tensors("some")
    given = {"a.weight": torch.randn(3, 2).T, "../b": torch.ones(1, dtype=torch.bfloat16)}
    tensors.update(given)
    again = Workspace(tmp_path, TrainingError).tensors("some")
    assert sorted(again) == sorted(given)
    assert len(again) == 2
    assert all(again[name].equal(tensor) for name, tensor in given.items())
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "some"}
    del again["../b"]
    for missing in (lambda: again["../b"], lambda: again.pop("never")):
        with pytest.raises(KeyError):
            missing()
