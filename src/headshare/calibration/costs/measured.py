"""Cost curves by the change of the model's predictions, measured on held-out text.

The same squared error costs predictions four times as much in one layer as in another (docs/experiments.md). So each
cost curve is followed a few steps at a time. Its layer alone gives the units up, the output projections of both
sublayers are refitted, and the dense model's later layers go on from there. The cost is then the Kullback-Leibler
divergence of the dense model's next-token distribution from the changed one's, in nats a token, averaged over windows
that nothing was fitted to. Costs of steps add up to more than the loss, as the refit of later layers makes up for part.
"""

import math
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from headshare.architecture.model_class import reads_images
from headshare.calibration import processes
from headshare.calibration.costs.actions import REMOVE, Order
from headshare.calibration.costs.curves import CostCurve, CostCurves, repriced
from headshare.calibration.costs.local import HELD_OUT, PRICED_TOKENS, fitted_windows
from headshare.calibration.costs.sublayer import READOUT, DenseLayer
from headshare.calibration.costs.surgery import Gram, gram_of, refitted_through, refitted_without
from headshare.calibration.costs.to_plan import plan_for_steps
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Stream
from headshare.calibration.refit.refitter import Refitter
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import ArchitectureError, CalibrationError
from headshare.plan.units import Part, Sublayer
from headshare.precision import short_layers, short_products
from headshare.progress import track
from headshare.sharing.factors import principal_values
from headshare.text.tokens import Calibration

# The tokens that are run to measure, and one in how many of them has its predictions compared.
PROBED_TOKENS = 2048
EVERY = 4
# changed models whose predictions are made at once
TOGETHER = 4

# A curve is measured where these shares of its steps are taken, or after each step if there are no more of them.
MARKS = (0.1, 0.35, 1.0)


def probe_prices(
    dense: Checkpoint,
    calibration: Calibration,
    prices: CostCurves,
    *,
    tokens: int = PRICED_TOKENS,
    held_out: float = HELD_OUT,
    probed: int = PROBED_TOKENS,
    ffn: bool = True,
    device: str = "cpu",
    done: MutableMapping[int, list[CostCurve]] | None = None,
) -> CostCurves:
    """Measure cost curves: the same curves with costs in nats a token.

    Each curve is measured after the shares of its steps that `MARKS` names. Steps in between share the measured cost in
    proportion to the costs that they had. Curves of ties that follow a removal are not measured; their
    costs are derived from those of the removal. Refits are made on the windows that `price_units` fits to with the same
    `tokens` and `held_out`, with `ffn` of both output projections. Predictions are compared for every fourth of the
    `probed` tokens, in other windows. Products have reduced precision where the machine is faster with it. Layers that
    are in `done` are not measured again; every other layer is put into it.

    Raises:
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer, or predicts no next token.
        CalibrationError: if there are too few windows, or predictions are not finite.
    """
    curves = {} if done is None else done
    if not predicts(dense):
        raise ArchitectureError(
            f"{dense.name} predicts no next token, so that cannot be measured. Plan without probing."
        )
    layers = {curve.layer for curve in prices.curves}
    if layers - set(curves):
        with short_products(), torch.no_grad():
            fitted = check_windows(calibration, tokens=tokens, held_out=held_out)
            walk = _Walk(dense, calibration.mixed(), prices, fitted, probed, ffn, device)
            for _ in track(walk.measure(curves), "measuring", walk.layers.count):
                pass
    in_order = tuple(curve for number in sorted(layers) for curve in curves[number])
    return replace(prices, curves=in_order, in_nats=True)


def check_windows(calibration: Calibration, *, tokens: int = PRICED_TOKENS, held_out: float = HELD_OUT) -> int:
    """The number of windows that are fitted to.

    Raises:
        CalibrationError: if there are too few windows to fit to, or none is left to measure on.
    """
    windows = len(calibration.tokens)
    fitted = fitted_windows(calibration, tokens, held_out)
    if fitted < 2 or fitted >= windows:
        raise CalibrationError(
            f"{calibration.source} gave {windows} windows, of which {fitted} would be fitted to; measuring needs "
            "two of those and one more. Ask for more tokens, for a smaller window, or for --no-probe."
        )
    return fitted


def predicts(checkpoint: Checkpoint) -> bool:
    """True if predictions can be measured layer by layer: the model predicts the next token, and reads text alone."""
    return checkpoint.predicts_next and not reads_images(checkpoint.model_class)


