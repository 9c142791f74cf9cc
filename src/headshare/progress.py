"""Progress of long steps: a bar on a terminal, plain lines elsewhere, nothing unless `shown` asks for it."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TypeVar

from headshare.files import printable

Item = TypeVar("Item")
PLAIN_INTERVAL_S = 10.0

_shown: ContextVar[bool] = ContextVar("headshare_progress", default=False)


@contextmanager
def shown() -> Iterator[None]:
    """Let `track` and `say` report on standard error within this block."""
    token = _shown.set(True)
    try:
        yield
    finally:
        _shown.reset(token)


def track(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Pass the items through, reporting how many of `total` are done."""
    if not _shown.get() or total == 0:
        yield from items
    elif sys.stderr.isatty():
        yield from _bar(items, what, total)
    else:
        yield from _lines(items, what, total)


def say(line: str) -> None:
    """Write one line on standard error, where `shown` asks for it."""
    if _shown.get():
        tell(line)


def tell(line: str) -> None:
    """Write one line on standard error. Where that is full or closed, no work fails for it."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{printable.shown(line)}\n")


def _bar(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=what)


def _lines(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    begun = time.monotonic()
    reported = begun
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - reported >= PLAIN_INTERVAL_S:
            left = (now - begun) / max(done, 1) * (total - done)
            tell(f"{what}: {done} of {total}, about {left:.0f} s left")
            reported = now
        yield item
