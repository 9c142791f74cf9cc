"""Sizes by layer: what a checkpoint stores there, and what its plan spares; without a checkpoint, in numbers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from headshare.checkpoint.header import TensorInfo
from headshare.plan.plan import SharePlan
from headshare.sharing.size import absent_numbers


@dataclass
class LayerSize:
    """What a layer stores, and what the dense model has there; bytes of a checkpoint, or numbers of a plan alone."""

    stored: int = 0
    dense: int = 0


def sizes_of(plan: SharePlan, tensors: Mapping[str, TensorInfo] | None) -> dict[int | None, LayerSize]:
    """Sizes by layer; under None what lies outside of layers.

    With the tensors of a checkpoint they are bytes. Where its matrices are packed, what the dense model stored is not
    known, and `dense` is `stored`. Without, they are numbers of the tensors that the plan's grids have.
    """
    stems = {place.tensor.partition("{layer}")[0] for layout in plan.layouts for place in layout.parts.values()}
    layer_of = re.compile("(?:" + "|".join(map(re.escape, sorted(stems))) + r")(\d+)\.") if stems else None
    found: dict[int | None, LayerSize] = {}

    def size_of(name: str) -> LayerSize:
        match = layer_of.match(name) if layer_of else None
        return found.setdefault(int(match[1]) if match else None, LayerSize())

    changed = {**plan.tensors, **plan.biases}
    if tensors is None:
        places = [(place, layout.layers) for layout in plan.layouts for place in layout.parts.values()]
        shapes = {place.name(layer): place.shape for place, layers in places for layer in range(layers)}
        for name, shape in shapes.items():
            size = size_of(name)
            size.dense += prod(shape)
            size.stored += prod(plan.tensors[name].stored_shape if name in plan.tensors else shape)
        for name, added in plan.added_tensors.items():
            size_of(name).stored += prod(added.shape)
        return found
    for name, info in tensors.items():
        size = size_of(name)
        size.stored += info.nbytes
        size.dense += 0 if name in plan.added_tensors else info.nbytes
        if name in changed and not info.parts and prod(info.shape) == prod(changed[name].stored_shape):
            size.dense += absent_numbers(changed[name]) * info.torch_dtype.itemsize
    return found
