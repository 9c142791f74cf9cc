"""A plan made of the steps that were chosen on cost curves."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from headshare.calibration.costs.curves import Form, Path, Prices, Step
from headshare.errors import PlanError
from headshare.plan.layout import Layout
from headshare.plan.low_rank import Factored
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.section import Choice
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Kind, Part, Tie


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
class _Tied:
    """A tie, the parts that it shares, and how much more it costs than with the step's best donor."""

    tie: Tie
    parts: tuple[Part, ...]
    dearer: float


Given = Sequence[tuple[Path, Step]]


def budgeted(prices: Prices, ends: Iterable[End], choice: Choice | None) -> Budgeted:
    """The plan that takes every cost path up to its end, with what it saves and what it is predicted to cost."""
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
