"""Progress of long steps: a bar on a terminal, a line that changes in a notebook, plain lines elsewhere.

An interactive interpreter and a notebook show it. A script shows it where `shown` asks for it.
"""

import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TypeVar

from headshare.files import printable

Item = TypeVar("Item")
PLAIN_INTERVAL_S = 10.0
NOTEBOOK_INTERVAL_S = 0.5

_shown: ContextVar[bool | None] = ContextVar("headshare_progress", default=None)


@contextmanager
def shown(wanted: bool = True) -> Iterator[None]:
    """Let `track` and `say` report on standard error within this block, or not."""
    token = _shown.set(wanted)
    try:
        yield
    finally:
        _shown.reset(token)


def track(items: Iterable[Item], what: str, total: int) -> Generator[Item]:
    """Pass the items through, reporting how many of `total` are done."""
    if not _is_shown() or total == 0:
        yield from items
    elif _is_notebook():
        yield from _one_line(items, what, total)
    elif sys.stderr.isatty():
        yield from _bar(items, what, total)
    else:
        yield from _lines(items, what, total)


def say(line: str) -> None:
    """Write one line on standard error, where `shown` asks for it."""
    if _is_shown():
        tell(line)


def tell(line: str) -> None:
    """Write one line on standard error. Where that is full or closed, no work fails for it."""
    _write(f"{printable.shown(line)}\n")


def _write(text: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _is_shown() -> bool:
    """True where progress is asked for, or where nobody has said and a person sits at the interpreter."""
    wanted = _shown.get()
    return hasattr(sys, "ps1") or _is_notebook() if wanted is None else wanted


def _is_notebook() -> bool:
    """True in a process that runs the cells of a notebook."""
    return "ipykernel.kernelapp" in sys.modules


def _bar(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=what)


def _one_line(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Report on one line, which a carriage return begins anew, and which is gone in the end."""
    begun = time.monotonic()
    reported = begun - NOTEBOOK_INTERVAL_S
    width = 0
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if now - reported >= NOTEBOOK_INTERVAL_S:
                line = f"{what}: {done} of {total}"
                line += f", about {(now - begun) / done * (total - done):.0f} s left" if done else ""
                width = max(width, len(line))
                _write(f"\r{line.ljust(width)}")
                reported = now
            yield item
    finally:
        if width:
            _write(f"\r{' ' * width}\r")


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
