"""In the place of gptqmodel's rounding, which tests may not have: the nearest numbers."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headshare.calibration import gptq as fewbits


class Nearest:
    """Rounds a linear module's weight to the nearest of sixteen numbers a group, and keeps the inputs that it is given.
    `seen` are all that were made since `stand_in`."""

    seen: list["Nearest"]

    def __init__(self, linear: nn.Linear, group: int) -> None:
        self.weight, self.group, self.inputs = linear.weight.detach().clone(), group, list[Tensor]()
        Nearest.seen.append(self)

    def add_batch(self, inputs: Tensor, _: object) -> None:
        self.inputs.append(inputs.reshape(-1, inputs.shape[-1]).clone())

    def quantize(self) -> tuple[Any, ...]:
        rows, inputs = self.weight.shape
        grouped = self.weight.view(rows, inputs // self.group, self.group)
        scale = grouped.abs().amax(dim=2) / 7
        found = (grouped / scale[..., None]).round() * scale[..., None]
        finite = all(bool(torch.isfinite(one).all()) for one in (self.weight, *self.inputs))
        return found.view(rows, inputs), scale, torch.full_like(scale, 8), None, 0.0, 0.0 if finite else 999999999


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Nearest]:
    """Round so from now on. Returns all that will be rounded, as it comes."""
    Nearest.seen = []
    monkeypatch.setattr(fewbits, "_maker", lambda group: partial(Nearest, group=group))
    return Nearest.seen
