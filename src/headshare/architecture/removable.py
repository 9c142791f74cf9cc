"""Checks that a model can lose units, and that a plan's removals are for that model."""

from collections.abc import Mapping
from typing import Any

from headshare.architecture.families import Counts, family_of
from headshare.architecture.model_layouts import ModelLayouts
from headshare.errors import PlanError
from headshare.plan.layout import Layout, Place
from headshare.plan.plan import SharePlan
from headshare.plan.units import Sublayer


def removal_refusal(config: Mapping[str, Any], kind: Sublayer) -> str | None:
    """The reason why units of this kind cannot be removed from a model of this (text) configuration, or None.

    The layout tells if there are any such units.
    """
    model_type = str(config.get("model_type", "unknown"))
    if kind is Sublayer.FFN:
        return None if family_of(model_type) else f"headshare does not know how '{model_type}' models use their neurons"
    counts = counts_of(model_type)
    if counts is None:
        return f"the attention of '{model_type}' models is not known to work with fewer heads in some layers"
    if counts.unless is not None and config.get(counts.unless):
        return f"with {counts.unless}, the attention of '{model_type}' models needs as many heads in every layer"
    return None


def counts_of(model_type: str) -> Counts | None:
    """Counts that this model type's attention keeps of its heads; None where it is not known to work with fewer."""
    family = family_of(model_type)
    return None if family is None else family.removable


def check_removals(plan: SharePlan, layouts: ModelLayouts) -> None:
    """Check a plan's removals against the layouts of a checkpoint or a model.

    Raises:
        PlanError: if the family's models cannot go without such units, or the plan's units are not this model's.
        ArchitectureError: if the model's layout is not known, or it is a mixture of experts.
    """
    for removal in plan.removals:
        kind = removal.layout.kind
        reason = removal_refusal(layouts.config, kind)
        if reason is not None:
            raise PlanError(f"{kind} units cannot be removed from this model: {reason}. Share it without `removals`.")
        if _geometry(layouts.units(kind, removal.layout.groups)) != _geometry(removal.layout):
            raise PlanError(f"the plan removes {kind} units that are not laid out as this model's; it is for another.")


def _geometry(layout: Layout) -> tuple[Any, ...]:
    """The layout without the prefixes before layers in its tensors' names, which models may change."""
    parts = {part: (_below_the_layer(place), *_numbers(place)) for part, place in layout.parts.items()}
    return layout.layers, layout.groups, parts


def _below_the_layer(place: Place) -> str:
    return place.tensor.partition("{layer}")[2]


def _numbers(place: Place) -> tuple[Any, ...]:
    return place.axis, place.shape, place.start, place.step, place.rows
