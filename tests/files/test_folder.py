"""Output folders: killed at any moment, out of disk, or in the way of something, whole or nothing."""

import errno
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import headshare as hs
import headshare.sharing.writer
from headshare.cli.app import main
from headshare.errors import OutputError
from headshare.evaluation.verify import verify
from support import tiny
from support.folders import WEIGHTS, contents, left_behind, nothing_changes
from support.processes import at_every_step, in_child, killed_before_step
from support.shares import a_plan, share

# ---- killed at any moment


class Case(NamedTuple):
    """Something that writes a folder, the input it reads, and what it leaves when nothing goes wrong."""

    write: Callable[[Path, bool], object]
    source: Path
    whole: dict[str, str]


@pytest.fixture(params=["share", "expand"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    dense = tiny.make_llama(tmp_path / "dense", num_hidden_layers=2, save={"max_shard_size": "40KB"})
    (dense / "tokenizer.json").write_text("{}")
    (dense / "1_Pooling").mkdir()
    (dense / "1_Pooling" / "config.json").write_text("{}")
    plan = a_plan(dense)
    source = dense
    if request.param == "expand":
        source = hs.share(hs.open_checkpoint(dense), plan).save(tmp_path / "source")

    def write(out: Path, overwrite: bool) -> object:
        opened = hs.open_checkpoint(source)
        if request.param == "expand":
            return hs.expand(opened, out, overwrite=overwrite)
        return hs.share(opened, plan).save(out, overwrite=overwrite)

    (tmp_path / "reference").mkdir()
    write(tmp_path / "reference" / "out", False)
    return Case(write, source, contents(tmp_path / "reference" / "out"))


def test_killed_before_any_step_no_output_is_there_or_a_whole_one(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    out, steps, absent = folder / "out", 0, 0
    with nothing_changes(case.source):
        while killed_before_step(steps, lambda: case.write(out, False)):
            steps += 1
            absent += not out.exists()
            assert not out.exists() or contents(out) == case.whole
            if out.exists():
                shutil.rmtree(out)
            case.write(out, False)
            assert contents(out) == case.whole
            assert left_behind(folder) == []
            shutil.rmtree(out)
    assert steps > 25
    assert 0 < absent < steps  # it was killed on both sides of the rename


def test_killed_before_any_step_of_overwriting_the_old_output_is_there_or_the_new(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    out, steps = folder / "out", 0
    old = tiny.make_llama(tmp_path / "old", seed=3)
    before, seen = contents(old), set()
    with nothing_changes(case.source):
        shutil.copytree(old, out)
        while killed_before_step(steps, lambda: case.write(out, True)):
            steps += 1
            found = contents(out)
            assert found in (before, case.whole)
            seen.add(found == before)
            case.write(out, True)
            assert contents(out) == case.whole
            assert left_behind(folder) == []
            shutil.rmtree(out)
            shutil.copytree(old, out)
    assert steps > 25
    assert seen == {True, False}


@pytest.mark.parametrize("case", ["share"], indirect=True)
def test_killed_before_any_step_where_folders_cannot_be_exchanged_nothing_half_is_ever_there(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without an exchange there is a moment with nothing in the place. Whoever looks puts it back."""
    monkeypatch.setattr("headshare.files.folder._exchange", lambda *_: False)
    folder = tmp_path / "work"
    folder.mkdir()
    out, steps, absent, seen = folder / "out", 0, 0, set()
    old = tiny.make_llama(tmp_path / "old", seed=3)
    before = contents(old)
    shutil.copytree(old, out)
    while killed_before_step(steps, lambda: case.write(out, True)):
        steps += 1
        absent += not out.exists()
        hs.open_checkpoint(out)
        found = contents(out)
        assert found in (before, case.whole)
        seen.add(found == before)
        # an old output that waits for the new one is never taken for that of what comes into its place
        if steps % 3 == 0 or any("replaced" in name for name in left_behind(folder)):
            case.write(out, True)
            assert contents(out) == case.whole
            assert left_behind(folder) == []
        # every run begins alike, so that no moment falls between the steps of two runs
        for path in [out, *(folder / name for name in left_behind(folder))]:
            shutil.rmtree(path)
        shutil.copytree(old, out)
    assert steps > 25
    assert absent > 0
    assert seen == {True, False}


def test_killed_at_random_times_only_whole_outputs_are_there_and_they_verify(tmp_path: Path) -> None:
    dense = tiny.make_llama(tmp_path / "dense", num_hidden_layers=8)
    plan = a_plan(dense)
    folder = tmp_path / "work"
    folder.mkdir()
    out = hs.share(hs.open_checkpoint(dense), plan).save(folder / "out")
    whole, chance = contents(out), random.Random(0)

    def again_and_again() -> None:
        while True:
            hs.share(hs.open_checkpoint(dense), plan).save(out, overwrite=True)

    with nothing_changes(dense):
        for _ in range(15):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                child = os.fork()
            if child == 0:
                try:
                    again_and_again()
                finally:
                    os._exit(99)
            time.sleep(chance.uniform(0.01, 0.08))
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            assert contents(out) == whole
        assert verify(hs.open_checkpoint(out), hs.open_checkpoint(dense)).ok
        hs.share(hs.open_checkpoint(dense), plan).save(out, overwrite=True)
    assert left_behind(folder) == []


def test_what_a_killed_run_left_is_removed_whatever_the_output_is_called(tmp_path: Path, llama: Path) -> None:
    # To a glob pattern, [1] is no name.
    (tmp_path / "work").mkdir()
    out = tmp_path / "work" / "llama[1]"
    assert any(killed_before_step(step, lambda: share(llama, out)) and left_behind(out.parent) for step in range(20))
    share(llama, out)
    assert left_behind(out.parent) == []


def test_a_stopped_run_keeps_what_another_run_may_not_remove(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            stops = iter([signal.SIGSTOP])  # once, when it is writing

            def stop(_: int) -> None:
                if any(folder.rglob("*.safetensors")):
                    os.kill(os.getpid(), next(stops, 0))

            at_every_step(stop)
            share(llama, folder / "out", 0.25)
        except OutputError:
            os._exit(1)
        finally:
            os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    try:
        (busy,) = left_behind(folder)
        share(llama, folder / "out", 0.5)
        second = contents(folder / "out")
        assert left_behind(folder) == [busy]
    finally:
        os.kill(child, signal.SIGCONT)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # The first run began where nothing was, without --overwrite; it may not replace what the second wrote meanwhile.
    assert contents(folder / "out") == second
    assert status == 1
    assert left_behind(folder) == []


def test_what_appears_at_the_output_while_we_write_is_not_deleted(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, pieces = tmp_path / "out", headshare.sharing.writer.stream

    def stream(*arguments: Any) -> Iterator[torch.Tensor]:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("precious")
        return pieces(*arguments)

    monkeypatch.setattr(headshare.sharing.writer, "stream", stream)
    with pytest.raises(OutputError, match="exists"):
        share(llama, out)
    assert (out / "notes.txt").read_text() == "precious"
    assert left_behind(tmp_path) == []


def test_every_file_and_folder_is_on_the_disk_before_the_output_has_its_name(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    at_rename: list[tuple[set[int], dict[str, int]]] = []
    flush, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        flush(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        at_rename.append((set(flushed), {str(p.relative_to(self)): p.stat().st_ino for p in [self, *self.rglob("*")]}))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", renamed)
    (tmp_path / "work").mkdir()
    case.write(tmp_path / "work" / "out", False)
    ((done, there),) = at_rename
    # 1_Pooling too: unflushed, it may be there and empty after a power cut.
    assert [name for name, inode in there.items() if inode not in done] == []
    assert (tmp_path / "work").stat().st_ino in flushed  # and the name itself afterwards


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_interrupted_run_leaves_nothing(
    interruption: type[BaseException], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(*_: object) -> Iterator[torch.Tensor]:
        raise interruption
        yield

    monkeypatch.setattr(headshare.sharing.writer, "stream", stream)
    with nothing_changes(tmp_path), pytest.raises(interruption):
        share(llama, tmp_path / "out")


# ---- a full or failing disk


class Told(NamedTuple):
    """What a child's error said: its type's name and its text; empty where nothing was raised."""

    kind: str
    text: str


def told_by_child(work: Callable[[], object]) -> Told:
    """Run this in a child, and bring back what it raised."""
    reading, writing = os.pipe()

    def child() -> None:
        try:
            work()
            told = ["", ""]
        except BaseException as error:
            told = [type(error).__name__, str(error)]
        os.write(writing, json.dumps(told).encode()[:60_000])  # a pipe is not under the limit on file sizes

    assert in_child(child) == 0
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        return Told(*json.loads(pipe.read()))


def on_a_disk_with(room: int, work: Callable[[], object]) -> Callable[[], object]:
    """The same work where no file can grow beyond this many bytes."""

    def limited() -> object:
        sys.stdout = sys.stderr = io.StringIO()  # pytest's are files, and no file can grow
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        return work()

    return limited


@pytest.mark.parametrize("room", [1, 1_000, 20_000, 30_000])
def test_a_disk_that_fills_up_is_one_clear_error_and_leaves_nothing(room: int, case: Case, tmp_path: Path) -> None:
    with nothing_changes(tmp_path):
        told = told_by_child(on_a_disk_with(room, lambda: case.write(tmp_path / "out", False)))
    assert told.kind == "OutputError"
    assert "no room left" in told.text
    assert "\n" not in told.text


def test_a_disk_that_fills_up_while_overwriting_leaves_the_old_output(case: Case, tmp_path: Path) -> None:
    tiny.make_llama(tmp_path / "out", seed=3)
    with nothing_changes(tmp_path):
        told = told_by_child(on_a_disk_with(20_000, lambda: case.write(tmp_path / "out", True)))
    assert told.kind == "OutputError"


def test_a_disk_that_is_too_full_is_found_before_anything_is_written(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    monkeypatch.setattr(os, "mkdir", None)
    with nothing_changes(tmp_path), pytest.raises(OutputError, match=r"has 1,000 bytes free; the output needs \d"):
        case.write(tmp_path / "out", False)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_whichever_flush_fails_it_is_one_clear_error_and_nothing_half_is_left(
    number: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, plan = os.fsync, a_plan(llama)
    out = hs.share(hs.open_checkpoint(llama), plan).save(tmp_path / "out")
    whole = contents(out)
    for failing in range(50):
        shutil.rmtree(out, ignore_errors=True)
        count = itertools.count()

        def fail(descriptor: int, failing: int = failing, count: Iterator[int] = count) -> None:
            if next(count) == failing:
                raise OSError(number, os.strerror(number))
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", fail)
        try:
            hs.share(hs.open_checkpoint(llama), plan).save(out)
        except OutputError as error:
            assert str(out) in str(error)
            assert not out.exists() or contents(out) == whole
            assert left_behind(tmp_path) == []
        else:
            assert failing > 4  # every flush has failed once
            return
    raise AssertionError("it flushes more than fifty times")


@pytest.mark.parametrize("problem", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_folder_that_may_not_be_written_in_is_one_clear_error(
    problem: OSError, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise problem

    monkeypatch.setattr(os, "mkdir", refuse)
    with nothing_changes(tmp_path), pytest.raises(OutputError, match=problem.strerror):
        case.write(tmp_path / "out", False)


@pytest.mark.parametrize("length", [200, 240, 255, 300])
def test_a_long_name_is_written_or_refused_with_one_clear_error(length: int, llama: Path, tmp_path: Path) -> None:
    # A temporary sibling's name is longer than the output's own.
    out = tmp_path / ("x" * length)
    try:
        share(llama, out)
    except OutputError:
        assert length > 200
    else:
        assert hs.open_checkpoint(out).plan is not None
    assert left_behind(tmp_path) == []


def test_a_disk_that_fills_up_while_scoring_or_planning_is_one_clear_error_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A cut-off scores.safetensors would be in the way of the next run.
    with hs.open_checkpoint(llama) as dense:
        scores = hs.score_units(dense)
    scores.save(tmp_path / "scores.safetensors")
    for words in (
        ["score", str(llama), "-o", str(tmp_path / "new.safetensors")],
        ["plan", "--from-scores", str(tmp_path / "scores.safetensors"), "-o", str(tmp_path / "new.json")],
    ):
        monkeypatch.setattr(sys, "argv", ["headshare", *words])
        with nothing_changes(tmp_path):
            told = told_by_child(on_a_disk_with(100, main))
        assert told == ("SystemExit", "1")


# ---- where the output may be


class Place(NamedTuple):
    """An output that must be refused, why, and whether --overwrite is given."""

    out: str
    reason: str
    overwrite: bool = False


PLACES = [
    Place("folder", "exists"),
    Place("empty", "exists"),
    Place("file", "exists"),
    Place("file", "not a checkpoint folder", True),
    Place("link to folder", "exists"),
    Place("link to nothing", "exists"),
    Place("link to checkpoint", "not a checkpoint folder", True),
    Place("link to itself", "exists"),  # for which Path.resolve raises RuntimeError on Python 3.11
    Place("link to itself", "not a checkpoint folder", True),
    Place("folder", "not a checkpoint folder", True),
    # A folder is no checkpoint for having some config.json in it.
    Place("project", "not a checkpoint folder", True),
    Place("box/llama", "inside the input"),
    Place("box/llama", "inside the input", True),
    Place("box/llama/out", "inside the input"),
    Place("box/llama/out", "inside the input", True),
    Place("box/../box/llama/../llama/out", "inside the input"),
    Place("link to llama", "inside the input", True),
    Place("link to llama/out", "inside the input"),
    Place("box", "inside the output", True),
    Place(".", "inside the output", True),
    Place("gone/out", "there is no folder"),
    Place("file/out", "there is no folder"),
    Place("link to nothing/out", "there is no folder"),
]


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder full of things that are in the way."""
    tiny.make_llama(tmp_path / "box" / "llama")
    tiny.make_llama(tmp_path / "checkpoint", seed=1)
    for name in ("folder", "empty", "project"):
        (tmp_path / name).mkdir()
    for path in (tmp_path / "folder" / "thesis.txt", tmp_path / "file", tmp_path / "project" / "main.c"):
        path.write_text("precious")
    (tmp_path / "project" / "config.json").write_text('{"name": "my project"}')
    for name, target in (("folder", "folder"), ("nothing", "nothing"), ("checkpoint", "checkpoint")):
        (tmp_path / f"link to {name}").symlink_to(target)
    (tmp_path / "link to itself").symlink_to("link to itself")
    (tmp_path / "link to llama").symlink_to("box/llama")
    return tmp_path


@pytest.mark.parametrize("verb", ["share", "expand"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.out}{' overwrite' if place.overwrite else ''}")
def test_an_output_in_a_wrong_place_is_refused_and_nothing_is_touched(
    place: Place, verb: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan = places / "box" / "llama", a_plan(places / "box" / "llama")
    if verb == "expand":
        hs.share(hs.open_checkpoint(source), plan).save(places / "shared")
        shutil.rmtree(source)
        (places / "shared").rename(source)
    monkeypatch.chdir(places)
    with nothing_changes(places), pytest.raises(OutputError, match=place.reason) as found:
        if verb == "expand":
            hs.expand(hs.open_checkpoint(source), place.out, overwrite=place.overwrite)
        else:
            hs.share(hs.open_checkpoint(source), plan).save(place.out, overwrite=place.overwrite)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("out", ["empty", "checkpoint"])
def test_an_empty_folder_and_a_checkpoint_may_be_overwritten(out: str, places: Path) -> None:
    share(places / "box" / "llama", places / out, overwrite=True)
    assert hs.open_checkpoint(places / out).plan is not None
    assert left_behind(places) == []


@pytest.mark.parametrize("store", ["models--someone--tiny/blobs", "blobs/ab"])
def test_the_input_is_read_through_links_and_never_written(store: str, llama: Path, tmp_path: Path) -> None:
    """A hub cache is a folder of links to blobs, of one model or of all."""
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / store).mkdir(parents=True)
    (llama / "tokenizer.json").write_text("{}")
    for number, path in enumerate(sorted(llama.iterdir())):
        blob = path.rename(tmp_path / store / f"{number:064x}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    with nothing_changes(tmp_path / store), nothing_changes(snapshot):
        out = share(snapshot, tmp_path / "out")
        assert verify(hs.open_checkpoint(out), hs.open_checkpoint(snapshot)).ok
        hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "tokenizer.json").read_text() == "{}"


def test_scores_are_not_written_over_the_weights_they_come_from(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["headshare", "score", str(llama), "-o", str(llama / WEIGHTS), "--overwrite"])
    with nothing_changes(llama), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
