"""Nothing is lost: killed at any moment, out of disk, handed hostile plans or damaged files, whole or nothing."""

import errno
import hashlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import headshare as hs
import headshare.sharing.writer
import tiny
from headshare.cli.app import main
from headshare.errors import OptionError
from headshare.evaluation.verify import verify

WEIGHTS, INDEX, MANIFEST = "model.safetensors", "model.safetensors.index.json", "headshare.json"


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below, and the kind of everything else, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"link to {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path.relative_to(folder))] = "folder"
    return found


def left_behind(parent: Path) -> list[str]:
    """Hidden names in a folder: what a run that failed may not leave, and a run that was killed leaves for the next."""
    return sorted(path.name for path in parent.iterdir() if path.name.startswith("."))


@contextmanager
def nothing_changes(folder: Path) -> Iterator[None]:
    """Fail if a file below is other than before, or was only written anew."""
    before = contents(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    yield
    assert before == (contents(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()})


def a_plan(folder: Path, ratio: float = 0.5, parts: str = "qkv") -> hs.SharePlan:
    with hs.open_checkpoint(folder) as dense:
        return hs.make_plan(hs.score_units(dense, parts=parts), ratio, parts=parts)


def share(folder: Path, out: Path, ratio: float = 0.5, *, overwrite: bool = False, dtype: str | None = None) -> Path:
    return hs.share(hs.open_checkpoint(folder), a_plan(folder, ratio), dtype=dtype).save(out, overwrite=overwrite)


# ---- killed at any moment


def in_child(work: Callable[[], object]) -> int:
    """Run this in a fork of the warm process; -signal if it was killed, 0 if it ended, 99 after an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the child neither waits for another thread nor starts one
        child = os.fork()
    if child == 0:
        status = 99
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


CHANGES = [
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "shutil.copyfile",
    "shutil.rmtree",
    "fcntl.flock",
    "ctypes.dlsym",
    "tempfile.mkdtemp",
]


def changes_files(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event announces that a file or folder is about to change (or folders to be exchanged)."""
    opened_to_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    return bool(opened_to_write) or event in CHANGES


def at_every_step(act: Callable[[int], None]) -> None:
    """Call `act` before every change that this process makes to a file from now on, with how many there were.

    For a child only: an audit hook cannot be taken back.
    """
    count = itertools.count()

    def step() -> None:
        act(next(count))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if changes_files(event, arguments):
            step()

    flush, pieces = os.fsync, headshare.sharing.writer.stream

    def fsync(descriptor: int) -> None:
        step()
        flush(descriptor)

    def stream(*arguments: Any) -> Iterator[torch.Tensor]:
        for piece in pieces(*arguments):
            step()  # in the middle of a weight file
            yield piece

    os.fsync, headshare.sharing.writer.stream = fsync, stream  # type: ignore[assignment]
    sys.addaudithook(hook)


def killed_before_step(number: int, work: Callable[[], object]) -> bool:
    """Run this in a child that kills itself with SIGKILL at that step; False if it ended before it came so far."""

    def child() -> None:
        at_every_step(lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == number else None)
        work()

    status = in_child(child)
    assert status in (0, -signal.SIGKILL)
    return status != 0


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
    """On a file system without an exchange there is a moment with no output, but none with a half one."""
    monkeypatch.setattr("headshare.files.folder._exchange", lambda *_: False)
    folder = tmp_path / "work"
    folder.mkdir()
    out, steps = folder / "out", 0
    old = tiny.make_llama(tmp_path / "old", seed=3)
    shutil.copytree(old, out)
    while killed_before_step(steps, lambda: case.write(out, True)):
        steps += 1
        assert not out.exists() or contents(out) in (contents(old), case.whole)
        if steps % 3 == 0:
            case.write(out, True)
            assert contents(out) == case.whole
            assert left_behind(folder) == []
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)
    assert steps > 25


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
        except hs.OutputError:
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
    with pytest.raises(hs.OutputError, match="exists"):
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
    monkeypatch.setattr(tempfile, "mkdtemp", None)
    with nothing_changes(tmp_path), pytest.raises(hs.OutputError, match=r"has 1,000 bytes free; the output needs \d"):
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
        except hs.OutputError as error:
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

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with nothing_changes(tmp_path), pytest.raises(hs.OutputError, match=problem.strerror):
        case.write(tmp_path / "out", False)


