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
    for runs in _near(assembly):
        read = [run for run in runs if run.source != NOTHING]
        if not read:
            length = sum(run.stop - run.start for run in runs)
            yield torch.zeros(length, *assembly.shape[1:], dtype=DTYPES[assembly.dtype])
        elif len(runs) == 1:
            name, start, stop = runs[0]
            step = _rows_per_slice(source.tensors[name])
            for first in range(start, stop, step):
                yield source.read(name, first, min(first + step, stop))
        else:
            name, first, _ = read[0]
            rows = source.read(name, first, read[-1].stop)
            zeros = rows.new_zeros(max(run.stop - run.start for run in runs), *rows.shape[1:])
            yield torch.cat(
                [
                    zeros[: run.stop - run.start]
                    if run.source == NOTHING
                    else rows[run.start - first : run.stop - first]
                    for run in runs
                ]
            )


def _near(assembly: Assembly) -> Iterator[list[Source]]:
    """The runs of an assembly in order, those together that lie in one slice of one tensor, with zeros among them.

    Where neurons are removed one by one there is a run for each stretch of those left, and each read takes its time.
    """
    length = assembly.shape[0] if assembly.shape else 1
    room = max(1, SLICE_BYTES * length // max(1, assembly.nbytes))
    together: list[Source] = []
    read: list[Source] = []
    rows = 0
    for run in assembly.runs:
        rows += run.stop - run.start
        fits = rows <= room
        if read and run.source != NOTHING:
            name, _, end = read[-1]
            fits &= run.source == name and run.start >= end and run.stop - read[0].start <= room
        if together and not fits:
            yield together
            together, read, rows = [], [], run.stop - run.start
        together.append(run)
        if run.source != NOTHING:
            read.append(run)
    if together:
        yield together


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
