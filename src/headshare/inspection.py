"""What is tied to what: a plan as a small text picture, layer by layer, and as data."""

from typing import Any

from headshare.checkpoints import Checkpoint
from headshare.errors import PlanError
from headshare.gaps import recipients_by_layer
from headshare.placement import held_again, split_evenly
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


def describe_split(checkpoint: Checkpoint, devices: int) -> dict[str, Any]:
    """What is held more than once when the layers are split evenly over this many devices: by pair, by device, in all.

    Raises:
        PlanError: if the checkpoint is dense, or has fewer layers than there are devices.
    """
    plan = plan_of(checkpoint)
    places = split_evenly(plan, devices)
    missing = sorted(set(places) - set(checkpoint.tensors))
    if missing:
        raise PlanError(f"the plan in {checkpoint.name} shares {missing[0]}, which is not among its tensors.")
    itemsizes = {name: checkpoint.tensors[name].torch_dtype.itemsize for name in places}
    pairs = held_again(plan, places, itemsizes)
    by_device = [[pair for pair in pairs if pair.device == f"device {number}"] for number in range(devices)]
    return {
        "pairs": [
            {"home": pair.home, "device": pair.device, "units": pair.units, "bytes": pair.nbytes} for pair in pairs
        ],
        "devices": [
            {"device": f"device {number}", "units": sum(p.units for p in held), "bytes": sum(p.nbytes for p in held)}
            for number, held in enumerate(by_device)
        ],
        "units": sum(pair.units for pair in pairs),
        "bytes": sum(pair.nbytes for pair in pairs),
    }


def picture_split(split: dict[str, Any]) -> str:
    """One line for each pair of devices, and their sum."""
    lines = [
        f"  {pair['device']} also holds {pair['units']} units of {pair['home']}: {pair['bytes']:,} bytes"
        for pair in split["pairs"]
    ]
    title = f"layers split over {len(split['devices'])} devices: {split['units']} units held more than once"
    return "\n".join([f"{title}, {split['bytes']:,} bytes", *lines]) + "\n"


def plan_of(checkpoint: Checkpoint) -> SharePlan:
    """The plan of a shared checkpoint.

    Raises:
        PlanError: if the checkpoint is dense.
    """
    if checkpoint.plan is None:
        raise PlanError(f"{checkpoint.name} is a dense checkpoint: nothing in it is tied.")
    return checkpoint.plan
