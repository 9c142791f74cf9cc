"""Assemblies: the sources of each output tensor's numbers as a value, and their stream, slice by slice."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import DTYPES, TensorInfo
from headshare.plan.tensors import MADE, NOTHING, Source, TensorPlan

# a slice of this size stays in the cache, and in memory that is used again
SLICE_BYTES = 4 * 2**20
# bytes of a page of memory, on whose boundaries a file can be mapped
PAGE = 4096


@dataclass(frozen=True)
class Assembly:
    """The assembly of one output tensor from runs of stored indices along `axis`, laid end to end.

    Each run comes from a tensor of the source, or is zeros (NOTHING). `dtype` is the safetensors name of the output's
    type; `file` is the file that the tensor goes into. `shared` marks a tensor that lends or borrows: a loaded model
    maps it from the file, if it fills whole pages there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    axis: int
    runs: tuple[Source, ...]
    shared: bool = False

    @property
    def paged(self) -> bool:
        """True if the tensor is to begin at a page's boundary: it is shared, and its size is whole pages."""
        return self.shared and self.axis == 0 and self.nbytes > 0 and self.nbytes % PAGE == 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the output."""
        count = 1
        for number in self.shape:
            count *= number
        return count * DTYPES[self.dtype].itemsize


def copied(info: TensorInfo, dtype: str | None = None) -> Assembly:
    """The assembly of an unchanged tensor, stored as `dtype` if it is a floating-point weight."""
    length = info.shape[0] if info.shape else 1
    return Assembly(info.name, output_dtype(info, dtype), info.shape, info.file, 0, (Source(info.name, 0, length),))


def kept_only(info: TensorInfo, tensor: TensorPlan, dtype: str | None = None, *, shared: bool = True) -> Assembly:
    """The assembly of what a dense tensor keeps under a plan. With `shared`, it lends or borrows."""
    runs = tuple(Source(info.name, start, stop) for start, stop in tensor.kept())
    return Assembly(info.name, output_dtype(info, dtype), tensor.stored_shape, info.file, tensor.axis, runs, shared)


def overwritten(info: TensorInfo, tensor: TensorPlan) -> Assembly:
    """The assembly, from a dense checkpoint, of a dense tensor with donors' indices for borrowed ones.

    Removed indices are zeros. Low-rank columns are left as the dense tensor has them.
    """
    runs = (run._replace(source=info.name) if run.source == MADE else run for run in tensor.whole())
    return Assembly(info.name, info.dtype, tensor.shape, info.file, tensor.axis, tuple(runs))


def filled(info: TensorInfo, tensor: TensorPlan, tensors: Mapping[str, TensorPlan]) -> Assembly:
    """The assembly, from a shared checkpoint, of a dense tensor with donors' indices for borrowed ones.

    Donors too hold only what they keep. Removed indices are zeros, and so are made ranges, which are computed later.
    """
    runs = []
    for source, start, stop in tensor.whole():
        if source in (NOTHING, MADE):
            runs.append(Source(NOTHING, start, stop))
        else:
            first = tensors[source].stored_index(start)
            runs.append(Source(source, first, first + stop - start))
    return Assembly(info.name, info.dtype, tensor.shape, info.file, tensor.axis, tuple(runs))


def output_dtype(info: TensorInfo, dtype: str | None) -> str:
    """The type of this tensor in an output whose floating-point weights are stored as `dtype`."""
    return dtype if dtype is not None and info.torch_dtype.is_floating_point else info.dtype


def stream(assembly: Assembly, source: Checkpoint) -> Iterator[Tensor]:
    """The numbers of the output tensor in order, as slices of at most about SLICE_BYTES."""
    slices = _rows(assembly, source) if assembly.axis == 0 else _columns(assembly, source)
    dtype = DTYPES[assembly.dtype]
    for piece in slices:
        yield piece.to(dtype).contiguous()


def _rows(assembly: Assembly, source: Checkpoint) -> Iterator[Tensor]:
    for name, start, stop in assembly.runs:
        if name == NOTHING:
            yield torch.zeros(stop - start, *assembly.shape[1:], dtype=DTYPES[assembly.dtype])
            continue
        step = _rows_per_slice(source.tensors[name])
        for first in range(start, stop, step):
            yield source.read(name, first, min(first + step, stop))


def _columns(assembly: Assembly, source: Checkpoint) -> Iterator[Tensor]:
    if not assembly.runs:
        return
    names = dict.fromkeys(run.source for run in assembly.runs if run.source != NOTHING)
    if not names:
        yield torch.zeros(assembly.shape, dtype=DTYPES[assembly.dtype])
        return
    step = max(1, min(_rows_per_slice(source.tensors[name]) for name in names) // len(names))
    for first in range(0, assembly.shape[0], step):
        last = min(first + step, assembly.shape[0])
        rows = {name: source.read(name, first, last) for name in names}
        like = next(iter(rows.values()))
        yield torch.cat(
            [
                like.new_zeros(last - first, stop - start) if name == NOTHING else rows[name][:, start:stop]
                for name, start, stop in assembly.runs
            ],
            dim=1,
        )


def _rows_per_slice(info: TensorInfo) -> int:
    row = info.nbytes // info.shape[0] if info.shape and info.shape[0] else info.nbytes
    return max(1, SLICE_BYTES // max(1, row))
