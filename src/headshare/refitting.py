"""Refit the readouts of a shared model, layer by layer, so that its hidden states follow the dense model's.

Two streams of hidden states are kept over the calibration tokens, the dense model's h_t and the shared model's h_s. At
each readout, with Z its inputs in the shared model, the target is Y = (h_t + out_t) - h_s: the output that would bring
the shared stream back to the dense one. Then both streams advance. Layers before the first tie stay as they are.
"""

from collections.abc import Iterator, MutableMapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headshare.assembly import overwritten, stream
from headshare.calibration import Calibration
from headshare.checkpoints import Checkpoint
from headshare.gaps import gapped_tensors, scale_name
from headshare.layout import Layout
from headshare.plans import Selection, SharePlan
from headshare.progress import track
from headshare.readouts import Fitted, Lent, NormalEquations, fit_readout
from headshare.streams import Batch, Layers, Seen, Stream
from headshare.units import Part

HELD_OUT = 0.125
ADDED = 1e-4


@dataclass(frozen=True)
class Step:
    """One readout refitted: errors are squared, relative to the target, on held-out tokens; `ridge` None: it was kept."""

    tensor: str
    ridge: float | None
    error_before: float
    error_after: float


@dataclass
class Refit:
    """New tensors by name, whole and in the checkpoint's own orientation, scales included; and how each came about."""

    tensors: MutableMapping[str, Tensor] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What is recorded of it; no tensor."""
        return {"steps": [asdict(step) for step in self.steps]}


class Residual(StrEnum):
    """How a layer adds its two outputs to what entered it; found by looking at the dense layer."""

    ADDED = "added"  # out = h + attention + feed-forward, one after the other or in parallel
    NORMED_SUM = "normed sum"  # out = norm(x + feed-forward), x = norm(h + attention), as in BERT
    NORMED_OUTPUT = "normed output"  # each output passes a norm before it is added, as in Gemma 2


@dataclass
class _Streams:
    """What enters the layer in each model, and what the shared model's second readout should bring its stream to."""

    dense: Stream
    shared: Stream
    target: Stream


def refit(
    dense: Checkpoint, plan: SharePlan, calibration: Calibration, *, ffn: bool = True, device: str = "cpu"
) -> Refit:
    """The readouts that make up for a plan's ties: W_o of every layer from the first tie on, and with `ffn` W_down too.

    Raises:
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
        CalibrationError: if the calibration has fewer than two windows.
    """
    refitter = Refitter(dense, plan, calibration, ffn=ffn, device=device)
    for _ in track(refitter.advance(), "refitting", refitter.layers.count):
        pass
    return refitter.result


