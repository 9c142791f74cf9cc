"""Tensor plans: what a plan means for each tensor.

Along one axis of a tensor, every index is one of four. It is *stored* here, *borrowed* from another layer's tensor,
*low-rank* (given by two small extra tensors) or another *made* range, or *removed* (zero when expanded).

Three numberings follow. *Dense* coordinates count all indices, as in the original checkpoint. *Reduced* coordinates
skip removed ones, as in the loaded model. *Stored* coordinates count only the indices in the file. Sharing and
expansion work in dense coordinates. Storages get the tensor plans of `reduced_tensors` and know of no removal. Without
removals, dense and reduced coordinates are the same.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from headshare.errors import PlanError
from headshare.plan.low_rank import LowRankRange
from headshare.plan.section import AddedTensor, Borrowed, Made, Removed, Scaled, Section, Touched
from headshare.plan.spans import Span, Spans, joined

# sources that are no tensor: zeros, and numbers that a maker computes from added tensors
NOTHING = ""
MADE = "*"


class Source(NamedTuple):
    """Dense indices [start, stop) of one tensor.

    The source NOTHING stands for as many zeros, MADE for the numbers that the tensor's own factors give there.
    """

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorPlan:
    """The plan of one tensor: its dense shape, the axis along which units lie, and its ranges along that axis.

    `gaps` are borrowed ranges, `scaled` those of them that carry scales, `removed` removed ones, and `made` those that
    a maker computes; each in order. A bias has one axis; all other tensors have two.
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
        spans += [Span(made.start, made.stop) for made in self.made]
        return _Absent(tuple(sorted([*spans, *self.removed]))) if spans else self._removed

    @cached_property
    def _removed(self) -> "_Absent":
        return _Absent(self.removed)

    @property
    def size(self) -> int:
        """The dense length along the axis."""
        return self.shape[self.axis]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor."""
        return self._shape_without(self._absent)

    @property
    def reduced_shape(self) -> tuple[int, ...]:
        """The shape without removed indices, as in a loaded model."""
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
        """Sources of all dense indices, in order: each run names the tensor that has it; neighbours are joined."""
        runs = [(start, Source(self.name, start, stop)) for start, stop in self.kept()]
        runs += [
            (gap.start, Source(gap.donor, gap.donor_start, gap.donor_start + gap.stop - gap.start)) for gap in self.gaps
        ]
        runs += [(start, Source(NOTHING, start, stop)) for start, stop in self.removed]
        runs += [(made.start, Source(MADE, made.start, made.stop)) for made in self.made]
        return _joined([run for _, run in sorted(runs)])

    def reduced(self, tensors: Mapping[str, "TensorPlan"]) -> "TensorPlan":
        """The tensor plan in reduced coordinates: of a smaller tensor of which nothing is removed."""
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
        made = tuple(span.moved_to(self.reduced_index(span.start)) for span in self.made)
        return TensorPlan(self.name, self.reduced_shape, self.axis, gaps, scaled, made=made)

    @property
    def factored(self) -> tuple[LowRankRange, ...]:
        """The low-rank ranges, products of two factors."""
        return tuple(made for made in self.made if isinstance(made, LowRankRange))

    @property
    def is_whole(self) -> bool:
        """True if all of it is stored here, though others may borrow from it."""
        return not (self.gaps or self.removed or self.made)

    @property
    def only_borrows(self) -> bool:
        """True if all that is not stored here is borrowed, without scales."""
        return not (self.removed or self.made or self.scaled)


class _Absent:
    """Spans that are left out, and so the shift of every index after them."""

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


def tensor_plans(sections: Iterable[Section]) -> dict[str, TensorPlan]:
    """Tensor plans of all tensors that a section changes or borrows from, by name, in dense coordinates.

    Tensors that are left alone are not listed. Nor are biases, which not every model has: see `bias_plans`.
    """
    by_name: dict[str, list[Touched]] = {}
    for section in sections:
        for touched in section.touched():
            by_name.setdefault(touched.name, []).append(touched)
    return {name: _merged(touched) for name, touched in by_name.items()}


def _merged(touched: list[Touched]) -> TensorPlan:
    """The plan of one tensor, from all ranges that sections change in it."""
    first = touched[0]
    ranges = [each.range for each in touched if each.range is not None]
    gaps = tuple(sorted(span for span in ranges if isinstance(span, Borrowed)))
    scaled = tuple(sorted((span.start, span.stop) for span in ranges if isinstance(span, Scaled)))
    removed = joined(sorted((span.start, span.stop) for span in ranges if isinstance(span, Removed)))
    made = tuple(span for span in ranges if not isinstance(span, Borrowed | Scaled | Removed))
    return TensorPlan(first.name, first.shape, first.axis, gaps, scaled, removed, made)


def bias_plans(sections: Iterable[Section]) -> dict[str, TensorPlan]:
    """Tensor plans of the biases beside weights whose outputs are removed, by name. Not every model has them."""
    by_name: dict[str, list[Touched]] = {}
    for section in sections:
        for touched in section.touched():
            if touched.outputs and isinstance(touched.range, Removed):
                by_name.setdefault(bias_name(touched.name), []).append(touched)
    return {
        name: TensorPlan(
            name,
            (many[0].shape[many[0].axis],),
            0,
            removed=joined(sorted((each.range.start, each.range.stop) for each in many if each.range is not None)),
        )
        for name, many in by_name.items()
    }


def reduced_tensors(tensors: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """Tensor plans of all tensors that lend or borrow, by name, in reduced coordinates."""
    return {name: tensors[name].reduced(tensors) for name in tied_names(tensors)}


def tied_names(tensors: Mapping[str, TensorPlan]) -> list[str]:
    """The names of the tensors that lend or borrow."""
    donors = {gap.donor for tensor in tensors.values() for gap in tensor.gaps}
    return [name for name, tensor in tensors.items() if tensor.gaps or name in donors]


def bias_name(weight_name: str) -> str:
    """The name of the bias beside this weight."""
    return weight_name.removesuffix("weight") + "bias"


def added_tensors(sections: Iterable[Section]) -> dict[str, AddedTensor]:
    """The tensors that the sections add, by name."""
    return {name: tensor for section in sections for name, tensor in section.added()}


def total_rank(tensor: TensorPlan) -> int:
    """The sum of the ranks of an output projection's low-rank units."""
    return sum(unit.rank for unit in tensor.factored)


