"""What a plan means for each tensor: which indices it no longer stores, and whose it uses instead.

A tensor that a plan touches has *gaps* along one axis. Dense coordinates count all of its indices; stored
coordinates count only those it keeps. Everything that moves weights (share, expand, the storages) works from this.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from headshare.plans import Selection, SharePlan
from headshare.units import Part


class Gap(NamedTuple):
    """Dense indices [start, stop) that are not stored here, and the same number from `donor_start` of `donor`."""

    start: int
    stop: int
    donor: str
    donor_start: int


class Run(NamedTuple):
    """Dense indices [start, stop) of one tensor."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class GappedTensor:
    """One tensor under a plan: its dense shape, the axis along which units lie, and its gaps in order."""

    name: str
    shape: tuple[int, int]
    axis: int
    gaps: tuple[Gap, ...] = ()
    scaled: tuple[tuple[int, int], ...] = ()
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _removed: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        removed = [0]
        for gap in self.gaps:
            removed.append(removed[-1] + gap.stop - gap.start)
        object.__setattr__(self, "_starts", tuple(gap.start for gap in self.gaps))
        object.__setattr__(self, "_removed", tuple(removed))

    @property
    def size(self) -> int:
        """Dense length along the axis."""
        return self.shape[self.axis]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of what is kept."""
        kept = self.size - self._removed[-1]
        return (kept, self.shape[1]) if self.axis == 0 else (self.shape[0], kept)

    def kept(self) -> list[tuple[int, int]]:
        """The runs of dense indices that are stored, in order."""
        edges = [0, *(edge for gap in self.gaps for edge in (gap.start, gap.stop)), self.size]
        return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]

    def stored_index(self, index: int) -> int:
        """The stored position of a dense index that is kept."""
        return index - self._removed[bisect_right(self._starts, index)]

    def whole(self) -> list[Run]:
        """All dense indices in order, each run naming the tensor that has it; neighbouring runs are joined."""
        runs = [Run(self.name, start, stop) for start, stop in self.kept()]
        runs += [Run(gap.donor, gap.donor_start, gap.donor_start + gap.stop - gap.start) for gap in self.gaps]
        order = [start for start, _ in self.kept()] + [gap.start for gap in self.gaps]
        ordered = [run for _, run in sorted(zip(order, runs, strict=True))]
        return _joined(ordered)


def _joined(runs: list[Run]) -> list[Run]:
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].source == run.source and joined[-1].stop == run.start:
            joined[-1] = Run(run.source, joined[-1].start, run.stop)
        else:
            joined.append(run)
    return joined


def gapped_tensors(plan: SharePlan) -> dict[str, GappedTensor]:
    """Every tensor that gives or takes under this plan, by name. Tensors that a plan leaves alone are not listed."""
    gaps: dict[str, list[Gap]] = {}
    scaled: dict[str, list[tuple[int, int]]] = {}
    shapes: dict[str, tuple[tuple[int, int], int]] = {}
    for selection in plan.selections:
        for part, place in selection.layout.parts.items():
            for recipient, donor in selection.ties:
                name, donor_name = place.name(recipient.layer), place.name(donor.layer)
                span = place.span(recipient.group)
                gaps.setdefault(name, []).append(Gap(*span, donor_name, place.span(donor.group)[0]))
                shapes[name] = shapes[donor_name] = (place.shape, place.axis)
                if selection.scale and part is Part.O:
                    scaled.setdefault(name, []).append(span)
    return {
        name: GappedTensor(name, shape, axis, tuple(sorted(gaps.get(name, []))), tuple(sorted(scaled.get(name, []))))
        for name, (shape, axis) in shapes.items()
    }


def scale_names(plan: SharePlan) -> dict[str, int]:
    """Extra tensors that scaled ties bring, by name, and how many numbers each has."""
    return {
        scale_name(name): sum(stop - start for start, stop in tensor.scaled)
        for name, tensor in gapped_tensors(plan).items()
        if tensor.scaled
    }


def scale_name(weight_name: str) -> str:
    """The tensor that scales the shared input channels of this readout weight."""
    return weight_name.removesuffix("weight") + "tie_scale"


def scaled_weight_name(scale: str) -> str:
    """The readout weight whose channels this tensor scales; the inverse of `scale_name`."""
    return scale.removesuffix("tie_scale") + "weight"


def recipients_by_layer(selection: Selection) -> dict[int, list[tuple[int, int, int]]]:
    """For each layer: (group, donor layer, donor group) of its recipients, in order."""
    ordered = sorted(selection.ties)
    return {
        layer: [(tie.recipient.group, *tie.donor) for tie in ties]
        for layer, ties in groupby(ordered, key=lambda tie: tie.recipient.layer)
    }
