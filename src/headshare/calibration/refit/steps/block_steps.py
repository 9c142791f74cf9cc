"""Gradient steps on one layer of a shared model, which bring its output back to the dense layer's.

The refit solves for the readouts alone. These steps change every matrix, bias and norm of the layer: Adam on the
squared error of what leaves the layer, on the calibration tokens, with no text to predict. What enters is what the
changed layers before it give, what should leave is what the dense layer gives in the dense model (the block refinement
of AA-SVD, arXiv 2604.02119). Beside the layer itself, that takes five times the bytes of its float32 weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headshare.calibration import processes
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Batch, Stream
from headshare.calibration.refit.normal_equations import token_weights
from headshare.calibration.refit.refinement import Refinement
from headshare.calibration.refit.steps.descent import BETAS, Best, drawn, is_look, share_of_rate
from headshare.precision import short_layers


@dataclass(frozen=True)
class BlockTarget:
    """The hidden states that enter a layer in the shared model, and those that leave it in the dense one.

    The first `fitted` windows are fitted to, the others are held out.
    """

    entering: Stream
    leaving: Stream
    fitted: int

    def held_out(self, layers: Layers) -> Iterator[slice]:
        """The held-out windows, as slices that are run at once."""
        return layers.batches(range(self.fitted, len(self.entering)), self.entering.shape[1])

    def drawn(self, refinement: Refinement, generator: torch.Generator) -> Iterator[tuple[Int[Tensor, " drawn"], int]]:
        """The windows of each step, and the number of them in all processes."""
        size = max(1, refinement.tokens // self.entering.shape[1])
        return drawn(self.fitted, size, refinement.steps, generator)


def refine_block(
    layers: Layers,
    layer: int,
    module: nn.Module,
    wanted: BlockTarget,
    weights: Mapping[str, nn.Parameter],
    own: Mapping[str, Bool[Tensor, "..."]],
    refinement: Refinement,
    *,
    seed: int,
) -> Best:
    """The best weights that a refinement finds, on windows drawn by the seed.

    Only those numbers of the built layer's `weights` change that are its `own`. The layer is left as it was. An error
    is the squared error of each held-out token as part of its squared size in the dense model, averaged over tokens.
    """
    optimizer = torch.optim.Adam(weights.values(), refinement.rate, BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, refinement.steps))
    generator = torch.Generator().manual_seed((seed + layer) % 2**63)

    best = Best.of(weights, _held_out(layers, layer, module, wanted))
    first = best.weights
    for weight in weights.values():
        weight.requires_grad_()
    try:
        for step, (at, windows) in enumerate(wanted.drawn(refinement, generator), start=1):
            _descend(layers, layer, module, (wanted.entering[at], wanted.leaving[at]), weights, own, windows)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if is_look(step, refinement.steps):
                best.look(step, weights, _held_out(layers, layer, module, wanted))
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.requires_grad = False
                weight.copy_(first[name])
    processes.copied(*best.weights.values())
    return best


def _descend(
    layers: Layers,
    layer: int,
    module: nn.Module,
    batch: tuple[Batch, Batch],
    weights: Mapping[str, nn.Parameter],
    own: Mapping[str, Tensor],
    windows: int,
) -> None:
    """Set the gradients of the weights on a batch of what enters and of what should leave, masked.

    The batch is this process's part of so many windows.
    """
    window = batch[0].shape[1]
    pieces = [torch.split(tensor, layers.batch(window)) for tensor in batch]
    for entering, leaving in (
        zip(*pieces, strict=True) if len(batch[0]) else ()
    ):  # as much as is run at once, whatever a step takes
        with torch.enable_grad():
            with short_layers(layers.device):
                left = layers.call(module, layer, entering)
            error = _error(left.float(), leaving.to(layers.device)).sum() / (windows * window)
            gradients = torch.autograd.grad(error, list(weights.values()), allow_unused=True)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            # weights that others use too take part in the layer and stay as they are
            if gradient is not None:
                masked = gradient * own[name]
                weight.grad = masked if weight.grad is None else weight.grad + masked
    if processes.count() > 1:
        for weight in weights.values():
            weight.grad = processes.summed(torch.zeros_like(weight) if weight.grad is None else weight.grad)


def _held_out(layers: Layers, layer: int, module: nn.Module, wanted: BlockTarget) -> float:
    """The error on the held-out tokens, averaged."""
    lost = torch.zeros((), dtype=torch.float64)
    for at in wanted.held_out(layers):
        left = layers.run(module, layer, wanted.entering[at])[0]
        lost += _error(left, wanted.leaving[at].to(layers.device)).double().sum().cpu()
    windows, window, _ = wanted.entering.shape
    return float(processes.summed(lost)) / processes.total((windows - wanted.fitted) * window)


def _error(left: Batch, wanted: Batch) -> Tensor:
    """The squared error of each token as a part of its squared size in the dense model.

    It is zero for a token whose size there is zero or not finite.
    """
    finite = torch.isfinite(wanted).all(dim=-1, keepdim=True)
    difference = torch.where(finite, left - wanted, 0.0)  # not its square: infinity times zero has no gradient
    return difference.square().sum(dim=-1) * token_weights(wanted)
