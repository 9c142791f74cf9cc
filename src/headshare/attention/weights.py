"""Similarities of the weights of all pairs of heads, by every match function, in the order of attention maps.

A match function is made for units, which are heads that share keys and values. Here it is given the products of single
query heads, each with the keys and values that it reads.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.layouts import require_one_dtype
from headshare.errors import CheckpointError
from headshare.matching.circuits import Circuits
from headshare.matching.functions import CIRCUIT, MATCH_FUNCTIONS
from headshare.matching.products import not_finite
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit, Part, Sublayer
from headshare.progress import track

Similarities = Float[Tensor, "heads heads"]
# parts that each query head has rows or columns of its own in; the others belong to all heads of a unit
OF_HEADS = (Part.Q, Part.O)


def similarities(checkpoint: Checkpoint) -> dict[str, Similarities]:
    """The scores of all pairs of query heads by each match function for attention units, by its name.

    A function that matches each part by itself has no score of whole heads, and is left out. Two layers are in memory
    at a time.

    Raises:
        ArchitectureError: if the model's layout is not known.
        CheckpointError: if the checkpoint is shared or quantised, or a weight is not finite.
    """
    checkpoint.require_dense("compare the heads of")
    layout = checkpoint.layouts.attention
    require_one_dtype(layout, checkpoint)
    functions = {
        name: function
        for name, function in MATCH_FUNCTIONS.items()
        if function.kind is Sublayer.ATTENTION and not function.separate
    }
    read = {part for function in functions.values() if not function.circuits for part in function.parts}
    products = {str(part): _products(checkpoint, layout, part) for part in layout.parts if part in read}
    if any(function.circuits for function in functions.values()):
        products[CIRCUIT] = Circuits(checkpoint, layout).of_heads()
    return {
        name: function.score({key: products[key] for key in ((CIRCUIT,) if function.circuits else function.parts)})
        for name, function in functions.items()
    }


def _products(checkpoint: Checkpoint, layout: Layout, part: Part) -> Similarities:
    """The inner products of all pairs of query heads in one part, in float64."""
    heads = layout.groups * (layout.parts[Part.Q].rows // layout.parts[Part.K].rows)
    total = torch.zeros((layout.layers * heads,) * 2, dtype=torch.float64)
    for layer in track(range(layout.layers), f"matching {part}", layout.layers):
        own = _of_layer(checkpoint, layout, part, layer)
        for other in range(layer + 1):
            block = own @ (own if other == layer else _of_layer(checkpoint, layout, part, other)).T
            block = block.repeat_interleave(heads // len(block), 0).repeat_interleave(heads // len(block), 1)
            here, there = (slice(at * heads, (at + 1) * heads) for at in (layer, other))
            total[here, there] = block
            total[there, here] = block.T
    return total


def _of_layer(checkpoint: Checkpoint, layout: Layout, part: Part, layer: int) -> Float[Tensor, "heads numbers"]:
    """The rows of a part in one layer, as one vector for each head that has rows of its own."""
    place = layout.parts[part]
    whole = checkpoint.read(place.name(layer)).double()
    whole = whole if place.axis == 0 else whole.T
    size = layout.parts[Part.K].rows if part in OF_HEADS else place.rows
    units = torch.stack([whole[slice(*place.span(group))] for group in range(layout.groups)])
    wrong = (~torch.isfinite(units.flatten(1)).all(dim=1)).nonzero()
    if len(wrong):
        raise CheckpointError(not_finite(HeadUnit(layer, int(wrong[0])), place.name(layer), checkpoint))
    return units.reshape(-1, size * units.shape[2])
