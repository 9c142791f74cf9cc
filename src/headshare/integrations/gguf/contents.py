"""The tensors of a GGUF file, each with its name and shape there, and its numbers from the checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from headshare.architecture.families import INPUT_EMBEDDINGS, TIED_OUTPUTS
from headshare.architecture.llama_cpp import (
    ATTENTION_NORM,
    EMBEDDING,
    ENGINE,
    FFN_NORM,
    LAST_NORM,
    OUTPUT,
    PART_NAMES,
    ROTARY_FACTORS,
)
from headshare.checkpoint.header import TensorInfo
from headshare.checkpoint.rounding.numbers import Rounded
from headshare.errors import ArchitectureError, CheckpointError
from headshare.integrations.gguf.rotary import Rotary
from headshare.integrations.gguf.shape import FileLayer, FileShape, Kept
from headshare.plan.layout import Layout, Place
from headshare.plan.tensors import bias_name
from headshare.plan.units import Part
from headshare.sharing.expanded import ExpandedTensors
from headshare.sharing.rounded.stock import StockMatrices
from headshare.sharing.size import parameter_infos


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file.

    `source` is the name of the checkpoint's tensor that it is made from, and `read` gives its numbers in this shape, of
    which so many are `zeros` that nothing asks for but llama.cpp. `reads_out` is true for the matrix that predictions
    are read from, and `whole` for a tensor of no unit. `in_rows` gives whole numbers of 8 bits and the scale of each
    row, where the checkpoint holds such.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    read: Callable[[], Tensor]
    zeros: int = 0
    reads_out: bool = False
    whole: bool = False
    in_rows: Callable[[], Rounded] | None = None

    @property
    def numbers(self) -> int:
        """The count of its numbers."""
        return prod(self.shape)


class _Sublayer(NamedTuple):
    """The attention or the feed-forward of a layer: its norm in the checkpoint and in the file, and what is kept."""

    norm: str
    norm_in_file: str
    layout: Layout
    kept: Kept

    def sources(self, layer: int) -> Iterator[str]:
        """The names of all tensors that it can have in the checkpoint."""
        yield self.norm
        for place in self.layout.parts.values():
            yield from (place.name(layer), bias_name(place.name(layer)))


def contents_of(tensors: ExpandedTensors, shape: FileShape, rotary: Rotary) -> list[FileTensor]:
    """The tensors of a checkpoint as the file has them, in its order: the embedding first.

    Raises:
        CheckpointError: if one is missing, or of another shape than the model's.
        ArchitectureError: if the checkpoint holds one that the file has no place for.
    """
    checkpoint = tensors.checkpoint
    contents = list(_all(tensors, shape, rotary))
    stored = parameter_infos(checkpoint)
    used = {each.source for each in contents if each.source}
    if missing := sorted(used - set(stored)):
        raise CheckpointError(f"{checkpoint.name} lacks {missing[0]}. Download it again.")
    if strange := sorted(set(stored) - used - set(tensors.files.added) - _gone(shape)):
        raise ArchitectureError(
            f"{checkpoint.name} holds {strange[0]}, which {ENGINE}'s {shape.architecture.name} has no place for."
        )
    rows = contents[0].shape[0]
    for each in contents:
        wanted = (rows, shape.hidden) if each.reads_out or each is contents[0] else (shape.hidden,)
        if each.whole and each.shape != wanted:
            raise CheckpointError(f"{checkpoint.name} holds {each.source} as {each.shape}; it should be {wanted}.")
    return contents


def _all(tensors: ExpandedTensors, shape: FileShape, rotary: Rotary) -> Iterator[FileTensor]:
    stored = parameter_infos(tensors.checkpoint)
    stock = StockMatrices(tensors.files)
    stem = _stem(shape)
    tied = bool(tensors.checkpoint.layouts.config.get("tie_word_embeddings"))
    inputs = (name for name in stored if name.startswith(stem) and name.endswith(INPUT_EMBEDDINGS))
    yield _whole(tensors, f"{EMBEDDING}.weight", next(inputs, f"{stem}{INPUT_EMBEDDINGS[0]}"), reads_out=tied)
    if (factors := rotary.factors) is not None:
        yield FileTensor(ROTARY_FACTORS, tuple(factors.shape), "", lambda: factors)
    for number, layer in enumerate(shape.layers):
        for sublayer in _sublayers(shape, layer.layer, layer):
            if sublayer.kept.count:
                yield from _sublayer(tensors, stock, shape, f"blk.{number}.", layer.layer, sublayer)
    yield _whole(tensors, f"{LAST_NORM[1]}.weight", f"{stem}{LAST_NORM[0]}.weight")
    if not tied:
        outputs = (name for name in TIED_OUTPUTS if name in stored)
        yield _whole(tensors, f"{OUTPUT}.weight", next(outputs, TIED_OUTPUTS[0]), reads_out=True)


def _stem(shape: FileShape) -> str:
    """The beginning of the names of the bare model's tensors."""
    layers = shape.attention.parts[Part.O].tensor.partition(".{layer}")[0]
    return layers[: layers.rfind(".") + 1]