@pytest.mark.parametrize("length", [200, 240, 255, 300])
def test_a_long_name_is_written_or_refused_with_one_clear_error(length: int, llama: Path, tmp_path: Path) -> None:
    # A temporary sibling's name is longer than the output's own.
    out = tmp_path / ("x" * length)
    try:
        share(llama, out)
    except hs.OutputError:
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
        ["plan", str(tmp_path / "scores.safetensors"), "-o", str(tmp_path / "new.json")],
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
    with nothing_changes(places), pytest.raises(hs.OutputError, match=place.reason) as found:
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


def test_the_input_is_read_through_links_and_never_written(llama: Path, tmp_path: Path) -> None:
    """A hub cache is a folder of links."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (llama / "tokenizer.json").write_text("{}")
    for path in llama.iterdir():
        (snapshot / path.name).symlink_to(path)
    with nothing_changes(llama), nothing_changes(snapshot):
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


# ---- damaged input


def test_a_file_cut_off_while_it_is_shared_is_an_error_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, pieces = a_plan(llama), headshare.sharing.writer.stream

    def stream(*arguments: Any) -> Iterator[torch.Tensor]:
        os.truncate(llama / WEIGHTS, 20_000)
        return pieces(*arguments)

    monkeypatch.setattr(headshare.sharing.writer, "stream", stream)
    with pytest.raises(hs.CheckpointError, match="became shorter while it was read"):
        hs.share(hs.open_checkpoint(llama), plan).save(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_an_input_that_cannot_be_read_is_blamed_on_the_input(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An OSError while the output is open need not come from the output.
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    plan = a_plan(llama)
    monkeypatch.setattr(os, "preadv", fail)
    with nothing_changes(tmp_path), pytest.raises(hs.CheckpointError, match=r"model\.safetensors"):
        hs.share(hs.open_checkpoint(llama), plan).save(tmp_path / "out")


def spoil(folder: Path, name: str, value: float) -> None:
    """Put one number of this value into a tensor."""
    tensors = load_file(folder / WEIGHTS)
    tensors[name][1, 2] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


Q2, V2, O2 = (f"model.layers.2.self_attn.{part}_proj.weight" for part in "qvo")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("exact", [True, False], ids=["in float64", "in float32"])
def test_weights_that_are_not_finite_are_named_and_not_shared(
    value: float, exact: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr("headshare.matching.products.EXACT_PRODUCTS", 0)
    spoil(llama, Q2, value)
    with pytest.raises(hs.CheckpointError, match=rf"{Q2} .*NaN or infinite .*layer 2, group 0"):
        share(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [V2, O2])
def test_weights_that_are_not_finite_are_not_shared_even_where_they_are_not_matched(
    name: str, llama: Path, tmp_path: Path
) -> None:
    # The match function qk reads neither v nor o.
    spoil(llama, name, float("nan"))
    with pytest.raises(hs.CheckpointError, match="NaN"):
        hs.share(hs.open_checkpoint(llama), a_plan(llama, parts="qkvo")).save(tmp_path / "out")


def test_a_model_whose_logits_are_not_finite_does_not_verify(llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    spoil(shared, "model.layers.0.mlp.up_proj.weight", float("nan"))
    (shared / MANIFEST).unlink()  # else the digest tells
    found = verify(hs.open_checkpoint(shared))
    assert not found.ok
    assert "NaN" in found.problems[0]


def test_a_shared_checkpoint_is_not_shared_again(llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    for refused in (
        lambda: hs.score_units(hs.open_checkpoint(shared)),
        lambda: hs.estimate(hs.open_checkpoint(shared)),
        lambda: hs.share(hs.open_checkpoint(shared), a_plan(llama)),
    ):
        with pytest.raises(hs.CheckpointError, match=r"is already shared.*headshare expand"):
            refused()
    with pytest.raises(hs.CheckpointError, match="is not a shared checkpoint"):
        hs.expand(hs.open_checkpoint(llama), tmp_path / "expanded")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_a_quantised_checkpoint_is_not_shared(method: str, llama: Path) -> None:
    plan = a_plan(llama)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    for refused in (
        lambda: hs.score_units(hs.open_checkpoint(llama)),
        lambda: hs.estimate(hs.open_checkpoint(llama)),
        lambda: hs.share(hs.open_checkpoint(llama), plan),
    ):
        with pytest.raises(hs.CheckpointError, match=rf"quantised \({method}\)"):
            refused()


# ---- hostile plans


def edited(plan: hs.SharePlan, **changes: Any) -> dict[str, Any]:
    """The plan as data, with some things of its first selection, or (`layout_`, `q_`) of its layout, changed."""
    data = plan.model_dump(mode="json")
    selection = data["selections"][0]
    for key, value in changes.items():
        where, _, field = key.partition("_")
        if where == "layout":
            selection["layout"][field] = value
        elif where in selection["layout"]["parts"]:
            selection["layout"]["parts"][where][field] = value
        else:
            selection[key] = value
    return data


def place_of_q(plan: hs.SharePlan) -> dict[str, Any]:
    place: dict[str, Any] = edited(plan)["selections"][0]["layout"]["parts"]["q"]
    return place


K, Q = "model.layers.{layer}.self_attn.k_proj.weight", "model.layers.{layer}.self_attn.q_proj.weight"


def overlapping_selections(plan: hs.SharePlan) -> dict[str, Any]:
    """q and k in two selections, and both say that they are the rows of q_proj: a chain through the back door."""
    data, other = edited(plan), edited(plan)
    first, second = data["selections"][0], other["selections"][0]
    place = first["layout"]["parts"]["q"]
    first["layout"]["parts"], second["layout"]["parts"] = {"q": place}, {"k": place}
    first["ties"], second["ties"] = [[1, 0, 0, 0]], [[2, 0, 1, 0]]
    return {**data, "selections": [first, second]}


def colliding_templates(plan: hs.SharePlan) -> dict[str, Any]:
    """Two names that differ as templates and are one tensor in layer 11."""
    data = edited(plan, layout_layers=12, ties=[[11, 0, 0, 0]])
    places = data["selections"][0]["layout"]["parts"]
    places["q"]["tensor"], places["k"] = "h.{layer}1.w", {**places["q"], "tensor": "h.1{layer}.w"}
    return data


# what is wrong with the plan: the plan of a tiny Llama, 4 layers x 2 groups, made so
INVALID: dict[str, Callable[[hs.SharePlan], Any]] = {
    "nothing at all": lambda plan: None,
    "a list": lambda plan: [],
    "text": lambda plan: "a plan",
    "an empty object": lambda plan: {},
    "no format": lambda plan: {"selections": []},
    "a later format": lambda plan: {**edited(plan), "format": 2},
    "a format that is text": lambda plan: {**edited(plan), "format": "1"},
    "a key of its own": lambda plan: {**edited(plan), "code": "import os"},
    "selections that are no list": lambda plan: {**edited(plan), "selections": 7},
    "a hundred selections": lambda plan: {**edited(plan), "selections": edited(plan)["selections"] * 100},
    "the same part twice": lambda plan: {**edited(plan), "selections": edited(plan)["selections"] * 2},
    "a long name": lambda plan: {**edited(plan), "model_type": "x" * 10_000},
    "a tie to itself": lambda plan: edited(plan, ties=[[1, 0, 1, 0]]),
    "a cycle of two": lambda plan: edited(plan, ties=[[1, 0, 2, 0], [2, 0, 1, 0]]),
    "a cycle within a layer": lambda plan: edited(plan, ties=[[1, 0, 1, 1], [1, 1, 1, 0]]),
    "a cycle of three": lambda plan: edited(plan, ties=[[1, 0, 2, 0], [2, 0, 3, 0], [3, 0, 1, 0]]),
    "a chain": lambda plan: edited(plan, ties=[[1, 0, 0, 0], [2, 0, 1, 0]]),
    "a later donor": lambda plan: edited(plan, ties=[[1, 0, 3, 0]]),
    "a recipient in layer 0": lambda plan: edited(plan, ties=[[0, 0, 0, 1]]),
    "a recipient tied twice": lambda plan: edited(plan, ties=[[2, 0, 0, 0], [2, 0, 1, 1]]),
    "the same tie twice": lambda plan: edited(plan, ties=[[2, 0, 0, 0], [2, 0, 0, 0]]),
    "a layer out of range": lambda plan: edited(plan, ties=[[4, 0, 0, 0]]),
    "a group out of range": lambda plan: edited(plan, ties=[[1, 2, 0, 0]]),
    "a donor out of range": lambda plan: edited(plan, ties=[[1, 0, 0, 2]]),
    "negative numbers": lambda plan: edited(plan, ties=[[1, 0, -1, 0]]),
    "a huge number": lambda plan: edited(plan, ties=[[2**70, 0, 0, 0]]),
    "ties of three numbers": lambda plan: edited(plan, ties=[[1, 0, 0]]),
    "ties of text": lambda plan: edited(plan, ties=["1000"]),
    "ties of fractions": lambda plan: edited(plan, ties=[[1.0, 0, 0, 0]]),
    "ties of truths": lambda plan: edited(plan, ties=[[True, False, False, False]]),
    "ties that are an object": lambda plan: edited(plan, ties={"1": 0}),
    # They are counted before they are read.
    "a million entries": lambda plan: edited(plan, ties=[[1, 0, 0, 0]] * 1_000_000),
    "a kind unheard of": lambda plan: edited(plan, kind="states"),
    "a scale without o": lambda plan: edited(plan, scale=True),
    "no layers": lambda plan: edited(plan, layout_layers=0, ties=[]),
    "absurdly many layers": lambda plan: edited(plan, layout_layers=2**40),
    "absurdly many groups": lambda plan: edited(plan, layout_groups=2**40),
    "more groups than fit": lambda plan: edited(plan, layout_groups=3),
    "layers that are NaN": lambda plan: edited(plan, layout_layers=float("nan")),
    "an unknown part": lambda plan: edited(plan, layout_parts={"x": place_of_q(plan)}),
    "an axis of two": lambda plan: edited(plan, q_axis=2),
    "a negative start": lambda plan: edited(plan, q_start=-8),
    "a start out of range": lambda plan: edited(plan, q_start=8),
    "groups that overlap": lambda plan: edited(plan, q_step=8),
    "a step of nothing": lambda plan: edited(plan, q_step=0),
    "rows of nothing": lambda plan: edited(plan, q_rows=0),
    "a shape of three": lambda plan: edited(plan, q_shape=[32, 32, 1]),
    "a negative shape": lambda plan: edited(plan, q_shape=[-32, 32]),
    "a shape that is too small": lambda plan: edited(plan, q_shape=[31, 32]),
    "a tensor without its layer": lambda plan: edited(plan, q_tensor="lm_head.weight"),
    "a tensor with two layers": lambda plan: edited(plan, q_tensor="{layer}.{layer}.weight"),
    "a tensor of a long name": lambda plan: edited(plan, q_tensor="{layer}" + "x" * 1000),
    "two parts in one place": lambda plan: edited(plan, k_tensor=Q, k_shape=[32, 32]),
    # Through the next two, ties of different selections could chain and gaps overlap.
    "two selections in one place": overlapping_selections,
    "two templates for one tensor": colliding_templates,
}  # fmt: skip


@pytest.mark.parametrize("spoilt", INVALID.values(), ids=INVALID.keys())
def test_a_hostile_plan_cannot_be_read_from_a_file_or_a_checkpoint(
    spoilt: Callable[[hs.SharePlan], Any], llama: Path, tmp_path: Path
) -> None:
    data = spoilt(a_plan(llama))
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(hs.PlanError) as found:
        hs.SharePlan.load(tmp_path / "plan.json")
    assert len(str(found.value)) < 1000
    assert "\n" not in str(found.value)
    put_plan(llama, data)
    with pytest.raises(hs.CheckpointError):
        hs.open_checkpoint(llama)


def put_plan(folder: Path, plan: Any) -> None:
    """Let config.json say that this is a checkpoint shared by this plan."""
    config = json.loads((folder / "config.json").read_text())
    entry = {"quant_method": "headshare", "format": 1, "plan": plan}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))


@pytest.mark.parametrize("name", [name for name in INVALID if "million" not in name])  # it copies those for seconds
def test_transformers_does_not_load_a_checkpoint_with_a_hostile_plan(name: str, llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    put_plan(shared, INVALID[name](a_plan(llama)))
    with pytest.raises(hs.CheckpointError):
        transformers.AutoModelForCausalLM.from_pretrained(shared)


def test_a_plan_of_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "plan.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(hs.PlanError, match="1000000000 bytes"):
        hs.SharePlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("text", [b"", b"\xff", b"[" * 100_000, b"{", b"9" * 10_000], ids=len)
def test_a_plan_that_is_no_json_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(text)
    with pytest.raises(hs.PlanError, match="the plan"):
        hs.SharePlan.load(tmp_path / "plan.json")


def another_models_plan(folder: Path, **changes: object) -> dict[str, Any]:
    return a_plan(tiny.make_llama(folder / "another", **changes)).model_dump(mode="json")


# plans that are right by themselves, and wrong for a tiny Llama
FOREIGN: dict[str, Callable[[Path, hs.SharePlan], dict[str, Any]]] = {
    "a deeper model's": lambda folder, plan: another_models_plan(folder, num_hidden_layers=6),
    "a wider model's": lambda folder, plan: another_models_plan(folder, hidden_size=64),
    "a model's with as many heads as queries": lambda folder, plan: another_models_plan(folder, num_key_value_heads=4),
    "another family's": lambda folder, plan: a_plan(tiny.make("gpt2", folder / "another")).model_dump(mode="json"),
    "one that names other tensors": lambda folder, plan: edited(plan, q_tensor="transformer.h.{layer}.q.weight"),
    "one that names a tensor of another shape": lambda folder, plan: edited(plan, q_tensor=K, k_tensor=Q),
    "one that lies about a shape": lambda folder, plan: edited(plan, q_shape=[64, 32]),
    "one that transposes": lambda folder, plan: edited(plan, k_axis=1),
    "one that shares norms": lambda folder, plan: edited(plan, q_tensor="model.layers.{layer}.input_layernorm.weight"),
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN.keys())
def test_another_models_plan_is_neither_applied_nor_loaded(
    foreign: Callable[[Path, hs.SharePlan], dict[str, Any]], llama: Path, tmp_path: Path
) -> None:
    data = foreign(tmp_path, a_plan(llama))
    plan = hs.SharePlan.from_dict(data)
    shared = share(llama, tmp_path / "shared")
    put_plan(shared, data)
    (shared / MANIFEST).unlink()
    with pytest.raises((hs.PlanError, RuntimeError, ValueError)):  # transformers names mismatched shapes by itself
        transformers.AutoModelForCausalLM.from_pretrained(shared)
    assert not verify(hs.open_checkpoint(shared)).ok
    with pytest.raises(hs.CheckpointError, match="does not hold what its plan says"):
        hs.expand(hs.open_checkpoint(shared), tmp_path / "expanded")
    if data != edited(a_plan(llama), k_axis=1):  # a plan may take columns where ours take rows; its tensors fit
        with pytest.raises(hs.PlanError, match="the plan is for another model"):
            hs.share(hs.open_checkpoint(llama), plan)


def test_ties_to_other_donors_than_were_shared_do_not_verify(llama: Path, tmp_path: Path) -> None:
    """They fit every shape, so nothing but the digest of config.json can tell."""
    shared = share(llama, tmp_path / "shared")
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    recipient, donor = plan.selections[0].ties[0]
    ties = [[*recipient, 0, 1 - donor.group if donor.layer == 0 else 0]]
    put_plan(shared, edited(plan, ties=[*ties, *([*t.recipient, *t.donor] for t in plan.selections[0].ties[1:])]))
    assert hs.open_checkpoint(shared).plan != plan
    found = verify(hs.open_checkpoint(shared))
    assert not found.ok
    assert "config.json" in found.problems[0]


# ---- flipped bits


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
        (shared / MANIFEST).unlink()
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
    assert found.problems == [f"{WEIGHTS} is not as it was written: its SHA-256 differs. Restore it, or share again"]


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


def test_missing_digests_are_a_note(llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    (shared / MANIFEST).unlink()
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


# ---- what is written


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask(mask: int, file_mode: int, folder_mode: int, llama: Path, tmp_path: Path) -> None:
    (llama / "1_Pooling").mkdir()
    (llama / "1_Pooling" / "config.json").write_text("{}")
    (llama / "tokenizer.json").write_text("{}")
    for path in llama.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    before = os.umask(mask)
    try:
        out = share(llama, tmp_path / "out")
        expanded = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
        with hs.open_checkpoint(llama) as dense:
            hs.score_units(dense).save(tmp_path / "scores.safetensors")
        a_plan(llama).save(tmp_path / "plan.json")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    written = [
        *out.rglob("*"),
        *expanded.rglob("*"),
        *(tmp_path / name for name in ("plan.json", "scores.safetensors")),
    ]
    for path in (out, expanded, *written):
        assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else file_mode), path


COPIED = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.txt",
    "merges.txt",
    "generation_config.json",
    "README.md",
    "LICENSE",
    "chat_template.jinja",
    "modules.json",
    "modeling_own.py",
    "1_Pooling/config.json",
    "a/b/c.txt",
]
LEFT = [
    ".git/config",
    ".gitattributes",
    ".cache/x.txt",
    "a/.hidden",
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "rng_state.pth",
    "last.ckpt",
    "tf_model.h5",
    "flax_model.msgpack",
    "onnx/model.onnx",
    "model.gguf",
    "pytorch_model.bin.index.json",
    "original/consolidated.00.pth",
    "extra.safetensors",
    "headshare.json",
]
PICKLES = ["scheduler.pkl", "state.pickle", "scaler.joblib"]  # under other endings


@pytest.mark.parametrize("verb", ["share", "expand"])
def test_small_files_come_along_and_hidden_files_and_other_weights_stay(verb: str, llama: Path, tmp_path: Path) -> None:
    source = llama if verb == "share" else share(llama, tmp_path / "source")
    for name in (*COPIED, *LEFT, *PICKLES):
        if name == MANIFEST and verb == "expand":
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"this is {name}")
    with nothing_changes(source):
        if verb == "share":
            out = share(source, tmp_path / "out")
        else:
            out = hs.expand(hs.open_checkpoint(source), tmp_path / "out")
    for name in COPIED:
        assert (out / name).read_text() == f"this is {name}"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {*COPIED, "config.json", WEIGHTS, MANIFEST}


def test_weights_of_a_sentence_embedders_own_modules_come_along(tmp_path: Path) -> None:
    # A Dense module of sentence-transformers keeps its weights in a folder of its own (2_Dense).
    dense = tiny.make("mpnet", tmp_path / "dense")
    (dense / "2_Dense").mkdir()
    (dense / "2_Dense" / "config.json").write_text("{}")
    (dense / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]')
    save_file({"linear.weight": torch.ones(2, 2)}, dense / "2_Dense" / WEIGHTS)
    out = share(dense, tmp_path / "out")
    assert contents(out)["2_Dense/model.safetensors"] == contents(dense)["2_Dense/model.safetensors"]


@pytest.mark.parametrize("verb", ["share", "expand"])
def test_a_sharded_input_gives_a_sharded_output_with_a_right_index(verb: str, tmp_path: Path) -> None:
    dense = tiny.make_llama(tmp_path / "dense", save={"max_shard_size": "50KB"})
    out = share(dense, tmp_path / "shared")
    if verb == "expand":
        out = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    files = sorted(path.name for path in dense.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(path.name for path in out.glob("*.safetensors")) == files
    index = json.loads((out / INDEX).read_text())
    found, size = {}, 0
    for file in files:
        with safe_open(out / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                found[name] = file
                size += opened.get_tensor(name).nbytes
    assert index["weight_map"] == found == json.loads((dense / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == size
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    same = transformers.AutoModelForCausalLM.from_pretrained(share(dense, tmp_path / "again"))
    with torch.inference_mode():
        assert torch.equal(model(tiny.tokens()).logits, same(tiny.tokens()).logits)


def test_a_sharded_and_a_single_file_share_alike(tmp_path: Path) -> None:
    one = share(tiny.make_llama(tmp_path / "one"), tmp_path / "shared one")
    many = share(tiny.make_llama(tmp_path / "many", save={"max_shard_size": "50KB"}), tmp_path / "shared many")
    theirs: dict[str, torch.Tensor] = {}
    for file in many.glob("*.safetensors"):
        theirs |= load_file(file)
    ours = load_file(one / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_weights_are_converted_as_torch_converts_them(stored: str, wanted: str, tmp_path: Path) -> None:
    dense = tiny.make_llama(tmp_path / "dense", tie_word_embeddings=True)
    original = {name: tensor.to(DTYPES[stored]) for name, tensor in load_file(dense / WEIGHTS).items()}
    counter = {"model.step": torch.arange(3)}
    save_file(original | counter, dense / WEIGHTS, metadata={"format": "pt"})
    plan = a_plan(dense)
    shared = hs.share(hs.open_checkpoint(dense), plan, dtype=wanted)
    out = shared.save(tmp_path / "out")
    written = load_file(out / WEIGHTS)
    assert torch.equal(written.pop("model.step"), torch.arange(3))
    given = {tie.recipient for tie in plan.selections[0].ties}
    for name, tensor in written.items():
        expected = original[name].to(DTYPES[wanted])
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            layer, rows = int(name.split(".")[2]), len(expected) // 2
            groups = [expected[:rows], expected[rows:]]
            expected = torch.cat([groups[g] for g in (0, 1) if (layer, g) not in given] or [expected[:0]])
        assert tensor.dtype == DTYPES[wanted]
        assert torch.equal(tensor, expected), name
    assert sum(tensor.nbytes for tensor in written.values()) + 24 == shared.estimate.shared_bytes
    assert json.loads((out / "config.json").read_text())["dtype"] == wanted
    assert verify(hs.open_checkpoint(out), hs.open_checkpoint(dense), logits=False).ok
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == DTYPES[wanted]


def test_a_conversion_that_overflows_is_not_silent(llama: Path, tmp_path: Path) -> None:
    # 1e6 is infinity in float16.
    spoil(llama, "model.layers.0.mlp.up_proj.weight", 1e6)
    with pytest.raises(hs.HeadshareError, match="up_proj"):
        share(llama, tmp_path / "out", dtype="float16")


def test_an_unknown_type_is_refused(llama: Path, tmp_path: Path) -> None:
    with nothing_changes(tmp_path), pytest.raises(OptionError, match="'int8' is not one of"):
        share(llama, tmp_path / "out", dtype="int8")


def test_sharing_nothing_writes_the_same_weights_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    out = share(llama, tmp_path / "out", 0.0)
    assert (out / WEIGHTS).read_bytes() == (llama / WEIGHTS).read_bytes()
