"""Prices of what layers could give up by what that does to the model's predictions, measured on held-out text.

The same squared error costs predictions four times as much in one layer as in another (docs/experiments.md). So each
path is followed a few steps at a time: its layer alone gives them up and is refitted, readouts of both halves, and the
dense model's later layers go on from there. The price is then the Kullback-Leibler divergence of the dense model's
next-token distribution from the changed one's, nats a token, averaged over windows that nothing was fitted to. Prices
of steps add up to more than the loss: the refit of later layers makes up for part of it.
"""

import math
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import replace

import torch

from headshare.architecture.families import WITH_IMAGES
from headshare.calibration.costs.actions import REMOVE, Order
from headshare.calibration.costs.curves import Path, Prices, Step
from headshare.calibration.costs.local import HELD_OUT, PRICED_TOKENS, fitted_windows
from headshare.calibration.costs.to_plan import plan_for_steps
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Stream
from headshare.calibration.refit.refitter import Refitter
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import ArchitectureError, CalibrationError
from headshare.precision import short_products
from headshare.progress import track
from headshare.text.tokens import Calibration
from headshare.text.windows import predicts_next

PROBED_TOKENS = 8192
EVERY = 4


def probe_prices(
    dense: Checkpoint,
    calibration: Calibration,
    prices: Prices,
    *,
    tokens: int = PRICED_TOKENS,
    held_out: float = HELD_OUT,
    probed: int = PROBED_TOKENS,
    ffn: bool = True,
    device: str = "cpu",
    done: MutableMapping[int, list[Path]] | None = None,
) -> Prices:
    """The same paths with prices in nats a token.

    Measured are the first 1, 2, 4, 8, ... steps of each path, and all of them; steps in between share what is measured
    in proportion to the prices they had. Paths of ties that follow a removal are not measured, but priced beside it.
    Refits are made on the windows that `price_units` fits to with the same `tokens` and `held_out`, with `ffn` of both
    readouts; the predictions of every fourth token are compared, in as many other windows as have `probed` tokens.
    Products are short ones where the machine has them. Layers that are in `done` are not measured again; each that is
    measured is put into it.

    Raises:
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer, or has no head.
        CalibrationError: if there are too few windows, or predictions are not finite.
    """
    found = {} if done is None else done
    if not predicts(dense):
        raise ArchitectureError(
            f"{dense.name} predicts no next token, so that cannot be measured. Plan without probing."
        )
    layers = {path.layer for path in prices.paths}
    if layers - set(found):
        with short_products(), torch.no_grad():
            fitted = check_windows(calibration, tokens=tokens, held_out=held_out)
            walk = _Walk(dense, calibration.mixed(), prices, fitted, probed, ffn, device)
            for _ in track(walk.measure(found), "measuring", walk.layers.count):
                pass
    paths = tuple(path for number in sorted(layers) for path in found[number])
    return replace(prices, paths=paths, in_nats=True)