def check_ranges(sections: Iterable[Section]) -> None:
    """Refuse sections that claim the same indices of a tensor; built-in sections check each other.

    Indices may be removed twice, as those of a unit that is removed from a layer of narrow values.

    Raises:
        PlanError: naming the tensor.
    """
    by_name: dict[str, list[tuple[int, int]]] = {}
    removed: dict[str, list[tuple[int, int]]] = {}
    for section in sections:
        for name, _, _, span, _ in section.touched():
            if span is not None and not isinstance(span, Scaled):
                lists = removed if isinstance(span, Removed) else by_name
                lists.setdefault(name, []).append((span.start, span.stop))
    for name, spans in by_name.items():
        claimed = sorted([*spans, *joined(sorted(removed.get(name, ())))])
        if any(before[1] > after[0] for before, after in pairwise(claimed)):
            raise PlanError(f"two sections of the plan claim the same indices of {name}.")


def check_copies(
    copies: Mapping[str, str], tensors: Mapping[str, TensorPlan], biases: Mapping[str, TensorPlan]
) -> None:
    """Refuse copies of tensors that are not stored whole, and tensors that borrow from a copy.

    Raises:
        PlanError: naming the tensors.
    """
    for name, donor in copies.items():
        if not tensors[donor].is_whole or name in biases or donor in biases:
            raise PlanError(f"{name} is stored as {donor}, of which the plan also takes numbers away.")
        if tensors[donor].shape != tensors[name].shape:
            raise PlanError(f"{name} is stored as {donor}, which other sections of the plan give another shape.")
    for tensor in tensors.values():
        lender = next((gap.donor for gap in tensor.gaps if gap.donor in copies), None)
        if lender is not None:
            raise PlanError(
                f"{tensor.name} takes numbers from {lender}, which is stored as {copies[lender]}. Tie it to that one."
            )
