"""What a plan means for each tensor: which indices it no longer stores, and whose it uses instead.

A tensor that a plan touches has *gaps* along one axis, and indices that are *removed*: nothing stands for those. A
readout can also have *factored* indices: a product of two extra tensors stands for them. There are three ways to
count. Dense coordinates count all indices of the original tensor; reduced coordinates those that are not removed, which
is what a loaded model multiplies with; stored coordinates those that the tensor keeps. Share and expand work in dense
coordinates; the storages get tensors that `reduced_tensors` has turned into reduced ones, and know of no removal.
Without removals the two are the same.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

from headshare.plan.layout import Place
from headshare.plan.plan import SharePlan
from headshare.plan.spans import Span, Spans, joined
from headshare.plan.ties import Selection
from headshare.plan.units import Part

NOTHING = ""
PRODUCT = "*"
READOUTS = (Part.O, Part.DOWN)


class Gap(NamedTuple):
    """Dense indices [start, stop) that are not stored here, and the same number from `donor_start` of `donor`."""

    start: int
    stop: int
    donor: str
    donor_start: int


class Product(NamedTuple):
    """Dense indices [start, stop) of a readout that are stored as a product of this rank: those of one unit."""

    start: int
    stop: int
    rank: int


class Run(NamedTuple):
    """Dense indices [start, stop) of one tensor; of NOTHING, as many zeros; of PRODUCT, what the tensor's own factors
    make there."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class GappedTensor:
    """One tensor under a plan: its dense shape, the axis along which units lie, its gaps, what is removed and what is
    factored, in order.

    A bias has one axis; all others have two.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    gaps: tuple[Gap, ...] = ()
    scaled: tuple[tuple[int, int], ...] = ()
    removed: Spans = ()
    factored: tuple[Product, ...] = ()

    @cached_property
    def _absent(self) -> "_Absent":
        spans = [Span(gap.start, gap.stop) for gap in self.gaps]
        spans += [Span(start, stop) for start, stop, _ in self.factored]
        return _Absent(tuple(sorted([*spans, *self.removed]))) if spans else self._removed

    @cached_property
    def _removed(self) -> "_Absent":
        return _Absent(self.removed)

    @property
    def size(self) -> int:
        """Dense length along the axis."""
        return self.shape[self.axis]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of what is kept."""
        return self._shape_without(self._absent)

    @property
    def reduced_shape(self) -> tuple[int, ...]:
        """The shape of what is not removed."""
        return self._shape_without(self._removed)

    def _shape_without(self, absent: "_Absent") -> tuple[int, ...]:
        return (*self.shape[: self.axis], self.size - absent.count, *self.shape[self.axis + 1 :])

    def kept(self) -> list[Span]:
        """The runs of dense indices that are stored, in order."""
        return self._absent.others(self.size)

    def present(self) -> list[Span]:
        """The runs of dense indices that are not removed, in order."""
        return self._removed.others(self.size)

    def stored_index(self, index: int) -> int:
        """The stored position of a dense index that is kept."""
        return index - self._absent.before(index)

    def reduced_index(self, index: int) -> int:
        """The reduced position of a dense index that is not removed."""
        return index - self._removed.before(index)

    def whole(self) -> list[Run]:
        """All dense indices in order, each run naming the tensor that has it; neighbouring runs are joined."""
        runs = [(start, Run(self.name, start, stop)) for start, stop in self.kept()]
        runs += [
            (gap.start, Run(gap.donor, gap.donor_start, gap.donor_start + gap.stop - gap.start)) for gap in self.gaps
        ]
        runs += [(start, Run(NOTHING, start, stop)) for start, stop in self.removed]
        runs += [(start, Run(PRODUCT, start, stop)) for start, stop, _ in self.factored]
        return _joined([run for _, run in sorted(runs)])

    def reduced(self, tensors: Mapping[str, "GappedTensor"]) -> "GappedTensor":
        """The same in reduced coordinates: a smaller tensor of which nothing is removed."""
        gaps = tuple(
            Gap(
                self.reduced_index(gap.start),
                self.reduced_index(gap.start) + gap.stop - gap.start,
                gap.donor,
                tensors[gap.donor].reduced_index(gap.donor_start),
            )
            for gap in self.gaps
        )
        scaled = tuple(
            (self.reduced_index(start), self.reduced_index(start) + stop - start) for start, stop in self.scaled
        )
        factored = tuple(
            Product(self.reduced_index(start), self.reduced_index(start) + stop - start, rank)
            for start, stop, rank in self.factored
        )
        return GappedTensor(self.name, self.reduced_shape, self.axis, gaps, scaled, factored=factored)


