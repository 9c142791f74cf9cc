"""Baselines: other ways to make attention smaller, for comparison at equal bytes.

An importance of units becomes cost curves of their deletion, from which a plan for any number of bytes follows. The
other baselines edit a stock model in memory: they write nothing and say how much they would store.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headshare.architecture.modules import linear_of
from headshare.calibration.costs.actions import REMOVE
from headshare.calibration.costs.curves import CostCurve, CostCurves, CurveStep
from headshare.calibration.costs.sublayer import UnitSizes
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError
from headshare.experiments.controls import weight_of
from headshare.integrations.transformers.loading import load_model
from headshare.plan.layout import Layout, Place
from headshare.plan.plan import SharePlan
from headshare.plan.units import HeadUnit, Part, Sublayer
from headshare.progress import track
from headshare.text.tokens import Calibration

Importance = Float[Tensor, " units"]


# ---- deletion, least important first


def magnitudes(dense: Checkpoint) -> Importance:
    """The Euclidean norm of each unit's weights in q, k, v and o together (structured magnitude pruning)."""
    return _summed(dense.layouts.attention, lambda name: dense.read(name).double().square()).sqrt()


def _summed(layout: Layout, numbers: Callable[[str], Tensor]) -> Importance:
    """The sum over each unit of the numbers that `numbers` gives for each weight of a named tensor."""
    totals = torch.zeros(layout.units, dtype=torch.float64)
    for place in layout.parts.values():
        for layer in range(layout.layers):
            whole = numbers(place.name(layer))
            for group in range(layout.groups):
                start, stop = place.span(group)
                part = whole.narrow(place.axis, start, stop - start)
                totals[layout.index(HeadUnit(layer, group))] += part.double().sum().cpu()
    return totals


def taylor(dense: Checkpoint, calibration: Calibration, *, device: str = "cpu") -> Importance:
    """Importance of each unit to first order: |w dL/dw| summed over the weights w of its q, k, v and o.

    L is the mean loss a token over all windows. |w dL/dw| estimates how much the loss changes if w is removed. This is
    the importance of LLM-Pruner's coupled structures, by element (Ma, Fang and Wang, "LLM-Pruner: on the structural
    pruning of large language models", 2023, equation 5).

    Grouped queries count with their key and value. The whole model is in memory, with the gradients of its attention.
    """
    layout = dense.layouts.attention
    model = load_model(dense, dtype=torch.float32, device_map=device).requires_grad_(False)
    # only attention's weights need gradients
    weights = {
        place.name(layer): weight_of(model, place.name(layer)).requires_grad_()
        for place in layout.parts.values()
        for layer in range(layout.layers)
    }
    # gradients add up over windows, so that one window is in memory at a time
    for window in track(calibration.tokens, "gradients", len(calibration.tokens)):
        tokens = window[None].to(device)
        (model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(calibration.tokens)).backward()

    def salience(name: str) -> Tensor:
        weight = weights[name]
        assert weight.grad is not None
        return (weight.detach() * weight.grad).abs()

    return _summed(layout, salience)


def removal_prices(dense: Checkpoint, importance: Importance) -> CostCurves:
    """Cost curves of deleting attention units, the least important of each layer first.

    Each layer keeps its most important unit.
    """
    layout = dense.layouts.attention
    curves = []
    for layer in range(layout.layers):
        order = sorted(range(layout.groups), key=lambda group: _of(importance, layout, layer, group))[:-1]
        saved = REMOVE.saved_bytes(UnitSizes.of(dense, layout, layer))
        steps = tuple(CurveStep(REMOVE, (group,), _of(importance, layout, layer, group), saved) for group in order)
        if steps:
            curves.append(CostCurve(Sublayer.ATTENTION, layer, steps))
    return CostCurves(str(dense.config.get("model_type", "unknown")), {Sublayer.ATTENTION: layout}, tuple(curves))


def _of(importance: Importance, layout: Layout, layer: int, group: int) -> float:
    return float(importance[layout.index(HeadUnit(layer, group))])


# ---- edits of a stock model


