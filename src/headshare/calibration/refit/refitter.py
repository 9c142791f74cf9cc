"""Refit the readouts of a shared model, layer by layer, so that its hidden states follow the dense model's.

Two streams of hidden states are kept over the calibration tokens, the dense model's h_t and the shared model's h_s. At
each readout, with Z its inputs in the shared model, the target is Y = (h_t + out_t) - h_s: the output that would bring
the shared stream back to the dense one. Then both streams advance. Layers before the first tie stay as they are.

With `steps`, a layer's other matrices follow by gradient steps before the streams advance (`reconstruction.py`); the
readouts are then fitted on the tokens that are not held out, so that those can say how many steps are best.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Stream
from headshare.calibration.refit.normal_equations import NormalEquations, token_weights
from headshare.calibration.refit.reconstruction import RATE, Wanted, reconstruct
from headshare.calibration.refit.regression import Fitted, Lent, Narrow, assembled, fit_readout
from headshare.calibration.refit.residuals import Residual, residual_of, watched
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CalibrationError, CheckpointError, PlanError
from headshare.plan.low_rank import factor_names
from headshare.plan.plan import SharePlan
from headshare.plan.tensors import bias_name, gapped_tensors
from headshare.plan.ties import Selection, scale_name
from headshare.plan.units import Part
from headshare.progress import track
from headshare.sharing.expanded import ExpandedTensors
from headshare.sharing.factors import join_columns, split_columns
from headshare.text.tokens import Calibration

HELD_OUT = 0.125


@dataclass(frozen=True)
class Step:
    """One readout refitted, or one layer reconstructed. Errors are squared, on held-out tokens, as parts of the
    target's own size.

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
    """New tensors by name, whole and in the checkpoint's own orientation and type, scales included; and how each came
    about. What is not listed stays as it was."""

    tensors: MutableMapping[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What is recorded of it; no tensor."""
        return {"steps": [asdict(step) for step in self.steps]}


@dataclass
class _Streams:
    """What enters the next layer in each model. They are one tensor as long as the two models are the same."""

    dense: Stream
    shared: Stream


def refit(
    dense: Checkpoint,
    plan: SharePlan,
    calibration: Calibration,
    *,
    ffn: bool = True,
    steps: int = 0,
    device: str = "cpu",
) -> Refit:
    """The readouts that make up for a plan's ties: W_o of every layer from the first tie on, and with `ffn` W_down too;
    and after so many gradient `steps` a layer, the other weight matrices of its attention and, with `ffn`, of its
    feed-forward.

    Raises:
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
        PlanError: if the plan is for another model.
        CalibrationError: if the calibration has fewer than two windows.
    """
    refitter = Refitter(dense, plan, calibration, ffn=ffn, steps=steps, device=device)
    for _ in track(refitter.advance(), "refitting", refitter.layers.count):
        pass
    return refitter.result


class Refitter:
    """One refit on its way. Each turn of `advance` is one layer; `result` holds what is done.

    With `shared`, a checkpoint of this plan, the shared model is that one, trained or refitted as it may be, and its
    readouts are pulled to what they are there. Without, it is the dense model shared by the plan. `layers` are the
    dense checkpoint's, if they are there already.

    Raises:
        CheckpointError, ArchitectureError: if a model cannot be walked layer by layer.
        PlanError: if the plan is for another model, or not that of the shared checkpoint.
        CalibrationError: if the calibration has fewer than two windows, or `steps` is below zero.
    """

    def __init__(
        self,
        dense: Checkpoint,
        plan: SharePlan,
        calibration: Calibration,
        *,
        ffn: bool = True,
        steps: int = 0,
        device: str = "cpu",
        shared: Checkpoint | None = None,
        layers: Layers | None = None,
    ) -> None:
        dense.require_dense("refit it")
        if steps < 0:
            raise CalibrationError(f"a layer cannot be reconstructed in {steps} steps. Ask for 0 or more.")
        if shared is not None and shared.plan != plan:
            raise PlanError(f"{shared.name} was not shared by this plan. Give the plan in its config.json.")
        planned = ExpandedTensors.planned(dense, plan)
        self.weights = planned if shared is None else ExpandedTensors.of(shared)
        self.layers, self.rate = layers or Layers(dense, device=device), RATE
        self.shared_layers = self.layers if shared is None else Layers(shared, device=device)
        self.plan, self.gapped = plan, gapped_tensors(plan)
        fit, held = calibration.split(HELD_OUT)
        self.tokens, self.fitted_windows = torch.cat([fit.tokens, held.tokens]), len(fit.tokens)
        self.ffn, self.gradient_steps, self.seed = ffn and self.layers.ffn is not None, steps, calibration.seed
        first = plan.first_layer()
        self.first = self.layers.count if first is None else first
        self.next = 0
        self.result = Refit()
        self._streams: _Streams | None = None

    @torch.no_grad()
    def advance(self) -> Iterator[int]:
        """Walk the layers from the next on, and yield each as it is done."""
        for layer in range(self.next, self.layers.count):
            if self.first < self.layers.count:  # else there is nothing to make up for
                self._advance_over(layer, self._entering())
            self.next = layer + 1
            yield layer

    @torch.no_grad()
    def refitted(self, layer: int, entering: Stream) -> nn.Module:
        """The shared model's layer, refitted on what enters it in the dense model: the stream of `tokens`, which is
        left as it is. Whatever else the plan changes does not count, nor does anything of this for `advance`."""
        return self._fitted(layer, _Streams(entering.clone(), entering.clone()))

    def state(self) -> dict[str, Stream]:
        """Copies of the streams that enter the next layer: `dense` and `shared`. With `next` and `result`, all that
        `resume` needs."""
        streams = self._entering()
        return {"dense": streams.dense.clone(), "shared": streams.shared.clone()}

    def resume(
        self, layer: int, streams: Mapping[str, Tensor], tensors: MutableMapping[str, Tensor], steps: list[Step]
    ) -> None:
        """Go on at this layer, which another refitter of the same arguments would have done next, with its `state` and
        what its result held; what follows is the same bit for bit. `tensors` is taken over, and added to.

        Raises:
            CheckpointError: if the streams are not of this calibration.
        """
        for name in ("dense", "shared"):
            if name not in streams or streams[name].shape[:2] != self.tokens.shape:
                raise CheckpointError(
                    f"the refit to go on with has no stream '{name}' of these tokens. Start it again."
                )
        one = self.shared_layers is self.layers and layer <= self.first
        dense = streams["dense"].clone()
        self._streams = _Streams(dense, dense if one else streams["shared"].clone())
        self.next, self.result = layer, Refit(tensors, list(steps))

    # ---- the streams

    def _entering(self) -> _Streams:
        """The streams that enter the next layer."""
        if self._streams is None:
            dense = self.layers.start(self.tokens)
            one = self.shared_layers is self.layers
            self._streams = _Streams(dense, dense if one else self.shared_layers.start(self.tokens))
        return self._streams

    def _advance_over(self, layer: int, streams: _Streams) -> None:
        if layer < self.first:
            self.layers.run_over(self.layers.build(layer), layer, streams.dense, self._batches())
            if streams.shared is not streams.dense:
                self.shared_layers.run_over(self._built(layer), layer, streams.shared, self._batches())
            return
        if streams.shared is streams.dense:
            streams.shared = streams.dense.clone()
        module = self._fitted(layer, streams)
        if self.gradient_steps:
            self._reconstruct(layer, module, Wanted(streams.shared, streams.dense, self.fitted_windows))
        self.shared_layers.run_over(module, layer, streams.shared, self._batches())

    def _fitted(self, layer: int, streams: _Streams) -> nn.Module:
        """The shared model's layer with its readouts fitted. The dense stream advances over it, the shared does not."""
        dense, shared = self.layers.build(layer), self._built(layer)
        residual, target = self._fit_attention(layer, dense, shared, streams)
        if target is not None:
            self._fit_feed_forward(layer, shared, streams, residual, target)
        return shared

    def _built(self, layer: int) -> nn.Module:
        """The shared model's layer, as it is before it is refitted."""
        if self.shared_layers is not self.layers:
            return self.shared_layers.build(layer)
        names = {place.name(layer) for layout in self.plan.layouts for place in layout.parts.values()}
        changed = [name for name in sorted(names & set(self.gapped)) if self._loses_some(name)]
        return self.layers.build(layer, {name: self.weights.read(name) for name in changed})

    def _loses_some(self, name: str) -> bool:
        return not self.gapped[name].is_whole

    def _batches(self) -> Iterator[slice]:
        """Windows that are run together; none holds both fitted and held-out ones."""
        for some in (range(self.fitted_windows), range(self.fitted_windows, len(self.tokens))):
            yield from self.layers.batches(some, self.tokens.shape[1])

    # ---- the two fits of a layer

    def _fit_attention(
        self, layer: int, dense: nn.Module, shared: nn.Module, streams: _Streams
    ) -> tuple[Residual, Stream | None]:
        """Fit W_o and advance the dense stream. Returns how the layer adds, and where W_down should bring the shared
        stream to, if it is fitted too."""
        path, sums = self.layers.path(Part.O), self._sums(shared, Part.O)
        target = torch.empty_like(streams.dense) if self.ffn else None
        residual: Residual | None = None
        for at in self._batches():
            entered, own = (stream[at].to(self.layers.device) for stream in (streams.dense, streams.shared))
            left, seen = self.layers.run(dense, layer, entered, watched(self.layers))
            residual = residual or residual_of(self.layers, entered, left, seen)
            inputs = self.shared_layers.run_to(shared, layer, own, path).inputs[path]
            carried = residual.carried(entered, seen)
            weights = token_weights(entered if carried is None else carried)
            sums[at.start >= self.fitted_windows].add(inputs, residual.wanted_of_o(entered, own, seen), weights)
            if target is not None:
                target[at] = residual.target(entered, seen).cpu()
            streams.dense[at] = left.cpu()  # what entered may be a view of it
        self._solve(layer, Part.O, shared, sums)
        assert residual is not None
        return residual, target

    def _fit_feed_forward(
        self, layer: int, shared: nn.Module, streams: _Streams, residual: Residual, target: Stream
    ) -> None:
        """Fit W_down. The dense stream has advanced over the layer, the shared one has not."""
        path, sums = self.layers.path(Part.DOWN), self._sums(shared, Part.DOWN)
        before = tuple(one for one in watched(self.layers) if one != path)
        for at in self._batches():
            own = streams.shared[at].to(self.layers.device)
            seen = self.shared_layers.run_to(shared, layer, own, path, before)
            wanted = residual.wanted_of_down(target[at].to(self.layers.device), own, seen)
            weights = token_weights(streams.dense[at].to(self.layers.device))
            sums[at.start >= self.fitted_windows].add(seen.inputs[path], wanted, weights)
        self._solve(layer, Part.DOWN, shared, sums)

    def _sums(self, module: nn.Module, part: Part) -> tuple[NormalEquations, NormalEquations]:
        """Empty sums for this readout: of fitted and of held-out tokens."""
        weight, bias = self._readout(module, part)
        outputs, inputs = weight.shape
        fit, held = (NormalEquations(inputs, outputs, bias is not None, self.layers.device) for _ in range(2))
        return fit, held

    def _readout(
        self, module: nn.Module, part: Part
    ) -> tuple[Float[Tensor, "outputs inputs"], Float[Tensor, " outputs"] | None]:
        """The weight and the bias of a built layer's readout, to be looked at or copied to."""
        found = module.get_submodule(self.layers.path(part))
        weight, bias = found.weight, getattr(found, "bias", None)
        assert isinstance(weight, Tensor)
        return (weight.T if self.layers.in_out else weight), bias

    def _solve(self, layer: int, part: Part, shared: nn.Module, sums: tuple[NormalEquations, NormalEquations]) -> None:
        """Fit the readout, put it into the shared layer as it will be stored, and keep it."""
        name, (weight, bias) = self.layers.tensor(part, layer), self._readout(shared, part)
        start = weight.double() if bias is None else torch.cat([weight, bias[:, None]], dim=1).double()
        free, lent, narrow = self._free(name, start.shape[1]), self._lent(name), self._narrow(name)
        prior = start.clone()
        if self.shared_layers is self.layers:
            prior[:, self._borrowed_features(layer, part)] = 0
        largest = torch.finfo(self._dtype(name)).max
        found = fit_readout(
            *sums, start, free, lent, narrow, prior=prior, largest=largest, all_tokens=not self.gradient_steps
        )
        if lent or not found.why_kept:
            rounded = found.scales.to(self._dtype(name))
            exact = assembled(found.weight.to(self._dtype(name)).double(), free, lent, rounded.double())
            for unit, product in zip(narrow, self._kept_factors(name, found, narrow), strict=True):
                exact[:, unit.columns] = product
            self._keep(name, exact, rounded, weight, bias)
        self.result.steps.append(_step(name, found, sum(one.left_out for one in sums)))

    def _kept_factors(
        self, name: str, found: Fitted, narrow: tuple[Narrow, ...]
    ) -> list[Float[Tensor, "outputs inputs"]]:
        """Add the factors of a readout's factored units to the result, and return their products as they are stored."""
        dtype = self._dtype(name)
        split = [split_columns(found.weight[:, one.columns], one.rank) for one in narrow]
        rounded = [(factor_in.to(dtype), factor_out.to(dtype)) for factor_in, factor_out in split]
        if narrow:
            inner, outer = factor_names(name)
            self.result.tensors[inner] = torch.cat([factor_in for factor_in, _ in rounded]).cpu()
            self.result.tensors[outer] = torch.cat([factor_out for _, factor_out in rounded], dim=1).cpu()
        return [join_columns(factor_in.double(), factor_out.double()) for factor_in, factor_out in rounded]

    def _dtype(self, name: str) -> torch.dtype:
        """What this tensor of the shared model is stored as."""
        return self.weights.checkpoint.tensors[name].torch_dtype

    def _keep(
        self,
        name: str,
        exact: Float[Tensor, "outputs inputs"],
        scales: Float[Tensor, " scaled"],
        weight: Float[Tensor, "outputs inner"],
        bias: Float[Tensor, " outputs"] | None,
    ) -> None:
        """Add a readout to the result, and copy it to the built layer's weight and bias. `exact` holds the numbers that
        are stored, times the scales, and the bias last; a layer computes with these products, a file rounds them."""
        whole = exact if bias is None else exact[:, :-1]
        weight.copy_(whole)
        stored = {name: (whole.T if self.layers.in_out else whole).to(self._dtype(name)).contiguous()}
        if bias is not None:
            stored[bias_name(name)] = exact[:, -1].to(self._dtype(bias_name(name)))
            bias.copy_(stored[bias_name(name)])
        if scales.numel():
            stored[scale_name(name)] = scales
        self.result.tensors.update({key: value.cpu() for key, value in stored.items()})

    # ---- the gradient steps of a layer

    def _reconstruct(self, layer: int, module: nn.Module, wanted: Wanted) -> None:
        """Change the layer's weight matrices, put them into it as they will be stored, and keep them."""
        weights = self._matrices(layer, module)
        steps, seed, rate = self.gradient_steps, self.seed, self.rate
        found = reconstruct(
            self.shared_layers, layer, module, wanted, weights, self._own, steps=steps, seed=seed, rate=rate
        )
        if found.step:
            for name, weight in found.weights.items():
                own, rounded = self._own(name, weight), weight.to(self._dtype(name))
                self.result.tensors[name] = rounded.cpu()
                weights[name].copy_(torch.where(own, rounded.to(weight), weights[name]))
        base = self.layers.tensor(Part.O, layer).removesuffix(f".{self.layers.path(Part.O)}.weight")
        note = f"{steps} gradient steps, " + (f"best after {found.step}" if found.step else "none was better")
        self.result.steps.append(Step(base, None, found.error_before, found.error_after, note))

    def _matrices(self, layer: int, module: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of a built layer's parts, by name."""
        found = {}
        for name, path in self.layers.tensors_of(layer, ffn=self.ffn).items():
            weight = module.get_submodule(path).weight
            assert isinstance(weight, nn.Parameter)
            found[name] = weight
        return found

    def _own(self, name: str, weight: Tensor) -> Bool[Tensor, "..."]:
        """Which of a weight's numbers it stores and nobody borrows: not those of donors or recipients, nor what is
        removed or a product."""
        if name not in self.gapped:
            return torch.ones_like(weight, dtype=torch.bool)
        own, tensor = torch.zeros_like(weight, dtype=torch.bool), self.gapped[name]
        for start, stop in tensor.kept():
            own.narrow(tensor.axis, start, stop - start).fill_(value=True)
        for gap in (gap for other in self.gapped.values() for gap in other.gaps if gap.donor == name):
            own.narrow(tensor.axis, gap.donor_start, gap.stop - gap.start).fill_(value=False)
        return own

    # ---- what the plan says of a readout

    def _free(self, name: str, size: int) -> Int[Tensor, " free"]:
        """Inputs whose columns this readout stores; the bias, where there is one, is the last."""
        taken = torch.zeros(size, dtype=torch.bool)
        if name in self.gapped:
            for start, stop, *_ in (
                *self.gapped[name].gaps,
                *self.gapped[name].removed,
                *self.gapped[name].factored,
            ):
                taken[start:stop] = True
        return (~taken).nonzero()[:, 0].to(self.layers.device)

    def _lent(self, name: str) -> tuple[Lent, ...]:
        """Inputs whose columns are a donor's, which may have been refitted by now."""
        if name not in self.gapped:
            return ()
        gapped, scale = self.gapped[name], self.weights.scale(name)
        donors = {donor: self._donor(donor) for donor in {gap.donor for gap in gapped.gaps}}
        lent, used = [], 0
        for gap in gapped.gaps:
            inputs = torch.arange(gap.start, gap.stop, device=self.layers.device)
            columns = donors[gap.donor][:, gap.donor_start : gap.donor_start + len(inputs)]
            scaled, own = (gap.start, gap.stop) in gapped.scaled, None
            if scaled and scale is not None:
                own = scale[used : used + len(inputs)].to(columns)
                used += len(inputs)
            lent.append(Lent(inputs, columns, scaled, own))
        return tuple(lent)

    def _narrow(self, name: str) -> tuple[Narrow, ...]:
        """Inputs whose columns are stored as a product."""
        factored = self.gapped[name].factored if name in self.gapped else ()
        return tuple(Narrow(torch.arange(a, b, device=self.layers.device), rank) for a, b, rank in factored)

    def _donor(self, name: str) -> Float[Tensor, "outputs inputs"]:
        """A readout as the shared model has it now."""
        whole = self.result.tensors[name] if name in self.result.tensors else self.weights.read(name)
        return (whole.T if self.layers.in_out else whole).to(self.layers.device, torch.float64)

    def _borrowed_features(self, layer: int, part: Part) -> Int[Tensor, " borrowed"]:
        """Inputs that another layer's v (or up) makes: the readout's own columns say nothing about them."""
        made = Part.V if part is Part.O else Part.UP
        inputs = self._whole_readout(part)
        borrowed = [
            torch.arange(*_span(selection, inputs, tie.recipient.group))
            for selection in self.plan.selections
            if made in selection.layout.parts
            for tie in selection.ties
            if tie.recipient.layer == layer
        ]
        return torch.cat([torch.zeros(0, dtype=torch.long), *borrowed]).to(self.layers.device)

    def _whole_readout(self, part: Part) -> int:
        """How many inputs this readout has."""
        layout = self.layers.attention if part is Part.O else self.layers.ffn
        assert layout is not None
        return layout.parts[part].shape[layout.parts[part].axis]


def _span(selection: Selection, inputs: int, group: int) -> tuple[int, int]:
    """The readout's inputs that belong to this group of the selection's grid."""
    size = inputs // selection.layout.groups
    return group * size, (group + 1) * size


def _step(name: str, found: Fitted, left_out: int) -> Step:
    notes = [found.why_kept] if found.why_kept else []
    if left_out:
        notes.append(f"{left_out} tokens whose numbers are not finite were left out")
    ridge = None if found.why_kept else found.ridge
    return Step(name, ridge, found.error_before, found.error_after, "; ".join(notes))
