"""Which donors could stand in for each unit of a layer, best first: every unit of every earlier layer is looked at.

A donor's gain is how much of what removing the unit costs it makes up for, nothing else being given up. What a donor
makes of this layer's input is computed once, and kept only while it is among the few best of some unit.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from headshare.calibration.costs.curves import Form
from headshare.calibration.costs.least_squares import Fit, Inputs, Lost, Readout
from headshare.calibration.costs.sublayer import Half
from headshare.plan.units import HeadUnit, Part


@dataclass(frozen=True)
class Candidate:
    """A donor for one unit: its features in the unit's place and, where its part of the readout is shared, that."""

    unit: HeadUnit
    gain: float
    features: Inputs
    readout: Readout | None = None


@dataclass
class Donors:
    """All donors that one unit could have in one form: the few best, and the others with their gains, best first."""

    few: int
    best: list[Candidate] = field(default_factory=list)
    others: list[tuple[HeadUnit, float]] = field(default_factory=list)

    def offer(self, candidate: Candidate) -> None:
        """Keep this one among the best, or only its gain. Of equals, the one that was offered first is ahead."""
        insort(self.best, candidate, key=_rank)
        if len(self.best) > self.few:
            last = self.best.pop()
            insort(self.others, (last.unit, last.gain), key=lambda one: -one[1])


def _rank(candidate: Candidate) -> float:
    return -candidate.gain


def find_donors(half: Half, fit: Fit, forms: Sequence[Form], few: int) -> list[dict[Form, Donors]]:
    """For each group, its donors in each of these forms of ties.

    Donors of q and k are ranked by what they would do with their v as well; the few best of those are then looked at
    with the recipient's own v.
    """
    search = _Search(half, fit.lost(half.columns), fit, forms, few)
    for layer in range(half.dense.number):
        search.look_at(layer)
    if Form.QK in forms:
        search.look_again()
    return search.found


class _Search:
    def __init__(self, half: Half, lost: Lost, fit: Fit, forms: Sequence[Form], few: int) -> None:
        self.half, self.lost, self.fit, self.forms, self.few = half, lost, fit, forms, few
        self.groups = half.layout.groups
        self.found = [{form: Donors(few) for form in forms} for _ in range(self.groups)]

    def look_at(self, layer: int) -> None:
        """Offer every unit of this layer to every unit of the recipients' layer."""
        readout = self.half.readout_of(layer) if Form.QKVO in self.forms else None
        for shift in self.half.shifts:
            features = self.half.features(layer, self.half.parts, shift)
            for slot in range(self.groups):
                donor = HeadUnit(layer, (slot + shift) % self.groups)
                recipients = range(self.groups) if len(self.half.shifts) == 1 else range(slot, slot + 1)
                self._offer(donor, features[:, self.half.columns[slot]], recipients, readout)

    def _offer(
        self, donor: HeadUnit, features: Inputs, recipients: range, readout: Float[Tensor, "hidden all"] | None
    ) -> None:
        beside, lost = self.fit.beside(features[: self.half.fitted]), self.lost.only(recipients)
        own = None if readout is None else readout[:, self.half.columns[donor.group]]
        for form in self.forms:
            scaled = own if form is Form.QKVO else None
            gains = beside.gains_for(lost) if scaled is None else beside.scaled_gains_for(lost, scaled)
            for group, gain in zip(recipients, gains.tolist(), strict=True):
                self.found[group][form].offer(Candidate(donor, gain, features, scaled))

    def look_again(self) -> None:
        """Look at the best donors of q and k with the recipients' own v. Each pass over the layer serves all groups."""
        wanted: dict[tuple[int, int], list[tuple[int, HeadUnit]]] = {}
        for group, donors in enumerate(self.found):
            for one in donors[Form.QK].best:
                key = one.unit.layer, (one.unit.group - group) % self.groups
                wanted.setdefault(key, []).append((group, one.unit))
            donors[Form.QK].best = []
        for (layer, shift), pairs in wanted.items():
            features = self.half.features(layer, (Part.Q, Part.K), shift)
            for group, unit in pairs:
                own = features[:, self.half.columns[group]]
                gain = float(
                    self.fit.beside(own[: self.half.fitted]).gains_for(self.lost.only(range(group, group + 1)))
                )
                insort(self.found[group][Form.QK].best, Candidate(unit, gain, own), key=_rank)
