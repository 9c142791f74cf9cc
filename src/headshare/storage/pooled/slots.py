"""Layouts of a block pool: slots of equal height, and for each tensor the slots of its whole weight.

Knows names, shapes and borrowed ranges only. Rows here run along the axis in which units lie, so that a tensor whose
units are columns stands transposed. Every storage that keeps weights once, and refers to them by place, uses these
layouts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

from headshare.plan.tensors import TensorPlan


class BlockRun(NamedTuple):
    """A run of `slots` slots of a whole weight, from `position` on. They are those of `source` from its `start` on."""

    position: int
    source: str
    start: int
    slots: int


@dataclass(frozen=True)
class TensorBlocks:
    """The slots of a tensor. Its own are [first, first + count), and its whole weight is these runs, in order."""

    name: str
    first: int
    count: int
    runs: tuple[BlockRun, ...]

    @property
    def borrows(self) -> bool:
        """Whether its whole weight differs from its own slots in order."""
        return self.runs != (BlockRun(0, self.name, 0, self.count),)

    @property
    def size(self) -> int:
        """The number of slots of the whole weight."""
        return sum(run.slots for run in self.runs)


@dataclass(frozen=True)
class BlockLayout:
    """The layout of all tensors of one width: `slots` slots of `height` rows of `width` numbers."""

    width: int
    height: int
    slots: int
    placed: Mapping[str, TensorBlocks]

    def table(self, name: str) -> list[int]:
        """The slots of a tensor's whole weight, in order."""
        runs = [(self.placed[run.source].first + run.start, run.slots) for run in self.placed[name].runs]
        return [slot for first, count in runs for slot in range(first, first + count)]


def racks_of(tensors: Mapping[str, TensorPlan]) -> list[BlockLayout]:
    """Layouts of these tensors, one for each width. The height of slots is the greatest that divides all boundaries."""
    by_width: dict[int, list[TensorPlan]] = {}
    for tensor in tensors.values():
        by_width.setdefault(tensor.shape[1 - tensor.axis], []).append(tensor)
    return [_rack(width, by_width[width], tensors) for width in sorted(by_width)]


def _rack(width: int, chosen: list[TensorPlan], tensors: Mapping[str, TensorPlan]) -> BlockLayout:
    # the whole weight of each tensor, as runs of rows: (source, first stored row there, rows)
    wholes = {
        tensor.name: [
            (source, tensors[source].stored_index(start), stop - start) for source, start, stop in tensor.whole()
        ]
        for tensor in chosen
    }
    lengths = [length for tensor in chosen for length in (tensor.size, tensor.stored_shape[tensor.axis])]
    height = gcd(*lengths, *(edge for runs in wholes.values() for _, *edges in runs for edge in edges)) or 1
    # tensors stand one after the other, each with the slots that it stores itself
    placed = {}
    first = 0
    for tensor in chosen:
        count = tensor.stored_shape[tensor.axis] // height
        placed[tensor.name] = TensorBlocks(tensor.name, first, count, _runs(wholes[tensor.name], height))
        first += count
    return BlockLayout(width, height, first, placed)


def _runs(whole: list[tuple[str, int, int]], height: int) -> tuple[BlockRun, ...]:
    runs = []
    position = 0
    for source, start, length in whole:
        runs.append(BlockRun(position, source, start // height, length // height))
        position += length // height
    return tuple(runs)
