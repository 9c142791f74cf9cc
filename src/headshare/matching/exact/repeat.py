"""Models in which blocks of layers run several times in a row, as a self-merge makes them, with each weight once.

Names and the configuration are all that such a model has of its own. Its tensors are those of the model that it is made
from, where they lie, under one name for each time that they are used.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from headshare.architecture.config import text_config
from headshare.architecture.heads import LAYER_COUNTS
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import TensorInfo
from headshare.errors import CheckpointError, OptionError
from headshare.matching.exact.plan import exact_plan
from headshare.plan.layout import MAX_LAYERS
from headshare.sharing.share import SharedCheckpoint, share

_BLOCK = re.compile(r"(0|[1-9][0-9]{0,5})(?:-([1-9][0-9]{0,5}))?", re.ASCII)
# settings that list some layers by their numbers, and settings by which every so manieth layer is of another kind
_NUMBERS_OF_LAYERS = ("mlp_only_layers",)
_EVERY = ("decoder_sparse_step",)


class Block(NamedTuple):
    """Layers `first` to `last`, both included, that run several times in a row."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def repeat_layers(dense: Checkpoint, layers: str, *, times: int = 2, dtype: str | None = None) -> SharedCheckpoint:
    """The model in which blocks of a dense model's layers run so many times in a row, each weight stored once.

    `layers` names them: "10-16" is one block, "10-16,20" are two, of which each is repeated by itself. Layers count
    from 0, and the last of a block is part of it. `save` writes it; a loaded model holds each weight once too, and keys
    and values of every layer that runs. `dtype` (float32, float16, bfloat16) converts all weights.

    Raises:
        OptionError: if these are no blocks of this model's layers in ascending order, or `times` is less than 2.
        ArchitectureError: if the model's layout is not known.
        CheckpointError: if the checkpoint is shared or quantised, or tells its layers apart in a way that does not say
            what repeated ones are.
    """
    dense.require_dense("repeat layers of")
    count = dense.layouts.attention.layers
    blocks = read_blocks(layers, count)
    order = list(repeated(blocks, count, times))
    grown = with_layers(dense, order)
    how = f"layers {','.join(map(str, blocks))} x {times}"
    return dataclasses.replace(share(grown, exact_plan(grown, mode=how, units=False), dtype=dtype), base_model=None)


def read_blocks(text: str, count: int) -> list[Block]:
    """The blocks of a model with so many layers that a text such as "10-16,20" names, in order.

    Raises:
        OptionError: saying what is wrong with it.
    """
    blocks: list[Block] = []
    for word in text.split(","):
        matched = _BLOCK.fullmatch(word.strip())
        if matched is None:
            raise OptionError(f"layers are written like 10-16,20: whole numbers, counted from 0; found {word!r:.50}.")
        block = Block(int(matched[1]), int(matched[2] or matched[1]))
        if block.last < block.first:
            raise OptionError(f"the block {block} ends before it begins. Write {block.last}-{block.first}.")
        if block.last >= count:
            raise OptionError(f"there is no layer {block.last}: the model has {count}, from 0 to {count - 1}.")
        if blocks and block.first <= blocks[-1].last:
            raise OptionError(f"the block {block} does not come behind {blocks[-1]}. Name each layer once, in order.")
        blocks.append(block)
    return blocks


def repeated(blocks: list[Block], count: int, times: int) -> Iterator[int]:
    """The layers of a model of `count` in the order in which they run, each block `times` times in a row.

    Raises:
        OptionError: if that is no repetition, or more layers than there can be.
    """
    if times < 2:
        raise OptionError(f"--times {times} repeats nothing. Give 2 or more.")
    if count + (times - 1) * sum(block.last - block.first + 1 for block in blocks) > MAX_LAYERS:
        raise OptionError(f"--times {times} makes a model of more than {MAX_LAYERS} layers.")
    starts = {block.first: block for block in blocks}
    layer = 0
    while layer < count:
        block = starts.get(layer, Block(layer, layer))
        yield from [*range(block.first, block.last + 1)] * (times if layer in starts else 1)
        layer = block.last + 1


def with_layers(dense: Checkpoint, order: list[int]) -> Checkpoint:
    """The checkpoint of a model whose layers are these of a dense one, in this order. Nothing is read or written.

    Raises:
        ArchitectureError: if the model's layout is not known.
        CheckpointError: if its configuration does not say what repeated layers are.
    """
    stem = next(iter(dense.layouts.attention.parts.values())).tensor.partition("{layer}")[0]
    uses: dict[str, list[int]] = {}
    for number, layer in enumerate(order):
        uses.setdefault(f"{stem}{layer}.", []).append(number)
    tensors: dict[str, TensorInfo] = {}
    of_layer = re.compile(re.escape(stem) + r"\d+\.")
    for name, info in dense.tensors.items():
        matched = of_layer.match(name)
        names = [name]
        if matched is not None:
            names = [f"{stem}{number}.{name[matched.end() :]}" for number in uses.get(matched[0], ())]
        tensors |= {new: dataclasses.replace(info, name=new) for new in names}
    return dataclasses.replace(dense, config=_grown_config(dense, order), tensors=tensors)


def _grown_config(dense: Checkpoint, order: list[int]) -> dict[str, Any]:
    """The configuration for layers in this order: their count, and every setting that lists layers."""
    settings = text_config(dense.config)
    lists = dict(_lists_of_layers(settings, order, dense.layouts.attention.layers))
    uneven = next((key for key in _EVERY if (settings.get(key) or 1) != 1), None)
    if uneven is not None:
        raise CheckpointError(
            f"config.json of {dense.name} tells layers apart by {uneven}: {settings[uneven]}, which would make other "
            "layers of repeated ones. Such models are not repeated."
        )
    grown = dict(dense.config)
    inner = grown.get("text_config")
    target = grown if not isinstance(inner, dict) else dict(inner)
    counts = [key for key in LAYER_COUNTS if key in target] or [LAYER_COUNTS[0]]
    target |= {**lists, **dict.fromkeys(counts, len(order))}
    if isinstance(inner, dict):
        grown["text_config"] = target
    # whether transformers reads it so
    read = text_config(grown)
    unlike = next((key for key, value in lists.items() if read.get(key) != value), None)
    if unlike is not None:
        raise CheckpointError(
            f"config.json of {dense.name} has no place for {unlike} of repeated layers. Such models are not repeated."
        )
    return grown


def _lists_of_layers(settings: Mapping[str, Any], order: list[int], count: int) -> Iterator[tuple[str, Any]]:
    """Settings that list something for each layer, or list layers, as they are for layers in this order."""
    for key, value in settings.items():
        if key in _NUMBERS_OF_LAYERS and value:
            yield key, [number for number, layer in enumerate(order) if layer in value]
        elif "layer" in key and isinstance(value, list) and len(value) == count and key not in _NUMBERS_OF_LAYERS:
            yield key, [value[layer] for layer in order]
