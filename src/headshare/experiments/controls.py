"""Controls: the plan's units treated in other ways, in a stock model in memory. Nothing is written."""

import random

import torch
from torch import Tensor, nn

from headshare.architecture.modules import ModuleMap
from headshare.errors import PlanError
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
