"""Allocation of a budget of units or of bytes over all layers, by their cost curves. Sees no weight.

A cost curve can only be followed from its beginning, and a plan follows one curve of each sublayer. So a choice names
the curve of every sublayer, and the number of steps to take along it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from headshare.calibration.costs.curves import CostCurve, CostCurves
from headshare.calibration.costs.to_plan import Budgeted, End, budgeted
from headshare.errors import PlanError
from headshare.plan.section import Choice
from headshare.plan.units import Sublayer

# What a sublayer can do: an end of a curve, or more.
Chosen = TypeVar("Chosen")
# For each sublayer, the index of the end that is chosen.
Taken = list[int]


def plan_for_units(prices: CostCurves, units: int, *, choice: Choice | None = None) -> Budgeted:
    """The plan that gives up exactly this many units at the least possible cost, which is the sum over its steps.

    Units are attention units, and groups of neurons where those are tied. Single neurons do not count as units, and are
    all kept. This is a multiple-choice knapsack, solved by dynamic programming over sublayers (Kellerer, Pferschy and
    Pisinger, "Knapsack Problems", 2004, section 11.5).

    Raises:
        PlanError: if so many units cannot be given up.
    """
    of_units = (curve for curve in prices.curves if not curve.is_of_neurons)
    sublayers = [_of_curves(curves) for curves in _by_sublayer(of_units)]
    most = sum(max(end for _, end in sublayer.ends) for sublayer in sublayers)
    if not 0 <= units <= most:
        raise PlanError(f"{units} units cannot be given up; of those that were priced, {most} can. Ask for less.")
    return budgeted(prices, _cheapest(sublayers, units), choice)


def plan_for_bytes(prices: CostCurves, saved: int, *, choice: Choice | None = None) -> Budgeted:
    """The plan that saves at least this many bytes, at the least cost that a greedy search finds.

    Each turn goes on in the sublayer where that is cheapest for the bytes that it saves. A turn takes one step or
    several, or changes to another curve of the sublayer, so a dear step does not hide the cheap ones behind it. Before
    each turn, the cheapest way to reach the budget by going on in one sublayer is noted. The cheapest of these ways is
    taken, without the steps that turn out not to be needed. The search is repeated with each set of actions alone, so a
    mix of actions is chosen only where it costs less than those.

    Raises:
        PlanError: if so many bytes cannot be saved.
    """
    # Nothing is searched for where even the end of every curve saves too little.
    choices = [(curves, sum(map(_most_saved, _by_sublayer(curves)))) for curves in _alternatives(prices.curves)]
    most = max(able for _, able in choices)
    if not 0 <= saved <= most:
        raise PlanError(f"{saved} bytes cannot be saved; what was priced can save {most}. Ask for less, or allow more.")

    # The greedy choice can be led astray by a mix, and donors that give something up make their ties dearer than was
    # predicted: so the plans are compared as they are, not the choices.
    plans = (budgeted(prices, _saving(curves, saved), choice) for curves, able in choices if able >= saved)
    return min(plans, key=lambda plan: plan.price)


def _most_saved(curves: Sequence[CostCurve]) -> int:
    """The bytes that a sublayer saves on the curve that saves most."""
    return max(sum(step.saved_bytes for step in curve.steps) for curve in curves)


def going_together(curves: Sequence[CostCurve]) -> Iterator[Sequence[CostCurve]]:
    """Selections of the curves: all that go together, and those that share nothing.

    Where units are tied, values of layer 0 stay as they are, since narrow ones are not lent and there must be a donor.
    """
    alone = [curve for curve in curves if not any(action.shares for action in curve.actions)]
    if len(alone) < len(curves):
        yield [curve for curve in curves if curve.layer or not any(action.narrows for action in curve.actions)]
    if alone or not curves:
        yield alone


def _alternatives(curves: Sequence[CostCurve]) -> Iterator[Sequence[CostCurve]]:
    """Selections of the curves: those that go together, and each set of actions alone."""
    yield from going_together(curves)
    kinds = sorted({(curve.kind, tuple(sorted(curve.actions))) for curve in curves})
    if len(kinds) > 1:
        for kind, actions in kinds:
            yield [curve for curve in curves if curve.kind is kind and curve.actions == set(actions)]


def _saving(curves: Sequence[CostCurve], wanted: int) -> list[End]:
    """The ends to which these curves are followed to save so many bytes."""
    return cheapest_saving([_of_curves(alternatives) for alternatives in _by_sublayer(curves)], wanted)


# ---- how far to follow which curve


@dataclass(frozen=True)
class Choices(Generic[Chosen]):
    """All choices that one sublayer has, such as to give nothing up, or the first steps of one of its cost curves.

    The `ends` are sorted by the bytes that are `saved`; the first saves none. `price` is the cost of each.
    """

    ends: tuple[Chosen, ...]
    price: NDArray[np.float64]
    saved: NDArray[np.int64]

    @classmethod
    def of(cls, choices: Iterable[tuple[int, float, Chosen]]) -> "Choices[Chosen]":
        """The choices with these saved bytes and costs."""
        ordered = sorted(choices, key=lambda choice: choice[:2])
        return cls(
            tuple(end for _, _, end in ordered),
            np.array([price for _, price, _ in ordered]),
            np.array([saved for saved, _, _ in ordered], dtype=np.int64),
        )

    def worth_having(self) -> "Choices[Chosen]":
        """The choices without those that cost something, save no more than another and cost no less."""
        # Ends come by saved bytes. Each drops those before it that cost as much or more, unless they cost nothing; it
        # stays if it saves more than the last that is left.
        kept = [0]
        for at in range(1, len(self.ends)):
            while len(kept) > 1 and self.price[kept[-1]] >= max(self.price[at], 0):
                kept.pop()
            if self.saved[kept[-1]] < self.saved[at]:
                kept.append(at)
        return Choices(tuple(self.ends[at] for at in kept), self.price[kept], self.saved[kept])

    def beyond(self, at: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The cost and the saved bytes of going on from this end to each of those after it."""
        return self.price[at + 1 :] - self.price[at], self.saved[at + 1 :] - self.saved[at]


