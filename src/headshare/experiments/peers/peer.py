"""Peers as values: what all of them read, what each is asked, and what each gives back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.observed import Batch, Stream
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.experiments.peers.matrices import Matrices, Remade
from headshare.experiments.peers.sizes import Sizes
from headshare.experiments.peers.statistics import LayerStatistics, Statistics
from headshare.files.state_files import Workspace
from headshare.plan.units import Part, Sublayer
from headshare.text.tokens import Calibration


@dataclass(frozen=True)
class Bench:
    """The dense model and the calibration text that all peers have in common, and what is computed from them once."""

    dense: Checkpoint
    calibration: Calibration
    work: Workspace
    device: str = "cpu"

    @cached_property
    def layers(self) -> Layers:
        """The dense model's layers."""
        return Layers(self.dense, device=self.device)

    @cached_property
    def matrices(self) -> Matrices:
        """Its matrices."""
        return Matrices(self.layers)

    @cached_property
    def sizes(self) -> Sizes:
        """Its sizes."""
        return Sizes(self.dense, self.matrices)

    @cached_property
    def statistics(self) -> Statistics:
        """Its statistics on the text."""
        return Statistics(self.layers, self.calibration, self.work)


@dataclass(frozen=True)
class Look:
    """The built layer of the dense model and that of the peer's, and the hidden states that enter each of them.

    What the peer has put into its layer is there; what it has not is as in the dense model.
    """

    layers: Layers
    matrices: Matrices
    layer: int
    dense: nn.Module
    own: nn.Module
    entering_dense: Stream
    entering_own: Stream

    def batches(self) -> Iterator[slice]:
        """Windows that are run together."""
        return self.layers.batches(range(len(self.entering_own)), self.entering_own.shape[1])

    def inputs(self, part: Part) -> Iterator[tuple[Batch, Batch]]:
        """The inputs of this part's matrix in the dense model and in the peer's, batch by batch."""
        path = self.layers.path(part)
        for at in self.batches():
            sides = (self.dense, self.entering_dense), (self.own, self.entering_own)
            dense, own = (
                self.layers.run_to(module, self.layer, stream[at], path).inputs[path] for module, stream in sides
            )
            yield dense, own

    def put(self, kind: Sublayer, remade: Remade) -> None:
        """Put a remade sublayer into the peer's layer."""
        self.matrices.put_into_layer(self.own, kind, remade)


@dataclass(frozen=True)
class Stage:
    """A request to a peer: to make this sublayer. `look` shows it in both models, to a peer that `follows`."""

    bench: Bench
    layer: int
    kind: Sublayer
    look: Look | None = None

    @cached_property
    def statistics(self) -> LayerStatistics:
        """The statistics of this layer."""
        return self.bench.statistics.of(self.layer)


@dataclass(frozen=True)
class Peer:
    """A peer at one number of bytes: sublayers are made when they are asked for, in the order of the model.

    Attributes:
        make: makes one sublayer.
        saved_bytes: the bytes that it saves, counted by its formula.
        note: how they are counted, or what was chosen.
        follows: it reads the hidden states of the model that it has made so far.
        enter: what becomes of the hidden states that enter the first layer; it may write to those it is given.
        around: does the same in a stock model, whose first layer is given too, and what is to be done before its head.
    """

    make: Callable[[Stage], Remade]
    saved_bytes: int
    note: str
    follows: bool = False
    enter: Callable[[Stream], Stream] | None = None
    around: Callable[[Any, nn.Module], None] | None = None
