"""Files behind tensors that a loader has mapped, for reading the tensors from the files themselves.

Loaders map a checkpoint's files and hand out views of them. Touching a view keeps its pages in this process for as long
as any tensor of that file lives. Reading the file leaves these pages alone, so that no byte is in memory twice.
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
    """Addresses [start, stop) at which a file is mapped, from its byte `offset` on."""

    start: int
    stop: int
    offset: int
    inode: int
    path: str


class InFile(NamedTuple):
    """A place in an open file: its descriptor and an offset."""

    descriptor: int
    offset: int


class MappedFiles:
    """The files that this process has mapped. They are looked up at first use, and anew after `close`."""

    def __init__(self) -> None:
        self._mappings: list[bytes] = []
        self._last: Range | None = None  # tensors of one file come one after the other
        self._open: dict[tuple[str, int], int | None] = {}
        weakref.finalize(self, _close_all, self._open)

    def behind(self, tensor: Tensor) -> InFile | None:
        """The place of this tensor's bytes in an open file; None where it is in no file, or was changed since."""
        if not tensor.is_contiguous() or not tensor.numel():
            return None
        mapping = self._find(tensor.data_ptr(), tensor.nbytes)
        descriptor = self._descriptor(mapping) if mapping else None
        if mapping is None or descriptor is None or not unchanged(tensor.data_ptr(), tensor.nbytes):
            return None
        return InFile(descriptor, mapping.offset + tensor.data_ptr() - mapping.start)

    def read(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor, read from the file behind it; the tensor itself where there is no such file."""
        copy = torch.empty_like(tensor)
        return copy if self.read_into(copy.flatten().view(torch.uint8), tensor) else tensor

    def read_into(self, target: Tensor, tensor: Tensor) -> bool:
        """Fill the target (uint8) with this tensor's bytes from the file behind it; False where there is no file."""
        place = self.behind(tensor)
        if place is None or not read_at(place.descriptor, target.numpy().data, place.offset):
            return False
        set_apart(tensor.data_ptr(), tensor.nbytes)
        return True

    def close(self) -> None:
        """Close the files that were read, and forget all mappings."""
        _close_all(self._open)
        self._mappings = []
        self._last = None

    def _find(self, address: int, nbytes: int) -> Range | None:
        if self._last is None or not self._last.start <= address < self._last.stop:
            self._mappings = self._mappings or _mappings()
            place = bisect_right(self._mappings, address, key=_start_of) - 1
            self._last = _mapped_file(self._mappings[place]) if place >= 0 else None
        return self._last if self._last and address + nbytes <= self._last.stop else None

    def _descriptor(self, mapping: Range) -> int | None:
        key = (mapping.path, mapping.inode)
        if key not in self._open:
            self._open[key] = _open_same(mapping)
        return self._open[key]


def _close_all(opened: dict[tuple[str, int], int | None]) -> None:
    while opened:
        descriptor = opened.popitem()[1]
        if descriptor is not None:
            os.close(descriptor)


def _open_same(mapping: Range) -> int | None:
    try:
        descriptor = os.open(mapping.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(descriptor).st_ino == mapping.inode:
        return descriptor
    os.close(descriptor)
    return None


def _mappings() -> list[bytes]:
    """All mappings of this process, by address, as the system tells of them."""
    try:
        return Path("/proc/self/maps").read_bytes().split(b"\n")[:-1]
    except OSError:
        return []


def _start_of(mapping: bytes) -> int:
    return int(mapping[: mapping.index(b"-")], 16)


def _mapped_file(mapping: bytes) -> Range | None:
    """The range of a private, readable mapping of a file; None for any other mapping."""
    # as bytes: names may hold what text takes for a line's end
    bounds, mode, offset, _, inode, *path = mapping.split(maxsplit=5)
    if mode[:1] != b"r" or mode[3:4] != b"p" or inode == b"0" or not path:
        return None
    start, stop = (int(bound, 16) for bound in bounds.split(b"-"))
    return Range(start, stop, int(offset, 16), int(inode), os.fsdecode(path[0]))
