"""Units that a model on several devices holds more than once: a donor's rows lie on every device that uses them.

This module knows a plan and the device of each tensor. It never sees a weight.
"""

from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

from headshare.errors import OptionError
from headshare.plan.plan import SharePlan


class HeldAgain(NamedTuple):
    """Units that live on `home` and are held on `device` too, and the bytes they take there."""

    home: str
    device: str
    units: int
    nbytes: int


def held_again(plan: SharePlan, devices: Mapping[str, str], itemsizes: Mapping[str, int]) -> list[HeldAgain]:
    """Units that one device holds although they live on another, for each pair of devices.

    `devices` and `itemsizes` give the device of every tensor of the plan, and the bytes of one of its numbers.
    """
    # by pair of devices: units, and bytes of their parts, each donor once however many recipients use it
    units: dict[tuple[str, str], set[tuple[int, int, int]]] = {}
    parts: dict[tuple[str, str], dict[tuple[str, int], int]] = {}
    for number, selection in enumerate(plan.selections):
        for place in selection.layout.parts.values():
            for recipient, donor in selection.ties:
                name = place.name(donor.layer)
                pair = (devices[name], devices[place.name(recipient.layer)])
                if pair[0] != pair[1]:
                    units.setdefault(pair, set()).add((number, *donor))
                    size = place.numel * itemsizes[name]
                    parts.setdefault(pair, {})[name, place.span(donor.group)[0]] = size
    return [HeldAgain(*pair, len(units[pair]), sum(parts[pair].values())) for pair in sorted(units)]


def split_evenly(plan: SharePlan, devices: int) -> dict[str, str]:
    """Devices of the plan's tensors when its layers are split over this many devices: "device 0", "device 1", ...

    Raises:
        OptionError: if there are more devices than layers, or none.
    """
    layers = min((selection.layout.layers for selection in plan.selections), default=devices)
    if not 1 <= devices <= layers:
        raise OptionError(f"{layers} layers cannot be split over {devices} devices; choose 1 to {layers}.")
    return {
        place.name(layer): f"device {layer * devices // selection.layout.layers}"
        for selection in plan.selections
        for place in selection.layout.parts.values()
        for layer in range(selection.layout.layers)
    }


class RankShare(NamedTuple):
    """What a rank holds of the parts that a plan shares, in bytes, where ranks divide each layer's units evenly.

    `stored` is of its own units that have weights, `borrowed` is saved by ties to units that it holds, and `copied` is
    of other ranks' units that it holds because its own are tied to them.
    """

    rank: int
    stored: int
    borrowed: int
    copied: int


def shares_of_ranks(plan: SharePlan, ranks: int, itemsizes: Mapping[str, int]) -> list[RankShare]:
    """What each of so many tensor-parallel ranks holds. `itemsizes` is as in `held_again`.

    Raises:
        OptionError: if ranks cannot have as many units each.
    """
    stored = [0] * ranks
    borrowed = [0] * ranks
    copied: list[dict[tuple[str, int], int]] = [{} for _ in range(ranks)]
    for selection in plan.selections:
        layout = selection.layout
        if layout.groups % ranks:
            raise OptionError(f"{layout.groups} {layout.kind} units of a layer do not divide evenly by {ranks} ranks.")
        donors = {tie.recipient: tie.donor for tie in selection.ties}
        for place, index in product(layout.parts.values(), range(layout.units)):
            unit = layout.unit(index)
            rank = unit.group * ranks // layout.groups
            name = place.name(unit.layer)
            size = place.numel * itemsizes[name]
            donor = donors.get(unit)
            if donor is None:
                stored[rank] += size - _removed(plan, name, place.span(unit.group)) * size // place.rows
            elif donor.group * ranks // layout.groups == rank:
                borrowed[rank] += size
            else:
                key = (place.name(donor.layer), place.span(donor.group)[0])
                borrowed[rank] += size if key in copied[rank] else 0
                copied[rank][key] = size
    return [RankShare(rank, stored[rank], borrowed[rank], sum(copied[rank].values())) for rank in range(ranks)]


def _removed(plan: SharePlan, name: str, span: tuple[int, int]) -> int:
    """The count of a tensor's indices in this span that the plan removes."""
    tensor = plan.tensors.get(name)
    spans = () if tensor is None else tensor.removed
    return sum(max(0, min(stop, span[1]) - max(start, span[0])) for start, stop in spans)