def _followed(curve: CostCurve) -> Iterator[tuple[int, float, End]]:
    """The saved bytes and the cost of the first steps of a curve, for each number of steps from one on."""
    price = 0.0
    saved = 0
    for end, step in enumerate(curve.steps, 1):
        price += step.price
        saved += step.saved_bytes
        yield saved, price, (curve, end)


def _of_curves(curves: Sequence[CostCurve]) -> Choices[End]:
    """The choices that these curves of one sublayer give. Giving nothing up is one choice, whatever the curve."""
    return Choices.of([(0, 0.0, (curves[0], 0)), *chain.from_iterable(map(_followed, curves))])


def cheapest_saving(sublayers: Sequence[Choices[Chosen]], wanted: int) -> list[Chosen]:
    """One choice of each sublayer, which together save so many bytes at the least cost that a greedy search finds.

    All choices together can save as much.
    """
    useful = [sublayer.worth_having() for sublayer in sublayers]
    return _ends(useful, _trimmed(useful, _greedy(useful, wanted), wanted))


def _by_sublayer(curves: Iterable[CostCurve]) -> list[list[CostCurve]]:
    """The curves of each sublayer together, in order of appearance."""
    sublayers: dict[tuple[Sublayer, int], list[CostCurve]] = {}
    for curve in curves:
        sublayers.setdefault((curve.kind, curve.layer), []).append(curve)
    return list(sublayers.values())


def _ends(sublayers: Sequence[Choices[Chosen]], taken: Taken) -> list[Chosen]:
    """What each sublayer takes."""
    return [sublayer.ends[at] for sublayer, at in zip(sublayers, taken, strict=True)]


