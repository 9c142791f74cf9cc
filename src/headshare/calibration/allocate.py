"""Choose what to give up from prices, over all layers, for a number of units or of bytes. Sees no weight.

A path can only be followed from its beginning, and of each half of each layer only one path at all; so what is chosen
is which, and how many steps to take along it.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from headshare.calibration.costs.curves import Form, Path, Prices, Step
from headshare.errors import PlanError
from headshare.plan.layout import Layout
from headshare.plan.plan import Choice, Factored, Removal, Selection, SharePlan
from headshare.plan.units import HeadUnit, Kind, Part, Tie

Taken = list[int]


@dataclass(frozen=True)
class Budgeted:
    """A plan, the bytes that it saves, and the sum of its steps' prices, each with the donor that it has in the plan:
    squared errors relative to the hidden state, or nats a token if those were measured."""

    plan: SharePlan
    saved_bytes: int
    price: float
    in_nats: bool = False

    def in_words(self) -> str:
        """The price, and where removal is cheaper than sharing, for the person at the keyboard."""
        if not self.in_nats:
            return f"predicted price {self.price:.6g} (sum of squared relative errors){self._removals()}"
        return (
            f"predicted divergence from the dense model {self.price:.4g} nats a token (the sum of what each layer "
            f"costs alone; the refit of later layers makes up for part){self._removals()}"
        )

    def _removals(self) -> str:
        layers = {one.layout.kind: len(one.removed) for one in self.plan.removals if one.removed}
        words = {Kind.ATTENTION: "attention units", Kind.FFN: "neurons"}
        found = [f"{words[kind]} in {count} layer{'s'[: count != 1]}" for kind, count in layers.items()]
        return f"; removal costs less than sharing for {' and for '.join(found)}" if found else ""


def plan_for_units(prices: Prices, units: int, *, choice: Choice | None = None) -> Budgeted:
    """Exactly this many units given up, at the least sum of the steps' prices that there is.

    Units are attention's, and groups of neurons where those are tied. Single neurons are none, and are all kept.
    A multiple-choice knapsack, by dynamic programming over halves of layers (Kellerer, Pferschy and Pisinger, "Knapsack
    Problems", 2004, section 11.5).

    Raises:
        PlanError: if fewer can be given up.
    """
    halves = [_Half.of(paths) for paths in _by_half(path for path in prices.paths if not path.is_of_neurons)]
    most = sum(half.most_steps for half in halves)
    if not 0 <= units <= most:
        raise PlanError(f"{units} units cannot be given up; of those that were priced, {most} can. Ask for less.")
    return _budgeted(prices, _cheapest(halves, units), choice)


def plan_for_bytes(prices: Prices, saved: int, *, choice: Choice | None = None) -> Budgeted:
    """At least this many bytes saved, at the least sum of the steps' prices that a greedy choice finds.

    Each turn goes on in one half of a layer, by one step or several, or along another of its paths, where that is
    cheapest for what it saves; so a dear step does not hide the cheap ones behind it. Of all ways to complete one of
    the turns by going on in one half, the cheapest is taken, less every step that turns out not to be needed. The same
    is tried with each form of each half of the layers alone: a mix is chosen only where it costs less than those.

    Raises:
        PlanError: if less can be saved.
    """
    most = sum(_most_saved(paths) for paths in _by_half(prices.paths))
    if not 0 <= saved <= most:
        raise PlanError(f"{saved} bytes cannot be saved; what was priced can save {most}. Ask for less, or allow more.")
    able = (paths for paths in _alternatives(prices.paths) if sum(map(_most_saved, _by_half(paths))) >= saved)
    return min((_budgeted(prices, _saving(paths, saved), choice) for paths in able), key=lambda found: found.price)


def _most_saved(paths: Sequence[Path]) -> int:
    """What one half of a layer saves on the longest of these."""
    return max(sum(step.saved_bytes for step in path.steps) for path in paths)


def _alternatives(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
    """All of them, and those of each form of each half of the layers alone."""
    yield paths
    kinds = sorted({(path.kind, tuple(sorted(path.forms))) for path in paths})
    if len(kinds) > 1:
        for kind, forms in kinds:
            yield [path for path in paths if path.kind is kind and path.forms == set(forms)]


def _saving(paths: Sequence[Path], wanted: int) -> "list[_End]":
    """How far to follow which of these to save this much."""
    halves = [_Half.of(some).worth_having() for some in _by_half(paths)]
    return _ends(halves, _trimmed(halves, _greedy(halves, wanted), wanted))


def plan_for_steps(prices: Prices, path: Path, steps: int) -> SharePlan:
    """The plan that takes these first steps of one path, and nothing else."""
    return _budgeted(prices, [(path, steps)], None).plan


# ---- how far to follow which path

_End = tuple[Path, int]


@dataclass(frozen=True)
class _Half:
    """All that one half of one layer could do: nothing, or the first steps of one of its paths. `ends` says which and
    how many, by saved bytes; price and saved bytes are those of all the steps."""

    ends: tuple[_End, ...]
    price: NDArray[np.float64]
    saved: NDArray[np.int64]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> "_Half":
        """All beginnings of these paths; the one that has none stands for all of their empty ones."""
        found = [(0, 0.0, paths[0], 0)]
        for path in paths:
            price, saved = 0.0, 0
            for end, step in enumerate(path.steps, 1):
                price, saved = price + step.price, saved + step.saved_bytes
                found.append((saved, price, path, end))
        found.sort(key=lambda one: one[:2])
        return cls(
            tuple((path, end) for _, _, path, end in found),
            np.array([price for _, price, _, _ in found]),
            np.array([saved for saved, _, _, _ in found], dtype=np.int64),
        )

    def worth_having(self) -> "_Half":
        """The same without beginnings that cost something, save no more than another and cost no less."""
        kept = [0]
        for at in range(1, len(self.ends)):
            while len(kept) > 1 and self.price[kept[-1]] >= max(self.price[at], 0):
                kept.pop()
            if self.saved[kept[-1]] < self.saved[at]:
                kept.append(at)
        return _Half(tuple(self.ends[at] for at in kept), self.price[kept], self.saved[kept])

    @property
    def most_steps(self) -> int:
        """The steps of the longest path."""
        return max(end for _, end in self.ends)

    def beyond(self, at: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """What it costs and saves to go on from here to each of those that save more."""
        return self.price[at + 1 :] - self.price[at], self.saved[at + 1 :] - self.saved[at]


def _by_half(paths: Iterable[Path]) -> list[list[Path]]:
    """The paths of each half of each layer together, in order of appearance."""
    halves: dict[tuple[Kind, int], list[Path]] = {}
    for path in paths:
        halves.setdefault((path.kind, path.layer), []).append(path)
    return list(halves.values())


def _ends(halves: Sequence[_Half], taken: Taken) -> list[_End]:
    return [half.ends[at] for half, at in zip(halves, taken, strict=True)]


def _cheapest(halves: Sequence[_Half], units: int) -> list[_End]:
    """The beginnings of least price that have this many steps in all. Of equals, later halves give less up."""
    best = np.full(units + 1, np.inf)
    best[0] = 0
    chosen = np.zeros((len(halves), units + 1), dtype=np.int64)
    for number, half in enumerate(halves):
        before, best = best, best.copy()
        for at, (_, steps) in enumerate(half.ends):
            if 0 < steps <= units:
                found = before[: units + 1 - steps] + half.price[at]
                better = found < best[steps:]
                best[steps:][better] = found[better]
                chosen[number, steps:][better] = at
    return _followed_back(halves, chosen, units)


def _followed_back(halves: Sequence[_Half], chosen: NDArray[np.int64], units: int) -> list[_End]:
    """Each half's part in the best choice of this many units, last half first and then turned round."""
    taken = []
    for half, row in zip(halves[::-1], chosen[::-1], strict=True):
        # a half without part in it takes what stands at 0: nothing, which is the first of its ends
        taken.append(half.ends[int(row[units])])
        units -= taken[-1][1]
    return taken[::-1]


def _greedy(halves: Sequence[_Half], wanted: int) -> Taken:
    """The cheapest choice that saves this much, of all that lie one turn beyond where a greedy one passes."""
    taken, price, left = [0] * len(halves), 0.0, wanted
    best, least = list(taken), np.inf if wanted else 0.0
    while left > 0:
        extensions, completions = [], []
        for number, half in enumerate(halves):
            more, saved = half.beyond(taken[number])
            if more.size:
                rates, complete = more / np.minimum(saved, left), np.where(saved >= left, more, np.inf)
                extensions.append((rates.min(), number, int(rates.argmin())))
                completions.append((price + complete.min(), number, int(complete.argmin())))
        cost, number, further = min(completions)
        if cost < least:
            best, least = _followed(taken, number, further), cost
        _, number, further = min(extensions)
        more, saved = halves[number].beyond(taken[number])
        taken, price, left = _followed(taken, number, further), price + more[further], left - int(saved[further])
    return best


def _followed(taken: Taken, number: int, further: int) -> Taken:
    """The same with that half one further on, and as many more."""
    return [at + 1 + further if one == number else at for one, at in enumerate(taken)]


def _trimmed(halves: Sequence[_Half], taken: Taken, wanted: int) -> Taken:
    """The same without what costs something and is not needed, the dearest first."""
    spare = sum(int(half.saved[at]) for half, at in zip(halves, taken, strict=True)) - wanted
    while True:
        shorter = [
            (half.price[at] - half.price[end], number, end)
            for number, (half, at) in enumerate(zip(halves, taken, strict=True))
            for end in range(at)
            if half.saved[at] - half.saved[end] <= spare and half.price[at] > half.price[end]
        ]
        if not shorter:
            return taken
        _, number, end = max(shorter)
        spare -= int(halves[number].saved[taken[number]] - halves[number].saved[end])
        taken = [end if one == number else at for one, at in enumerate(taken)]


# ---- the plan of what was chosen


@dataclass(frozen=True)
class _Tied:
    """A tie, the parts that it shares, and how much more it costs than with the step's best donor."""

    tie: Tie
    parts: tuple[Part, ...]
    dearer: float


Given = Sequence[tuple[Path, Step]]


def _budgeted(prices: Prices, ends: Iterable[_End], choice: Choice | None) -> Budgeted:
    given = [(path, step) for path, end in ends for step in path.steps[:end]]
    tied, chosen = _tied(prices, given), choice or Choice(match="output", mode="greedy")
    selections = [one for layout in prices.layouts.values() for one in _selections(layout, tied, chosen)]
    plan = SharePlan(
        model_type=prices.model_type,
        selections=tuple(selections),
        removals=tuple(_removals(prices, given, chosen)),
        factored=tuple(_factored(prices, given, chosen)),
    )
    price = sum((step.price for _, step in given), sum((one.dearer for one in tied), 0.0))
    return Budgeted(plan, sum(step.saved_bytes for _, step in given), price, prices.in_nats)


def _tied(prices: Prices, given: Given) -> list[_Tied]:
    """Every tie with the best donor that is still there. All forms of one half share a part with each other, so a unit
    that gives anything up lends nothing; and a readout with factored units lends no columns."""
    gone = {kind: {unit for path, step in given if path.kind is kind for unit in _units(path, step)} for kind in Kind}
    factored = {path.layer for path, step in given if step.form is Form.FACTORED}
    tied = []
    for path, step in given:
        if step.form is not Form.REMOVE:
            layout, (recipient,) = prices.layout_of(path), _units(path, step)
            never = factored if step.form is Form.QKVO else set()
            donor, price = _donor(step, recipient, gone[path.kind], never, layout)
            parts = tuple(part for part in layout.parts if part in step.form.parts)
            tied.append(_Tied(Tie(recipient, donor), parts, price - step.donors[0][1]))
    return tied


def _units(path: Path, step: Step) -> list[HeadUnit]:
    return [HeadUnit(path.layer, group) for group in step.groups]


def _donor(
    step: Step, recipient: HeadUnit, gone: Collection[HeadUnit], never: Collection[int], layout: Layout
) -> tuple[HeadUnit, float]:
    """The first of a step's donors that gives nothing up and is in none of the layers that `never` lend; or else the
    first such unit of the model, as if it cost as much as the last donor.

    Raises:
        PlanError: if there is none in an earlier layer.
    """
    earlier = (HeadUnit(layer, group) for layer in range(recipient.layer) for group in range(layout.groups))
    for donor, price in chain(step.donors, ((unit, step.donors[-1][1]) for unit in earlier)):
        if donor not in gone and donor.layer not in never:
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
