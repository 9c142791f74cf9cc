"""Layers of different widths: the units and neurons that a layer of vLLM's model gets where a plan removes some.

Ranks share them evenly, so that zeros fill up what is left over.
"""

from typing import NamedTuple

from headshare.plan.plan import SharePlan
from headshare.plan.spans import length
from headshare.plan.units import Sublayer

# neurons of a rank come in such blocks, which products are fast on
BLOCK = 16


class LayerWidth(NamedTuple):
    """The units of attention and the neurons of a layer, on all ranks together. No units: no attention."""

    units: int
    neurons: int


def layer_width(plan: SharePlan, layer: int, dense: LayerWidth, ranks: int) -> LayerWidth:
    """The width of this layer, which has that of `dense` where the plan removes nothing."""
    kept = {Sublayer.ATTENTION: dense.units, Sublayer.FFN: dense.neurons}
    for removal in plan.removals:
        kept[removal.layout.kind] -= length(removal.removed.get(layer, ()))
    units = kept[Sublayer.ATTENTION]
    if units and ranks <= dense.units:
        units = min(dense.units, _filled(units, ranks))
    elif units:
        units = dense.units  # of which a rank has one already
    return LayerWidth(units, min(dense.neurons, _filled(max(1, kept[Sublayer.FFN]), BLOCK * ranks)))


def _filled(count: int, block: int) -> int:
    return -(-count // block) * block
