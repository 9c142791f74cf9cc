"""The matrices of one rank: which indices of the checkpoint's tensors each holds, and which of these it stores itself.

An engine fuses matrices (q, k and v; gate and up) and cuts them between ranks. Here a matrix of a rank is a list of
ranges of the checkpoint's dense tensors. Each stored unit that a rank needs stands in the first of its matrices that
uses it; all others borrow from there, wherever the unit's home is in the checkpoint. This module knows no engine.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from headshare.errors import StorageError
from headshare.plan.section import Borrowed
from headshare.plan.spans import Spans, length
from headshare.plan.tensors import MADE, NOTHING, Source, TensorPlan


@dataclass(frozen=True)
class RankMatrix:
    """A matrix of one rank: dense ranges of tensors along its `axis`, in order, each `across` numbers wide.

    A range of NOTHING is zeros, which an engine wants where a layer has fewer units than ranks can share evenly.
    """

    name: str
    axis: int
    across: int
    runs: tuple[Source, ...]

    @property
    def size(self) -> int:
        """The count of indices along the axis."""
        return sum(run.stop - run.start for run in self.runs)


class Piece(NamedTuple):
    """Indices of a stored tensor, [start, start + size), and their place `at` among a matrix's stored indices."""

    matrix: str
    at: int
    start: int
    size: int


@dataclass(frozen=True)
class RankLayout:
    """The layout of a rank's matrices: a tensor plan for each, in which the matrices lend to each other.

    `pieces` says, by the checkpoint's tensors, where stored indices go; `made` says the same of dense indices that are
    computed. All else that a matrix stores is zeros.
    """

    plans: dict[str, TensorPlan] = field(default_factory=dict)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    made: dict[str, list[Piece]] = field(default_factory=dict)


def range_of(tensor: TensorPlan, removed: Spans, total: int, start: int, stop: int) -> list[Source]:
    """The dense ranges behind indices [start, stop) of what an engine takes for a tensor of `total` indices.

    That is the dense tensor; or, if `total` says otherwise, what is left of it without `removed`, and zeros behind.

    Raises:
        StorageError: if that is more than the engine has room for.
    """
    if total == tensor.size:
        return [Source(tensor.name, start, stop)]
    if total < tensor.size - length(removed):
        raise StorageError(
            f"{tensor.name} keeps {tensor.size - length(removed)} of its indices by the plan, and the engine's model "
            f"has {total}. Its config.json and its plan are of different models."
        )
    runs = []
    at = 0
    edges = [0, *(edge for span in removed for edge in span), tensor.size]
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        low, high = max(start, at), min(stop, at + last - first)
        if low < high:
            runs.append(Source(tensor.name, first + low - at, first + high - at))
        at += last - first
    zeros = stop - max(start, at)
    return [*runs, Source(NOTHING, 0, zeros)] if zeros > 0 else runs


def lay_out(matrices: Iterable[RankMatrix], tensors: Mapping[str, TensorPlan]) -> RankLayout:
    """The layout of these matrices, which are in the order in which they first store what several use."""
    resolved = [(matrix, list(_resolved(matrix, tensors))) for matrix in matrices]
    # ranges are cut wherever another begins or ends, so that any two are the same or have nothing in common
    edges: dict[str, set[int]] = {}
    for _, found in resolved:
        for _, (source, start, stop) in found:
            edges.setdefault(source, set()).update((start, stop))
    cuts = {source: sorted(found) for source, found in edges.items()}
    owners: dict[tuple[str, int], tuple[str, int]] = {}
    layout = RankLayout()
    for matrix, found in resolved:
        own: list[tuple[int, Source]] = []
        gaps: list[Borrowed] = []
        for position, run in found:
            for at, source, start, stop in _cut(position, run, cuts[run.source]):
                owner = (matrix.name, at)
                if source != NOTHING and not source.startswith(MADE):
                    owner = owners.setdefault((source, start), owner)
                if owner == (matrix.name, at):
                    own.append((at, Source(source, start, stop)))
                else:
                    gaps.append(Borrowed(at, at + stop - start, *owner))
        shape = (matrix.size, matrix.across) if matrix.axis == 0 else (matrix.across, matrix.size)
        plan = TensorPlan(matrix.name, shape, matrix.axis, tuple(_joined(gaps)))
        layout.plans[matrix.name] = plan
        for at, (source, start, stop) in own:
            if source == NOTHING:
                continue
            made = source.startswith(MADE)
            name = source.removeprefix(MADE)
            first = start if made else tensors[name].stored_index(start)
            piece = Piece(matrix.name, plan.stored_index(at), first, stop - start)
            _add((layout.made if made else layout.pieces).setdefault(name, []), piece)
    return layout


def _resolved(matrix: RankMatrix, tensors: Mapping[str, TensorPlan]) -> Iterator[tuple[int, Source]]:
    """Positions in the matrix and, for each, the range of the tensor that stores it. MADE stands before a tensor's name
    where the tensor computes the range.
    """
    position = 0
    for run in matrix.runs:
        if run.source == NOTHING:
            yield position, Source(NOTHING, 0, run.stop - run.start)
            position += run.stop - run.start
            continue
        at = 0  # in the dense tensor
        for source, start, stop in tensors[run.source].whole():
            low, high = max(run.start, at), min(run.stop, at + stop - start)
            if low < high:
                name = MADE + run.source if source == MADE else source
                yield position + low - run.start, Source(name, start + low - at, start + high - at)
            at += stop - start
        position += run.stop - run.start


def _cut(position: int, run: Source, cuts: Sequence[int]) -> Iterator[tuple[int, str, int, int]]:
    """The pieces of a range between neighbouring cuts, with their positions. Zeros and made ranges stay whole."""
    if run.source == NOTHING or run.source.startswith(MADE):
        yield position, *run
        return
    inside = cuts[bisect_left(cuts, run.start) : bisect_left(cuts, run.stop) + 1]
    for start, stop in pairwise(inside):
        yield position + start - run.start, run.source, start, stop


def _joined(gaps: Iterable[Borrowed]) -> list[Borrowed]:
    """The gaps, with neighbours that continue each other at the donor as one."""
    joined: list[Borrowed] = []
    for gap in gaps:
        last = joined[-1] if joined else None
        if last and (last.stop, last.donor, last.donor_start + last.stop - last.start) == (
            gap.start,
            gap.donor,
            gap.donor_start,
        ):
            joined[-1] = Borrowed(last.start, gap.stop, last.donor, last.donor_start)
        else:
            joined.append(gap)
    return joined


def _add(pieces: list[Piece], piece: Piece) -> None:
    """Add a piece, as one with the last if it continues that."""
    last = pieces[-1] if pieces else None
    if last and (last.matrix, last.at + last.size, last.start + last.size) == piece[:3]:
        pieces[-1] = last._replace(size=last.size + piece.size)
    else:
        pieces.append(piece)
