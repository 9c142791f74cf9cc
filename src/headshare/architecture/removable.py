"""Checks that a model can lose units or dimensions of values, and that a plan's removals of either are for it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from headshare.architecture.families import Counts, Separate, family_of
from headshare.architecture.model_layouts import ModelLayouts
from headshare.errors import PlanError
from headshare.plan.layout import Layout, Place
from headshare.plan.plan import SharePlan
from headshare.plan.units import Sublayer


def removal_refusal(config: Mapping[str, Any], kind: Sublayer, *, whole: bool = False) -> str | None:
    """The reason why units of this kind cannot be removed from a model of this (text) configuration, or None.

    The layout tells if there are any such units. With `whole`, layers lose all their units or none. Then it does not
    matter how attention counts its heads.
    """
    model_type = str(config.get("model_type", "unknown"))
    if kind is Sublayer.FFN:
        return None if family_of(model_type) else f"headshare does not know how '{model_type}' models use their neurons"
    if whole and family_of(model_type):
        return None
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


def narrow_values_refusal(config: Mapping[str, Any]) -> str | None:
    """The reason why values cannot be narrowed in a model of this (text) configuration, or None."""
    model_type = str(config.get("model_type", "unknown"))
    family = family_of(model_type)
    if family is not None and not isinstance(family.qkv, Separate):
        return f"'{model_type}' models compute values in one matrix with queries and keys"
    counts = None if family is None else family.narrow_values
    if counts is None:
        return f"the attention of '{model_type}' models is not known to work with values narrower than keys"
    if counts.unless is not None and config.get(counts.unless):
        return f"with {counts.unless}, '{model_type}' models change single values, which are not to be rotated"
    return None


def check_removals(plan: SharePlan, layouts: ModelLayouts) -> None:
    """Check a plan's removals, of units and of dimensions of values, against the layouts of a checkpoint or a model.

    Raises:
        PlanError: if the family's models cannot go without them, or the plan's units are not this model's.
        ArchitectureError: if the model's layout is not known, or it is a mixture of experts.
    """
    for removal in plan.removals:
        kind = removal.layout.kind
        whole = removal.whole_layers
        reason = removal_refusal(layouts.config, kind, whole=len(whole) == len(removal.removed))
        if reason is not None:
            raise PlanError(f"{kind} units cannot be removed from this model: {reason}. Share it without `removals`.")
        if _geometry(layouts.units(kind, removal.layout.groups)) != _geometry(removal.layout):
            raise PlanError(f"the plan removes {kind} units that are not laid out as this model's; it is for another.")
        if kind is Sublayer.ATTENTION:
            _check_counted(attention_kinds(layouts.config, removal.layout.layers), whole)
    values = plan.narrow_values
    if values is not None:
        reason = narrow_values_refusal(layouts.config)
        if reason is not None:
            raise PlanError(f"values cannot be narrowed in this model: {reason}. Share it without `narrow_values`.")
        if _geometry(layouts.attention.only(tuple(values.layout.parts))) != _geometry(values.layout):
            raise PlanError(
                "the plan narrows values of units that are not laid out as this model's; it is for another."
            )


def attention_kinds(config: Mapping[str, Any], layers: int) -> list[str]:
    """The kind of each layer's attention, such as `sliding_attention`. They are alike where nothing else is said.

    Keys and values are kept in another way for each kind, and each is counted and masked by its first layer.
    """
    kinds = config.get("layer_types")
    return [str(kind) for kind in kinds] if isinstance(kinds, list) and len(kinds) == layers else [""] * layers


def _check_counted(kinds: Sequence[str], whole: Collection[int]) -> None:
    """Refuse a plan that leaves a model no attention of a kind that it has."""
    left = {kind for layer, kind in enumerate(kinds) if layer not in whole}
    for kind in kinds:
        if kind not in left:
            what = kind.replace("_", " ") or "attention"
            raise PlanError(f"the plan removes all {what} of the model, which counts tokens by it. Keep a unit of it.")


def _geometry(layout: Layout) -> tuple[Any, ...]:
    """The layout without the prefixes before layers in its tensors' names, which models may change."""
    parts = {part: (_below_the_layer(place), *_numbers(place)) for part, place in layout.parts.items()}
    return layout.layers, layout.groups, parts


def _below_the_layer(place: Place) -> str:
    return place.tensor.partition("{layer}")[2]


def _numbers(place: Place) -> tuple[Any, ...]:
    return place.axis, place.shape, place.start, place.step, place.rows
