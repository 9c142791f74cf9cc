"""The writer of safetensors files: tensors streamed in a canonical order, aligned to pages, read back and digested."""

import ctypes
import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, uint8

from headshare.checkpoint.header import DTYPES
from headshare.errors import CheckpointError, HeadshareError
from headshare.files.atomic import read_at
from headshare.sharing.assembly import PAGE, SLICE_BYTES, Assembly

# slices that are written and not yet read back: enough for two threads to be busy
SLICES_AHEAD = 4
# bytes that are written before the disk begins, or goes on
FLUSH_BYTES = 64 * 2**20
_MEMCMP = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
_MEMCMP.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def write_safetensors(
    path: Path,
    assemblies: Sequence[Assembly],
    slices: Iterable[Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write tensors into one safetensors file, in this order, and return its digest by BLAKE3. It is not flushed yet.

    `slices` yields, for each assembly, its numbers in order. Each slice is read back, compared and digested while the
    next ones are read and written, so that the digest is that of the file and no second pass is needed. `metadata` goes
    into the header.

    Raises:
        HeadshareError: if an assembly does not yield as many bytes as its shape needs.
        CheckpointError: if the file does not hold what was written.
    """
    with path.open("w+b", buffering=0) as file, _WriteBehind(file) as behind:
        behind.write(_header(assemblies, metadata or {}))
        for assembly, pieces in zip(assemblies, slices, strict=True):
            written = sum(behind.write(piece.flatten().view(uint8)) for piece in pieces if piece.numel())
            if written != assembly.nbytes:
                raise HeadshareError(f"{assembly.name}: wrote {written} bytes, expected {assembly.nbytes}.")
        return behind.digest()


class _WriteBehind(ExitStack):
    """A file that is written to while a second thread checks what was written, and a third puts it on the disk."""

    def __init__(self, file: FileIO) -> None:
        super().__init__()
        self._file = file
        self._held = _ReadBack(file)
        self._checker = self.enter_context(ThreadPoolExecutor(1))
        self._checks: deque[Future[None]] = deque()
        self._flusher = self.enter_context(ThreadPoolExecutor(1))
        self._flush: Future[None] | None = None
        self._unflushed = 0

    def write(self, data: Tensor) -> int:
        """Write bytes, and return how many.

        Raises:
            CheckpointError: if the file does not hold what was written before.
        """
        # slices that wait for their check are in memory, so only a few may
        if len(self._checks) == SLICES_AHEAD:
            self._checks.popleft().result()
        view = data.numpy().data
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        self._checks.append(self._checker.submit(self._held.check, data))
        # a disk that begins when all is written is waited for
        self._unflushed += done
        if self._unflushed >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._flushed()
            self._flush = self._flusher.submit(os.fsync, self._file.fileno())
            self._unflushed = 0
        return done

    def digest(self) -> str:
        """The digest of the file, once all of it was checked."""
        for check in self._checks:
            check.result()
        self._flushed()
        return self._held.digest.hexdigest()

    def _flushed(self) -> None:
        if self._flush is not None:
            self._flush.result()


class _ReadBack:
    """What an open file holds, read back from its beginning on, compared with what was written, and digested."""

    def __init__(self, file: FileIO) -> None:
        self.digest = blake3()
        self._file = file
        self._offset = 0
        self._buffer = torch.empty(SLICE_BYTES, dtype=uint8)

    def check(self, written: Tensor) -> None:
        """Read the next bytes, which must be these.

        Raises:
            CheckpointError: if they are others.
        """
        for start in range(0, len(written), len(self._buffer)):
            meant = written[start : start + len(self._buffer)]
            held = self._buffer[: len(meant)]
            if not read_at(self._file.fileno(), held.numpy().data, self._offset) or not same_bytes(held, meant):
                raise CheckpointError(
                    f"{self._file.name} does not hold what was written to it from byte {self._offset} on. Check the "
                    "disk and memory, and run again."
                )
            self.digest.update(held.numpy().data)
            self._offset += len(meant)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """True if two equally long rows of bytes are equal."""
    # of the C library: in the calling thread, where torch's would wait for others, and without the interpreter's lock
    return bool(_MEMCMP(one.data_ptr(), other.data_ptr(), len(one)) == 0)


def _header(assemblies: Sequence[Assembly], metadata: Mapping[str, str]) -> Tensor:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for assembly in assemblies:
        end = offset + assembly.nbytes
        header[assembly.name] = {"dtype": assembly.dtype, "shape": list(assembly.shape), "data_offsets": [offset, end]}
        offset = end
    # spaces behind the header align the first tensor, and so all paged ones
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    boundary = PAGE if assemblies and assemblies[0].paged else 8
    text += b" " * (-(len(text) + 8) % boundary)
    return torch.frombuffer(bytearray(struct.pack("<Q", len(text)) + text), dtype=uint8)


def canonical_order(assemblies: Iterable[Assembly]) -> list[Assembly]:
    """Assemblies in the order of a file: paged tensors first, then as safetensors orders them, by type and by name.

    So each paged tensor begins at a page's boundary and can be mapped from there. Wider types come first.
    """
    return sorted(assemblies, key=lambda each: (not each.paged, -DTYPES[each.dtype].itemsize, each.name))
