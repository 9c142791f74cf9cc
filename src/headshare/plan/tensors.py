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
from itertools import accumulate
from typing import NamedTuple

from headshare.plan.low_rank import LowRankRange
from headshare.plan.plan import SharePlan
from headshare.plan.section import AddedTensor, Borrowed, Made, Removed, Scaled, Touched
from headshare.plan.spans import Span, Spans, joined

NOTHING = ""
MADE = "*"


class Source(NamedTuple):
    """Dense indices [start, stop) of one tensor; of NOTHING, as many zeros; of MADE, what the tensor's own factors
    make there."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorPlan:
    """One tensor under a plan: its dense shape, the axis along which units lie, its gaps, what is removed and what is
    factored, in order.

    A bias has one axis; all others have two.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    gaps: tuple[Borrowed, ...] = ()
    scaled: tuple[tuple[int, int], ...] = ()
    removed: Spans = ()
    made: tuple[Made, ...] = ()

    @cached_property
    def _absent(self) -> "_Absent":
        spans = [Span(gap.start, gap.stop) for gap in self.gaps]
        spans += [Span(one.start, one.stop) for one in self.made]
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

    def whole(self) -> list[Source]:
        """All dense indices in order, each run naming the tensor that has it; neighbouring runs are joined."""
        runs = [(start, Source(self.name, start, stop)) for start, stop in self.kept()]
        runs += [
            (gap.start, Source(gap.donor, gap.donor_start, gap.donor_start + gap.stop - gap.start)) for gap in self.gaps
        ]
        runs += [(start, Source(NOTHING, start, stop)) for start, stop in self.removed]
        runs += [(one.start, Source(MADE, one.start, one.stop)) for one in self.made]
        return _joined([run for _, run in sorted(runs)])

    def reduced(self, tensors: Mapping[str, "TensorPlan"]) -> "TensorPlan":
        """The same in reduced coordinates: a smaller tensor of which nothing is removed."""
        gaps = tuple(
            Borrowed(
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
        made = tuple(one.moved_to(self.reduced_index(one.start)) for one in self.made)
        return TensorPlan(self.name, self.reduced_shape, self.axis, gaps, scaled, made=made)

    @property
    def factored(self) -> tuple[LowRankRange, ...]:
        """The ranges that are products of two factors."""
        return tuple(one for one in self.made if isinstance(one, LowRankRange))

    @property
    def is_whole(self) -> bool:
        """Whether all of it is stored here, though others may borrow from it."""
        return not (self.gaps or self.removed or self.made)

    @property
    def only_borrows(self) -> bool:
        """Whether all that is not stored here is a donor's, as it is."""
        return not (self.removed or self.made or self.scaled)


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


def _joined(runs: list[Source]) -> list[Source]:
    joined: list[Source] = []
    for run in runs:
        if joined and joined[-1].source == run.source and joined[-1].stop == run.start:
            joined[-1] = Source(run.source, joined[-1].start, run.stop)
        else:
            joined.append(run)
    return joined


def tensor_plans(plan: SharePlan) -> dict[str, TensorPlan]:
    """Every tensor that some section of the plan changes or borrows from, by name, in dense coordinates. Tensors that a
    plan leaves alone are not listed; nor are biases, which not every model has: see `bias_plans`."""
    by_name: dict[str, list[Touched]] = {}
    for section in plan.sections:
        for touched in section.touched():
            by_name.setdefault(touched.name, []).append(touched)
    return {name: _merged(touched) for name, touched in by_name.items()}


def _merged(touched: list[Touched]) -> TensorPlan:
    """One tensor from all that sections say of it."""
    first = touched[0]
    ranges = [one.range for one in touched if one.range is not None]
    gaps = tuple(sorted(one for one in ranges if isinstance(one, Borrowed)))
    scaled = tuple(sorted((one.start, one.stop) for one in ranges if isinstance(one, Scaled)))
    removed = joined(sorted((one.start, one.stop) for one in ranges if isinstance(one, Removed)))
    made = tuple(one for one in ranges if not isinstance(one, Borrowed | Scaled | Removed))
    return TensorPlan(first.name, first.shape, first.axis, gaps, scaled, removed, made)


def bias_plans(plan: SharePlan) -> dict[str, TensorPlan]:
    """The biases that lose something, where the model has them: those beside weights whose outputs are removed."""
    by_name: dict[str, list[Touched]] = {}
    for section in plan.sections:
        for touched in section.touched():
            if touched.outputs and isinstance(touched.range, Removed):
                by_name.setdefault(bias_name(touched.name), []).append(touched)
    return {
        name: TensorPlan(
            name,
            (many[0].shape[many[0].axis],),
            0,
            removed=joined(sorted((one.range.start, one.range.stop) for one in many if one.range is not None)),
        )
        for name, many in by_name.items()
    }


def reduced_tensors(plan: SharePlan) -> dict[str, TensorPlan]:
    """Every tensor that gives or takes, in the coordinates of a model from which removed units are gone."""
    tensors = tensor_plans(plan)
    return {name: tensors[name].reduced(tensors) for name in tied_names(tensors)}


def tied_names(tensors: Mapping[str, TensorPlan]) -> list[str]:
    """The names of the tensors that give or take."""
    donors = {gap.donor for tensor in tensors.values() for gap in tensor.gaps}
    return [name for name, tensor in tensors.items() if tensor.gaps or name in donors]


def bias_name(weight_name: str) -> str:
    """The bias beside this weight."""
    return weight_name.removesuffix("weight") + "bias"


def added_tensors(plan: SharePlan) -> dict[str, AddedTensor]:
    """Every tensor that the plan's sections add, by name."""
    return {name: tensor for section in plan.sections for name, tensor in section.added()}


def total_rank(tensor: TensorPlan) -> int:
    """The sum of the ranks of a readout's factored units."""
    return sum(one.rank for one in tensor.factored)
