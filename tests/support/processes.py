"""Work in a process of its own: a fork of this one, or a script."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import headshare.sharing.writer


def in_child(work: Callable[[], object], *, wait: bool = True) -> int:
    """Run this in a fork of the warm process; -signal if it was killed, 0 if it ended, 99 after an exception. Without
    `wait`, the number of the process."""
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
    if not wait:
        return child
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(code: str, *arguments: object, **environment: str) -> str:
    """What a script of its own process prints; a crash is a failure here, with what it said."""
    head = "import sys, os, gc, json, copy, pickle, torch, headshare as hs, transformers\nfrom support import tiny\n"
    head += "from headshare.integrations.transformers.loading import load_model\ntorch.set_num_threads(1)\n"
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_DEACTIVATE_ASYNC_LOAD": "1",  # threads' own heaps would stand between two measurements
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, check=False, env=variables, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


MEASURE = r"""
    import ctypes, re

    def pss():
        "PSS of checkpoints, arenas and anonymous memory; libraries are other processes' affair too."
        total, counts = 0, False
        for line in open("/proc/self/smaps", "rb"):
            if re.match(rb"[0-9a-f]+-[0-9a-f]+ ", line):
                path = line.split(maxsplit=5)[5].strip() if len(line.split(maxsplit=5)) > 5 else b""
                counts = not path or path[:1] == b"[" or b"memfd" in path or b".safetensors" in path
            elif counts and line.startswith(b"Pss:"):
                total += int(line.split()[1]) * 1024
        return total

    def settle():
        for _ in range(2):
            gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    def ready(folder, storage, dtype):
        model = load_model(hs.open_checkpoint(folder), storage=storage, dtype=dtype)
        with torch.inference_mode():
            model(tiny.tokens())
        return model
"""


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
