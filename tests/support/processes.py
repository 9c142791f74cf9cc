"""Work in a process of its own: a fork of this one, or a script."""

import os
import subprocess
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path


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
