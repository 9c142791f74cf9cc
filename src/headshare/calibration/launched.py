"""The processes that were launched together with this one, as the environment or torch says. Imports no torch."""

import os
import sys
from typing import Any

# the note on an error that another process reports
SENT = "raised by the first process of this run"


def launched() -> int:
    """The number of processes that were launched together with this one."""
    distributed = _distributed()
    if distributed is not None and distributed.is_initialized():
        return int(distributed.get_world_size())
    several = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if several and _can_join() else 1


def launched_first() -> bool:
    """True if no other process was launched before this one, so that it is the one to report what was done."""
    distributed = _distributed()
    if distributed is not None and distributed.is_initialized():
        return int(distributed.get_rank()) == 0
    return launched() == 1 or os.environ["RANK"] == "0"


def is_sent(error: BaseException) -> bool:
    """True if the first process has raised this error too, and will report it."""
    return SENT in getattr(error, "__notes__", ())


def _distributed() -> Any:
    """torch.distributed, if somebody has imported it and it can be used."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_available() else None


def _can_join() -> bool:
    """False if torch is known to be built without its distributed part. Who has not imported it cannot know yet."""
    return "torch.distributed" not in sys.modules or _distributed() is not None