def _cheapest(sublayers: Sequence[Choices[End]], units: int) -> list[End]:
    """The ends of least cost that have this many steps in all. Among equals, later sublayers give less up."""
    # `best` is the least cost of every number of steps in the sublayers so far: at first there is no sublayer.
    best = np.full(units + 1, np.inf)
    best[0] = 0
    chosen = np.zeros((len(sublayers), units + 1), dtype=np.int64)
    for number, sublayer in enumerate(sublayers):
        # A sublayer takes one of its ends, so each is put on top of what was best without this sublayer.
        before = best
        best = best.copy()
        for at, (_, steps) in enumerate(sublayer.ends):
            if 0 < steps <= units:
                costs = before[: units + 1 - steps] + sublayer.price[at]
                better = costs < best[steps:]
                best[steps:][better] = costs[better]
                chosen[number, steps:][better] = at
    return _followed_back(sublayers, chosen, units)


def _followed_back(sublayers: Sequence[Choices[End]], chosen: NDArray[np.int64], units: int) -> list[End]:
    """The end of each sublayer in the best choice of this many units, traced back from the last sublayer."""
    taken = []
    for sublayer, row in zip(sublayers[::-1], chosen[::-1], strict=True):
        # A sublayer without part in the choice takes the first of its ends, at 0, which gives nothing up.
        taken.append(sublayer.ends[int(row[units])])
        units -= taken[-1][1]
    return taken[::-1]


def _greedy(sublayers: Sequence[Choices[Chosen]], wanted: int) -> Taken:
    """The cheapest choice that saves so many bytes, among those one turn away from a state of the greedy search."""
    taken = [0] * len(sublayers)
    price = 0.0
    left = wanted
    best = list(taken)
    least = np.inf if wanted else 0.0
    while left > 0:
        # In each sublayer: the turn that is cheapest for its bytes, of which no more count than are still wanted; and
        # the cheapest turn that saves all of those at once.
        extensions = []
        completions = []
        for number, sublayer in enumerate(sublayers):
            more, saved = sublayer.beyond(taken[number])
            if more.size:
                rates = more / np.minimum(saved, left)
                extensions.append((rates.min(), number, int(rates.argmin())))
                complete = np.where(saved >= left, more, np.inf)
                completions.append((price + complete.min(), number, int(complete.argmin())))
        # The best rate can lead past a cheaper end, so the best way to end here is kept on every turn.
        cost, number, further = min(completions)
        if cost < least:
            best = _moved(taken, number, further)
            least = cost
        # The search itself goes on by the best rate, until enough is saved.
        _, number, further = min(extensions)
        more, saved = sublayers[number].beyond(taken[number])
        taken = _moved(taken, number, further)
        price += more[further]
        left -= int(saved[further])
    return best


def _moved(taken: Taken, number: int, further: int) -> Taken:
    """The choice with sublayer `number` moved on by one end, and by `further` more."""
    return [at + 1 + further if position == number else at for position, at in enumerate(taken)]


def _trimmed(sublayers: Sequence[Choices[Chosen]], taken: Taken, wanted: int) -> Taken:
    """The choice without steps that cost something and are not needed; the dearest go first."""
    spare = sum(int(sublayer.saved[at]) for sublayer, at in zip(sublayers, taken, strict=True)) - wanted
    while True:
        # The ways to go back in one sublayer that lower the cost and still leave enough saved.
        shorter = [
            (sublayer.price[at] - sublayer.price[end], number, end)
            for number, (sublayer, at) in enumerate(zip(sublayers, taken, strict=True))
            for end in range(at)
            if sublayer.saved[at] - sublayer.saved[end] <= spare and sublayer.price[at] > sublayer.price[end]
        ]
        if not shorter:
            return taken
        _, number, end = max(shorter)
        spare -= int(sublayers[number].saved[taken[number]] - sublayers[number].saved[end])
        taken = [end if position == number else at for position, at in enumerate(taken)]
