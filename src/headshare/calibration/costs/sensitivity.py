"""Sensitivity of a model's predictions to errors in the outputs of its sublayers, from one backward pass.

An error e_t in the output of W_o or W_down at token t changes the model's next-token distributions. To second order,
their Kullback-Leibler divergence from the dense model's is half of e_t^T F e_t, where F is the Fisher information: the
mean of g_t g_t^T, with g_t the gradient, at that output, of the log-probability of tokens drawn from the model's own
predictions (Martens, "New insights and perspectives on the natural gradient method", 2020). Errors of different tokens
are taken to be independent. One pass back through the layers gives F for all sublayers.

Errors are measured relative to the hidden state h_t that they are added to, so gradients are multiplied by |h_t|. The
`metric` M of a sublayer is the symmetric root of F / 2 in these units: |M e_t / |h_t||^2 is the divergence in nats.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headshare.calibration import processes
from headshare.calibration.costs.sublayer import READOUT, hidden_with_output
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Batch, Seen, Stream, watching
from headshare.errors import CalibrationError
from headshare.plan.units import Part, Sublayer
from headshare.precision import short_layers, short_products
from headshare.progress import track
from headshare.text.tokens import Calibration

# The tokens that gradients are taken on, in batches of this many.
TOKENS = 4096
BATCH = 1024

# Tokens whose hidden state is this many times as large as the median one's of their window have no part: there are a
# few in every window, predictions hardly depend on them, and their gradients times their size would outweigh all
# others.
OUTLIER = 10.0

Metric = Float[Tensor, "hidden hidden"]
Metrics = Mapping[int, Mapping[Sublayer, Metric]]


def sensitivities(
    layers: Layers, calibration: Calibration, kinds: tuple[Sublayer, ...], *, tokens: int = TOKENS
) -> dict[int, dict[Sublayer, Metric]]:
    """The metrics of these sublayers of every layer, on the first windows of the calibration that hold so many tokens.

    `layers` are of a model with its head. They run with the short products that the machine has, forwards and back,
    one layer in memory at a time; the hidden states that enter each layer are kept on the CPU.

    Raises:
        CalibrationError: if gradients are not finite.
    """
    windows = calibration.tokens[: max(1, tokens // calibration.tokens.shape[1])]
    seeds = torch.randint(2**62, (len(windows),), generator=torch.Generator().manual_seed(calibration.seed % 2**63))
    metrics: dict[int, dict[Sublayer, Metric]] = {}
    with short_products():
        entering = [layers.start(processes.mine(windows))]
        with short_layers(layers.device):
            for layer in range(layers.count):
                entering.append(layers.run_over(layers.build(layer), layer, entering[-1].clone()))

        # The last layer's gradients come from the predictions; each layer then gives the one before it its own.
        gradient = _of_predictions(layers, entering.pop(), processes.mine(seeds).tolist())
        for layer in track(reversed(range(layers.count)), "tracing back", layers.count):
            metrics[layer], gradient = _Backward(layers, layer, kinds).through(entering.pop(), gradient)
    return metrics


def _batches(layers: Layers, stream: Stream) -> Iterator[slice]:
    """Slices of a stream's windows that are differentiated at once."""
    return layers.batches(range(len(stream)), stream.shape[1], BATCH)


def _of_predictions(layers: Layers, leaving: Stream, seeds: Sequence[int]) -> Stream:
    """The gradients, at the hidden states that leave the last layer, of the log-probability of sampled tokens.

    Each window has a seed of its own, so that it draws the same tokens whichever process has it.
    """
    gradients = torch.empty_like(leaving)
    for at in _batches(layers, leaving):
        with torch.enable_grad():
            hidden = leaving[at].to(layers.device).requires_grad_()
            with short_layers(layers.device):
                logits = layers.logits(hidden).float()
            known = logits.log_softmax(dim=-1)
            drawn = [_drawn(window, seed) for window, seed in zip(known.detach(), seeds[at], strict=True)]
            chosen = known.gather(2, torch.stack(drawn)).sum()
        gradients[at] = torch.autograd.grad(chosen, hidden)[0].cpu()
    return gradients


