"""Actions: the ways in which a unit can be given up, a row of a table each. Decides nothing and measures nothing.

The traits of a row say what a unit shares, what becomes of its columns of the output projection, and in which order
units are given up. The cost curves, the plan and the command line ask for the traits, never for the name. An action
that the traits cannot describe brings functions of its own: `costs` for its cost curves, `sections` for its part of a
plan.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from headshare.calibration import processes
from headshare.calibration.costs.sections import (
    SectionBuilder,
    low_rank_sections,
    narrow_values_sections,
    removal_sections,
    tie_sections,
)
from headshare.calibration.costs.sublayer import SublayerData, UnitSizes
from headshare.errors import PlanError
from headshare.plan.tensors import bias_name
from headshare.plan.units import ATTENTION_PARTS, FFN_PARTS, HeadUnit, Part, Sublayer
from headshare.sharing.factors import by_group, value_bases

# The word for a choice among several actions, which is no action's name.
AUTO = "auto"

# The steps in which all dimensions of a head's values could go, and the largest part of them that is dropped.
NARROW_STEPS = 16
MOST_DIMENSIONS = 0.75

# The parts that an action can share, by its sublayer.
_SHARED: Mapping[Sublayer | None, tuple[Part, ...]] = {
    Sublayer.ATTENTION: ATTENTION_PARTS,
    Sublayer.FFN: tuple(part for part in FFN_PARTS if part is not Part.DOWN),
    None: (),
}


class Output(StrEnum):
    """Treatments of a unit's columns of the output projection (W_o, W_down).

    `OWN`: the unit keeps columns of its own. `SCALED`: it takes its donor's, with one scale for each channel.
    `LOW_RANK`: a low-rank product stands in their place. `NARROW`: columns of dimensions that matter least are gone,
    in all units of the layer. `NONE`: all columns are gone, and the unit with them.
    """

    OWN = "own"
    SCALED = "scaled"
    LOW_RANK = "low rank"
    NARROW = "narrow"
    NONE = "none"


class Order(StrEnum):
    """Orders in which a layer gives its units up.

    `OWN`: the cheapest for its bytes first. `REMOVAL`: wherever units can be removed, the order in which `remove` gives
    them up, so that both actions are compared on the same units.
    """

    OWN = "own"
    REMOVAL = "removal"


class GivenUp(NamedTuple):
    """A step of a cost curve that an action makes itself. The fields are those of `CurveStep`."""

    groups: tuple[int, ...]
    price: float
    saved_bytes: int
    donors: tuple[tuple[HeadUnit, float], ...] = ()
    rank: int = 0
    width: int = 0


# Such a function sees the tokens of its own process, and must add its sums up by `processes.summed`.
Costs = Callable[[SublayerData], Iterable[GivenUp]]


@dataclass(frozen=True, order=True)
class Action:
    """A way in which a unit can be given up.

    `name` is its word on the command line and in saved cost curves. `sublayer` is the sublayer that it is for; None
    means both, and in the feed-forward single neurons. A unit takes the parts that it `shares` from a donor, where its
    layers have them: a feed-forward without gate shares up. `lasting` is for an action in the order of removal. It is
    the part of what the action makes up for in its layer that the refits of later layers would not, measured on
    held-out text. `costs` makes a cost curve in an order and at costs of its own, instead of the descent's. `sections`
    build the action's part of a plan.

    Raises:
        PlanError: if the traits contradict each other.
    """

    name: str
    sublayer: Sublayer | None
    shares: tuple[Part, ...]
    output: Output
    order: Order = Order.OWN
    lasting: float = 1.0
    costs: Costs | None = None
    sections: tuple[SectionBuilder, ...] = (tie_sections,)

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("+, "):
            raise PlanError(f"an action's name is a word without plus, comma and space; found {self.name!r:.50}.")
        if not set(self.shares) <= set(_SHARED[self.sublayer]):
            raise PlanError(f"{self} shares {','.join(self.shares)}, which units of {self.sublayer} do not share.")
        if (self.output is Output.SCALED) != (Part.O in self.shares):
            raise PlanError(f"{self} must share o if its columns are scaled, and only then.")
        if self.costs is None and bool(self.shares) == self.removes:
            raise PlanError(f"{self} must share parts or remove the unit, or bring costs of its own.")
        if not self.shares and tie_sections in self.sections:
            raise PlanError(f"{self} shares nothing, so it must bring sections of a plan that are no ties.")
        if self.sublayer is not Sublayer.ATTENTION and (self.order is Order.REMOVAL or self.output is Output.LOW_RANK):
            raise PlanError(f"{self} must be for attention, as only its units follow removals or become products.")

    def __str__(self) -> str:
        return self.name

    @property
    def removes(self) -> bool:
        """True if the unit is gone altogether. Only models that can go without units have such an action."""
        return self.output is Output.NONE

    @property
    def narrows(self) -> bool:
        """True if values become narrower. Only models whose attention takes such values have such an action."""
        return self.output is Output.NARROW

    def saved_bytes(self, sizes: UnitSizes, rank: int = 0) -> int:
        """The bytes that giving up one unit of these sizes saves, as `sharing.size.estimate_plan` counts them.

        Narrow values save by their width, which is nothing of a unit's: their cost curve says it.
        """
        shared = sum(size for part, size in sizes.parts.items() if part in self.shares)
        match self.output:
            case Output.OWN | Output.NARROW:
                return shared
            case Output.SCALED:
                return shared - sizes.scales
            case Output.LOW_RANK:
                return shared + sizes.parts[Part.O] - rank * sizes.rank
            case Output.NONE:
                return sum(sizes.parts.values()) + sizes.biases


ACTIONS: dict[str, Action] = {}


def register_action(action: Action) -> Action:
    """Add an action to the table, and return it.

    Raises:
        PlanError: if its name is taken.
    """
    if action.name == AUTO or action.name in ACTIONS:
        raise PlanError(f"there is an action '{action}' already. Choose another name.")
    ACTIONS[action.name] = action
    return action


def registered(actions: Iterable[Action]) -> tuple[Action, ...]:
    """The actions in the order of the table, each once.

    Raises:
        PlanError: if an action is not in the table, so that saved cost curves could not name it.
    """
    wanted = set(actions)
    unknown = wanted - set(ACTIONS.values())
    if unknown:
        raise PlanError(f"the action '{min(unknown)}' is not known; register it with register_action.")
    return tuple(action for action in ACTIONS.values() if action in wanted)


def narrow_values_costs(half: SublayerData) -> Iterator[GivenUp]:
    """Narrower values, a sixteenth of a head's dimensions at a step, in all units of a layer.

    The cost of a step is what dropping its dimensions adds to the squared error of the output, before W_o is fitted
    again: exact where one query head reads each key/value head, else a bound (`principal_values`). Directions are those
    of `half.weight`, so with a metric they are those that cost predictions least; the refit takes those of W_o itself.
    At most `MOST_DIMENSIONS` of the dimensions are dropped.
    """
    v = half.layout.parts[Part.V]
    # A key/value head's second moments are sums over the query heads that read it, so no larger Gram matrix is needed.
    heads = half.inputs[: half.fitted].double().view(half.fitted, half.layout.groups, -1, v.rows)
    values = heads.transpose(0, 1).flatten(1, 2)
    moments = processes.summed(values.mT @ values) * (half.all_tokens / half.all_fitted)
    readers = by_group(half.weight, half.layout.groups, v.rows)
    bases = value_bases(moments, readers.mT @ readers)
    losses = bases.importance.sum(dim=0).flip(0).cumsum(0).tolist()
    step = max(1, v.rows // NARROW_STEPS)
    before = 0.0
    for dropped in range(step, int(v.rows * MOST_DIMENSIONS) + 1, step):
        price = losses[dropped - 1] - before
        before = losses[dropped - 1]
        yield GivenUp(tuple(range(half.layout.groups)), price, step * _dimension_bytes(half), width=v.rows - dropped)


def whole_costs(half: SublayerData) -> Iterator[GivenUp]:
    """One step, on which the whole sublayer is gone. Its cost is the size of what the sublayer gave."""
    held = half.inputs[half.fitted :]
    seen = held if half.all_fitted < half.all_tokens else half.inputs
    given = (seen @ half.weight.T).double().square().sum()
    price = float(processes.summed(given)) * half.all_tokens / processes.total(len(seen))
    groups = half.layout.groups
    yield GivenUp(tuple(range(groups)), price, SUBLAYERS.saved_bytes(half.sizes) * groups)


def _dimension_bytes(half: SublayerData) -> int:
    """The bytes of one dimension of values in all units of the layer."""
    v, o = (half.layout.parts[part] for part in (Part.V, Part.O))
    stored = half.dense.checkpoint.tensors
    number = half.dense.number
    rows, columns = (stored[place.name(number)].torch_dtype.itemsize for place in (v, o))
    bias = bias_name(v.name(number))
    entries = stored[bias].torch_dtype.itemsize if bias in stored else 0
    readers = o.shape[o.axis] // v.rows
    return half.layout.groups * (v.shape[1 - v.axis] * rows + entries) + readers * o.shape[1 - o.axis] * columns


QK = register_action(Action("qk", Sublayer.ATTENTION, (Part.Q, Part.K), Output.OWN))
QKV = register_action(Action("qkv", Sublayer.ATTENTION, (Part.Q, Part.K, Part.V), Output.OWN))
QKVO = register_action(
    Action("qkvo", Sublayer.ATTENTION, (Part.Q, Part.K, Part.V, Part.O), Output.SCALED, Order.REMOVAL, lasting=1.0)
)
LOW_RANK = register_action(
    Action(
        "low_rank",
        Sublayer.ATTENTION,
        (Part.Q, Part.K, Part.V),
        Output.LOW_RANK,
        Order.REMOVAL,
        lasting=0.4,
        sections=(tie_sections, low_rank_sections),
    )
)
GATEUP = register_action(Action("gateup", Sublayer.FFN, (Part.GATE, Part.UP), Output.OWN))
NARROW_VALUES = register_action(
    Action(
        "narrow_values",
        Sublayer.ATTENTION,
        (),
        Output.NARROW,
        costs=narrow_values_costs,
        sections=(narrow_values_sections,),
    )
)
REMOVE = register_action(Action("remove", None, (), Output.NONE, sections=(removal_sections,)))
SUBLAYERS = register_action(Action("sublayers", None, (), Output.NONE, costs=whole_costs, sections=(removal_sections,)))

# The actions that `auto` chooses among; the cost curves of removals are made along with these.
AUTO_ACTIONS = (QKVO, LOW_RANK)
