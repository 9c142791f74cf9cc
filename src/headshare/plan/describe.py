"""What is tied, removed and factored: a plan as a small text picture, layer by layer, and as data."""

from typing import Any

from headshare.plan.low_rank import Factored
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.spans import length
from headshare.plan.tensors import recipients_by_layer
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Kind

KEPT, LENDS, GIVEN, REMOVED, FACTORED = "■", "◆", "·", "x", "f"
BAR = 32


def describe(plan: SharePlan) -> dict[str, Any]:
    """The plan's ties, removals, factored units and counts, as `inspect --json` prints them."""
    return {
        "model_type": plan.model_type,
        "plan_digest": plan.digest,
        "ties": plan.ties,
        "selections": [_describe_selection(selection) for selection in plan.selections],
        "removals": [_describe_removal(removal) for removal in plan.removals],
        "factored": [_describe_factored(factored) for factored in plan.factored],
    }


def given_up(plan: SharePlan) -> list[float]:
    """The share of each layer's attention units that are tied, factored or removed: the paper's figure 6."""
    layouts = [layout for layout in plan.layouts if layout.kind is Kind.ATTENTION]
    if not layouts:
        return []
    units = {tie.recipient for one in plan.selections if one.layout.kind is Kind.ATTENTION for tie in one.ties}
    numbers = range(layouts[0].layers)
    for removal in (one for one in plan.removals if one.layout.kind is Kind.ATTENTION):
        units |= {HeadUnit(layer, group) for layer in numbers for group in removal.indices(layer)}
    for factored in plan.factored:
        units |= {HeadUnit(layer, group) for layer in numbers for group, _ in factored.ranked(layer)}
    return [sum(unit.layer == layer for unit in units) / layouts[0].groups for layer in numbers]


def _describe_removal(removal: Removal) -> dict[str, Any]:
    return {**_describe_units(removal, "removed"), "indices": removal.model_dump(mode="json")["removed"]}


def _describe_factored(factored: Factored) -> dict[str, Any]:
    data = factored.model_dump(mode="json")
    return {**_describe_units(factored, "factored"), "indices": data["units"], "ranks": data["ranks"]}


def _describe_units(some: Removal | Factored, done: str) -> dict[str, Any]:
    return {
        "kind": str(some.layout.kind),
        "layers": some.layout.layers,
        "groups": some.layout.groups,
        done: some.count,
        "ratio": some.count / some.layout.units,
        "chosen": some.chosen.model_dump(mode="json"),
    }


def _describe_selection(selection: Selection) -> dict[str, Any]:
    return {
        "kind": str(selection.layout.kind),
        "parts": [str(part) for part in selection.parts],
        "layers": selection.layout.layers,
        "groups": selection.layout.groups,
        "recipients": len(selection.ties),
        "ratio": len(selection.ties) / selection.layout.units,
        "chosen": selection.chosen.model_dump(mode="json"),
        "ties": [[*tie.recipient, *tie.donor] for tie in selection.ties],
    }


def picture(plan: SharePlan) -> str:
    """One line a layer, one sign a unit, and beside it whose weights each recipient uses."""
    blocks = [_picture_selection(selection, plan) for selection in plan.selections]
    blocks += [_picture_removal(removal) for removal in plan.removals]
    blocks += [_picture_factored(factored) for factored in plan.factored]
    legend = f"{KEPT} kept   {LENDS} kept, and lends to a later layer   {GIVEN} given up, uses a donor's"
    legend += f"   {REMOVED} removed" if plan.removals else ""
    legend += f"   {FACTORED} W_o stored as a product" if plan.factored else ""
    return "\n\n".join([*blocks, legend]) + "\n"


def _picture_selection(selection: Selection, plan: SharePlan) -> str:
    layout, chosen = selection.layout, selection.chosen
    measured = len(selection.ties) / layout.units
    title = (
        f"{layout.kind}, parts {','.join(selection.parts)}: {len(selection.ties)} of {layout.units} units given up "
        f"({measured:.1%}; asked {chosen.ratio:.1%}), match {chosen.match}, mode {chosen.mode}"
    )
    lenders = {tie.donor for tie in selection.ties}
    by_layer = recipients_by_layer(selection)
    width = len(str(layout.layers - 1))
    lines = [title]
    for layer in range(layout.layers):
        ties = by_layer.get(layer, [])
        given = {group for group, _, _ in ties}
        gone = _gone(plan, selection, layer)
        signs = "".join(
            GIVEN if g in given else LENDS if (layer, g) in lenders else REMOVED if g in gone else KEPT
            for g in range(layout.groups)
        )
        notes = "  ".join(f"{group}<-{donor_layer}.{donor_group}" for group, donor_layer, donor_group in ties)
        lines.append(f"  layer {layer:{width}}  {signs}  {notes}".rstrip())
    return "\n".join(lines)


def _gone(plan: SharePlan, selection: Selection, layer: int) -> set[int]:
    """The groups of a selection's layer that are removed whole; of a group that loses neurons something is left."""
    same = [one for one in plan.removals if (one.layout.kind, one.layout.groups) == _grid(selection)]
    return {group for removal in same for group in removal.indices(layer)}


def _grid(selection: Selection) -> tuple[Kind, int]:
    return selection.layout.kind, selection.layout.groups


def _picture_removal(removal: Removal) -> str:
    """A sign for each attention unit; for neurons, of which there are thousands, a bar and a count."""
    layout, chosen = removal.layout, removal.chosen
    what = "units" if layout.kind is Kind.ATTENTION else "neurons"
    title = (
        f"{layout.kind}: {removal.count} of {layout.units} {what} removed ({removal.count / layout.units:.1%}; "
        f"asked {chosen.ratio:.1%}), match {chosen.match}, mode {chosen.mode}"
    )
    width, digits = len(str(layout.layers - 1)), len(str(layout.groups))
    lines = [title]
    for layer in range(layout.layers):
        count = length(removal.removed.get(layer, ()))
        if layout.kind is Kind.ATTENTION:
            gone = set(removal.indices(layer))
            signs = "".join(REMOVED if group in gone else KEPT for group in range(layout.groups))
        else:
            kept = round(BAR * (1 - count / layout.groups))
            signs = KEPT * kept + REMOVED * (BAR - kept)
        lines.append(f"  layer {layer:{width}}  {signs}  {count:{digits}} of {layout.groups}")
    return "\n".join(lines)


def _picture_factored(factored: Factored) -> str:
    """A sign for each attention unit, and the ranks of those that are factored."""
    layout, chosen = factored.layout, factored.chosen
    title = (
        f"{layout.kind}, part o: {factored.count} of {layout.units} units factored "
        f"({factored.count / layout.units:.1%}; asked {chosen.ratio:.1%}), match {chosen.match}, mode {chosen.mode}"
    )
    width = len(str(layout.layers - 1))
    lines = [title]
    for layer in range(layout.layers):
        rank_of = dict(factored.ranked(layer))
        signs = "".join(FACTORED if group in rank_of else KEPT for group in range(layout.groups))
        lines.append(f"  layer {layer:{width}}  {signs}  {_in_words(sorted(rank_of.values()))}".rstrip())
    return "\n".join(lines)


def _in_words(ranks: list[int]) -> str:
    """How many units are factored, and at which rank: "3 of rank 8", "2 of rank 4 to 16"."""
    if not ranks:
        return ""
    return f"{len(ranks)} of rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[-1] != ranks[0] else "")