def _sublayers(shape: FileShape, layer: int, kept: FileLayer | None) -> tuple[_Sublayer, _Sublayer]:
    """Both sublayers of a layer of the model; of one that is not in the file, nothing is kept."""
    prefix = shape.attention.parts[Part.O].prefix(layer)
    units, neurons = (Kept(()), Kept(())) if kept is None else (kept.units, kept.neurons)
    return (
        _Sublayer(f"{prefix}{ATTENTION_NORM[0]}.weight", ATTENTION_NORM[1], shape.attention, units),
        _Sublayer(f"{prefix}{FFN_NORM[0]}.weight", FFN_NORM[1], shape.neurons, neurons),
    )


def _gone(shape: FileShape) -> set[str]:
    """The names of the tensors of sublayers that are not in the file."""
    layers = {each.layer: each for each in shape.layers}
    return {
        name
        for layer in range(shape.attention.layers)
        for sublayer in _sublayers(shape, layer, layers.get(layer))
        if not sublayer.kept.count
        for name in sublayer.sources(layer)
    }


def _sublayer(
    tensors: ExpandedTensors, stock: StockMatrices, shape: FileShape, prefix: str, layer: int, sublayer: _Sublayer
) -> Iterator[FileTensor]:
    yield _whole(tensors, f"{prefix}{sublayer.norm_in_file}.weight", sublayer.norm)
    for part, place in sublayer.layout.parts.items():
        name = f"{prefix}{PART_NAMES[part]}"
        source = place.name(layer)
        in_pairs = shape.architecture.pairs and part in (Part.Q, Part.K)
        head = shape.head_dim if in_pairs else None
        yield _part(tensors, stock, f"{name}.weight", source, place, sublayer.kept, head)
        bias = bias_name(source)
        if bias not in tensors.checkpoint.tensors:
            continue
        # a readout's outputs, along the other axis, are all there
        if place.axis:
            yield _whole(tensors, f"{name}.bias", bias)
        else:
            yield _part(tensors, stock, f"{name}.bias", bias, place, sublayer.kept, head)


def _whole(tensors: ExpandedTensors, name: str, source: str, *, reads_out: bool = False) -> FileTensor:
    shape = tensors.shape(source) if source in tensors else (0,)  # one that is missing is refused when all are listed
    checkpoint = tensors.checkpoint
    info = checkpoint.tensors.get(source)
    in_rows = partial(checkpoint.read_rounded, source) if info is not None and _has_rows(info) else None
    return FileTensor(
        name, shape, source, lambda: tensors.read(source), reads_out=reads_out, whole=True, in_rows=in_rows
    )


def _has_rows(info: TensorInfo) -> bool:
    """True if a matrix is stored as whole numbers of 8 bits with one scale for each row."""
    return info.parts is not None and (info.parts.bits, info.parts.group, info.parts.in_out) == (8, None, False)


def _part(
    tensors: ExpandedTensors, stock: StockMatrices, name: str, source: str, place: Place, kept: Kept, head: int | None
) -> FileTensor:
    """A part's matrix, or its bias, with the groups that are kept and those of zeros.

    Rows of heads of `head` numbers are put in pairs; with None they stay as they are.
    """

    def read() -> Tensor:
        taken = _taken(tensors.read(source, rounded=False), place, kept)
        return taken if head is None else _in_pairs(taken, head)

    def in_rows() -> Rounded:
        numbers, scale = stock.whole(source)
        numbers = _taken(numbers, place, kept)
        scale = scale if place.axis else _taken(scale, place, kept)
        return Rounded(numbers, scale) if head is None else Rounded(_in_pairs(numbers, head), _in_pairs(scale, head))

    info = tensors.checkpoint.tensors.get(source)
    exact = info is not None and _has_rows(info) and source in stock.names
    size = kept.count * place.rows
    shape = (*place.shape[: place.axis], size, *place.shape[place.axis + 1 :]) if source.endswith("weight") else (size,)
    zeros = prod(shape) // size * kept.zeros * place.rows
    return FileTensor(name, shape, source, read, zeros=zeros, in_rows=in_rows if exact else None)


def _taken(whole: Tensor, place: Place, kept: Kept) -> Tensor:
    """The indices of the kept groups along the part's axis, and groups of zeros behind them."""
    indices = [index for group in kept.groups for index in range(*place.span(group))]
    taken = whole.index_select(place.axis, torch.tensor(indices, dtype=torch.long))
    if not kept.zeros:
        return taken
    size = [*whole.shape]
    size[place.axis] = kept.zeros * place.rows
    return torch.cat([taken, whole.new_zeros(size)], dim=place.axis)


def _in_pairs(rows: Tensor, head: int) -> Tensor:
    """Rows of heads with the two halves of each head interleaved, so that numbers rotated together lie side by side."""
    halves = rows.reshape(len(rows) // head, 2, head // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