class Refitter:
    """One refit on its way; each turn of `advance` is one layer."""

    def __init__(
        self, dense: Checkpoint, plan: SharePlan, calibration: Calibration, *, ffn: bool = True, device: str = "cpu"
    ) -> None:
        self.layers = Layers(dense, device=device)
        self.dense, self.plan, self.gapped = dense, plan, gapped_tensors(plan)
        fit, held = calibration.split(HELD_OUT)
        self.tokens, self.fitted_windows = torch.cat([fit.tokens, held.tokens]), len(fit.tokens)
        self.ffn = ffn and self.layers.ffn is not None
        changed = [tie.recipient.layer for selection in plan.selections for tie in selection.ties]
        changed += [layer for removal in plan.removals for layer in removal.removed]
        self.first = min(changed, default=self.layers.count)
        self.residual: Residual | None = None
        self.result = Refit()

    def advance(self) -> Iterator[int]:
        """Walk the layers, and yield each as it is done."""
        entering = self.layers.start(self.tokens)
        streams = _Streams(entering, entering.clone(), torch.empty_like(entering))
        for layer in range(self.layers.count):
            dense = self.layers.build(layer)
            if layer < self.first:
                self._pass(layer, dense, streams.dense)
                streams.shared.copy_(streams.dense)
            else:
                shared = self.layers.build(layer, self._overwritten(layer))
                self._fit_attention(layer, dense, shared, streams)
                if self.ffn:
                    self._fit_feed_forward(layer, shared, streams)
                self._pass(layer, shared, streams.shared)
            yield layer

    def _pass(self, layer: int, module: nn.Module, entering: Stream) -> None:
        for at in self._batches():
            entering[at] = self.layers.run(module, layer, entering[at])[0].cpu()

    def _batches(self) -> Iterator[slice]:
        """Windows that are run together; none holds both fitted and held-out ones."""
        size = self.layers.batch(self.tokens.shape[1])
        for start, stop in ((0, self.fitted_windows), (self.fitted_windows, len(self.tokens))):
            for first in range(start, stop, size):
                yield slice(first, min(first + size, stop))

    def _fit_attention(self, layer: int, dense: nn.Module, shared: nn.Module, streams: _Streams) -> None:
        """Fit W_o; advance the dense stream; note where the second readout should bring the shared one."""
        path = self.layers.path(Part.O)
        sums = self._sums(shared, path)
        for at in self._batches():
            entered, own = (stream[at].to(self.layers.device) for stream in (streams.dense, streams.shared))
            left, seen = self.layers.run(dense, layer, entered, self._watched())
            kind = self._residual(entered, left, seen)
            carried = self._carried(kind, entered, seen)
            wanted = seen.outputs[path] + (0 if kind is Residual.NORMED_OUTPUT else entered - own)
            inputs = self.layers.run_to(shared, layer, own, path).inputs[path]
            sums[at.start >= self.fitted_windows].add(inputs, wanted, _weights(entered if carried is None else carried))
            streams.dense[at] = left.cpu()
            if self.ffn:
                after = seen.outputs[self.layers.path(Part.DOWN)]
                streams.target[at] = (after if carried is None else after + carried).cpu()
        self._solve(layer, Part.O, shared, sums)

    def _fit_feed_forward(self, layer: int, shared: nn.Module, streams: _Streams) -> None:
        path, kind = self.layers.path(Part.DOWN), self.residual
        assert kind is not None
        sums = self._sums(shared, path)
        for at in self._batches():
            own = streams.shared[at].to(self.layers.device)
            seen = self.layers.run_to(shared, layer, own, path, self._watched()[:-1])
            carried = self._carried(kind, own, seen)
            wanted = streams.target[at].to(self.layers.device) - (0 if carried is None else carried)
            weights = _weights(streams.dense[at].to(self.layers.device))
            sums[at.start >= self.fitted_windows].add(seen.inputs[path], wanted, weights)
        self._solve(layer, Part.DOWN, shared, sums)

    def _watched(self) -> tuple[str, ...]:
        """W_o, what enters the feed-forward, and W_down last: what tells how the layer adds its outputs."""
        if self.layers.ffn is None:
            return (self.layers.path(Part.O),)
        return self.layers.path(Part.O), self.layers.path(Part.UP), self.layers.path(Part.DOWN)

    def _residual(self, entered: Batch, left: Batch, seen: Seen) -> Residual:
        if self.residual is None:
            outputs = [seen.outputs[path] for path in self._watched()[::2]]
            missed = (left - entered - sum(outputs)).abs().max() if len(outputs) == 2 else torch.zeros(())
            if self.layers.post_norm:
                self.residual = Residual.NORMED_SUM
            else:
                self.residual = Residual.ADDED if missed <= ADDED * left.abs().max() else Residual.NORMED_OUTPUT
        return self.residual

    def _carried(self, kind: Residual, entered: Batch, seen: Seen) -> Batch | None:
        """What the second readout is added to; None where a norm stands between."""
        match kind:
            case Residual.ADDED:
                return entered + seen.outputs[self.layers.path(Part.O)]
            case Residual.NORMED_SUM:
                return seen.inputs[self.layers.path(Part.UP)]
            case Residual.NORMED_OUTPUT:
                return None

    def _sums(self, module: nn.Module, path: str) -> tuple[NormalEquations, NormalEquations]:
        """Empty sums for the readout at this path: of fitted and of held-out tokens."""
        outputs, inputs = self._weight(module, path).shape
        bias = module.get_submodule(path).bias is not None if hasattr(module.get_submodule(path), "bias") else False
        device = self.layers.device
        return NormalEquations(inputs, outputs, bias, device), NormalEquations(inputs, outputs, bias, device)

    def _weight(self, module: nn.Module, path: str) -> Float[Tensor, "outputs inputs"]:
        weight = module.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        return weight.T if self.layers.in_out else weight

    def _solve(self, layer: int, part: Part, shared: nn.Module, sums: tuple[NormalEquations, NormalEquations]) -> None:
        """Fit the readout, put it into the shared layer as it will be stored, and keep it."""
        name, path = self.layers.tensor(part, layer), self.layers.path(part)
        fit, held = sums
        raw = self._weight(shared, path).double()
        bias = shared.get_submodule(path).bias
        if fit.bias:
            raw = torch.cat([raw, bias[:, None].double()], dim=1)
        free, lent = self._free(name, raw.shape[1]), self._lent(name)
        centre = raw.clone()
        centre[:, self._borrowed_features(layer, part)] = 0
        found = fit_readout(fit, held, centre, free, lent)
        self._keep(name, path, shared, found, fit.bias)
        ridge = None if found.ridge == float("inf") else found.ridge
        self.result.steps.append(Step(name, ridge, held.error(raw), found.error_after))

    def _keep(self, name: str, path: str, shared: nn.Module, found: Fitted, bias: bool) -> None:
        dtype = self.dense.tensors[name].torch_dtype
        module = shared.get_submodule(path)
        whole = found.weight[:, :-1] if bias else found.weight
        stored = {name: (whole.T if self.layers.in_out else whole).to(dtype).contiguous()}
        module.weight.copy_(stored[name])
        if bias:
            stored[bias_name(name)] = found.weight[:, -1].to(dtype)
            module.bias.copy_(stored[bias_name(name)])
        if found.scales.numel():
            stored[scale_name(name)] = found.scales.to(dtype)
        self.result.tensors.update({key: value.cpu() for key, value in stored.items()})

    def _overwritten(self, layer: int) -> dict[str, Tensor]:
        """The layer's tensors that the plan touches, with donors' numbers in place."""
        names = {place.name(layer) for layout in self.plan.layouts for place in layout.parts.values()}
        return {
            name: torch.cat(list(stream(overwritten(self.dense.tensors[name], self.gapped[name]), self.dense)))
            for name in names & set(self.gapped)
            if self.gapped[name].gaps or self.gapped[name].removed
        }

    def _free(self, name: str, size: int) -> Int[Tensor, " free"]:
        """Inputs whose columns this readout stores; the bias is one."""
        taken = torch.zeros(size, dtype=torch.bool)
        for gap in self.gapped[name].gaps if name in self.gapped else ():
            taken[gap.start : gap.stop] = True
        for first, last in self.gapped[name].removed if name in self.gapped else ():
            taken[first:last] = True
        return (~taken).nonzero()[:, 0].to(self.layers.device)

    def _lent(self, name: str) -> tuple[Lent, ...]:
        if name not in self.gapped:
            return ()
        gapped, lent = self.gapped[name], []
        for gap in gapped.gaps:
            donor = self.result.tensors[gap.donor] if gap.donor in self.result.tensors else self.dense.read(gap.donor)
            whole = donor.T if self.layers.in_out else donor
            columns = whole[:, gap.donor_start : gap.donor_start + gap.stop - gap.start]
            inputs = torch.arange(gap.start, gap.stop, device=self.layers.device)
            scaled = (gap.start, gap.stop) in gapped.scaled
            lent.append(Lent(inputs, columns.to(self.layers.device, torch.float64), scaled))
        return tuple(lent)

    def _borrowed_features(self, layer: int, part: Part) -> Int[Tensor, " borrowed"]:
        """Inputs that another layer's v (or up) makes: the readout's own columns say nothing about them."""
        made, layout = (Part.V, self.layers.attention) if part is Part.O else (Part.UP, self.layers.ffn)
        borrowed = [
            torch.arange(*_span(selection, part, layout, tie.recipient.group))
            for selection in self.plan.selections
            if made in selection.layout.parts
            for tie in selection.ties
            if tie.recipient.layer == layer
        ]
        return torch.cat([torch.zeros(0, dtype=torch.long), *borrowed]).to(self.layers.device)


def _span(selection: Selection, part: Part, layout: Layout | None, group: int) -> tuple[int, int]:
    """The readout's inputs that belong to this group of the selection's grid."""
    assert layout is not None
    inputs = layout.parts[part].shape[layout.parts[part].axis]
    size = inputs // selection.layout.groups
    return group * size, (group + 1) * size


def bias_name(weight_name: str) -> str:
    """The bias that belongs to this weight."""
    return weight_name.removesuffix("weight") + "bias"


def _weights(hidden: Batch) -> Float[Tensor, "batch window"]:
    """One over each token's squared size, so that the few tokens with enormous activations do not rule the fit."""
    return 1 / hidden.square().sum(dim=-1).clamp(min=torch.finfo(hidden.dtype).tiny)
