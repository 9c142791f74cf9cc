"""A sublayer of a dense layer on calibration text: the inputs of its output projection, also with donors' weights.

Every token is weighted by 1 / (|h|^2 tokens), where h is the hidden state with the sublayer's output added. So squared
errors of the output projection are relative to the hidden state and averaged over tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headshare.calibration import processes
from headshare.calibration.costs.least_squares import Inputs, Readout
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Seen, Stream
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.plan.layout import Layout
from headshare.plan.tensors import bias_name
from headshare.plan.units import Part, Sublayer

READOUT = {Sublayer.ATTENTION: Part.O, Sublayer.FFN: Part.DOWN}
# Units are alike in all places if moving them changes features by no more than this part of the largest.
ALIKE = 1e-4

Hidden = Float[Tensor, "batch window hidden"]


@dataclass(frozen=True)
class Weighted:
    """Inputs of an output projection, each token's times the square root of its weight, and these roots."""

    inputs: Inputs
    root: Float[Tensor, "tokens 1"]

    @classmethod
    def of(cls, batches: Sequence[tuple[Float[Tensor, "batch window channels"], Hidden]]) -> "Weighted":
        """Weighted inputs made of each batch's inputs and hidden states."""
        squares = torch.cat([hidden.square().sum(dim=-1).flatten() for _, hidden in batches])[:, None]
        tokens = processes.total(len(squares))
        root = (squares.clamp(min=torch.finfo(squares.dtype).tiny) * tokens).rsqrt()
        return cls(torch.cat([inputs.flatten(0, 1) for inputs, _ in batches]) * root, root)


@dataclass(frozen=True)
class DenseLayer:
    """A built layer of the dense model, and the hidden states that enter it."""

    checkpoint: Checkpoint
    layers: Layers
    number: int
    module: nn.Module
    stream: Stream

    def batches(self) -> Iterator[Hidden]:
        """Batches of the windows, each run at once."""
        return (self.stream[at] for at in self.layers.batches(range(len(self.stream)), self.stream.shape[1]))

    def look(self, kinds: Sequence[Sublayer]) -> tuple[dict[Sublayer, Weighted], Stream]:
        """Run the layer. Returns the inputs of these sublayers' output projections, and the layer's hidden states."""
        watched = [READOUT[kind] for kind in kinds] + [Part.UP] * (Sublayer.FFN in kinds)
        batches_of: dict[Sublayer, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in kinds}
        leaving = []
        for entering in self.batches():
            left, seen = self.layers.run(self.module, self.number, entering, tuple(map(self.layers.path, watched)))
            leaving.append(left.cpu())
            for kind, batches in batches_of.items():
                inputs = seen.inputs[self.layers.path(READOUT[kind])]
                batches.append((inputs, hidden_with_output(self.layers, kind, entering, left, seen)))
        return {kind: Weighted.of(batches) for kind, batches in batches_of.items()}, torch.cat(leaving)


def hidden_with_output(layers: Layers, kind: Sublayer, entering: Hidden, left: Hidden, seen: Seen) -> Hidden:
    """The hidden states with this sublayer's output added; before the norm where sublayers end in one.

    `entering` and `left` are those that enter and leave the layer, and `seen` is what its modules received and gave.
    """
    if kind is Sublayer.ATTENTION:
        return entering.to(layers.device) + seen.outputs[layers.path(Part.O)]
    if layers.post_norm:
        return seen.inputs[layers.path(Part.UP)] + seen.outputs[layers.path(Part.DOWN)]
    return left


@dataclass(frozen=True)
class UnitSizes:
    """Bytes of one unit of a layer: its weights by part, and its entries of biases.

    `scales` are the bytes of one scale for each channel that the output projection reads of the unit. `rank` are those
    of one more rank of a low-rank product for the unit's columns there.
    """

    parts: Mapping[Part, int]
    biases: int
    scales: int
    rank: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, layout: Layout, layer: int) -> "UnitSizes":
        """The sizes of a unit as this layer of the checkpoint stores its weights."""

        def item(name: str) -> int:
            return checkpoint.tensors[name].torch_dtype.itemsize

        parts = {part: place.numel * item(place.name(layer)) for part, place in layout.parts.items()}
        # The readout's bias is of the layer's output, and so of no unit.
        readout = layout.parts[READOUT[layout.kind]]
        makers = [place for place in layout.parts.values() if place is not readout]
        named = [(bias_name(place.name(layer)), place.rows) for place in makers]
        biases = sum(rows * item(name) for name, rows in named if name in checkpoint.tensors)
        number = item(readout.name(layer))
        outputs = readout.shape[1 - readout.axis]
        return cls(parts, biases, readout.rows * number, (readout.rows + outputs) * number)


