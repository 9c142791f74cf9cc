"""One half of a dense layer on calibration text: its readout's inputs, as they are and with donors' weights in place.

Every token is weighted by 1 / (|h|^2 tokens), h the hidden state with that half's output added; so squared errors of
the readout's output are relative to the hidden state and averaged over tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headshare.calibration.costs.least_squares import Inputs, Readout
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Seen, Stream
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.plan.layout import Layout
from headshare.plan.tensors import bias_name
from headshare.plan.units import Kind, Part

READOUT = {Kind.ATTENTION: Part.O, Kind.FFN: Part.DOWN}
ALIKE = 1e-4

Hidden = Float[Tensor, "batch window hidden"]


@dataclass(frozen=True)
class Weighted:
    """A readout's inputs, each token's times the square root of its weight, and those roots."""

    inputs: Inputs
    root: Float[Tensor, "tokens 1"]

    @classmethod
    def of(cls, batches: Sequence[tuple[Float[Tensor, "batch window channels"], Hidden]]) -> "Weighted":
        """Weighted inputs made of each batch's inputs and hidden states."""
        squares = torch.cat([hidden.square().sum(dim=-1).flatten() for _, hidden in batches])[:, None]
        root = (squares.clamp(min=torch.finfo(squares.dtype).tiny) * len(squares)).rsqrt()
        return cls(torch.cat([inputs.flatten(0, 1) for inputs, _ in batches]) * root, root)


@dataclass(frozen=True)
class DenseLayer:
    """A layer of the dense model, built, and the stream that enters it."""

    checkpoint: Checkpoint
    layers: Layers
    number: int
    module: nn.Module
    stream: Stream

    def batches(self) -> Iterator[Hidden]:
        """Windows of the stream that are run at once."""
        return (self.stream[at] for at in self.layers.batches(range(len(self.stream)), self.stream.shape[1]))

    def look(self, kinds: Sequence[Kind]) -> tuple[dict[Kind, Weighted], Stream]:
        """The inputs of these halves' readouts, and the stream that leaves the layer."""
        watched = [READOUT[kind] for kind in kinds] + [Part.UP] * (Kind.FFN in kinds)
        found: dict[Kind, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in kinds}
        leaving = []
        for entering in self.batches():
            left, seen = self.layers.run(self.module, self.number, entering, tuple(map(self.layers.path, watched)))
            leaving.append(left.cpu())
            for kind, batches in found.items():
                inputs = seen.inputs[self.layers.path(READOUT[kind])]
                batches.append((inputs, self._hidden(kind, entering, left, seen)))
        return {kind: Weighted.of(batches) for kind, batches in found.items()}, torch.cat(leaving)

    def _hidden(self, kind: Kind, entering: Hidden, left: Hidden, seen: Seen) -> Hidden:
        """The hidden state with this half's output added: before the norm, in layers whose halves end in one."""
        if kind is Kind.ATTENTION:
            return entering.to(self.layers.device) + seen.outputs[self.layers.path(Part.O)]
        if self.layers.post_norm:
            return seen.inputs[self.layers.path(Part.UP)] + seen.outputs[self.layers.path(Part.DOWN)]
        return left


@dataclass(frozen=True)
class UnitSizes:
    """Bytes of one unit of a layer: its weights by part, and its entries of biases. `scales` are those of one number
    for each channel of it that the readout reads, `rank` those of one more rank of a product for its columns there."""

    parts: Mapping[Part, int]
    biases: int
    scales: int
    rank: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, layout: Layout, layer: int) -> "UnitSizes":
        """Sizes as this layer of the checkpoint stores its weights."""

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


class Half:
    """One half of a layer, its units those of the layout: its readout's inputs, and what donors would put there.

    `columns` are the readout's inputs that belong to each group, `parts` those that make them. Fits look at the first
    `fitted` tokens; the others are held out.
    """

    def __init__(self, dense: DenseLayer, layout: Layout, seen: Weighted, fitted: int) -> None:
        self.dense = dense
        self.layout = layout
        self.inputs = seen.inputs
        self.root = seen.root
        self.fitted = fitted
        self.device = dense.layers.device
        self.readout = READOUT[layout.kind]
        self.parts = tuple(part for part in layout.parts if part is not self.readout)
        self.weight = self._as_readout(_weight(dense.module.get_submodule(dense.layers.path(self.readout))))
        self.columns: Int[Tensor, "groups columns"] = _columns(layout, self.readout).to(self.device)

    @cached_property
    def sizes(self) -> UnitSizes:
        """The bytes of one unit."""
        return UnitSizes.of(self.dense.checkpoint, self.layout, self.dense.number)

    @cached_property
    def shifts(self) -> range:
        """Numbers of groups by which donors have to be moved, each in turn, to see every donor in every place.

        Not at all where a unit does the same in all places: not with biases, or positions that depend on the head.
        Found by moving the layer's own units on by one.
        """
        groups = self.layout.groups
        if groups == 1:
            return range(1)
        moved = self.features(self.dense.number, self.parts, 1)
        missed = moved[:, self.columns.flatten()] - self.inputs[:, self.columns.roll(-1, 0).flatten()]
        return range(1 if missed.abs().max() <= ALIKE * self.inputs.abs().max() else groups)

    @torch.no_grad()
    def features(self, donor_layer: int, parts: Sequence[Part], shift: int = 0) -> Inputs:
        """The readout's weighted inputs if group g had these parts of the donor layer's group g + shift, modulo groups.

        Biases stay the recipients' own, as they do in a shared model; so do relative positions and norms.
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
        """The whole readout of another layer."""
        name = self.layout.parts[self.readout].name(donor_layer)
        return self._as_readout(self.dense.checkpoint.read(name).to(self.device, torch.float32))

    def _as_readout(self, stored: Tensor) -> Readout:
        return stored.T if self.dense.layers.in_out else stored

    @contextmanager
    def _overwritten(self, donor_layer: int, parts: Sequence[Part], shift: int) -> Iterator[None]:
        """Within this block the layer has these parts of the donor layer, moved by `shift` groups."""
        paths = {part: self.dense.layers.path(part) for part in parts}
        weights = {path: _weight(self.dense.module.get_submodule(path)) for path in paths.values()}
        own = {path: weight.clone() for path, weight in weights.items()}
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
    place = layout.parts[readout]
    starts = torch.tensor([place.span(group)[0] for group in range(layout.groups)])
    return starts[:, None] + torch.arange(place.rows)
