"""Commands in forks that are stopped or starved, and their outputs as they can be compared."""

import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import headshare.files.folder
from headshare.cli.app import main as headshare_main
from support.folders import contents

MARK = ".headshare-"
# what differs from run to run: how long it took, and the Trainer's mean of the losses since it went on
TIMES = re.compile(r"seconds|_runtime$|_per_second$|train_loss$")


@dataclass
class Ended:
    """How a run ended: -9 where it was killed; its standard error; the seconds it took."""

    status: int
    err: str
    seconds: float


def run(
    folder: Path, words: str, *, kill_after: float | None = None, room: int | None = None, exchange: bool = True
) -> Ended:
    """Run a command in a fork that works in this folder. It is killed after so many seconds, or has so much room."""
    begun = time.monotonic()
    reading, writing = os.pipe()  # and no file, which could not grow where there is little room
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 2**20)
    child = os.fork()
    if child == 0:
        _command(folder, words, writing, room, exchange)
    os.close(writing)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - begun
    with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
        return Ended(status, pipe.read(), seconds)


def _command(folder: Path, words: str, said: int, room: int | None, exchange: bool) -> None:
    """Run a command as the console script does, in a child that never returns."""
    status = 99
    try:
        os.chdir(folder)
        tempfile.tempdir = str(folder / "tmp")
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(said, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        if not exchange:
            headshare.files.folder._exchange = lambda *_: False
        if room is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        sys.argv = ["headshare", *words.split()]
        headshare_main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def same_for_all_times(path: Path) -> dict[str, Any]:
    """The contents of an output, a file or a folder, without hidden state and what it says of seconds."""
    if not path.exists():
        return {}
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    listed = {path.name: ""} if path.is_file() else contents(path)
    found: dict[str, Any] = {name: digest for name, digest in listed.items() if MARK not in name}
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        if MARK in name:
            continue
        if file.suffix == ".json":
            with contextlib.suppress(ValueError):  # a half one is not as any other
                found[name] = _without_times(json.loads(file.read_bytes()), timed={"training.json"} & found.keys())
        elif path.is_file():
            found[name] = file.read_bytes()
        elif file.suffix in (".csv", ".md"):
            found[name] = re.sub(r"[\d.]+", "", file.read_text())
    return found


def _without_times(data: Any, timed: set[str]) -> Any:
    if isinstance(data, dict):
        return {
            key: _without_times(value, timed)
            for key, value in data.items()
            if key not in timed and not TIMES.search(key)
        }
    return [_without_times(value, timed) for value in data] if isinstance(data, list) else data


def hidden(folder: Path) -> set[str]:
    """What is headshare's own for a time, or for later runs."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if MARK in path.name}