class _Walk:
    """A walk through the dense model, with the hidden states of the windows to fit to and of those to measure on."""

    def __init__(
        self,
        dense: Checkpoint,
        calibration: Calibration,
        prices: CostCurves,
        fitted: int,
        probed: int,
        ffn: bool,
        device: str,
    ) -> None:
        windows, window = calibration.tokens.shape
        self.dense = dense
        self.prices = prices
        self.ffn = ffn
        self.device = device
        self.fit = replace(calibration, tokens=calibration.tokens[:fitted])
        self.layers = Layers(dense, device=device, head=True)

        # The last windows are measured on; none of them is fitted to.
        measured = min(windows - fitted, max(1, probed // window))
        self.measured = self.layers.start(processes.mine(calibration.tokens[-measured:]))

        # Removals are refitted from sums over the windows to fit to, once for all marks of a layer.
        self.to_fit = fitted

        # Every refit orders these windows alike: those that it fits to first, then those that it holds out.
        self.fitted = self.layers.start(self._refitter(prices.curves[0], 0).tokens)

        # The dense model's own last hidden states, which all predictions are compared with.
        self.last = self._through(range(self.layers.count), [self.measured.clone()])[0][:, ::EVERY]

    def measure(self, done: MutableMapping[int, list[CostCurve]]) -> Iterator[int]:
        """Measure the curves of each layer that is not in `done`, and put them there."""
        for layer in range(self.layers.count):
            curves = [curve for curve in self.prices.curves if curve.layer == layer]
            if curves and layer not in done:
                done[layer] = processes.agreed(self._priced(layer, curves))
            # Later layers are measured on the dense layer's output, whatever was measured for this layer.
            dense = self.layers.build(layer)
            for stream in (self.fitted, self.measured):
                self.layers.run_over(dense, layer, stream)
            yield layer

    def _priced(self, layer: int, curves: Sequence[CostCurve]) -> list[CostCurve]:
        """The curves of this layer with measured costs."""
        # Ties in the order of removal follow the removal's costs; all other curves are measured at their marks.
        leaders = {curve: leader for curve in curves if (leader := leader_of(curve, curves))}
        marks = [(curve, steps) for curve in curves if curve not in leaders for steps in marked(len(curve.steps))]

        # The layer alone is changed and refitted. Its output then goes through the dense layers after it, for all
        # changes together, so that each of those layers is built once.
        changed = _Changed(self.layers, layer, self.prices, self.fitted[: self.to_fit])
        streams = []
        for curve, steps in marks:
            if all(action.removes for action in curve.actions):
                module = changed.without(curve, steps)
            elif curve.steps[steps - 1].width:
                module = changed.narrowed(curve, curve.steps[steps - 1].width)
            else:
                module = self._refitter(curve, steps).refitted(layer, self.fitted)
            with short_layers(self.layers.device):
                streams.append(self.layers.run_over(module, layer, self.measured.clone()))
        lost = self._divergences(self._through(range(layer + 1, self.layers.count), streams))
        if not all(map(math.isfinite, lost)):
            raise CalibrationError(f"what layer {layer} does to predictions is not finite on {self.fit.source}.")

        # Steps between two marks share the measured cost. Curves that follow a removal then take its new costs.
        measured: dict[CostCurve, dict[int, float]] = {}
        for (curve, steps), loss in zip(marks, lost, strict=True):
            measured.setdefault(curve, {})[steps] = loss
        after = {curve: repriced(curve, losses) for curve, losses in measured.items()}
        return [
            beside(curve, leaders[curve], after[leaders[curve]]) if curve in leaders else after[curve]
            for curve in curves
        ]

    def _refitter(self, curve: CostCurve, steps: int) -> Refitter:
        """A refit of the model that takes the first steps of this curve alone."""
        plan = plan_for_steps(self.prices, curve, steps)
        return Refitter(self.dense, plan, self.fit, ffn=self.ffn, device=self.device, layers=self.layers)

    # ---- running

    def _through(self, layers: Sequence[int], streams: Sequence[Stream]) -> Sequence[Stream]:
        """Run these dense layers over all of the streams of hidden states together."""
        together = torch.cat(list(streams))
        for layer in layers:
            module = self.layers.build(layer)
            with short_layers(self.layers.device):
                self.layers.run_over(module, layer, together)
        return torch.split(together, [len(stream) for stream in streams])

    def _divergences(self, streams: Sequence[Stream]) -> list[float]:
        """KL(dense | changed) of each stream of last hidden states, in nats a token.

        It is sum_i p_i log p_i - sum_i p_i z_i + log sum_i exp z_i, with p the dense model's probabilities and z the
        changed one's logits. Those of `TOGETHER` streams and one window are in memory at a time: the head is read once
        for all of them.
        """
        totals = torch.zeros(len(streams), dtype=torch.float64)
        for window, last in enumerate(self.last):
            expected = self.layers.logits(last[None])[0].log_softmax(dim=-1)
            probability = expected.exp()
            own = torch.linalg.vecdot(probability, expected).double().sum()
            for first in range(0, len(streams), TOGETHER):
                some = torch.stack([stream[window, ::EVERY] for stream in streams[first : first + TOGETHER]])
                for number, logits in enumerate(self.layers.logits(some), start=first):
                    # the divergence is the same, and no exponential too large
                    logits -= logits.amax(dim=-1, keepdim=True)
                    lost = logits.logsumexp(dim=-1) - torch.linalg.vecdot(probability, logits)
                    totals[number] += float(own + lost.double().sum())
        tokens = processes.total(self.last.shape[0] * self.last.shape[1])
        return [
            max(total / tokens, 0.0) for total in processes.summed(totals).tolist()
        ]  # rounding may give less than zero; NaN stays


class _Changed:
    """A dense layer that goes without units, its output projection refitted on what enters it in the dense model."""

    def __init__(self, layers: Layers, layer: int, prices: CostCurves, entering: Stream) -> None:
        self.layers = layers
        self.layer = layer
        self.prices = prices
        self.entering = entering
        self.grams: dict[Sublayer, Gram] = {}

    def without(self, curve: CostCurve, steps: int) -> nn.Module:
        """The layer without the units of the first steps of a curve of removals."""
        module, weight = self._readout(curve.kind)
        place = self.prices.layout_of(curve).parts[READOUT[curve.kind]]
        spans = [place.span(group) for step in curve.steps[:steps] for group in step.groups]
        gone = torch.cat([torch.arange(start, stop) for start, stop in spans]).to(weight.device)
        weight.copy_(refitted_without(self._gram(module, curve.kind), weight, gone))
        return module

    def narrowed(self, curve: CostCurve, width: int) -> nn.Module:
        """The layer with values that have so many dimensions in each head, of the directions that a refit would keep.

        W_o alone is changed: it reads no others.
        """
        module, weight = self._readout(curve.kind)
        gram = self._gram(module, curve.kind)
        layout = self.prices.layout_of(curve)
        dims = layout.parts[Part.V].rows
        into = principal_values(gram, weight, layout.groups, dims).into[:, :width]
        heads = into.repeat_interleave(weight.shape[1] // (layout.groups * dims), dim=0)
        whole = into.new_zeros(len(heads), width, len(heads), dims)
        whole.diagonal(dim1=0, dim2=2).copy_(heads.permute(1, 2, 0))
        weight.copy_(refitted_through(gram, weight, whole.view(len(heads) * width, -1)))
        return module

    def _readout(self, kind: Sublayer) -> tuple[nn.Module, Tensor]:
        """The layer as it is, and the matrix of its output projection, to be changed in place."""
        module = self.layers.build(self.layer)
        projection = module.get_submodule(self.layers.path(READOUT[kind]))
        assert isinstance(projection.weight, Tensor)
        return module, projection.weight.data.T if self.layers.in_out else projection.weight.data

    def _gram(self, module: nn.Module, kind: Sublayer) -> Gram:
        """The Gram matrix of the inputs of the dense layer's output projection, weighted as in `SublayerData`."""
        if kind not in self.grams:
            dense = DenseLayer(self.layers.checkpoint, self.layers, self.layer, module, self.entering)
            seen, _ = dense.look((kind,))
            self.grams[kind] = gram_of(seen[kind].inputs)
        return self.grams[kind]


def marked(steps: int) -> list[int]:
    """The numbers of steps after which a curve is measured: `MARKS` of them, at least one, and all."""
    return sorted({max(1, round(share * steps)) for share in MARKS} if steps else ())


def leader_of(curve: CostCurve, curves: Sequence[CostCurve]) -> CostCurve | None:
    """The removal curve that a curve of ties follows: it removes the same units in the same order.

    None for a curve whose action does not follow removals, or if no such removal is among these curves.
    """
    if len(curve.actions) != 1 or any(action.order is not Order.REMOVAL for action in curve.actions):
        return None
    order = [step.groups for step in curve.steps]
    removals = (other for other in curves if other.kind is curve.kind and other.actions == {REMOVE})
    return next((other for other in removals if [step.groups for step in other.steps[: len(order)]] == order), None)


def beside(curve: CostCurve, before: CostCurve, after: CostCurve) -> CostCurve:
    """A curve of ties with costs derived from the removal of the same units, before and after it was measured.

    Ties make up for a part of the removal's error. They are taken to make up for the same part of its measured cost,
    times the action's `lasting`.
    """
    (action,) = curve.actions
    measured: dict[int, float] = {}
    own = old = new = 0.0
    for number, (step, removed, priced) in enumerate(zip(curve.steps, before.steps, after.steps, strict=False), 1):
        own += step.price
        old += removed.price
        new += priced.price
        measured[number] = new * (1 - action.lasting * (1 - own / old)) if old > 0 else new
    return repriced(curve, measured)
