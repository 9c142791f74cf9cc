"""Cost curves: for each sublayer, the order in which its units could be given up, and the cost of each step.

They are plain values, which are printed, compared and kept as JSON.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from headshare.calibration.costs.actions import ACTIONS, Action, Output
from headshare.errors import PlanError
from headshare.files.untrusted import first_error
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit, Sublayer


def _named(name: object) -> Action:
    """The action of this name, for pydantic."""
    if not isinstance(name, str) or name not in ACTIONS:
        raise ValueError(f"there is no action {name!r:.50}; there are {', '.join(ACTIONS)}")
    return ACTIONS[name]


Named = Annotated[Action, PlainValidator(_named), PlainSerializer(str, return_type=str), Field(alias="form")]


@dataclass(frozen=True)
class CurveStep:
    """A step of a cost curve: one unit or several neurons that are given up, with the cost and the bytes saved.

    `groups` are the units. `price` is what the step adds to the layer's error after all steps before it, with the best
    donor. It can be below zero, where donors make up for what earlier steps lost. `donors` are all that the unit could
    have, best first, each with its price: exact for the first few, estimated and no less than theirs for the others. A
    removal has no donors. `rank` is that of the low-rank product which stands for the unit's columns of o. `width` is
    that of values after the step, in all units of the layer, which later steps of the curve narrow on. JSON calls the
    action `form`.

    Raises:
        PlanError: if the fields contradict each other.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    action: Named
    groups: tuple[int, ...]
    price: float
    saved_bytes: int
    donors: tuple[tuple[HeadUnit, float], ...] = ()
    rank: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0 or (self.rank > 0) != (self.action.output is Output.LOW_RANK):
            raise PlanError(f"a step has a rank if it is factored, and only then; found {self.rank} for {self.action}.")
        if self.width < 0 or (self.width > 0) != (self.action.output is Output.NARROW):
            raise PlanError(f"a step has a width if it narrows values, and only then; found {self.width}.")
        if not self.groups or min(self.groups) < 0 or len(set(self.groups)) < len(self.groups):
            raise PlanError(f"a step gives up one group or several different ones; found {self.groups!r:.100}.")
        if self.saved_bytes < 1 or not all(map(math.isfinite, (self.price, *(price for _, price in self.donors)))):
            raise PlanError(f"a step saves bytes at finite prices; found {self.saved_bytes} bytes at {self.price}.")
        if self.donors and not self.action.shares:
            raise PlanError(f"{self.action}: a unit that shares nothing takes nothing, so it has no donors.")
        if self.action.shares and (len(self.groups) > 1 or not self.donors):
            raise PlanError(f"a tie has one recipient and at least one donor; found {len(self.groups)} recipients.")


@dataclass(frozen=True)
class CostCurve:
    """The order in which one sublayer of one layer gives units up, step by step.

    A feed-forward either removes single neurons or ties groups of them, not both. A curve that narrows values does
    nothing else: what it saves would depend on the units that are left, and v and o of narrow layers are not tied.

    Raises:
        PlanError: if a unit is given up twice, an action is for the other sublayer, values are narrowed beside another
            action or do not become narrower, or a donor is in no earlier layer.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Sublayer
    layer: int
    steps: tuple[CurveStep, ...]

    def __post_init__(self) -> None:
        where = f"the {self.kind} curve of layer {self.layer}"
        given = [group for step in self.steps if not step.width for group in step.groups]
        widths = [step.width for step in self.steps if step.width]
        if any(later >= before for before, later in pairwise(widths)):
            raise PlanError(f"{where} has values that do not become narrower.")
        if widths and len(self.actions) > 1:
            raise PlanError(f"{where} narrows values and does something else. Make a curve of each action.")
        if len(set(given)) < len(given):
            raise PlanError(f"{where} gives a unit up twice.")
        if self.layer < 0:
            raise PlanError(f"there is no layer {self.layer}.")
        if any(action.sublayer not in (None, self.kind) for action in self.actions):
            raise PlanError(f"{where} has an action that is for the other half of the layer.")
        if self.kind is Sublayer.FFN and len({action.removes for action in self.actions}) > 1:
            raise PlanError(f"{where} both removes neurons and ties groups of them.")
        if any(not 0 <= donor.layer < self.layer for step in self.steps for donor, _ in step.donors):
            raise PlanError(f"{where} has a donor that is in no earlier layer.")

    @property
    def actions(self) -> frozenset[Action]:
        """The actions of the curve's steps."""
        return frozenset(step.action for step in self.steps)

    @property
    def is_of_neurons(self) -> bool:
        """True if the curve's units are single neurons."""
        return self.kind is Sublayer.FFN and any(action.removes for action in self.actions)


