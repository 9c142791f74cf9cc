"""A plan made of the steps that were chosen on cost curves."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from headshare.calibration.costs.actions import Action, Output
from headshare.calibration.costs.curves import Path, Prices, Step
from headshare.calibration.costs.sections import Taken
from headshare.errors import PlanError
from headshare.plan.layout import Layout
from headshare.plan.plan import SharePlan
from headshare.plan.section import Choice, Section
from headshare.plan.units import HeadUnit, Kind


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


def plan_for_steps(prices: Prices, path: Path, steps: int) -> SharePlan:
    """The plan that takes these first steps of one path, and nothing else."""
    return budgeted(prices, [(path, steps)], None).plan


End = tuple[Path, int]


@dataclass(frozen=True)
class _Given:
    """One step that the plan takes, by its action, and how much more it costs than with the step's best donor."""

    action: Action
    taken: Taken
    dearer: float = 0.0


def budgeted(prices: Prices, ends: Iterable[End], choice: Choice | None) -> Budgeted:
    """The plan that takes every cost path up to its end, with what it saves and what it is predicted to cost."""
    steps = [(path, step) for path, end in ends for step in path.steps[:end]]
    given = _given(prices, steps)
    sections = _sections(given, choice or Choice(match="output", mode="greedy"))
    plan = SharePlan.of_sections(sections, prices.model_type)
    price = sum((step.price for _, step in steps), sum((one.dearer for one in given), 0.0))
    return Budgeted(plan, sum(step.saved_bytes for _, step in steps), price, prices.in_nats)


def _sections(given: Sequence[_Given], choice: Choice) -> Iterator[Section]:
    """The plan's sections: each builder sees all units of the actions that have it."""
    for builder in dict.fromkeys(builder for one in given for builder in one.action.sections):
        yield from builder([one.taken for one in given if builder in one.action.sections], choice)


def _given(prices: Prices, steps: Sequence[tuple[Path, Step]]) -> list[_Given]:
    """Every step with the best of its donors that is still there."""
    # All actions of one half share a part with each other, so a unit that gives anything up lends nothing; and a
    # readout with low-rank units lends no columns.
    gone = {kind: {unit for path, step in steps if path.kind is kind for unit in _units(path, step)} for kind in Kind}
    mixed = {path.layer for path, step in steps if step.action.output is Output.LOW_RANK}
    given = []
    for path, step in steps:
        layout = prices.layout_of(path)
        units = _units(path, step)
        donor = None
        dearer = 0.0
        if step.donors:
            never = mixed if step.action.output is Output.SCALED else set()
            donor, price = _donor(step, units[0], gone[path.kind], never, layout)
            dearer = price - step.donors[0][1]
        parts = tuple(part for part in layout.parts if part in step.action.shares)
        given.append(_Given(step.action, Taken(layout, units, parts, donor, step.rank), dearer))
    return given


def _units(path: Path, step: Step) -> tuple[HeadUnit, ...]:
    return tuple(HeadUnit(path.layer, group) for group in step.groups)


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
