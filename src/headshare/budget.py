"""Choose what to give up from prices: the steps of least price for a byte, over all layers, up to a budget. Sees no weight."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from headshare.errors import PlanError
from headshare.layout import Layout
from headshare.plans import Choice, Removal, Selection, SharePlan
from headshare.pricing import Form, Path, Prices, Step
from headshare.units import HeadUnit, Kind, Part, Tie

Taken = dict[int, int]


@dataclass(frozen=True)
class Budgeted:
    """A plan, what it saves, and the sum of its steps' prices (squared error relative to the hidden state)."""

    plan: SharePlan
    saved_bytes: int
    price: float


def plan_for_units(prices: Prices, units: int, *, choice: Choice | None = None) -> Budgeted:
    """Exactly this many units given up, at the least price that a greedy choice with updates finds.

    Raises:
        PlanError: if fewer can be given up.
    """
    return _budgeted(prices, units, lambda step: len(step.groups), choice, exact=True)


def plan_for_bytes(prices: Prices, saved: int, *, choice: Choice | None = None) -> Budgeted:
    """At least this many bytes saved, at the least price that a greedy choice with updates finds.

    Raises:
        PlanError: if less can be saved.
    """
    return _budgeted(prices, saved, lambda step: step.saved_bytes, choice, exact=False)


def _budgeted(prices, wanted, size, choice, *, exact) -> Budgeted:
    taken = _greedy(prices.paths, wanted, size, exact=exact)
    steps = [(path, step) for number, path in enumerate(prices.paths) for step in path.steps[: taken[number]]]
    plan = _plan(prices, steps, choice or Choice(match="output", mode="greedy"))
    return Budgeted(plan, sum(step.saved_bytes for _, step in steps), sum(step.price for _, step in steps))


def _greedy(paths: Sequence[Path], wanted: int, size, *, exact: bool) -> Taken:
    """How far along each path to go. Each turn extends one path, by one step or several, where that is cheapest for
    what it saves; so a dear step does not hide the cheap ones behind it."""
    taken = dict.fromkeys(range(len(paths)), 0)
    total = 0
    while total < wanted:
        best = None
        for number, path in enumerate(paths):
            price = saved = 0
            for more, step in enumerate(path.steps[taken[number] :], 1):
                price, saved = price + step.price, saved + size(step)
                if exact and total + saved > wanted:
                    break
                rate = price / min(saved, wanted - total)
                if best is None or rate < best[0]:
                    best = (rate, number, more, saved)
        if best is None:
            raise PlanError(f"at most {total} of {wanted} can be given up; ask for less, or allow more.")
        _, number, more, saved = best
        taken[number] += more
        total += saved
    return taken


def _plan(prices: Prices, steps: Sequence[tuple[Path, Step]], choice: Choice) -> SharePlan:
    layout = prices.layouts[Kind.ATTENTION]
    gone = {
        HeadUnit(path.layer, g)
        for path, step in steps
        if step.form is Form.REMOVE and path.kind is Kind.ATTENTION
        for g in step.groups
    }
    given: dict[Part, set[HeadUnit]] = {part: set(gone) for part in layout.parts}
    for path, step in steps:
        for part in step.form.parts:
            given[part].update(HeadUnit(path.layer, group) for group in step.groups)
    ties: dict[Part, list[Tie]] = {}
    for path, step in steps:
        if step.form is not Form.REMOVE:
            recipient = HeadUnit(path.layer, step.groups[0])
            donor = _donor(step, given)
            for part in step.form.parts:
                ties.setdefault(part, []).append(Tie(recipient, donor))
    selections = _selections(layout, ties, choice)
    removals = []
    if gone:
        removals.append(Removal(layout=layout, removed=_by_layer(gone), chosen=choice))
    neurons = {HeadUnit(path.layer, n) for path, step in steps if path.kind is Kind.FFN for n in step.groups}
    if neurons:
        removals.append(Removal(layout=prices.neurons, removed=_by_layer(neurons), chosen=choice))
    return SharePlan(model_type=prices.model_type, selections=selections, removals=tuple(removals))


def _by_layer(units: Collection[HeadUnit]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, group in sorted(units):
        found.setdefault(layer, []).append(group)
    return found


def _donor(step: Step, given) -> HeadUnit:
    for donor, _ in step.donors:
        if not any(donor in given[part] for part in step.form.parts):
            return donor
    raise PlanError("no unit of an earlier layer is left to lend; ask for less, or protect layer 0.")


def _selections(layout: Layout, ties: dict[Part, list[Tie]], choice: Choice) -> tuple[Selection, ...]:
    """Parts with the same ties go together."""
    together: dict[tuple[Tie, ...], list[Part]] = {}
    for part in layout.parts:
        if part in ties:
            together.setdefault(tuple(sorted(ties[part])), []).append(part)
    return tuple(
        Selection(layout=layout.only(tuple(parts)), ties=tied, scale=Part.O in parts, chosen=choice)
        for tied, parts in together.items()
    )