def check_windows(calibration: Calibration, *, tokens: int = PRICED_TOKENS, held_out: float = HELD_OUT) -> int:
    """The number of windows that are fitted to, where there are enough to measure on others.

    Raises:
        CalibrationError: if there are too few.
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
    """Whether the checkpoint is of a model that predicts the next token, so that it can be probed."""
    names = checkpoint.config.get("architectures")
    known = [str(name) for name in names] if isinstance(names, list) else []
    return any(predicts_next(name, checkpoint.config) and not name.endswith(WITH_IMAGES) for name in known)


class _Walk:
    """The dense model's stream of the windows to fit to and of those to measure on, from layer to layer."""

    def __init__(
        self,
        dense: Checkpoint,
        calibration: Calibration,
        prices: Prices,
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
        measured = min(windows - fitted, max(1, probed // window))
        self.measured = self.layers.start(calibration.tokens[-measured:])
        # Every refit orders these windows alike: those that it fits to first, then those that it holds out.
        self.fitted = self.layers.start(self._refitter(prices.paths[0], 0).tokens)
        # The dense model's own last hidden states, which all predictions are compared with.
        self.last = self._through(range(self.layers.count), [self.measured.clone()])[0][:, ::EVERY]

    def measure(self, found: MutableMapping[int, list[Path]]) -> Iterator[int]:
        """Price the paths of each layer that is not among those found, and put them there."""
        for layer in range(self.layers.count):
            paths = [path for path in self.prices.paths if path.layer == layer]
            if paths and layer not in found:
                found[layer] = self._priced(layer, paths)
            # Later layers are measured on what the dense layer gives, whatever this one was found to cost.
            dense = self.layers.build(layer)
            for stream in (self.fitted, self.measured):
                self.layers.run_over(dense, layer, stream)
            yield layer

    def _priced(self, layer: int, paths: Sequence[Path]) -> list[Path]:
        """The paths of this layer with measured prices."""
        # Ties in the order of removal are priced beside the removal; all other paths are measured at their marks.
        leaders = {path: leader for path in paths if (leader := leader_of(path, paths))}
        marks = [(path, steps) for path in paths if path not in leaders for steps in marked(len(path.steps))]
        # The layer alone is changed and refitted. What it gives then goes through the dense layers after it, all
        # changes together, so that each of those is built once.
        streams = []
        for path, steps in marks:
            module = self._refitter(path, steps).refitted(layer, self.fitted)
            streams.append(self.layers.run_over(module, layer, self.measured.clone()))
        lost = self._divergences(self._through(range(layer + 1, self.layers.count), streams))
        if not all(map(math.isfinite, lost)):
            raise CalibrationError(f"what layer {layer} does to predictions is not finite on {self.fit.source}.")
        # Steps between two marks share what was measured; then those that follow a removal take its new prices.
        measured: dict[Path, dict[int, float]] = {}
        for (path, steps), loss in zip(marks, lost, strict=True):
            measured.setdefault(path, {})[steps] = loss
        after = {path: repriced(path, losses) for path, losses in measured.items()}
        return [beside(path, leaders[path], after[leaders[path]]) if path in leaders else after[path] for path in paths]

    def _refitter(self, path: Path, steps: int) -> Refitter:
        plan = plan_for_steps(self.prices, path, steps)
        return Refitter(self.dense, plan, self.fit, ffn=self.ffn, device=self.device, layers=self.layers)

    # ---- running

    def _through(self, layers: Sequence[int], streams: Sequence[Stream]) -> Sequence[Stream]:
        """Turn streams that enter these dense layers into those that leave them, in place."""
        for layer in layers:
            module = self.layers.build(layer)
            for stream in streams:
                self.layers.run_over(module, layer, stream)
        return streams

    def _divergences(self, streams: Sequence[Stream]) -> list[float]:
        """KL(dense | changed) of each of these, nats a token: sum_i p_i (log p_i - z_i) + log sum_i exp z_i, with p the
        dense model's probabilities and z the changed one's logits. One window's logits are held at a time."""
        totals = [0.0] * len(streams)
        for window, last in enumerate(self.last):
            expected = self.layers.logits(last[None]).log_softmax(dim=-1)
            probability = expected.exp()
            for number, stream in enumerate(streams):
                found = self.layers.logits(stream[window, None, ::EVERY])
                # The divergence is the same, and no exponential too large.
                found -= found.amax(dim=-1, keepdim=True)
                lost = (probability * (expected - found)).sum(dim=-1) + found.logsumexp(dim=-1)
                totals[number] += float(lost.double().sum())
        tokens = self.last.shape[0] * self.last.shape[1]
        return [max(total / tokens, 0.0) for total in totals]  # rounding may say less than nothing; NaN stays


def marked(steps: int) -> list[int]:
    """The numbers of steps after which a path is measured: 1, 2, 4, 8, ... and all."""
    if not steps:
        return []
    return [*(1 << power for power in range(steps.bit_length()) if 1 << power < steps), steps]


def leader_of(path: Path, paths: Sequence[Path]) -> Path | None:
    """The one of these paths that removes the units that this one ties, in the same order, by an action that follows
    removals."""
    if len(path.actions) != 1 or any(action.order is not Order.REMOVAL for action in path.actions):
        return None
    order = [step.groups for step in path.steps]
    removals = (one for one in paths if one.kind is path.kind and one.actions == {REMOVE})
    return next((one for one in removals if [step.groups for step in one.steps[: len(order)]] == order), None)


def beside(path: Path, before: Path, after: Path) -> Path:
    """A path of ties, priced beside the removal of the same units, which had these prices before and has those after:
    the part of the removal's error that ties make up for is the part of its price, as far as that is `lasting`."""
    (action,) = path.actions
    measured: dict[int, float] = {}
    own = old = new = 0.0
    for number, (step, removed, priced) in enumerate(zip(path.steps, before.steps, after.steps, strict=False), 1):
        own += step.price
        old += removed.price
        new += priced.price
        measured[number] = new * (1 - action.lasting * (1 - own / old)) if old > 0 else new
    return repriced(path, measured)


def repriced(path: Path, measured: dict[int, float]) -> Path:
    """The path with steps that add up to what was measured after some of them, the last included."""
    steps: list[Step] = []
    before = 0.0
    for end, lost in sorted(measured.items()):
        steps += _sharing(path.steps[len(steps) : end], lost - before)
        before = lost
    return replace(path, steps=tuple(steps))


def _sharing(steps: Sequence[Step], cost: float) -> Iterator[Step]:
    """The steps between two measurements, with their shares of what they cost together: in proportion to their prices,
    or to what they save where those do not add up to more than nothing. Donors keep their distance, in the new unit."""
    # A price below zero is no proportion of what was measured; bytes always are.
    old = [step.price for step in steps]
    if min(old) < 0 or not sum(old):
        old = [float(step.saved_bytes) for step in steps]
    for step, share in zip(steps, old, strict=True):
        price = cost * share / sum(old)
        scale = abs(price / step.price) if step.price else 1.0
        donors = tuple((unit, price + scale * (each - step.donors[0][1])) for unit, each in step.donors)
        yield replace(step, price=price, donors=donors)