class SublayerData:
    """A sublayer of a layer, in the units of a layout: the inputs of its output projection, also those of donors.

    `readout` is the part that is the output projection, and `weight` its matrix, multiplied by the `metric` of its
    outputs where there is one. `columns` are the inputs that belong to each group, and `parts` the parts that make
    them. Fits see the first `fitted` tokens; the others are held out. With the tokens of other processes, `all_tokens`
    are looked at and `all_fitted` of them fitted to.
    """

    def __init__(
        self, dense: DenseLayer, layout: Layout, seen: Weighted, fitted: int, metric: Tensor | None = None
    ) -> None:
        self.dense = dense
        self.layout = layout
        self.inputs = seen.inputs
        self.root = seen.root
        self.fitted = fitted
        self.all_fitted = processes.total(fitted)
        self.all_tokens = processes.total(len(seen.inputs))
        self.metric = metric
        self.device = dense.layers.device
        self.readout = READOUT[layout.kind]
        self.parts = tuple(part for part in layout.parts if part is not self.readout)
        own = _weight(dense.module.get_submodule(dense.layers.path(self.readout)))
        self.weight = self._in_metric(self._as_readout(own))
        self.columns: Int[Tensor, "groups columns"] = _columns(layout, self.readout).to(self.device)

    @cached_property
    def sizes(self) -> UnitSizes:
        """The bytes of one unit."""
        return UnitSizes.of(self.dense.checkpoint, self.layout, self.dense.number)

    @cached_property
    def shifts(self) -> range:
        """The shifts, in groups, by which donors have to be moved so that every donor is seen in every place.

        It is 0 alone where a unit does the same in all places, which it does not with biases, or with positions that
        depend on the head. To find out, the layer's own units are moved on by one group.
        """
        groups = self.layout.groups
        if groups == 1:
            return range(1)
        moved = self.features(self.dense.number, self.parts, 1)
        missed = moved[:, self.columns.flatten()] - self.inputs[:, self.columns.roll(-1, 0).flatten()]
        differs = bool(missed.abs().max() > ALIKE * self.inputs.abs().max())
        return range(groups if processes.any_of(differs) else 1)

    @torch.no_grad()
    def features(self, donor_layer: int, parts: Sequence[Part], shift: int = 0) -> Inputs:
        """The weighted inputs of the output projection with these parts of the donor layer's units in place.

        Group g has the parts of the donor layer's group g + shift, modulo groups. Biases stay the recipients' own, as
        they do in a shared model; so do relative positions and norms.
        """
        layers = self.dense.layers
        path = layers.path(self.readout)
        with self._overwritten(donor_layer, parts, shift):
            seen = [
                layers.run_to(self.dense.module, self.dense.number, entering, path).inputs[path].flatten(0, 1)
                for entering in self.dense.batches()
            ]
        return torch.cat(seen) * self.root

    def readout_of(self, donor_layer: int) -> Readout:
        """The whole output projection of another layer, as a matrix (outputs, inputs)."""
        name = self.layout.parts[self.readout].name(donor_layer)
        return self._in_metric(self._as_readout(self.dense.checkpoint.read(name).to(self.device, torch.float32)))

    def _in_metric(self, readout: Readout) -> Readout:
        """The output projection followed by the metric, so that squared errors of its outputs are costs."""
        return readout if self.metric is None else self.metric @ readout

    def _as_readout(self, stored: Tensor) -> Readout:
        return stored.T if self.dense.layers.in_out else stored

    @contextmanager
    def _overwritten(self, donor_layer: int, parts: Sequence[Part], shift: int) -> Iterator[None]:
        """A block within which the layer has these parts of the donor layer, moved by `shift` groups."""
        paths = {part: self.dense.layers.path(part) for part in parts}
        weights = {path: _weight(self.dense.module.get_submodule(path)) for path in paths.values()}
        own = {path: weight.clone() for path, weight in weights.items()}

        # Fused parts lie in one tensor, which is read once.
        donors: dict[str, Tensor] = {}
        for part, path in paths.items():
            place = self.layout.parts[part]
            if path not in donors:
                donors[path] = self.dense.checkpoint.read(place.name(donor_layer))
            for group in range(self.layout.groups):
                to, _ = place.span(group)
                start, _ = place.span((group + shift) % self.layout.groups)
                weights[path].narrow(place.axis, to, place.rows).copy_(
                    donors[path].narrow(place.axis, start, place.rows)
                )
        try:
            yield
        finally:
            for path, weight in own.items():
                weights[path].copy_(weight)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight.data


def _columns(layout: Layout, readout: Part) -> Int[Tensor, "groups columns"]:
    """The inputs of the output projection that belong to each group."""
    place = layout.parts[readout]
    starts = torch.tensor([place.span(group)[0] for group in range(layout.groups)])
    return starts[:, None] + torch.arange(place.rows)
