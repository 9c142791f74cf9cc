"""Cases and methods: what a method of a comparison is given and returns, and the registry of methods."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from headshare.calibration.allocate import plan_for_bytes
from headshare.calibration.choose import prices_on
from headshare.calibration.costs.actions import REMOVE, Action
from headshare.calibration.costs.curves import Prices
from headshare.calibration.gptq import Rounded
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import EvaluationError
from headshare.experiments.baselines import Importance, magnitudes, taylor
from headshare.files.state_files import Workspace
from headshare.matching.estimate import estimate
from headshare.matching.pairing import make_plan
from headshare.matching.scores import Scores
from headshare.matching.similarity import score_units
from headshare.plan.plan import SharePlan
from headshare.plan.units import Kind
from headshare.text.tokens import Calibration
from headshare.training import Method as Training
from headshare.training import Sharing, TrainSettings

REFIT = "+refit"
ROUNDED = "+gptq4"
TRAINED = ("postshare", "both")
GRADIENT_WINDOWS = 10  # as many samples as LLM-Pruner looks at


@dataclass(frozen=True)
class Common:
    """The common ground of all cases: the dense model, the text, and all that is worked out of them once.
    `work` keeps prices for later runs too. `training` says how methods train that do, but for the plan."""

    dense: Checkpoint
    calibration: Calibration | None
    work: Workspace
    device: str = "cpu"
    training: TrainSettings | None = None
    _scores: dict[str, Scores] = field(default_factory=dict, init=False, repr=False)

    @property
    def text(self) -> Calibration:
        """The calibration text.

        Raises:
            EvaluationError: if there is none.
        """
        if self.calibration is None:
            raise EvaluationError("this method looks at a text: name one with --calibration FILE, or self.")
        return self.calibration

    def scores(self, match: str) -> Scores:
        """The likeness of units by this match function."""
        if match not in self._scores:
            self._scores[match] = score_units(self.dense, match, "qkv")
        return self._scores[match]

    @cached_property
    def magnitudes(self) -> Importance:
        """The size of each unit's weights."""
        return magnitudes(self.dense)

    @cached_property
    def taylor(self) -> Importance:
        """LLM-Pruner's importance of each unit."""
        some = replace(self.text, tokens=self.text.mixed().tokens[:GRADIENT_WINDOWS])
        return taylor(self.dense, some, device=self.device)

    def units(self, *actions: Action) -> Prices:
        """Prices of attention's units by these actions, in nats: measured once, and of removals too where ties follow
        those."""
        return self._prices(actions, Kind.ATTENTION)

    def neurons(self) -> Prices:
        """Prices of neurons' removal, in nats, measured once."""
        return self._prices((REMOVE,), Kind.FFN)

    def _prices(self, actions: tuple[Action, ...], kind: Kind) -> Prices:
        return prices_on(self.dense, self.text, actions, kinds=(kind,), device=self.device, workspace=self.work)


@dataclass(frozen=True)
class Case:
    """A request to a method: to save at least the bytes that sharing q, k and v of int(ratio x units) units saves."""

    common: Common
    ratio: float
    seed: int

    @property
    def dense(self) -> Checkpoint:
        """The dense model."""
        return self.common.dense

    @cached_property
    def saved_bytes(self) -> int:
        """At least so many are to be saved."""
        return estimate(self.dense, self.ratio, parts="qkv").saved_bytes

    def directshare(self, match: str = "qk") -> SharePlan:
        """The pairs by a match function; the paper's, unless another is named."""
        return make_plan(self.common.scores(match), self.ratio)

    def trained(self, method: Training) -> TrainSettings:
        """The training run of this ratio's DirectShare plan."""
        found = self.common.training
        assert found is not None
        return found.model_copy(update={"method": method, "sharing": Sharing(ratio=self.ratio), "seed": self.seed})

    def saving(self, prices: Prices) -> SharePlan:
        """The plan that saves the bytes at the least price."""
        return plan_for_bytes(prices, self.saved_bytes).plan


@dataclass(frozen=True)
class Edit:
    """A stock model changed in memory: `change` does it and returns the bytes that it would save, stored as it could
    be. `note` says what is to be known of that."""

    change: Callable[[Any], int]
    note: str


Make = Callable[[Case], SharePlan | Edit | TrainSettings | Rounded]


@dataclass(frozen=True)
class Method:
    """A way to save bytes. `summary` is its line in a table; `refits` says whether there is a refit of it, `fixed` that
    it saves what it saves, whatever the ratio, `reads` that it looks at a text."""

    name: str
    summary: str
    make: Make
    refits: bool
    fixed: bool
    reads: bool


METHODS: dict[str, Method] = {}


def base_of(name: str) -> str:
    """A method's name without what is done after it."""
    return name.removesuffix(ROUNDED).removesuffix(REFIT)


def reads_text(name: str) -> bool:
    """Whether this method, or what is done after it, looks at the calibration text."""
    return METHODS[base_of(name)].reads or base_of(name) != name


def method(
    name: str, summary: str, *, refits: bool = True, fixed: bool = False, reads: bool = False
) -> Callable[[Make], Make]:
    """Register a method under this name."""

    def register(make: Make) -> Make:
        METHODS[name] = Method(name, summary, make, refits, fixed, reads)
        return make

    return register
