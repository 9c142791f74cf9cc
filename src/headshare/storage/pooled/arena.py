"""Memory that can appear at several addresses at once (Linux): a memfd, and contiguous views laid over its pieces.

A view is an ordinary tensor whose consecutive pages are pages of the arena, in any order and with any repetition.
Nothing is copied: the arena takes the same physical memory however many views there are.
"""

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headshare.errors import StorageError

# Sizes of pages, and flags that libc's mmap, mprotect and madvise take.
PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20
PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000
MADV_RANDOM = 1
MADV_DONTNEED = 4
MADV_HUGEPAGE = 14

OTHERWISE = 'Load the model with storage="owner".'


class Piece(NamedTuple):
    """Bytes of an open file, to stand at `position` in a view. Positions, offsets and lengths are whole pages."""

    position: int
    descriptor: int
    offset: int
    length: int


def supported() -> bool:
    """Whether this system can map one piece of memory at several addresses, and lets this process do it."""
    return sys.platform == "linux" and hasattr(os, "memfd_create") and _allowed()


@cache
def _allowed() -> bool:
    """Whether a page can be shared: a sandbox may refuse it to the processes in it."""
    try:
        Arena(PAGE)
    except StorageError:
        return False
    return True


class Arena:
    """Memory of `nbytes` that can be mapped in pieces. It is writable until `seal`, and freed with its last tensor.

    Raises:
        StorageError: if the system refuses the memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // PAGE) * PAGE
        import fcntl  # which Windows lacks, as it lacks memfds

        try:
            self.descriptor = os.memfd_create("headshare", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise StorageError(f"the system gives no shared memory: {error.strerror}. {OTHERWISE}") from None
        weakref.finalize(self, os.close, self.descriptor).atexit = False
        try:
            os.ftruncate(self.descriptor, self.nbytes)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError as error:
            raise StorageError(f"the system refuses {self.nbytes} bytes: {error.strerror}. {OTHERWISE}") from None
        if not self.nbytes:
            return
        self._base = _map([Piece(0, self.descriptor, 0, self.nbytes)], self.nbytes, PROT_READ | PROT_WRITE)
        _libc().madvise(self._base.address, self.nbytes, MADV_HUGEPAGE)  # a wish: less work in filling it

    def region(self, offset: int, nbytes: int) -> Tensor:
        """Bytes [offset, offset + nbytes) as a uint8 tensor with a torch storage of its own, writable until `seal`."""
        return self._base.tensor(offset, nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)

    def seal(self) -> None:
        """Make the arena read-only for good. From now on a stray write stops the process and changes no weight."""
        if self.nbytes and _libc().mprotect(self._base.address, self._base.nbytes, PROT_READ):
            raise StorageError(f"the system cannot protect memory: {os.strerror(ctypes.get_errno())}.")


class _Mapping:
    """A range of addresses, which is given back when the last tensor on it is gone."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        weakref.finalize(self, _libc().munmap, address, nbytes).atexit = False

    def tensor(self, offset: int, nbytes: int) -> Tensor:
        buffer = (ctypes.c_ubyte * nbytes).from_address(self.address + offset)
        buffer._mapping = self  # type: ignore[attr-defined]  # the tensor keeps the buffer, and the buffer the mapping
        return torch.frombuffer(buffer, dtype=torch.uint8)


def mapped(pieces: Sequence[Piece], nbytes: int) -> Tensor:
    """A read-only uint8 tensor that is laid over these pieces of files.

    Raises:
        StorageError: if the system refuses one more mapping.
    """
    return _map(pieces, nbytes, PROT_READ).tensor(0, nbytes)


def _map(pieces: Sequence[Piece], nbytes: int, protection: int) -> _Mapping:
    """Reserve one range of addresses, then lay the pieces over it."""
    libc = _libc()
    nbytes = -(-nbytes // PAGE) * PAGE
    # Large pages of the arena stay large here if both lie alike within large pages. So reserve more, and cut both ends.
    room = nbytes + HUGE_PAGE
    reserved = libc.mmap(None, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if reserved == _failed():
        raise _refused()
    start = reserved + (pieces[0].offset - reserved) % HUGE_PAGE
    if start > reserved:
        libc.munmap(reserved, start - reserved)
    if reserved + room > start + nbytes:
        libc.munmap(start + nbytes, reserved + room - start - nbytes)
    # MAP_FIXED replaces pages of the reservation, so that no other thread can get these addresses in between.
    for position, descriptor, offset, length in pieces:
        flags = MAP_SHARED | MAP_FIXED
        if libc.mmap(start + position, length, protection, flags, descriptor, offset) == _failed():
            error = _refused()
            libc.munmap(start, nbytes)
            raise error
    return _Mapping(start, nbytes)


def _refused() -> StorageError:
    return StorageError(f"the system refuses one more mapping: {os.strerror(ctypes.get_errno())}. {OTHERWISE}")


def set_apart(address: int, nbytes: int) -> None:
    """Drop the whole pages of this mapped, unchanged piece of a file, and keep out all pages that are not read.

    When a page of a file is read, the system maps its neighbours too. A loader's view whose bytes we hold elsewhere
    lies among others that will be read. Once set apart, it takes no memory.
    """
    start, stop = -(-address // PAGE) * PAGE, (address + nbytes) // PAGE * PAGE
    if start < stop:
        _libc().madvise(start, stop - start, MADV_RANDOM)
        _libc().madvise(start, stop - start, MADV_DONTNEED)


def unchanged(address: int, nbytes: int) -> bool:
    """Whether the pages of this private mapping of a file are still the file's: none was written, and so copied."""
    first, last = address // PAGE, (address + nbytes - 1) // PAGE
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            pages = np.frombuffer(os.pread(pagemap, 8 * (last - first + 1), 8 * first), dtype=np.uint64)
        finally:
            os.close(pagemap)
    except OSError:
        return False
    present, swapped, of_file = ((pages >> np.uint64(bit)) & np.uint64(1) for bit in (63, 62, 61))
    return len(pages) == last - first + 1 and not bool((swapped | (present & ~of_file)).any())


def mappings_left() -> int | None:
    """The number of mappings that this process may still make; None where the system does not say."""
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
        return limit - Path("/proc/self/maps").read_bytes().count(b"\n")
    except (OSError, ValueError):
        return None


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = ctypes.c_size_t
    pointer = ctypes.c_void_p
    libc.mmap.argtypes = [pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [pointer, size]
    libc.mprotect.argtypes = [pointer, size, ctypes.c_int]
    libc.madvise.argtypes = [pointer, size, ctypes.c_int]
    return libc


@cache
def _failed() -> int | None:
    return ctypes.c_void_p(-1).value
