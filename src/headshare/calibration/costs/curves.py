"""Cost curves as values, which are printed, compared and kept as JSON: units that layers could give up, in which order
and at what price."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from headshare.calibration.costs.actions import ACTIONS, Action, Output
from headshare.errors import PlanError
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit, Kind


def _named(name: object) -> Action:
    if not isinstance(name, str) or name not in ACTIONS:
        raise ValueError(f"there is no action {name!r:.50}; there are {', '.join(ACTIONS)}")
    return ACTIONS[name]


Named = Annotated[Action, PlainValidator(_named), PlainSerializer(str, return_type=str), Field(alias="form")]


@dataclass(frozen=True)
class Step:
    """One unit given up, or several neurons, with what that adds to the layer's error and what it saves.

    `groups` are the units. `price` is with the steps before it taken, and with the best donor; it can be below zero,
    where donors make up for what earlier steps lost. `donors` are those the unit could have, best first, with the
    price of each: exact for the first few, estimated and no less than theirs for the others. A removal has none.
    `rank` is that of the product that stands for the unit's columns of o. JSON calls the action `form`.

    Raises:
        PlanError: if there is no such step.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    action: Named
    groups: tuple[int, ...]
    price: float
    saved_bytes: int
    donors: tuple[tuple[HeadUnit, float], ...] = ()
    rank: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0 or (self.rank > 0) != (self.action.output is Output.LOW_RANK):
            raise PlanError(f"a step has a rank if it is factored, and only then; found {self.rank} for {self.action}.")
        if not self.groups or min(self.groups) < 0 or len(set(self.groups)) < len(self.groups):
            raise PlanError(f"a step gives up one group or several different ones; found {self.groups!r:.100}.")
        if self.saved_bytes < 1 or not all(map(math.isfinite, (self.price, *(price for _, price in self.donors)))):
            raise PlanError(f"a step saves bytes at finite prices; found {self.saved_bytes} bytes at {self.price}.")
        if self.donors and not self.action.shares:
            raise PlanError(f"{self.action}: a unit that shares nothing takes nothing, so it has no donors.")
        if self.action.shares and (len(self.groups) > 1 or not self.donors):
            raise PlanError(f"a tie has one recipient and at least one donor; found {len(self.groups)} recipients.")


@dataclass(frozen=True)
class Path:
    """The order in which one half of one layer gives units up. Neurons are removed, or groups of them tied, not both.

    Raises:
        PlanError: if a unit is given up twice, an action is for the other half, or a donor is in no earlier layer.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Kind
    layer: int
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        where = f"the {self.kind} path of layer {self.layer}"
        given = [group for step in self.steps for group in step.groups]
        if len(set(given)) < len(given):
            raise PlanError(f"{where} gives a unit up twice.")
        if self.layer < 0:
            raise PlanError(f"there is no layer {self.layer}.")
        if any(action.sublayer not in (None, self.kind) for action in self.actions):
            raise PlanError(f"{where} has an action that is for the other half of the layer.")
        if self.kind is Kind.FFN and len({action.removes for action in self.actions}) > 1:
            raise PlanError(f"{where} both removes neurons and ties groups of them.")
        if any(not 0 <= donor.layer < self.layer for step in self.steps for donor, _ in step.donors):
            raise PlanError(f"{where} has a donor that is in no earlier layer.")

    @property
    def actions(self) -> frozenset[Action]:
        """The actions of its steps."""
        return frozenset(step.action for step in self.steps)

    @property
    def is_of_neurons(self) -> bool:
        """Whether this path's units are single neurons."""
        return self.kind is Kind.FFN and any(action.removes for action in self.actions)


@dataclass(frozen=True)
class Prices:
    """All paths of a model, the layouts that their units are of, and the layout of single neurons, which are removed.
    Of several paths of the same half of a layer, a plan follows one. `in_nats` says that prices are what predictions
    lose, nats a token, instead of squared errors relative to the hidden state.

    Raises:
        PlanError: if a path reaches outside its layout or empties a layer, or paths of the feed-forward are of neurons
            in one layer and of groups in another.
    """

    model_type: str
    layouts: Mapping[Kind, Layout]
    paths: tuple[Path, ...]
    neurons: Layout | None = None
    in_nats: bool = False

    def __post_init__(self) -> None:
        if len({path.is_of_neurons for path in self.paths if path.kind is Kind.FFN and path.steps}) > 1:
            raise PlanError("some layers remove neurons and others tie groups of them; a model does one or the other.")
        for path in self.paths:
            self._check(path)

    def only(self, actions: Collection[Action]) -> "Prices":
        """The same without paths that have other actions."""
        return replace(self, paths=tuple(path for path in self.paths if path.actions <= set(actions)))

    def layout_of(self, path: Path) -> Layout:
        """The layout that this path's units are of.

        Raises:
            PlanError: if there is none.
        """
        layout = self.neurons if path.is_of_neurons else self.layouts.get(path.kind)
        if layout is None:
            raise PlanError(f"the {path.kind} path of layer {path.layer} is of units that have no layout.")
        return layout

    def _check(self, path: Path) -> None:
        layout = self.layout_of(path)
        groups = [group for step in path.steps for group in step.groups]
        groups += [donor.group for step in path.steps for donor, _ in step.donors]
        if path.layer >= layout.layers or max(groups, default=0) >= layout.groups:
            raise PlanError(
                f"the {path.kind} path of layer {path.layer} is not of this model, which has {layout.layers} layers of "
                f"{layout.groups} groups. Price it again."
            )
        if sum(len(step.groups) for step in path.steps if step.action.removes) >= layout.groups:
            raise PlanError(f"the {path.kind} path of layer {path.layer} removes all its units; keep one.")


_PATHS: TypeAdapter[list[Path]] = TypeAdapter(list[Path])


def paths_to_json(paths: Sequence[Path]) -> str:
    """One layer's paths as JSON, exact to the last bit; the inverse of `paths_from_json`."""
    return _PATHS.dump_json(list(paths), by_alias=True).decode()


def paths_from_json(text: str | bytes) -> list[Path]:
    """Read and check paths that were written earlier.

    Raises:
        PlanError: if they are not JSON, or not paths.
    """
    try:
        return _PATHS.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "the first character"
        raise PlanError(f"these paths are not valid at {where}: {first['msg']}. Price the layer again.") from None
