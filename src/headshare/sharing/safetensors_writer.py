"""The writer of safetensors files: tensors streamed in a canonical order, aligned to pages, and digested."""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor, uint8

from headshare.checkpoint.header import DTYPES
from headshare.errors import HeadshareError
from headshare.sharing.assembly import PAGE, Assembly


def write_safetensors(
    path: Path,
    assemblies: Sequence[Assembly],
    slices: Iterable[Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write tensors into one safetensors file, in this order, and return its digest by BLAKE3. It is not flushed yet.

    `slices` yields, for each assembly, its numbers in order. One slice is digested while the next is read and written.
    `metadata` goes into the header.

    Raises:
        HeadshareError: if an assembly does not yield as many bytes as its shape needs.
    """
    digest = blake3()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as digester:
        digested: list[Future[Any]] = []

        def write(data: Any) -> int:
            view = memoryview(data).cast("B")
            done = 0
            # at most one slice waits for its digest, so that no more than two are in memory
            while digested:
                digested.pop().result()
            digested.append(digester.submit(digest.update, view))
            while done < len(view):
                done += file.write(view[done:])
            return done

        write(_header(assemblies, metadata or {}))
        for assembly, pieces in zip(assemblies, slices, strict=True):
            written = sum(write(piece.flatten().view(uint8).numpy()) for piece in pieces if piece.numel())
            if written != assembly.nbytes:
                raise HeadshareError(f"{assembly.name}: wrote {written} bytes, expected {assembly.nbytes}.")
    return digest.hexdigest()


def _header(assemblies: Sequence[Assembly], metadata: Mapping[str, str]) -> bytes:
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
    return struct.pack("<Q", len(text)) + text


def canonical_order(assemblies: Iterable[Assembly]) -> list[Assembly]:
    """Assemblies in the order of a file: paged tensors first, then as safetensors orders them, by type and by name.

    So each paged tensor begins at a page's boundary and can be mapped from there. Wider types come first.
    """
    return sorted(assemblies, key=lambda each: (not each.paged, -DTYPES[each.dtype].itemsize, each.name))