def _drawn(known: Float[Tensor, "window vocabulary"], seed: int) -> Int[Tensor, "window 1"]:
    """A token for each place of a window, drawn from its log-probabilities.

    The first token at which the sum of probabilities passes a random number: one number for each place, where
    `torch.multinomial` draws one for each word of the vocabulary.
    """
    sums = known.exp().cpu().double().cumsum_(dim=-1)
    total = sums[:, -1:]
    drawn = torch.rand(total.shape, dtype=sums.dtype, generator=torch.Generator().manual_seed(seed)) * total
    # a number that was rounded up to the total passes no sum
    return torch.searchsorted(sums, drawn, right=True).clamp_(max=sums.shape[-1] - 1).to(known.device)


@dataclass
class _Backward:
    """One layer, to be gone through backwards."""

    layers: Layers
    layer: int
    kinds: tuple[Sublayer, ...]

    def through(self, entering: Stream, leaving: Stream) -> tuple[dict[Sublayer, Metric], Stream]:
        """The metrics of the layer's sublayers, and the gradients at what entered it.

        `entering` are the hidden states that enter the layer, and `leaving` the gradients at those that leave it.
        """
        module = self.layers.build(self.layer)
        empty = torch.zeros(leaving.shape[-1], leaving.shape[-1], dtype=torch.float64, device=self.layers.device)
        sums = {kind: empty.clone() for kind in self.kinds}
        count = dict.fromkeys(self.kinds, 0)
        before = torch.empty_like(leaving)
        for at in _batches(self.layers, entering):
            hidden = entering[at].to(self.layers.device).requires_grad_()
            with torch.enable_grad(), _outputs(module, self._paths()) as outputs:
                left, seen = self._run(module, hidden)
            given = [outputs[self.layers.path(READOUT[kind])] for kind in self.kinds]
            back = leaving[at].to(left)
            first, *gradients = torch.autograd.grad(left, [hidden, *given], back)
            before[at] = first.cpu()
            for kind, gradient in zip(self.kinds, gradients, strict=True):
                size = hidden_with_output(self.layers, kind, hidden.detach(), left.detach(), seen).norm(dim=-1)
                rows = gradient.reshape(*size.shape, -1) * size[..., None]
                kept = rows[size <= OUTLIER * size.median(dim=-1, keepdim=True).values]
                sums[kind] += (kept.T @ kept).double()
                count[kind] += len(kept)
        means = {kind: processes.summed(sums[kind]) / processes.total(count[kind]) for kind in self.kinds}
        return {kind: self._metric(mean) for kind, mean in means.items()}, before

    def _paths(self) -> tuple[str, ...]:
        return tuple(self.layers.path(READOUT[kind]) for kind in self.kinds)

    def _run(self, module: nn.Module, hidden: Batch) -> tuple[Batch, Seen]:
        """Run the layer with gradients. What `hidden_with_output` needs of it is noted."""
        seen = Seen()
        watched = (*self._paths(), *([self.layers.path(Part.UP)] if Sublayer.FFN in self.kinds else []))
        with watching(module, watched, seen), short_layers(self.layers.device):
            left = self.layers.call(module, self.layer, hidden)
        return left, seen.detached().in_windows(hidden)

    def _metric(self, information: Float[Tensor, "hidden hidden"]) -> Metric:
        """The symmetric root of half of the Fisher information, in float32."""
        if not bool(torch.isfinite(information).all()):
            raise CalibrationError(f"the gradients at layer {self.layer} are not finite. Plan with --no-probe.")
        values, vectors = torch.linalg.eigh(information / 2)
        root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
        return root.float()


@contextmanager
def _outputs(module: nn.Module, paths: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """A block within which the outputs of the modules at these paths are kept, with their history."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str, _: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        # A copy goes on, so that a layer may add to it in place.
        outputs[path] = output
        return output.clone()

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(module.get_submodule(path).register_forward_hook(partial(keep, path)))
        yield outputs