@torch.no_grad()
def zero_smallest(model: nn.Module, layout: Layout, numbers: int) -> None:
    """Set the `numbers` smallest numbers of the attention's matrices to zero (unstructured magnitude pruning).

    The stored size does not change. Of several numbers of the largest size to be zeroed, the first ones are taken.
    """
    weights = [weight_of(model, place.name(layer)) for layer in range(layout.layers) for place in _distinct(layout)]
    # the largest size to be zeroed is found by halving, so that no more than one matrix is copied at once
    below = -1
    last = 2**31 - 1
    while last - below > 1:
        middle = (below + last) // 2
        if sum(int((_sizes(weight) <= middle).sum()) for weight in weights) < numbers:
            below = middle
        else:
            last = middle
    # all smaller numbers become zero, and of those of exactly this size as many as are left
    left = numbers - sum(int((_sizes(weight) < last).sum()) for weight in weights)
    for weight in weights:
        sizes = _sizes(weight)
        level = sizes == last
        weight.masked_fill_((sizes < last) | (level & (level.flatten().cumsum(0).view_as(level) <= left)), 0)
        left = max(0, left - int(level.sum()))


def _sizes(weight: Tensor) -> Int[Tensor, "..."]:
    """The absolute values as whole numbers in the same order: the bits of a float that is not negative."""
    return weight.abs().float().view(torch.int32)


def _distinct(layout: Layout) -> list[Place]:
    """The places of a layout, once for each tensor: fused parts lie in one tensor."""
    return list({place.tensor: place for place in layout.parts.values()}.values())


@torch.no_grad()
def overwrite_with_mean(model: nn.Module, plan: SharePlan) -> None:
    """Give all recipients of a plan the mean of all other units, part by part.

    The mean is a single copy in place of one donor for each recipient.
    """
    for selection in plan.selections:
        recipients = {tie.recipient for tie in selection.ties}
        layout = selection.layout
        for part, place in layout.parts.items():
            if part is Part.O:
                continue
            # views of every unit's weights, which the mean is then written to
            slices = {}
            for layer in range(layout.layers):
                weight = weight_of(model, place.name(layer))
                for group in range(layout.groups):
                    start, stop = place.span(group)
                    slices[HeadUnit(layer, group)] = weight.narrow(place.axis, start, stop - start)
            kept = [weights for unit, weights in slices.items() if unit not in recipients]
            mean = torch.stack([weights.double() for weights in kept]).mean(dim=0)
            for recipient in recipients:
                slices[recipient].copy_(mean)


@torch.no_grad()
def round_to_integers(model: nn.Module, *, bits: int = 8, stored: torch.dtype | None = None) -> int:
    """Round the matrices of all layers to integers, symmetrically, with one scale for each output.

    This is weight-only quantisation to `bits` bits; the rounded numbers are kept as dense ones. The largest number of
    an output becomes 2^(bits - 1) - 1. Embeddings, the head and norms stay.

    Returns the bytes that it saves. Weights and scales are counted in the type `stored`, whatever the model computes
    in (default: the model's own type).

    Raises:
        CheckpointError: if there are experts, all in one tensor.
    """
    saved = 0.0
    most = 2 ** (bits - 1) - 1
    if experts := next((name for name, value in model.named_parameters() if value.ndim > 2), None):
        raise CheckpointError(f"{experts} holds the matrices of several experts, which are not rounded yet.")
    for name, module in model.named_modules():
        linear = linear_of(module)
        # layers have a number in their names; the head and the embeddings have none
        if linear is None or not any(step.isdigit() for step in name.split(".")):
            continue
        weight = module.get_parameter("weight")
        across = 0 if linear.in_out else 1
        whole = weight.float()  # the type that integers are multiplied in; a model's own would round once more
        scale = (whole.abs().amax(dim=across, keepdim=True) / most).clamp(min=torch.finfo(whole.dtype).tiny)
        weight.copy_((whole / scale).round() * scale)
        item = (stored or weight.dtype).itemsize
        saved += weight.numel() * (item - bits / 8) - scale.numel() * item
    return math.floor(saved)
