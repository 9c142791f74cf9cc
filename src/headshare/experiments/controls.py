"""Controls: the plan's units treated in other ways, in a stock model in memory. Nothing is written."""

import random

import torch
from torch import Tensor, nn

from headshare.architecture.modules import ModuleMap
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import PlanError
from headshare.matching.functions import cosine
from headshare.matching.modes import MODES, Request
from headshare.matching.pairing import units_at
from headshare.matching.products import unit_products
from headshare.plan.layout import Layout
from headshare.plan.plan import SharePlan
from headshare.plan.section import Choice
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Sublayer, Tie


@torch.no_grad()
def overwrite_recipients(model: nn.Module, plan: SharePlan) -> None:
    """Write donors' rows over recipients' in a stock model, and take removed units out.

    The model then computes what a shared model computes, with nothing saved. Low-rank units keep their columns as they
    are, because the plan does not know their factors.
    """
    weights: dict[str, Tensor] = {}
    for selection in plan.selections:
        for place in selection.layout.parts.values():
            for recipient, donor in selection.ties:
                into = weights.setdefault(place.name(recipient.layer), weight_of(model, place.name(recipient.layer)))
                taken = weights.setdefault(place.name(donor.layer), weight_of(model, place.name(donor.layer)))
                start, stop = place.span(recipient.group)
                source, end = place.span(donor.group)
                into.narrow(place.axis, start, stop - start).copy_(taken.narrow(place.axis, source, end - source))
    for removal in plan.removals:
        units = [HeadUnit(layer, group) for layer in removal.removed for group in removal.indices(layer)]
        delete_units(model, removal.layout, units)


@torch.no_grad()
def delete_units(model: nn.Module, layout: Layout, units: list[HeadUnit]) -> None:
    """Take units out of a stock model: their columns of the output projection (o or down) become zero.

    Raises:
        PlanError: if the layout has no readout part.
    """
    part = Part.O if layout.kind is Sublayer.ATTENTION else Part.DOWN
    if part not in layout.parts:
        raise PlanError(f"to delete {layout.kind} units, the layout must have part {part}.")
    place = layout.parts[part]
    for layer, group in units:
        start, stop = place.span(group)
        weight_of(model, place.name(layer)).narrow(place.axis, start, stop - start).zero_()


def with_random_donors(plan: SharePlan, seed: int = 0) -> SharePlan:
    """A plan with the same recipients, each tied to a random kept unit of an earlier layer.

    Removals and low-rank units stay the same.
    """
    generator = random.Random(seed)  # noqa: S311 - an experiment's control, not a secret
    selections = []
    for selection in plan.selections:
        recipients = {tie.recipient for tie in selection.ties}
        ties = []
        for recipient in sorted(recipients):
            earlier = [
                HeadUnit(layer, group) for layer in range(recipient.layer) for group in range(selection.layout.groups)
            ]
            kept = [unit for unit in earlier if unit not in recipients and plan.may_lend(unit, selection)]
            ties.append(Tie(recipient, generator.choice(kept)))
        choice = Choice(match="random", mode=selection.chosen.mode, ratio=selection.chosen.ratio)
        selections.append(Selection(layout=selection.layout, ties=tuple(ties), scale=selection.scale, chosen=choice))
    return SharePlan(
        model_type=plan.model_type,
        selections=tuple(selections),
        removals=plan.removals,
        factored=plan.factored,
        others=plan.others,
    )


def layer_by_layer(dense: Checkpoint, ratio: float) -> SharePlan:
    """A plan that shares q, k and v of whole layers, enough for the heads of this ratio (section 3.2 of the paper).

    Layers are matched as the paper matches heads: by the cosine of all of W_q and W_k, the best pairs first, each
    recipient with a donor that keeps its weights. Each unit takes the place's unit of the donor.
    """
    layout = dense.layouts.attention.only((Part.Q, Part.K, Part.V))
    products = sum(unit_products(dense, layout, (Part.Q, Part.K)).values())
    assert isinstance(products, Tensor)
    # of a layer with a layer: the sum over units in the same place
    layers = products.view(layout.layers, layout.groups, layout.layers, layout.groups).diagonal(dim1=1, dim2=3).sum(-1)
    whole = layout.model_copy(update={"groups": 1, "parts": {}})
    recipients = whole_layers(layout, ratio)
    pairs = MODES["star"](Request(whole, cosine({Part.Q: layers}, Part.Q), recipients, frozenset()))
    ties = [
        Tie(HeadUnit(tie.recipient.layer, group), HeadUnit(tie.donor.layer, group))
        for tie in pairs
        for group in range(layout.groups)
    ]
    selection = Selection(layout=layout, ties=tuple(ties), chosen=Choice(match="layers", mode="star", ratio=ratio))
    return SharePlan(model_type=str(dense.config.get("model_type", "unknown")), selections=(selection,))


def whole_layers(layout: Layout, ratio: float) -> int:
    """The number of layers that hold at least the units of this ratio; one layer always keeps its own."""
    return min(-(-units_at(ratio, layout.units) // layout.groups), layout.layers - 1)


def recipients_of(plan: SharePlan) -> dict[Sublayer, list[HeadUnit]]:
    """The recipients of a plan by sublayer, each once."""
    recipients: dict[Sublayer, set[HeadUnit]] = {}
    for selection in plan.selections:
        recipients.setdefault(selection.layout.kind, set()).update(tie.recipient for tie in selection.ties)
    return {kind: sorted(units) for kind, units in recipients.items()}


def weight_of(model: nn.Module, name: str) -> Tensor:
    """A stock model's weight, by its tensor's name in the checkpoint."""
    weight = ModuleMap.of(model, [name]).module(model, name).weight
    assert isinstance(weight, Tensor)
    return weight
