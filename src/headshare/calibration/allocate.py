"""Choices of what to give up, made from prices over all layers, for a number of units or of bytes. Sees no weight.

A path can only be followed from its beginning, and of each half of each layer only one path at all; so a choice says
which, and how many steps to take along it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headshare.calibration.costs.curves import Path, Prices
from headshare.calibration.costs.to_plan import Budgeted, End, budgeted
from headshare.errors import PlanError
from headshare.plan.section import Choice
from headshare.plan.units import Kind

Taken = list[int]


def plan_for_units(prices: Prices, units: int, *, choice: Choice | None = None) -> Budgeted:
    """The plan that gives up exactly this many units, at the least sum of the steps' prices that there is.

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
    return budgeted(prices, _cheapest(halves, units), choice)


def plan_for_bytes(prices: Prices, saved: int, *, choice: Choice | None = None) -> Budgeted:
    """The plan that saves at least this many bytes, at the least sum of the steps' prices that a greedy choice finds.

    Each turn goes on in one half of a layer, by one step or several, or along another of its paths, where that is
    cheapest for what it saves; so a dear step does not hide the cheap ones behind it. Of all ways to complete one of
    the turns by going on in one half, the cheapest is taken, less every step that turns out not to be needed. The same
    is tried with each action of each half of the layers alone: a mix is chosen only where it costs less than those.

    Raises:
        PlanError: if less can be saved.
    """
    most = sum(_most_saved(paths) for paths in _by_half(prices.paths))
    if not 0 <= saved <= most:
        raise PlanError(f"{saved} bytes cannot be saved; what was priced can save {most}. Ask for less, or allow more.")
    # The greedy choice can be led astray by a mix, and donors that give something up make their ties dearer than was
    # priced: so the plans are compared as they are, not the choices.
    able = (paths for paths in _alternatives(prices.paths) if sum(map(_most_saved, _by_half(paths))) >= saved)
    return min((budgeted(prices, _saving(paths, saved), choice) for paths in able), key=lambda found: found.price)


def _most_saved(paths: Sequence[Path]) -> int:
    """The bytes that one half of a layer saves on the path that saves most."""
    return max(sum(step.saved_bytes for step in path.steps) for path in paths)


def _alternatives(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
    """All of them, and those of each set of actions of each half of the layers alone."""
    yield paths
    kinds = sorted({(path.kind, tuple(sorted(path.actions))) for path in paths})
    if len(kinds) > 1:
        for kind, actions in kinds:
            yield [path for path in paths if path.kind is kind and path.actions == set(actions)]


def _saving(paths: Sequence[Path], wanted: int) -> list[End]:
    """The ends to which these are followed to save this much."""
    halves = [_Half.of(some).worth_having() for some in _by_half(paths)]
    return _ends(halves, _trimmed(halves, _greedy(halves, wanted), wanted))


# ---- how far to follow which path


@dataclass(frozen=True)
class _Half:
    """All that one half of one layer could do: nothing, or the first steps of one of its paths. `ends` says which and
    how many, by saved bytes; `price` and `saved` are sums over all the steps."""

    ends: tuple[End, ...]
    price: NDArray[np.float64]
    saved: NDArray[np.int64]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> "_Half":
        """All beginnings of these paths; the one that has none stands for all of their empty ones."""
        found = [(0, 0.0, paths[0], 0)]
        for path in paths:
            price = 0.0
            saved = 0
            for end, step in enumerate(path.steps, 1):
                price += step.price
                saved += step.saved_bytes
                found.append((saved, price, path, end))
        found.sort(key=lambda one: one[:2])
        return cls(
            tuple((path, end) for _, _, path, end in found),
            np.array([price for _, price, _, _ in found]),
            np.array([saved for saved, _, _, _ in found], dtype=np.int64),
        )

    def worth_having(self) -> "_Half":
        """The same without beginnings that cost something, save no more than another and cost no less."""
        # Ends come by saved bytes. Each drops those before it that cost as much or more, unless they cost nothing; it
        # stays if it saves more than the last that is left.
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
        """The price and the saved bytes of going on from here to each of those that save more."""
        return self.price[at + 1 :] - self.price[at], self.saved[at + 1 :] - self.saved[at]


def _by_half(paths: Iterable[Path]) -> list[list[Path]]:
    """The paths of each half of each layer together, in order of appearance."""
    halves: dict[tuple[Kind, int], list[Path]] = {}
    for path in paths:
        halves.setdefault((path.kind, path.layer), []).append(path)
    return list(halves.values())


def _ends(halves: Sequence[_Half], taken: Taken) -> list[End]:
    return [half.ends[at] for half, at in zip(halves, taken, strict=True)]


def _cheapest(halves: Sequence[_Half], units: int) -> list[End]:
    """The beginnings of least price that have this many steps in all. Of equals, later halves give less up."""
    # `best` is the least price of every number of steps in the halves so far: at first of none.
    best = np.full(units + 1, np.inf)
    best[0] = 0
    chosen = np.zeros((len(halves), units + 1), dtype=np.int64)
    for number, half in enumerate(halves):
        # A half takes one of its beginnings at most, so each is put on top of what was best without this half.
        before = best
        best = best.copy()
        for at, (_, steps) in enumerate(half.ends):
            if 0 < steps <= units:
                found = before[: units + 1 - steps] + half.price[at]
                better = found < best[steps:]
                best[steps:][better] = found[better]
                chosen[number, steps:][better] = at
    return _followed_back(halves, chosen, units)


def _followed_back(halves: Sequence[_Half], chosen: NDArray[np.int64], units: int) -> list[End]:
    """Each half's part in the best choice of this many units, last half first and then turned round."""
    taken = []
    for half, row in zip(halves[::-1], chosen[::-1], strict=True):
        # A half without part in it takes the first of its ends, at 0, which is nothing.
        taken.append(half.ends[int(row[units])])
        units -= taken[-1][1]
    return taken[::-1]


def _greedy(halves: Sequence[_Half], wanted: int) -> Taken:
    """The cheapest choice that saves this much, of all that lie one turn beyond where a greedy one passes."""
    taken = [0] * len(halves)
    price = 0.0
    left = wanted
    best = list(taken)
    least = np.inf if wanted else 0.0
    while left > 0:
        # In each half: the turn that is cheapest for its bytes, of which no more count than are still wanted; and the
        # cheapest one that saves all of those at once.
        extensions = []
        completions = []
        for number, half in enumerate(halves):
            more, saved = half.beyond(taken[number])
            if more.size:
                rates = more / np.minimum(saved, left)
                extensions.append((rates.min(), number, int(rates.argmin())))
                complete = np.where(saved >= left, more, np.inf)
                completions.append((price + complete.min(), number, int(complete.argmin())))
        # The best rate can lead past a cheaper end, so the best way to end here is kept on every turn.
        cost, number, further = min(completions)
        if cost < least:
            best = _followed(taken, number, further)
            least = cost
        _, number, further = min(extensions)
        more, saved = halves[number].beyond(taken[number])
        taken = _followed(taken, number, further)
        price += more[further]
        left -= int(saved[further])
    return best


def _followed(taken: Taken, number: int, further: int) -> Taken:
    """The same with that half one further on, and as many more."""
    return [at + 1 + further if one == number else at for one, at in enumerate(taken)]


def _trimmed(halves: Sequence[_Half], taken: Taken, wanted: int) -> Taken:
    """The same without what costs something and is not needed, the dearest first."""
    spare = sum(int(half.saved[at]) for half, at in zip(halves, taken, strict=True)) - wanted
    while True:
        # The ways to go back in one half that bring something and still leave enough saved.
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
