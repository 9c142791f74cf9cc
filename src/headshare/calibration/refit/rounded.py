"""A built layer whose matrices are rounded as a plan says, so that a refit makes up for that too."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from headshare.calibration.layerwise.layers import Layers
from headshare.checkpoint.header import DTYPES
from headshare.checkpoint.rounding.numbers import dense, to_nearest
from headshare.checkpoint.rounding.tensors import scale_type
from headshare.plan.plan import SharePlan
from headshare.plan.units import READOUTS, Part


def is_repaired(plan: SharePlan) -> bool:
    """True if a plan costs a model something that a refit makes up for: 8 bits alone do not."""
    return bool(plan.sections or (plan.bits is not None and plan.bits.int4))


def round_layer(module: nn.Module, layers: Layers, layer: int, plan: SharePlan, *, readouts: bool) -> None:
    """Round the matrices of a built layer to the nearest numbers of the plan's bits, in place.

    They are the output projections with `readouts`, and all others without. Matrices are in their dense shape, so that
    of an output projection that loses columns the groups are not quite those that are stored.
    """
    if plan.bits is None:
        return
    layouts = [layout for layout in (layers.attention, layers.ffn) if layout is not None]
    parts: Collection[Part] = [part for layout in layouts for part in layout.parts if (part in READOUTS) == readouts]
    for name, path in {layers.tensor(part, layer): layers.path(part) for part in parts}.items():
        bits = plan.bits.of.get(name)
        if bits is None:
            continue
        weight = module.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        matrix = weight.data.T if layers.in_out else weight.data
        group = plan.bits.group if bits == 4 else None
        scales = DTYPES[scale_type(bits, layers.checkpoint.tensors[name].dtype)]
        numbers, scale = to_nearest(matrix.cpu(), bits, group, scales)
        nearest = dense(numbers, scale, group, torch.float32).to(weight.device)
        weight.data.copy_(nearest.T if layers.in_out else nearest)
