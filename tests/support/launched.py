"""Commands in several processes that were launched together, as torchrun launches them: forks of this one."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headshare.cli.app import main
from support.processes import in_child

PATIENCE = 60.0


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, or minus the signal that killed it, and what it printed."""

    status: int
    out: str
    err: str


def launched(
    words: Sequence[object], folder: Path, *, count: int = 2, first: Callable[[int], object] = lambda rank: None
) -> list[Ended]:
    """Run a command in so many processes that know of each other. `first` is called in each with its number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> Callable[[], None]:
        def work() -> None:
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": port}  # fmt: skip
            os.environ |= {name: str(value) for name, value in where.items()}
            for descriptor, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f"{name}-{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            first(rank)
            sys.argv = ["headshare", *map(str, words)]
            status = 99
            try:
                main()
                status = 0
            except SystemExit as ended:
                status = int(ended.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

        return work

    children = [in_child(one(rank), wait=False) for rank in range(count)]
    statuses = _statuses(children)
    return [
        Ended(status, _said(folder / f"out-{rank}"), _said(folder / f"err-{rank}"))
        for rank, status in enumerate(statuses)
    ]


def _said(printed: Path) -> str:
    """What was printed, without the lines that older gloo prints when it connects."""
    lines = printed.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo] Rank"))


def _statuses(children: Sequence[int]) -> list[int]:
    """How each of these processes ended; those that do not end in time are killed, which no test expects of all."""
    found: dict[int, int] = {}
    begun = time.monotonic()
    while len(found) < len(children):
        for child in set(children) - set(found):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                found[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - begun > PATIENCE:
                os.kill(child, signal.SIGALRM)
        time.sleep(0.01)
    return [found[child] for child in children]
