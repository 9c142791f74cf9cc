"""Choose what to give up from prices, over all layers, for a number of units or of bytes. Sees no weight.

A path can only be followed from its beginning; so what is chosen is how many steps to take along each.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from headshare.errors import PlanError
from headshare.layout import Layout
from headshare.paths import Form, Path, Prices, Step
from headshare.plans import Choice, Factored, Removal, Selection, SharePlan
from headshare.units import HeadUnit, Kind, Part, Tie

Taken = list[int]


@dataclass(frozen=True)
class Budgeted:
    """A plan, the bytes that it saves, and the sum of its steps' prices, each with the donor that it has in the plan
    (squared errors relative to the hidden state)."""

    plan: SharePlan
    saved_bytes: int
    price: float


def plan_for_units(prices: Prices, units: int, *, choice: Choice | None = None) -> Budgeted:
    """Exactly this many units given up, at the least sum of the steps' prices that there is.

    Units are attention's, and groups of neurons where those are tied. Single neurons are none, and are all kept.
    A multiple-choice knapsack, by dynamic programming over paths (Kellerer, Pferschy and Pisinger, "Knapsack
    Problems", 2004, section 11.5).

    Raises:
        PlanError: if fewer can be given up.
    """
    paths = [path for path in prices.paths if not path.is_of_neurons]
    most = sum(len(path.steps) for path in paths)
    if not 0 <= units <= most:
        raise PlanError(f"{units} units cannot be given up; of those that were priced, {most} can. Ask for less.")
    return _budgeted(prices, paths, _cheapest(paths, units), choice)


def plan_for_bytes(prices: Prices, saved: int, *, choice: Choice | None = None) -> Budgeted:
    """At least this many bytes saved, at the least sum of the steps' prices that a greedy choice finds.

    Each turn follows one path on, by one step or several, where that is cheapest for what it saves; so a dear step does
    not hide the cheap ones behind it. Of all ways to complete one of the turns by following one path on, the cheapest
    is taken, less every step that turns out not to be needed.

    Raises:
        PlanError: if less can be saved.
    """
    most = sum(step.saved_bytes for path in prices.paths for step in path.steps)
    if not 0 <= saved <= most:
        raise PlanError(f"{saved} bytes cannot be saved; what was priced can save {most}. Ask for less, or allow more.")
    sums = [_Sums.of(path) for path in prices.paths]
    return _budgeted(prices, prices.paths, _trimmed(sums, _greedy(sums, saved), saved), choice)


# ---- how far to follow each path


def _cheapest(paths: Sequence[Path], units: int) -> Taken:
    """The prefixes of least price that have this many steps in all. Of equals, later paths are followed less far."""
    best = np.full(units + 1, np.inf)
    best[0] = 0
    chosen = np.zeros((len(paths), units + 1), dtype=np.int64)
    for number, path in enumerate(paths):
        before, best = best, best.copy()
        for taken, price in enumerate(np.cumsum([step.price for step in path.steps[:units]]), 1):
            found = before[: units + 1 - taken] + price
            better = found < best[taken:]
            best[taken:][better] = found[better]
            chosen[number, taken:][better] = taken
    return _followed_back(chosen, units)


def _followed_back(chosen: NDArray[np.int64], units: int) -> Taken:
    """Each path's steps in the best choice of this many units, last path first and then turned round."""
    taken = []
    for row in chosen[::-1]:
        taken.append(int(row[units]))
        units -= taken[-1]
    return taken[::-1]


@dataclass(frozen=True)
class _Sums:
    """Price and saved bytes of a path's first steps: of none, of one, of two, and so on."""

    price: NDArray[np.float64]
    saved: NDArray[np.int64]

    @classmethod
    def of(cls, path: Path) -> "_Sums":
        prices = np.array([0.0, *(step.price for step in path.steps)])
        saved = np.array([0, *(step.saved_bytes for step in path.steps)], dtype=np.int64)
        return cls(prices.cumsum(), saved.cumsum())

    def beyond(self, at: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Price and saved bytes of following the path on from here, by one step, by two, and so on."""
        return self.price[at + 1 :] - self.price[at], self.saved[at + 1 :] - self.saved[at]


def _greedy(sums: Sequence[_Sums], wanted: int) -> Taken:
    """The cheapest choice that saves this much, of all that lie one extension beyond where a greedy one passes."""
    taken, price, left = [0] * len(sums), 0.0, wanted
    best, least = list(taken), np.inf if wanted else 0.0
    while left > 0:
        extensions, completions = [], []
        for number, path in enumerate(sums):
            more, saved = path.beyond(taken[number])
            if more.size:
                rates, complete = more / np.minimum(saved, left), np.where(saved >= left, more, np.inf)
                extensions.append((rates.min(), number, int(rates.argmin())))
                completions.append((price + complete.min(), number, int(complete.argmin())))
        cost, number, further = min(completions)
        if cost < least:
            best, least = _followed(taken, number, further), cost
        _, number, further = min(extensions)
        more, saved = sums[number].beyond(taken[number])
        taken, price, left = _followed(taken, number, further), price + more[further], left - int(saved[further])
    return best


def _followed(taken: Taken, number: int, further: int) -> Taken:
    """The same with one more step of that path, and as many further."""
    return [at + 1 + further if one == number else at for one, at in enumerate(taken)]


def _trimmed(sums: Sequence[_Sums], taken: Taken, wanted: int) -> Taken:
    """The same without last steps that cost something and are not needed, the dearest first."""
    spare = sum(int(path.saved[at]) for path, at in zip(sums, taken, strict=True)) - wanted
    while True:
        shorter = [
            (path.price[at] - path.price[end], number, end)
            for number, (path, at) in enumerate(zip(sums, taken, strict=True))
            for end in range(at)
            if path.saved[at] - path.saved[end] <= spare and path.price[at] > path.price[end]
        ]
        if not shorter:
            return taken
        _, number, end = max(shorter)
        spare -= int(sums[number].saved[taken[number]] - sums[number].saved[end])
        taken = [end if one == number else at for one, at in enumerate(taken)]


# ---- the plan of what was chosen


@dataclass(frozen=True)
class _Tied:
    """A tie, the parts that it shares, and how much more it costs than with the step's best donor."""

    tie: Tie
    parts: tuple[Part, ...]
    dearer: float


Given = Sequence[tuple[Path, Step]]


def _budgeted(prices: Prices, paths: Sequence[Path], taken: Taken, choice: Choice | None) -> Budgeted:
    given = [(path, step) for path, end in zip(paths, taken, strict=True) for step in path.steps[:end]]
    tied, chosen = _tied(prices, given), choice or Choice(match="output", mode="greedy")
    selections = [one for layout in prices.layouts.values() for one in _selections(layout, tied, chosen)]
    plan = SharePlan(
        model_type=prices.model_type,
        selections=tuple(selections),
        removals=tuple(_removals(prices, given, chosen)),
        factored=tuple(_factored(prices, given, chosen)),
    )
    price = sum((step.price for _, step in given), sum((one.dearer for one in tied), 0.0))
    return Budgeted(plan, sum(step.saved_bytes for _, step in given), price)


def _tied(prices: Prices, given: Given) -> list[_Tied]:
    """Every tie with the best donor that is still there. All forms of one half share a part with each other, so a unit
    that gives anything up lends nothing."""
    gone = {kind: {unit for path, step in given if path.kind is kind for unit in _units(path, step)} for kind in Kind}
    tied = []
    for path, step in given:
        if step.form is not Form.REMOVE:
            layout, (recipient,) = prices.layout_of(path), _units(path, step)
            donor, price = _donor(step, recipient, gone[path.kind], layout)
            parts = tuple(part for part in layout.parts if part in step.form.parts)
            tied.append(_Tied(Tie(recipient, donor), parts, price - step.donors[0][1]))
    return tied


def _units(path: Path, step: Step) -> list[HeadUnit]:
    return [HeadUnit(path.layer, group) for group in step.groups]


def _donor(step: Step, recipient: HeadUnit, gone: Collection[HeadUnit], layout: Layout) -> tuple[HeadUnit, float]:
    """The first of a step's donors that gives nothing up; or else the first such unit of the model, as if it cost as
    much as the last donor.

    Raises:
        PlanError: if there is none in an earlier layer.
    """
    earlier = (HeadUnit(layer, group) for layer in range(recipient.layer) for group in range(layout.groups))
    for donor, price in chain(step.donors, ((unit, step.donors[-1][1]) for unit in earlier)):
        if donor not in gone:
            return donor, price
    raise PlanError(f"no unit of an earlier layer is left to lend to {recipient}; ask for less, or protect layer 0.")


def _selections(layout: Layout, tied: Iterable[_Tied], chosen: Choice) -> Iterator[Selection]:
    """Parts with the same ties go together. Ties that share o have scales."""
    ties: dict[Part, list[Tie]] = {}
    for one in tied:
        for part in one.parts:
            ties.setdefault(part, []).append(one.tie)
    together: dict[tuple[Tie, ...], list[Part]] = {}
    for part in layout.parts:
        if part in ties:
            together.setdefault(tuple(sorted(ties[part])), []).append(part)
    for same, parts in together.items():
        yield Selection(layout=layout.only(tuple(parts)), ties=same, scale=Part.O in parts, chosen=chosen)


def _removals(prices: Prices, given: Given, chosen: Choice) -> Iterator[Removal]:
    """What is removed of attention, and of neurons."""
    for kind in Kind:
        removed: dict[int, list[int]] = {}
        layouts = {}
        for path, step in given:
            if path.kind is kind and step.form is Form.REMOVE:
                removed.setdefault(path.layer, []).extend(step.groups)
                layouts[kind] = prices.layout_of(path)
        if removed:
            yield Removal(layout=layouts[kind], removed=removed, chosen=chosen)


def _factored(prices: Prices, given: Given, chosen: Choice) -> Iterator[Factored]:
    """The units whose columns of o become products, with their ranks."""
    ranks = {unit: step.rank for path, step in given if step.form is Form.FACTORED for unit in _units(path, step)}
    if ranks:
        layers = sorted({unit.layer for unit in ranks})
        groups = {layer: sorted(unit.group for unit in ranks if unit.layer == layer) for layer in layers}
        yield Factored(
            layout=prices.layouts[Kind.ATTENTION].only((Part.O,)),
            units=groups,
            ranks={layer: tuple(ranks[HeadUnit(layer, group)] for group in groups[layer]) for layer in layers},
            chosen=chosen,
        )
