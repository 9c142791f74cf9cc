"""Other ways to make attention smaller, to be compared with at equal bytes.

Deletion by an importance becomes prices, so that a plan for any number of bytes follows; the rest are edits of a stock
model in memory, which write nothing and say what they would store.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headshare.architecture.modules import linear_of
from headshare.calibration.costs.actions import REMOVE
from headshare.calibration.costs.curves import Path, Prices, Step
from headshare.calibration.costs.sublayer import UnitSizes
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError
from headshare.experiments.controls import weight_of
from headshare.integrations.transformers.loading import load_model
from headshare.plan.layout import Layout, Place
from headshare.plan.plan import SharePlan
from headshare.plan.units import HeadUnit, Kind, Part
from headshare.progress import track
from headshare.text.tokens import Calibration

Importance = Float[Tensor, " units"]


# ---- deletion, least important first


def magnitudes(dense: Checkpoint) -> Importance:
    """The Euclidean norm of each unit's weights, q, k, v and o together: structured magnitude pruning, by unit."""
    return _summed(dense.layouts.attention, lambda name: dense.read(name).double().square()).sqrt()


def _summed(layout: Layout, numbers: Callable[[str], Tensor]) -> Importance:
    """The sums over each unit's parts of numbers that stand in the places of its weights, by tensor's name."""
    found = torch.zeros(layout.units, dtype=torch.float64)
    for place in layout.parts.values():
        for layer in range(layout.layers):
            whole = numbers(place.name(layer))
            for group in range(layout.groups):
                start, stop = place.span(group)
                part = whole.narrow(place.axis, start, stop - start)
                found[layout.index(HeadUnit(layer, group))] += part.double().sum().cpu()
    return found


def taylor(dense: Checkpoint, calibration: Calibration, *, device: str = "cpu") -> Importance:
    """What removing each weight would change of the loss to first order, |w dL/dw|, summed over a unit's q, k, v and o:
    the importance of LLM-Pruner's coupled structures, by element (Ma, Fang and Wang, "LLM-Pruner: on the structural
    pruning of large language models", 2023, equation 5). L is the mean loss a token over all windows.

    Grouped queries go with their key and value. The model is in memory whole, with the gradients of its attention.
    """
    layout = dense.layouts.attention
    model = load_model(dense, dtype=torch.float32, device_map=device).requires_grad_(False)
    weights = {
        place.name(layer): weight_of(model, place.name(layer)).requires_grad_()
        for place in layout.parts.values()
        for layer in range(layout.layers)
    }
    for window in track(calibration.tokens, "gradients", len(calibration.tokens)):
        tokens = window[None].to(device)
        (model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(calibration.tokens)).backward()

    def salience(name: str) -> Tensor:
        weight = weights[name]
        assert weight.grad is not None
        return (weight.detach() * weight.grad).abs()

    return _summed(layout, salience)


def removal_prices(dense: Checkpoint, importance: Importance) -> Prices:
    """Deletion of attention units, the least important of each layer first; each layer keeps its most important one."""
    layout = dense.layouts.attention
    paths = []
    for layer in range(layout.layers):
        order = sorted(range(layout.groups), key=lambda group: _of(importance, layout, layer, group))[:-1]
        saved = REMOVE.saved_bytes(UnitSizes.of(dense, layout, layer))
        steps = tuple(Step(REMOVE, (group,), _of(importance, layout, layer, group), saved) for group in order)
        if steps:
            paths.append(Path(Kind.ATTENTION, layer, steps))
    return Prices(str(dense.config.get("model_type", "unknown")), {Kind.ATTENTION: layout}, tuple(paths))


def _of(importance: Importance, layout: Layout, layer: int, group: int) -> float:
    return float(importance[layout.index(HeadUnit(layer, group))])


# ---- edits of a stock model


@torch.no_grad()
def zero_smallest(model: nn.Module, layout: Layout, numbers: int) -> None:
    """Set so many numbers of the attention's matrices to zero, the smallest of all: unstructured magnitude pruning.
    What is stored stays as large as it was.

    Of numbers as large as the last that goes, those that come first do. That one's size is found by halving, so that
    no more than a matrix is copied at once.
    """
    weights = [weight_of(model, place.name(layer)) for layer in range(layout.layers) for place in _distinct(layout)]
    below, last = -1, 2**31 - 1
    while last - below > 1:
        middle = (below + last) // 2
        if sum(int((_sizes(weight) <= middle).sum()) for weight in weights) < numbers:
            below = middle
        else:
            last = middle
    left = numbers - sum(int((_sizes(weight) < last).sum()) for weight in weights)
    for weight in weights:
        sizes = _sizes(weight)
        level = sizes == last
        weight.masked_fill_((sizes < last) | (level & (level.flatten().cumsum(0).view_as(level) <= left)), 0)
        left = max(0, left - int(level.sum()))


def _sizes(weight: Tensor) -> Int[Tensor, "..."]:
    """Numbers' sizes as whole numbers in the same order: the bits of what is no less than zero."""
    return weight.abs().float().view(torch.int32)


def _distinct(layout: Layout) -> list[Place]:
    """One place for each tensor: fused parts lie in one."""
    return list({place.tensor: place for place in layout.parts.values()}.values())


@torch.no_grad()
def overwrite_with_mean(model: nn.Module, plan: SharePlan) -> None:
    """Give all recipients of a plan the mean of all units that are no recipients, part by part: one copy for all of
    them, in place of a donor for each."""
    for selection in plan.selections:
        recipients = {tie.recipient for tie in selection.ties}
        layout = selection.layout
        for part, place in layout.parts.items():
            if part is Part.O:
                continue
            slices = {}
            for layer in range(layout.layers):
                weight = weight_of(model, place.name(layer))
                for group in range(layout.groups):
                    start, stop = place.span(group)
                    slices[HeadUnit(layer, group)] = weight.narrow(place.axis, start, stop - start)
            kept = [one for unit, one in slices.items() if unit not in recipients]
            mean = torch.stack([one.double() for one in kept]).mean(dim=0)
            for recipient in recipients:
                slices[recipient].copy_(mean)


@torch.no_grad()
def round_to_integers(model: nn.Module, *, bits: int = 8, stored: torch.dtype | None = None) -> int:
    """Round the matrices of all layers to integers with a scale an output, symmetric: what weight-only quantisation to
    so many bits keeps, computed with as dense numbers. Returns the bytes that it saves of weights that are `stored` in
    this type, whatever the model computes in (default: its own); scales are counted in it too.

    An output's largest number becomes 2^(bits - 1) - 1. Embeddings, the head and norms stay.

    Raises:
        CheckpointError: if there are experts, all in one tensor.
    """
    saved = 0.0
    most = 2 ** (bits - 1) - 1
    if experts := next((name for name, one in model.named_parameters() if one.ndim > 2), None):
        raise CheckpointError(f"{experts} holds the matrices of several experts, which are not rounded yet.")
    for name, module in model.named_modules():
        linear = linear_of(module)
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
