"""Write a whole folder or none: a temporary sibling, flushed to disk, checked, then renamed in one step."""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from headshare.checkpoint.header import DTYPES
from headshare.errors import HeadshareError
from headshare.files.atomic import umask
from headshare.sharing.assembly import PAGE, Assembly


def write_safetensors(path: Path, assemblies: Sequence[Assembly], slices: Iterable[Iterable[Tensor]]) -> str:
    """Stream tensors into one safetensors file, in the order given; return its SHA-256. The file is not flushed yet.

    `slices` yields, for each assembly, its numbers in order. One slice is digested while the next is read and written.

    Raises:
        HeadshareError: if an assembly does not yield as many bytes as its shape needs.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as digester:
        digested: list[Future[None]] = []

        def write(data: Any) -> int:
            view, done = memoryview(data).cast("B"), 0
            while digested:
                digested.pop().result()
            digested.append(digester.submit(digest.update, view))
            while done < len(view):
                done += file.write(view[done:])
            return done

        write(_header(assemblies))
        for assembly, pieces in zip(assemblies, slices, strict=True):
            written = sum(write(piece.flatten().view(uint8).numpy()) for piece in pieces if piece.numel())
            if written != assembly.nbytes:
                raise HeadshareError(f"{assembly.name}: wrote {written} bytes, expected {assembly.nbytes}.")
    path.chmod(0o666 & ~umask())
    return digest.hexdigest()


def _header(assemblies: Sequence[Assembly]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for assembly in assemblies:
        end = offset + assembly.nbytes
        header[assembly.name] = {"dtype": assembly.dtype, "shape": list(assembly.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    boundary = PAGE if assemblies and assemblies[0].paged else 8
    text += b" " * (-(len(text) + 8) % boundary)
    return struct.pack("<Q", len(text)) + text


def canonical_order(assemblies: Iterable[Assembly]) -> list[Assembly]:
    """Paged tensors first, so that each begins at a page's boundary in the file and can be mapped from there; then the
    order in which safetensors itself writes: widest type first, then by name."""
    return sorted(assemblies, key=lambda one: (not one.paged, -DTYPES[one.dtype].itemsize, one.name))
