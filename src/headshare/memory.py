"""How much anonymous memory (what cannot be dropped and read again) this process took, at its highest."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    peak, stop = Peak(), threading.Event()

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