class _Absent:
    """Spans that are left out, and so how far what follows them moves."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self._starts = [start for start, _ in spans]
        self._counts = [0, *accumulate(stop - start for start, stop in spans)]

    @property
    def count(self) -> int:
        return self._counts[-1]

    def before(self, index: int) -> int:
        return self._counts[bisect_right(self._starts, index)]

    def others(self, size: int) -> list[Span]:
        edges = [0, *(edge for span in self._spans for edge in span), size]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [Span(start, stop) for start, stop in pairs if start < stop]


def _joined(runs: list[Run]) -> list[Run]:
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].source == run.source and joined[-1].stop == run.start:
            joined[-1] = Run(run.source, joined[-1].start, run.stop)
        else:
            joined.append(run)
    return joined


def gapped_tensors(plan: SharePlan) -> dict[str, GappedTensor]:
    """Every tensor that gives, takes or loses something under this plan or has factored units, by name, in dense
    coordinates. Tensors that a plan leaves alone are not listed; nor are biases, which not every model has: see
    `gapped_biases`."""
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
    removed = _removed(plan, tuple(Part))
    shapes |= {name: (place.shape, place.axis) for name, (place, _) in removed.items()}
    factored = _factored(plan)
    shapes |= {name: (place.shape, place.axis) for name, (place, _) in factored.items()}
    return {
        name: GappedTensor(
            name,
            shape,
            axis,
            tuple(sorted(gaps.get(name, []))),
            tuple(sorted(scaled.get(name, []))),
            removed[name][1] if name in removed else (),
            factored[name][1] if name in factored else (),
        )
        for name, (shape, axis) in shapes.items()
    }


def gapped_biases(plan: SharePlan) -> dict[str, GappedTensor]:
    """The biases that lose something, where the model has them: those of the parts whose units are outputs."""
    features = _removed(plan, tuple(part for part in Part if part not in READOUTS))
    return {
        bias_name(name): GappedTensor(bias_name(name), (place.shape[place.axis],), 0, removed=spans)
        for name, (place, spans) in features.items()
    }


def reduced_tensors(plan: SharePlan) -> dict[str, GappedTensor]:
    """Every tensor that gives or takes, in the coordinates of a model from which removed units are gone."""
    tensors = gapped_tensors(plan)
    return {name: tensors[name].reduced(tensors) for name in tied_names(tensors)}


def reduced_readouts(plan: SharePlan) -> dict[str, GappedTensor]:
    """Every readout with factored units, in the same coordinates."""
    tensors = gapped_tensors(plan)
    return {name: tensor.reduced(tensors) for name, tensor in tensors.items() if tensor.factored}


def tied_names(tensors: Mapping[str, GappedTensor]) -> list[str]:
    """The names of the tensors that give or take."""
    donors = {gap.donor for tensor in tensors.values() for gap in tensor.gaps}
    return [name for name, tensor in tensors.items() if tensor.gaps or name in donors]


def _removed(plan: SharePlan, parts: tuple[Part, ...]) -> dict[str, tuple[Place, Spans]]:
    """A place in each tensor that loses units of these parts, and the indices that it loses."""
    found: dict[str, tuple[Place, Spans]] = {}
    for removal in plan.removals:
        for part, place in removal.layout.parts.items():
            for layer, groups in removal.removed.items() if part in parts else ():
                name, spans = place.name(layer), _indices(place, groups)
                others = found[name][1] if name in found else ()
                found[name] = (place, joined(sorted([*others, *spans])) if others else spans)
    return found


def _factored(plan: SharePlan) -> dict[str, tuple[Place, tuple[Product, ...]]]:
    """The place of each readout that has factored units, and those units' indices."""
    return {
        one.place.name(layer): (
            one.place,
            tuple(Product(*one.place.span(group), rank) for group, rank in one.ranked(layer)),
        )
        for one in plan.factored
        for layer in one.units
    }


def _indices(place: Place, groups: Spans) -> Spans:
    """The indices that these groups have in this place."""
    if (place.start, place.step, place.rows) == (0, 1, 1):
        return groups
    if place.step == place.rows:
        return tuple(Span(place.span(start)[0], place.span(stop - 1)[1]) for start, stop in groups)
    return tuple(Span(*place.span(group)) for start, stop in groups for group in range(start, stop))


def bias_name(weight_name: str) -> str:
    """The bias beside this weight."""
    return weight_name.removesuffix("weight") + "bias"


def recipients_by_layer(selection: Selection) -> dict[int, list[tuple[int, int, int]]]:
    """For each layer: (group, donor layer, donor group) of its recipients, in order."""
    ordered = sorted(selection.ties)
    return {
        layer: [(tie.recipient.group, *tie.donor) for tie in ties]
        for layer, ties in groupby(ordered, key=lambda tie: tie.recipient.layer)
    }
