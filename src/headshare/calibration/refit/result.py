"""The result of a refit: new tensors, and the steps that led to them."""

from collections.abc import MutableMapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class RefitStep:
    """A step of a refit: one output projection refitted, or one layer refined by gradient steps.

    Errors are squared errors on held-out tokens, as parts of the target's own size.
    `ridge` is None where nothing was solved, or the readout was kept as it was; `note` says why, or what else is to be
    known.
    """

    tensor: str
    ridge: float | None
    error_before: float
    error_after: float
    note: str = ""


@dataclass
class Refit:
    """The new tensors of a refit by name, and the steps that led to them.

    Tensors are whole, in the checkpoint's own orientation and type, and include scales. All other tensors stay.
    """

    tensors: MutableMapping[str, Tensor] = field(default_factory=dict)
    steps: list[RefitStep] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The record of its steps, without any tensor."""
        return {"steps": [asdict(step) for step in self.steps]}
