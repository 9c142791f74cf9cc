"""What is tied to what: a plan as a small text picture, layer by layer, and as data."""

from typing import Any

from headshare.checkpoints import Checkpoint
from headshare.errors import PlanError
from headshare.gaps import recipients_by_layer
from headshare.plans import Selection, SharePlan

KEPT, LENDS, GIVEN = "■", "◆", "·"


def describe(plan: SharePlan) -> dict[str, Any]:
    """The plan's ties and counts, as `inspect --json` prints them."""
    return {
        "model_type": plan.model_type,
        "plan_digest": plan.digest,
        "ties": plan.ties,
        "selections": [_describe_selection(selection) for selection in plan.selections],
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
    blocks = [_picture_selection(selection) for selection in plan.selections]
    legend = f"{KEPT} kept   {LENDS} kept, and lends to a later layer   {GIVEN} given up, uses a donor's"
    return "\n\n".join([*blocks, legend]) + "\n"


def _picture_selection(selection: Selection) -> str:
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
        signs = "".join(
            GIVEN if group in given else LENDS if (layer, group) in lenders else KEPT for group in range(layout.groups)
        )
        notes = "  ".join(f"{group}<-{donor_layer}.{donor_group}" for group, donor_layer, donor_group in ties)
        lines.append(f"  layer {layer:{width}}  {signs}  {notes}".rstrip())
    return "\n".join(lines)


def plan_of(checkpoint: Checkpoint) -> SharePlan:
    """The plan of a shared checkpoint.

    Raises:
        PlanError: if the checkpoint is dense.
    """
    if checkpoint.plan is None:
        raise PlanError(f"{checkpoint.name} is a dense checkpoint: nothing in it is tied.")
    return checkpoint.plan
