"""Gradient steps on one layer of a shared model, which bring its output back to the dense layer's.

The refit solves for the readouts alone. These steps change every weight matrix of the layer's attention and
feed-forward where no other layer uses it: Adam on the squared error of what leaves the layer, on the calibration
tokens, with no text to predict. Beside the layer itself, that takes five times the bytes of its float32 matrices.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Batch, Stream
from headshare.calibration.refit.normal_equations import token_weights
from headshare.precision import short_products

RATE = 1e-4
BETAS = (0.9, 0.99)
LOOKS = 8
TOKENS = 2048  # a step


@dataclass(frozen=True)
class Reconstructed:
    """The best of the steps: its weights by name, its number, and the held-out errors before the first step and there.

    An error is the squared error of each token as part of its squared size in the dense model, averaged over tokens.
    """

    weights: Mapping[str, Tensor]
    step: int
    error_before: float
    error_after: float


@dataclass(frozen=True)
class LayerTarget:
    """The hidden states that enter a layer in the shared model, and those that leave it in the dense one.

    The first `fitted` windows are fitted to, the others are held out.
    """

    entering: Stream
    leaving: Stream
    fitted: int

    def held_out(self, layers: Layers) -> Iterator[slice]:
        """The held-out windows, as slices that are run at once."""
        return layers.batches(range(self.fitted, len(self.entering)), self.entering.shape[1])


def reconstruct(
    layers: Layers,
    layer: int,
    module: nn.Module,
    wanted: LayerTarget,
    weights: Mapping[str, nn.Parameter],
    own: Callable[[str, Tensor], Tensor],
    *,
    steps: int,
    seed: int,
    rate: float,
) -> Reconstructed:
    """The best weights that this many steps find, each on TOKENS tokens in windows drawn by the seed.

    Only numbers that are the layer's `own` change. The built layer is left with its first weights.
    """
    # Weights that are shared take part in the layer and stay as they are: their gradients are masked.
    first = {name: weight.detach().clone() for name, weight in weights.items()}
    masks = {name: own(name, weight) for name, weight in first.items()}
    optimizer = torch.optim.Adam(weights.values(), rate, BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed((seed + layer) % 2**63)

    # The steps may fit the calibration text and nothing else, so held-out tokens choose among `LOOKS` of them; the
    # weights before the first step are a choice too.
    before = _held_out(layers, layer, module, wanted)
    best = Reconstructed(first, 0, before, before)
    for weight in weights.values():
        weight.requires_grad_()
    try:
        for step in range(1, steps + 1):
            at = torch.randint(wanted.fitted, (max(1, TOKENS // wanted.entering.shape[1]),), generator=generator)
            _descend(layers, layer, module, wanted.entering[at], wanted.leaving[at], weights, masks)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % max(steps // LOOKS, 1) == 0 or step == steps:
                now = _held_out(layers, layer, module, wanted)
                if now < best.error_after:
                    kept = {name: weight.detach().clone() for name, weight in weights.items()}
                    best = Reconstructed(kept, step, before, now)
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.requires_grad = False
                weight.copy_(first[name])
    return best


def _descend(
    layers: Layers,
    layer: int,
    module: nn.Module,
    entering: Batch,
    leaving: Batch,
    weights: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
) -> None:
    """Set the gradients of the weights on this batch, masked."""
    with torch.enable_grad(), short_products():
        error = _error(layers.call(module, layer, entering), leaving.to(layers.device)).mean()
        gradients = torch.autograd.grad(error, list(weights.values()))
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        weight.grad = gradient * masks[name]


def _held_out(layers: Layers, layer: int, module: nn.Module, wanted: LayerTarget) -> float:
    """The error on the held-out tokens, averaged."""
    errors = [
        _error(layers.run(module, layer, wanted.entering[at])[0], wanted.leaving[at].to(layers.device)).flatten()
        for at in wanted.held_out(layers)
    ]
    return torch.cat(errors).mean().item()


def _error(left: Batch, wanted: Batch) -> Tensor:
    """The squared error of each token as a part of its squared size in the dense model.

    It is zero for a token whose size there is zero or not finite.
    """
    finite = torch.isfinite(wanted).all(dim=-1, keepdim=True)
    difference = torch.where(finite, left - wanted, 0.0)  # not its square: infinity times zero has no gradient
    return difference.square().sum(dim=-1) * token_weights(wanted)
