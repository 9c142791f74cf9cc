"""Memory of this process: the highest anonymous memory (which cannot be dropped and read again), and the PSS now."""

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INTERVAL_S = 0.005


def anonymous_bytes() -> int | None:
    """Anonymous resident memory of this process now; None where the system does not say (other than Linux)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def pss_bytes(folder: Path) -> int | None:
    """PSS of this process's own memory and of the files that it has mapped from this folder; None if it is unknown.

    Each page counts once, however often it is mapped: sharing shows here, and not in RSS. Libraries are left out,
    because their PSS changes with the other processes that use them.
    """
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    inside = str(folder.resolve()) + "/"
    total = 0
    counted = False
    for line in lines:
        if line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024 if counted else 0
        elif "-" in line.split(maxsplit=1)[0]:
            path = "".join(line.split(maxsplit=5)[5:])
            counted = not path.startswith("/") or path.startswith((inside, "/memfd:", "/dev/zero"))
    return total


def give_back_freed() -> None:
    """Drop unreachable objects and give freed memory back to the system, where the C library can do that."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_cached(folder: Path) -> None:
    """Ask the system to drop this folder's files from its cache, so that they are next read from the disk."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file, suppress(OSError, AttributeError):
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Peak:
    """The highest value seen while watching, in bytes; None where the system does not say."""

    def __init__(self) -> None:
        self.bytes = anonymous_bytes()

    def look(self) -> None:
        """Take one more reading."""
        now = anonymous_bytes()
        if now is not None:
            self.bytes = max(self.bytes or 0, now)


@contextmanager
def watched_peak() -> Iterator[Peak]:
    """Watch this process's anonymous memory within the block, the interpreter and its libraries included."""
    peak = Peak()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(INTERVAL_S):
            peak.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.look()
