"""Donors that could stand in for each unit of a layer, best first, among all units of all earlier layers.

A donor's gain is the part of the cost of removing the unit that the donor makes up for, while nothing else is given up.
A donor's features, computed from this layer's input, are kept only while it is among the few best of some unit.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from headshare.calibration import processes
from headshare.calibration.costs.actions import Action, Output
from headshare.calibration.costs.least_squares import Beside, Fit, Inputs, Lost, Readout
from headshare.calibration.costs.sublayer import SublayerData
from headshare.plan.units import HeadUnit


@dataclass(frozen=True)
class Candidate:
    """A donor for one unit: its gain, its features in the unit's place, and its readout columns if those are shared."""

    unit: HeadUnit
    gain: float
    features: Inputs
    readout: Readout | None = None


@dataclass
class Donors:
    """Donors that one unit could have by one action: the few best, and the others with their gains, best first."""

    few: int
    best: list[Candidate] = field(default_factory=list)
    others: list[tuple[HeadUnit, float]] = field(default_factory=list)

    def offer(self, candidate: Candidate) -> None:
        """Keep a candidate among the best, or only its gain. Among equals, the one that was offered first is ahead."""
        insort(self.best, candidate, key=_rank)
        if len(self.best) > self.few:
            last = self.best.pop()
            insort(self.others, (last.unit, last.gain), key=lambda other: -other[1])


def _rank(candidate: Candidate) -> float:
    """The key by which candidates are sorted, the largest gain first."""
    return -candidate.gain


def find_donors(half: SublayerData, fit: Fit, actions: Sequence[Action], few: int) -> list[dict[Action, Donors]]:
    """Find the donors of each group by each of these actions, all of which share parts.

    An action can leave a recipient a part that makes features, such as its own v. Donors are then ranked with all parts
    of their own, and only the few best are looked at again with the recipient's part.
    """
    search = _Search(half, fit.lost(half.columns), fit, actions, few)
    for layer in range(half.dense.number):
        search.look_at(layer)
    for action in actions:
        if not set(half.parts) <= set(action.shares):
            search.look_again(action)
    return search.donors


class _Search:
    """A search for donors of the units of one sublayer. `donors` holds the donors of each group, by action."""

    def __init__(self, half: SublayerData, lost: Lost, fit: Fit, actions: Sequence[Action], few: int) -> None:
        self.half = half
        self.lost = lost
        self.fit = fit
        self.actions = actions
        self.groups = half.layout.groups
        self.donors = [{action: Donors(few) for action in actions} for _ in range(self.groups)]

    def look_at(self, layer: int) -> None:
        """Offer every unit of this layer to every unit of the recipients' layer."""
        # An action with scaled columns needs the donors' output projection, which the others do not.
        scaled = any(action.output is Output.SCALED for action in self.actions)
        readout = self.half.readout_of(layer) if scaled else None
        for shift in self.half.shifts:
            # One pass over the layer moves all donors by this many groups: each then stands in one recipient's place,
            # or in any recipient's if places make no difference.
            features = self.half.features(layer, self.half.parts, shift)
            for slot in range(self.groups):
                donor = HeadUnit(layer, (slot + shift) % self.groups)
                recipients = range(self.groups) if len(self.half.shifts) == 1 else range(slot, slot + 1)
                self._offer(donor, features[:, self.half.columns[slot]], recipients, readout)

    def _offer(
        self, donor: HeadUnit, features: Inputs, recipients: range, readout: Float[Tensor, "hidden all"] | None
    ) -> None:
        """Offer a donor with these features to these recipients, by every action."""
        beside = self.fit.beside(features[: self.half.fitted])
        lost = self.lost.only(recipients)
        own = None if readout is None else readout[:, self.half.columns[donor.group]]
        for action in self.actions:
            scaled = own if action.output is Output.SCALED else None
            gains = _gains(beside, lost, scaled).tolist()
            for group, gain in zip(recipients, gains, strict=True):
                self.donors[group][action].offer(Candidate(donor, gain, features, scaled))

    def look_again(self, action: Action) -> None:
        """Look at this action's best donors with the parts that recipients keep."""
        # Each pass over the layer serves all groups whose donors are as many groups away.
        wanted: dict[tuple[int, int], list[tuple[int, HeadUnit, Readout | None]]] = {}
        for group, donors in enumerate(self.donors):
            for candidate in donors[action].best:
                key = candidate.unit.layer, (candidate.unit.group - group) % self.groups
                wanted.setdefault(key, []).append((group, candidate.unit, candidate.readout))
            donors[action].best = []

        # The best donors are ranked again by what they do beside the recipient's own part.
        parts = tuple(part for part in self.half.parts if part in action.shares)
        for (layer, shift), pairs in wanted.items():
            features = self.half.features(layer, parts, shift)
            for group, unit, readout in pairs:
                own = features[:, self.half.columns[group]]
                beside = self.fit.beside(own[: self.half.fitted])
                gain = float(_gains(beside, self.lost.only(range(group, group + 1)), readout))
                insort(self.donors[group][action].best, Candidate(unit, gain, own, readout), key=_rank)


def _gains(beside: Beside, lost: Lost, readout: Readout | None) -> Float[Tensor, " units"]:
    """The gains of features for each lost unit, read out by columns of its own or by scaled ones of the donor.

    They choose among donors, so they are the first process's.
    """
    return processes.from_first(
        lambda: (beside.gains_for(lost) if readout is None else beside.scaled_gains_for(lost, readout)).cpu()
    )
