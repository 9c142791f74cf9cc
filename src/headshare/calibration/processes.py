"""Processes that calibrate together: the windows of each, sums over the tokens of all, and what the first one decides.

All that calibration needs of the tokens are sums over them. So under `accelerate launch` or `torchrun` each process
walks the model with its own windows, and sums are added up. Nothing else is divided: what is solved once is solved by
the first process, which also writes. Knows torch.distributed, and no model and no file.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, distributed

from headshare.calibration.launched import SENT, launched
from headshare.errors import CalibrationError
from headshare.files.untrusted import wants_memory

Value = TypeVar("Value")

# The longest that a process waits for the others: a large model may be written and measured in that time. One that has
# ended is noticed at once.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class _Processes:
    """The processes that work together, and which of them this one is. The `group` of a lone process is None."""

    rank: int = 0
    count: int = 1
    group: Any = None


_ALONE = _Processes()
_joined: ContextVar[_Processes] = ContextVar("headshare_processes", default=_ALONE)


@contextmanager
def together() -> Iterator[None]:
    """A block in which this process calibrates together with those that were launched with it, if there are any.

    Every one of them must enter the block and do the same in it. A process that fails, or is killed, ends the others'
    work too, at the latest after `PATIENCE`.

    Raises:
        CalibrationError: from then on, where another process is waited for that does not come.
    """
    if launched() == 1 or _joined.get().count > 1:
        yield
        return
    mine = not distributed.is_initialized()
    with _answered():
        # The CPU's tensors are added up by gloo and a GPU's by NCCL, wherever a sum happens to lie.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if mine:
            distributed.init_process_group(backend, timeout=PATIENCE)
            group = distributed.group.WORLD
        else:
            group = distributed.new_group(backend=backend, timeout=PATIENCE)
    token = _joined.set(_Processes(distributed.get_rank(), distributed.get_world_size(), group))
    try:
        yield
    finally:
        _joined.reset(token)
        with suppress(RuntimeError):  # others have gone, and a process that waits for this one is to notice
            distributed.destroy_process_group(None if mine else group)


def own_gpu() -> int | None:
    """The number of the GPU on its machine that is this process's own; None for a lone process."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() > 1 else None


def count() -> int:
    """The number of processes that work together."""
    return _joined.get().count


def rank() -> int:
    """The number of this process among them."""
    return _joined.get().rank


def is_first() -> bool:
    """True in the process that decides and writes."""
    return rank() == 0


# ---- what is divided


def mine(windows: Tensor) -> Tensor:
    """The windows that are this process's own: one in as many as there are processes, in order. There may be none."""
    return windows[rank() :: count()] if count() > 1 else windows


def mine_of(numbers: Int[Tensor, " some"]) -> Int[Tensor, " own"]:
    """Those of these numbers of windows that are this process's own, as numbers among `mine`."""
    return numbers[numbers % count() == rank()] // count()


def divided(windows: Int[Tensor, "windows window"], fitted: int) -> tuple[Int[Tensor, "own window"], int]:
    """This process's own windows of those that are fitted to, which come first, and of the others; and how many of the
    first sort these are.

    Raises:
        CalibrationError: if a process would have nothing to fit to.
    """
    from_first(lambda: _check_enough(fitted))
    fit = mine(windows[:fitted])
    return torch.cat([fit, mine(windows[fitted:])]), len(fit)


def _check_enough(fitted: int) -> None:
    if fitted < count():
        raise CalibrationError(
            f"{count()} processes cannot share {fitted} window{'s'[: fitted != 1]} to fit to, as each needs one. Ask "
            "for more tokens, for a smaller window, or for fewer processes."
        )


def summed(tensor: Tensor) -> Tensor:
    """The sum of this tensor over the processes, the same bits in each. The tensor's own memory is used for it."""
    if count() == 1:
        return tensor
    whole = tensor.contiguous()
    with _answered():
        distributed.all_reduce(whole, group=_joined.get().group)
    return whole


def total(number: int) -> int:
    """The sum of a count over the processes."""
    return number if count() == 1 else int(summed(torch.tensor(number, dtype=torch.int64)))


def any_of(true: bool) -> bool:
    """True if it is true in any process."""
    return total(int(true)) > 0


# ---- what the first process decides


def from_first(make: Callable[[], Value]) -> Value:
    """What this makes in the first process, alone, and sent to all. What it raises there is raised in all.

    Rounding may differ between machines, and a choice must not.
    """
    if count() == 1:
        return make()
    sent: list[Any] = [None, None]
    if is_first():
        try:
            sent = [make(), None]
        except Exception as error:
            sent = [None, error]
    with _answered():
        distributed.broadcast_object_list(sent, group_src=0, group=_joined.get().group)
    made, failed = sent
    if failed is not None:
        if not is_first():
            failed.add_note(SENT)
        raise failed
    return made  # type: ignore[no-any-return]  # the first process has put it there


def agreed(value: Value) -> Value:
    """The first process's value, in all of them."""
    return from_first(lambda: value)


def copied(*tensors: Tensor) -> None:
    """Put the first process's numbers into these tensors of all processes, in place."""
    if count() == 1:
        return
    for tensor in tensors:
        sent = tensor.detach().clone(memory_format=torch.contiguous_format)
        with _answered():
            distributed.broadcast(sent, group_src=0, group=_joined.get().group)
        tensor.detach().copy_(sent)


def wait() -> None:
    """Return when every process has come here."""
    total(0)


@contextmanager
def _answered() -> Iterator[None]:
    """A block that waits for the other processes.

    Raises:
        CalibrationError: if one of them is not there any more.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if wants_memory(error):
            raise
        raise CalibrationError(
            f"another process of this run has ended, or gave no answer for {PATIENCE.seconds // 3600} hours; what it "
            "printed last says why. The state of the run is kept: give the same command again, and it goes on."
        ) from error
