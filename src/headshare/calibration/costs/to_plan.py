"""Plans made of the steps that were chosen on cost curves."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from headshare.calibration.costs.actions import Action, Output
from headshare.calibration.costs.curves import CostCurve, CostCurves, CurveStep
from headshare.calibration.costs.sections import Taken
from headshare.errors import PlanError
from headshare.plan.layout import Layout
from headshare.plan.plan import SharePlan
from headshare.plan.section import Choice, Section
from headshare.plan.units import HeadUnit, Sublayer


@dataclass(frozen=True)
class Budgeted:
    """A plan with the bytes that it saves and its predicted cost.

    `price` is the sum of the costs of all steps, each with the donor that it has in the plan. Costs are squared errors
    relative to the hidden state, or nats a token with `in_nats`. Where matrices are rounded, `rounding` is what that
    adds to the price.
    """

    plan: SharePlan
    saved_bytes: int
    price: float
    in_nats: bool = False
    rounding: float = 0.0

    def in_words(self) -> str:
        """What is predicted and given up, for the command line's report."""
        return f"{self._predicted()}\n{self.bits_in_words()}".rstrip("\n")

    def bits_in_words(self) -> str:
        """How many bits each part has, and what that costs, where matrices are rounded; else nothing."""
        bits = self.plan.bits
        if bits is None:
            return ""
        unit = "nats" if self.in_nats else "of the price"
        words = f"{bits.in_words()}; predicted to cost {self.rounding:.4g} {unit}"
        return words if self.plan.sections else f"bits alone reach this size at less cost: nothing is given up\n{words}"

    def _predicted(self) -> str:
        if not self.in_nats:
            return f"predicted price {self.price:.6g} (sum of squared relative errors){self._places()}"
        return (
            f"predicted divergence from the dense model {self.price:.4g} nats a token (the sum of what each layer "
            f"costs alone; the refit of later layers makes up for part){self._places()}"
        )

    def _places(self) -> str:
        """The end of that line: in how many layers units, neurons or sublayers are removed, and values narrowed."""
        words = {
            Sublayer.ATTENTION: ("attention units", "all attention"),
            Sublayer.FFN: ("neurons", "the whole feed-forward"),
        }
        places = []
        for removal in self.plan.removals:
            whole = len(removal.whole_layers)
            for what, count in zip(words[removal.layout.kind], (len(removal.removed) - whole, whole), strict=True):
                if count:
                    places.append(f"removing {what} in {_layers(count)}")
        values = self.plan.narrow_values
        if values is not None:
            places.append(f"narrowing values in {_layers(len(values.widths))}")
        return f"; what costs least for its bytes is {', '.join(places)}" if places else ""


def _layers(count: int) -> str:
    return f"{count} layer{'s'[: count != 1]}"


def plan_for_steps(prices: CostCurves, path: CostCurve, steps: int) -> SharePlan:
    """The plan that takes the first `steps` of one cost curve, and nothing else."""
    return budgeted(prices, [(path, steps)], None).plan


# A cost curve, and the number of its steps that are taken.
End = tuple[CostCurve, int]


@dataclass(frozen=True)
class _Given:
    """A step that the plan takes, by its action.

    `dearer` is how much more it costs than with its best donor, which may be given up itself.
    """

    action: Action
    taken: Taken
    dearer: float = 0.0


def budgeted(prices: CostCurves, ends: Iterable[End], choice: Choice | None) -> Budgeted:
    """The plan that follows every cost curve up to its end, with the bytes that it saves and its predicted cost."""
    steps = [(path, step) for path, end in ends for step in path.steps[:end]]
    given = _given(prices, steps)
    sections = _sections(given, choice or Choice(match="output", mode="greedy"))
    plan = SharePlan.of_sections(sections, prices.model_type)
    price = sum((step.price for _, step in steps), sum((step.dearer for step in given), 0.0))
    return Budgeted(plan, sum(step.saved_bytes for _, step in steps), price, prices.in_nats)


def _sections(given: Sequence[_Given], choice: Choice) -> Iterator[Section]:
    """The sections of the plan. Each section builder sees all units of the actions that have it."""
    for builder in dict.fromkeys(builder for step in given for builder in step.action.sections):
        yield from builder([step.taken for step in given if builder in step.action.sections], choice)


def _given(prices: CostCurves, steps: Sequence[tuple[CostCurve, CurveStep]]) -> list[_Given]:
    """Every step with the best of its donors that the plan does not give up."""
    # Any two actions of a sublayer share a part, so a unit that gives anything up lends nothing. An output projection
    # with low-rank units lends no columns.
    gone = {
        kind: {unit for path, step in steps if path.kind is kind for unit in _units(path, step)} for kind in Sublayer
    }
    mixed = {path.layer for path, step in steps if step.action.output is Output.LOW_RANK}

    # The costs of donors are known, so a step whose best donor is gone becomes dearer by the difference.
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
        given.append(_Given(step.action, Taken(layout, units, parts, donor, step.rank, step.width), dearer))
    return given


def _units(path: CostCurve, step: CurveStep) -> tuple[HeadUnit, ...]:
    """The units that this step of the curve gives up."""
    return tuple(HeadUnit(path.layer, group) for group in step.groups)


def _donor(
    step: CurveStep, recipient: HeadUnit, gone: Collection[HeadUnit], never: Collection[int], layout: Layout
) -> tuple[HeadUnit, float]:
    """The donor that a step takes, with its cost: the first that is not `gone` and in no layer that can `never` lend.

    Where no donor of the step is left, it is the first such unit of the model, at the cost of the last donor.

    Raises:
        PlanError: if no earlier layer has such a unit.
    """
    earlier = (HeadUnit(layer, group) for layer in range(recipient.layer) for group in range(layout.groups))
    for donor, price in chain(step.donors, ((unit, step.donors[-1][1]) for unit in earlier)):
        if donor not in gone and donor.layer not in never:
            return donor, price
    raise PlanError(f"no unit of an earlier layer is left to lend to {recipient}; ask for less, or protect layer 0.")
