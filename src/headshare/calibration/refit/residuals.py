"""Residual connections: the way in which a layer adds its two outputs to the hidden states that entered it.

It is found by looking at the dense layer. The targets of the shared layer's output projections follow from it: they
bring the hidden states of the shared model back to the dense model's.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.calibration import processes
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Batch, Seen
from headshare.plan.units import Part

ADDED = 1e-4


class Adding(StrEnum):
    """Ways in which layers add the outputs of their sublayers."""

    PLAIN = "plain"  # left = entered + factor * (attention + feed-forward), one after the other or in parallel
    NORMED_SUM = "normed sum"  # left = norm(x + feed-forward), x = norm(entered + attention), as in BERT
    NORMED_OUTPUT = "normed output"  # each output passes a norm before it is added, as in Gemma 2


@dataclass(frozen=True)
class Residual:
    """The way in which one layer adds the outputs of its sublayers.

    `o`, `up` and `down` are the paths of W_o, of the module that reads the feed-forward's input, and of W_down; the
    last two are None for experts. Outputs are multiplied by `factor` before they are added: 1 in most models.
    """

    o: str
    up: str | None
    down: str | None
    adding: Adding
    factor: float = 1.0

    def wanted_of_o(self, entered: Batch, own: Batch, seen: Seen) -> Batch:
        """The target of the shared layer's W_o.

        `entered` is the dense stream, `own` is the shared one, and `seen` is from the dense layer.
        """
        if self.adding is Adding.NORMED_OUTPUT:
            return seen.outputs[self.o]
        return seen.outputs[self.o] + (entered - own) / self.factor

    def wanted_of_down(self, target: Batch, own: Batch, seen: Seen) -> Batch:
        """The target of the shared layer's W_down. `own` is the stream that enters it, and `seen` is from the layer."""
        carried = self.carried(own, seen)
        return target if carried is None else (target - carried) / self.factor

    def target(self, entered: Batch, seen: Seen) -> Batch:
        """The sum of the dense layer's feed-forward and what it is added to, before any norm."""
        assert self.down is not None
        output = seen.outputs[self.down]
        carried = self.carried(entered, seen)
        return output if carried is None else output * self.factor + carried

    def carried(self, entered: Batch, seen: Seen) -> Batch | None:
        """The hidden states that W_down's output is added to; None where a norm stands between."""
        match self.adding:
            case Adding.PLAIN:
                return entered + self.factor * seen.outputs[self.o]
            case Adding.NORMED_SUM:
                return None if self.up is None else seen.inputs[self.up]
            case Adding.NORMED_OUTPUT:
                return None


def watched(layers: Layers) -> tuple[str, ...]:
    """The paths of a layer that must have been seen to tell how it adds: W_o, and with a feed-forward, up and down."""
    parts = (Part.O,) if layers.ffn is None else (Part.O, Part.UP, Part.DOWN)
    return tuple(layers.path(part) for part in parts)


def residual_of(layers: Layers, entered: Batch, left: Batch, seen: Seen) -> Residual:
    """The way in which a layer adds, found from the hidden states that entered and left it and from its outputs.

    Layers with experts are taken to add plainly.
    """
    o, up, down = (*watched(layers), None, None)[:3]
    assert o is not None
    if layers.post_norm:
        return Residual(o, up, down, Adding.NORMED_SUM)
    if down is None:
        return Residual(o, up, down, Adding.PLAIN)
    factor = processes.from_first(lambda: _factor(entered, left, seen.outputs[o] + seen.outputs[down]))
    if factor is None:
        return Residual(o, up, down, Adding.NORMED_OUTPUT)
    return Residual(o, up, down, Adding.PLAIN, factor)


def _factor(entered: Batch, left: Batch, outputs: Batch) -> float | None:
    """The factor by which outputs were multiplied before they were added: 1, or the number that fits best.

    None if no factor fits every token whose numbers are finite.
    """
    finite = torch.isfinite(left + entered + outputs).all(dim=-1)
    entered = entered[finite].double()
    left = left[finite].double()
    outputs = outputs[finite].double()
    change = left - entered
    size = torch.maximum(_size(left), _size(entered))
    best = float((change * outputs).sum() / outputs.square().sum().clamp(min=torch.finfo(torch.float64).tiny))
    fitting = (factor for factor in (1.0, best) if bool((_size(change - factor * outputs) <= ADDED * size).all()))
    return next((factor for factor in fitting if factor), None)


def _size(tokens: Float[Tensor, "tokens hidden"]) -> Float[Tensor, " tokens"]:
    return tokens.square().sum(dim=-1).sqrt()