@dataclass(frozen=True)
class CostCurves:
    """The cost curves of a model, the layouts of their units, and the layout of single neurons, which are removed.

    A sublayer can have several curves, of which a plan follows one. With `in_nats`, costs are the divergence of the
    model's predictions in nats a token; otherwise they are squared errors relative to the hidden state.

    Raises:
        PlanError: if a curve reaches outside its layout, or curves of the feed-forward are of neurons in one layer and
            of groups in another.
    """

    model_type: str
    layouts: Mapping[Sublayer, Layout]
    curves: tuple[CostCurve, ...]
    neurons: Layout | None = None
    in_nats: bool = False

    def __post_init__(self) -> None:
        if len({curve.is_of_neurons for curve in self.curves if curve.kind is Sublayer.FFN and curve.steps}) > 1:
            raise PlanError("some layers remove neurons and others tie groups of them; a model does one or the other.")
        for curve in self.curves:
            self._check(curve)

    def only(self, actions: Collection[Action]) -> "CostCurves":
        """The curves that have no actions but these."""
        return replace(self, curves=tuple(curve for curve in self.curves if curve.actions <= set(actions)))

    def without_layers(self, protected: Collection[int]) -> "CostCurves":
        """The curves of the layers that are not protected."""
        return replace(self, curves=tuple(curve for curve in self.curves if curve.layer not in protected))

    def layout_of(self, curve: CostCurve) -> Layout:
        """The layout of this curve's units.

        Raises:
            PlanError: if the model has none.
        """
        layout = self.neurons if curve.is_of_neurons else self.layouts.get(curve.kind)
        if layout is None:
            raise PlanError(f"the {curve.kind} curve of layer {curve.layer} is of units that have no layout.")
        return layout

    def _check(self, curve: CostCurve) -> None:
        """Refuse a curve whose units or donors are not in its layout."""
        layout = self.layout_of(curve)
        groups = [group for step in curve.steps for group in step.groups]
        groups += [donor.group for step in curve.steps for donor, _ in step.donors]
        if curve.layer >= layout.layers or max(groups, default=0) >= layout.groups:
            raise PlanError(
                f"the {curve.kind} curve of layer {curve.layer} is not of this model, which has {layout.layers} "
                f"layers of {layout.groups} groups. Price it again."
            )


def repriced(curve: CostCurve, measured: dict[int, float]) -> CostCurve:
    """The curve with costs that add up to those measured after some of its steps, the last included."""
    steps: list[CurveStep] = []
    before = 0.0
    for end, lost in sorted(measured.items()):
        steps += _sharing(curve.steps[len(steps) : end], lost - before)
        before = lost
    return replace(curve, steps=tuple(steps))


def _sharing(steps: Sequence[CurveStep], cost: float) -> Iterator[CurveStep]:
    """Steps between two measurements, each with its share of the cost of all of them together.

    Shares are in proportion to the costs that the steps had, or to the bytes that they save where a cost is below zero
    or all are zero. The costs of donors keep their distance, in the new unit.
    """
    # A cost below zero cannot be a proportion; bytes always can.
    old = [step.price for step in steps]
    if min(old) < 0 or not sum(old):
        old = [float(step.saved_bytes) for step in steps]
    for step, share in zip(steps, old, strict=True):
        price = cost * share / sum(old)
        scale = abs(price / step.price) if step.price else 1.0
        donors = tuple((unit, price + scale * (each - step.donors[0][1])) for unit, each in step.donors)
        yield replace(step, price=price, donors=donors)


_CURVES: TypeAdapter[list[CostCurve]] = TypeAdapter(list[CostCurve])


def curves_to_json(curves: Sequence[CostCurve]) -> str:
    """The curves of one layer as JSON, exact to the last bit; the inverse of `curves_from_json`."""
    return _CURVES.dump_json(list(curves), by_alias=True).decode()


def curves_from_json(text: str | bytes) -> list[CostCurve]:
    """Read and check curves that were written earlier.

    Raises:
        PlanError: if they are not JSON, or not cost curves.
    """
    with _valid():
        return _CURVES.validate_json(text, strict=True)


def checked_curves(data: object) -> list[CostCurve]:
    """Curves made of values that were read from JSON.

    Raises:
        PlanError: if they are not cost curves.
    """
    with _valid():
        return _CURVES.validate_python(data)


@contextmanager
def _valid() -> Iterator[None]:
    """A block whose validation errors say where the curves are wrong."""
    try:
        yield
    except ValidationError as error:
        where, why = first_error(error)
        where = where or "the first character"
        raise PlanError(f"these curves are not valid at {where}: {why}. Price the layer again.") from None
