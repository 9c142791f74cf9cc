"""Read a tensor that a loader has mapped from a file, from the file itself.

Loaders map a checkpoint's files and hand out views of them. Touching a view keeps its pages in this process for as long
as any tensor of that file lives; reading the file leaves them alone, so that no byte is in memory twice.
"""

import os
import weakref
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from headshare.files.atomic import read_at
from headshare.storage.pooled.arena import set_apart, unchanged


class Range(NamedTuple):
    """Addresses [start, stop) on which a file lies, from `offset` on."""

    start: int
    stop: int
    offset: int
    inode: int
    path: str


class InFile(NamedTuple):
    """An offset in an open file."""

    descriptor: int
    offset: int


class MappedFiles:
    """The files that this process has mapped. Looked up again when an address is not among those it knows."""

    def __init__(self) -> None:
        self._ranges: list[Range] = []
        self._open: dict[tuple[str, int], int | None] = {}
        weakref.finalize(self, _close_all, self._open)

    def behind(self, tensor: Tensor) -> InFile | None:
        """Where in which open file this tensor's bytes are; None where it is in no file, or was changed since."""
        if not tensor.is_contiguous() or not tensor.numel():
            return None
        found = self._find(tensor.data_ptr(), tensor.nbytes)
        descriptor = self._descriptor(found) if found else None
        if found is None or descriptor is None or not unchanged(tensor.data_ptr(), tensor.nbytes):
            return None
        return InFile(descriptor, found.offset + tensor.data_ptr() - found.start)

    def read(self, tensor: Tensor) -> Tensor:
        """The same numbers, read from the file behind the tensor; the tensor itself where there is none to read."""
        copy = torch.empty_like(tensor)
        return copy if self.read_into(copy.flatten().view(torch.uint8), tensor) else tensor

    def read_into(self, target: Tensor, tensor: Tensor) -> bool:
        """Fill the target (uint8) with this tensor's bytes from the file behind it; False where there is none."""
        place = self.behind(tensor)
        if place is None or not read_at(place.descriptor, target.numpy().data, place.offset):
            return False
        set_apart(tensor.data_ptr(), tensor.nbytes)
        return True

    def close(self) -> None:
        """Close the files that were read, and forget what was mapped."""
        _close_all(self._open)
        self._ranges = []

    def _find(self, address: int, nbytes: int) -> Range | None:
        for _ in range(2):
            place = bisect_right(self._ranges, address, key=lambda known: known.start) - 1
            if place >= 0 and address + nbytes <= self._ranges[place].stop:
                return self._ranges[place]
            if self._ranges:
                break
            self._ranges = _mapped_ranges()
        return None

    def _descriptor(self, found: Range) -> int | None:
        key = (found.path, found.inode)
        if key not in self._open:
            self._open[key] = _open_same(found)
        return self._open[key]


def _close_all(opened: dict[tuple[str, int], int | None]) -> None:
    while opened:
        descriptor = opened.popitem()[1]
        if descriptor is not None:
            os.close(descriptor)


def _open_same(found: Range) -> int | None:
    try:
        descriptor = os.open(found.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(descriptor).st_ino == found.inode:
        return descriptor
    os.close(descriptor)
    return None


def _mapped_ranges() -> list[Range]:
    """Every private, readable mapping of a file, by address."""
    ranges = []
    try:
        with Path("/proc/self/maps").open("rb") as lines:  # as bytes: names may hold what text takes for a line's end
            for line in lines:
                bounds, mode, offset, _, inode, *path = line.rstrip(b"\n").split(maxsplit=5)
                if mode[:1] == b"r" and mode[3:4] == b"p" and inode != b"0" and path:
                    start, stop = (int(bound, 16) for bound in bounds.split(b"-"))
                    ranges.append(Range(start, stop, int(offset, 16), int(inode), os.fsdecode(path[0])))
    except OSError:
        return []
    return ranges
