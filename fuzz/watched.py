"""Commands run in this process and judged, and jobs run in a forked process within limits of time and memory."""

import contextlib
import io
import json
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headshare.cli.app import main

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_ERROR = 1500
DEEP = 200


@dataclass(frozen=True)
class Limits:
    """What one command may take: seconds of its processor and of the clock, and bytes beyond those at its start."""

    cpu_s: float = 20.0
    wall_s: float = 120.0
    memory: int = 600 * 2**20


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `trouble` says what no command should do; `place` is where, for telling troubles apart."""

    words: tuple[str, ...]
    status: int | None
    out: str
    err: str
    seconds: float
    peak: int
    trouble: str = ""
    place: str = ""


class _TooLong(BaseException):
    """Too many seconds: no handler of a library catches it."""


def _stop(*_: object) -> None:
    raise _TooLong


def run_command(words: Sequence[str], limits: Limits) -> Outcome:
    """Run one command as the console script does, and judge how it ended."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict", newline="")
    err = io.StringIO()
    status: int | None = None
    trouble = ""
    place = ""
    signal.signal(signal.SIGPROF, _stop)
    before = _resident(reset=True)
    begun = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
    argv = sys.argv
    sys.argv = ["headshare", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except _TooLong as error:
        trouble = f"more than {limits.cpu_s} CPU seconds"
        place = f"CPU seconds at {_place(error)}"
    except BaseException as error:  # that is what is looked for
        trouble = "".join(traceback.format_exception(error, limit=-DEEP))[-6000:]
        place = f"{type(error).__name__} at {_place(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.argv = argv
    seconds = time.process_time() - begun
    peak = max(0, _resident() - before)
    out.flush()
    printed = out.buffer.getvalue().decode()  # type: ignore[attr-defined]  # what was put in above
    if not trouble:
        trouble, place = _judged(words, status, printed, err.getvalue())
    if not trouble and peak > limits.memory:
        trouble = place = f"more than {limits.memory / 2**20:.0f} MiB"
        trouble += f": {peak / 2**20:.0f}"
    return Outcome(tuple(words), status, printed[-3000:], err.getvalue()[-3000:], seconds, peak, trouble, place)


def _judged(words: Sequence[str], status: int | None, out: str, err: str) -> tuple[str, str]:
    """What is wrong with the way in which a command ended, and its kind; two empty texts if nothing is."""
    if found := CONTROL.search(out + err):
        return f"prints {found[0]!r}", f"control characters of {words[0]}"
    if status == 0:
        return "", ""
    lines = err.rstrip("\n").split("\n")
    errors = [line for line in lines if line.startswith("error: ")]
    if not errors and words[0] == "verify" and status == 1 and out:
        return "", ""
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"{len(lines)} lines on standard error, status {status}", f"error of several lines: {lines[-1][:60]}"
    if len(errors[0]) > MAX_ERROR:
        return f"an error of {len(errors[0])} characters", f"long error: {errors[0][:60]}"
    if out:
        return "an error, and standard output", f"output before an error of {words[0]}"
    if "allocate memory" in errors[0]:
        return "asks for more memory than there is", "memory, caught by a library"
    return "", ""


def _place(error: BaseException) -> str:
    """The last line of ours that an exception came through, and the last of all."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name != _stop.__name__]
    ours = [frame for frame in frames if "/headshare/" in frame.filename]
    return " > ".join(f"{Path(frame.filename).name}:{frame.name}" for frame in ours[-1:] + frames[-1:])


def _resident(*, reset: bool = False) -> int:
    """The largest resident size of this process so far; with `reset`, its size now, from which it counts again."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


Job = Callable[[int], list[Outcome]]


def in_forks(job: Job, numbers: Sequence[int], limits: Limits) -> Iterator[tuple[int, list[Outcome]]]:
    """Do a job for each number, in a forked process that is replaced when it dies or takes too long.

    A death is an outcome like others.
    """
    left = list(numbers)
    while left:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _work(job, left, writer, limits)
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            try:
                for number, outcomes in _answers(pipe, child, left, limits):
                    left.remove(number)
                    yield number, outcomes
            except GeneratorExit:  # nobody wants the rest
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise


def _work(job: Job, numbers: Sequence[int], writer: int, limits: Limits) -> None:
    """Do the jobs in a child, which writes a line for each and never returns."""
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 6 * limits.memory, -1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(writer, "w") as pipe:
            for number in numbers:
                answer = json.dumps([number, [asdict(outcome) for outcome in job(number)]])
                pipe.write(f"{answer}\n")
                pipe.flush()
    except BaseException:  # a child that raised would go on as a second parent
        traceback.print_exc()
    finally:
        os._exit(0)


def _answers(pipe: Any, child: int, left: Sequence[int], limits: Limits) -> Iterator[tuple[int, list[Outcome]]]:
    """The answers of a child, until it has done all; its death or standstill is the last of them."""
    waiting = list(left)
    pending = b""
    while waiting:
        ready, _, _ = select.select([pipe], [], [], limits.wall_s)
        block = os.read(pipe.fileno(), 2**16) if ready else b""
        if not block:
            if not ready:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            how = f"killed by signal {status & 127}" if ready else f"more than {limits.wall_s} seconds of the clock"
            yield waiting[0], [Outcome(("?",), None, "", "", 0.0, 0, how, how)]
            return
        *lines, pending = (pending + block).split(b"\n")
        for line in lines:
            number, outcomes = json.loads(line)
            waiting.remove(number)
            yield number, [Outcome(**{**one, "words": tuple(one["words"])}) for one in outcomes]
    os.waitpid(child, 0)
