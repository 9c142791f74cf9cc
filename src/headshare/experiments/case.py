"""Cases and methods: the input and the results of a method of a comparison, and the registry of methods."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from headshare.calibration.allocate import plan_for_bytes
from headshare.calibration.budget import BY_DEFAULT
from headshare.calibration.choose import prices_on
from headshare.calibration.costs.actions import ACTIONS, REMOVE, Action
from headshare.calibration.costs.curves import CostCurves
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import EvaluationError
from headshare.experiments.baselines import Importance, magnitudes, taylor
from headshare.experiments.cells import Asked
from headshare.experiments.peers.peer import Bench
from headshare.files.state_files import Workspace
from headshare.matching.estimate import estimate
from headshare.matching.pairing import make_plan
from headshare.matching.scores import Scores
from headshare.matching.similarity import score_units
from headshare.plan.plan import SharePlan
from headshare.plan.units import Sublayer
from headshare.sharing.rounded.write import RoundedCheckpoint
from headshare.sharing.size import parameter_bytes
from headshare.text.tokens import Calibration
from headshare.training import Sharing, TrainSettings
from headshare.training import TrainingMethod as Training

REFIT = "+refit"
ROUNDED = "+gptq4"
TRAINED = ("postshare", "both")
GRADIENT_WINDOWS = 10  # as many samples as LLM-Pruner looks at


@dataclass(frozen=True)
class Common:
    """The common ground of all cases: the dense model, the text, and what is computed from them once.

    `work` keeps cost curves for later runs too. `training` holds the settings, without the plan, of methods that train.
    """

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
        """The scores of all pairs of units by this match function."""
        if match not in self._scores:
            self._scores[match] = score_units(self.dense, match, "qkv")
        return self._scores[match]

    @cached_property
    def magnitudes(self) -> Importance:
        """The norm of each unit's weights."""
        return magnitudes(self.dense)

    @cached_property
    def taylor(self) -> Importance:
        """LLM-Pruner's importance of each unit."""
        windows = replace(self.text, tokens=self.text.mixed().tokens[:GRADIENT_WINDOWS])
        return taylor(self.dense, windows, device=self.device)

    @cached_property
    def bench(self) -> Bench:
        """The model and the text as methods of others read them."""
        return Bench(self.dense, self.text, self.work, self.device)

    def units(self, *actions: Action) -> CostCurves:
        """Cost curves of attention units for these actions, in nats, measured once.

        They include removals where ties follow the order of removals.
        """
        return self._prices(actions, Sublayer.ATTENTION)

    def neurons(self) -> CostCurves:
        """Cost curves of removing neurons, in nats, measured once."""
        return self._prices((REMOVE,), Sublayer.FFN)

    def by_default(self) -> CostCurves:
        """Cost curves of all that a budget of bytes may take, in nats, measured once."""
        return self._prices(tuple(ACTIONS[name] for name in BY_DEFAULT))

    def _prices(self, actions: tuple[Action, ...], *kinds: Sublayer) -> CostCurves:
        return prices_on(
            self.dense, self.text, actions, kinds=kinds or tuple(Sublayer), device=self.device, workspace=self.work
        )


@dataclass(frozen=True)
class Case:
    """A request to a method: to save at least the bytes that sharing q, k and v of int(ratio x units) units saves.

    Or, where a share of the model's bytes is asked for, to save at least that. `mode` is DirectShare's.
    """

    common: Common
    asked: Asked
    seed: int
    mode: str = "star"

    @property
    def dense(self) -> Checkpoint:
        """The dense model."""
        return self.common.dense

    @property
    def ratio(self) -> float:
        """The ratio of units.

        Raises:
            EvaluationError: if none is asked for, but a share of the model's bytes.
        """
        if not self.asked.ratio:
            raise EvaluationError("this method gives up a ratio of the units, not a share of the bytes: use --ratios.")
        return self.asked.ratio

    @cached_property
    def saved_bytes(self) -> int:
        """The bytes that a method must save at least."""
        if self.asked.save:
            return math.ceil(self.asked.save * parameter_bytes(self.dense))
        return estimate(self.dense, self.ratio, parts="qkv").saved_bytes

    def directshare(self, match: str = "qk", mode: str | None = None) -> SharePlan:
        """The plan by a match function and a mode; the paper's function and the case's mode unless others are named."""
        return make_plan(self.common.scores(match), self.ratio, mode=mode or self.mode)

    def trained(self, method: Training) -> TrainSettings:
        """The training run of this ratio's DirectShare plan."""
        settings = self.common.training
        assert settings is not None
        sharing = Sharing(ratio=self.ratio, mode=self.mode)
        return settings.model_copy(update={"method": method, "sharing": sharing, "seed": self.seed})

    def saving(self, prices: CostCurves) -> SharePlan:
        """The plan that saves the bytes at the least cost."""
        return plan_for_bytes(prices, self.saved_bytes).plan


@dataclass(frozen=True)
class Edit:
    """A change of a stock model in memory.

    `change` makes it and returns the bytes that it would save if it were stored. `note` explains that number. `refit`,
    where there is one, makes it with our refit of what is left.
    """

    change: Callable[[Any], int]
    note: str
    refit: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class Noted:
    """A plan, and what is to be known of it."""

    plan: SharePlan
    note: str


Make = Callable[[Case], SharePlan | Noted | Edit | TrainSettings | RoundedCheckpoint]


@dataclass(frozen=True)
class Method:
    """A way to save bytes.

    `summary` is its line in a table. `refits`: its plan can be refitted. `fixed`: it saves the same at every ratio.
    `reads`: it needs a calibration text. `digest` is that of the person's own file that it comes from, if it does.
    """

    name: str
    summary: str
    make: Make
    refits: bool
    fixed: bool
    reads: bool
    digest: str = ""


METHODS: dict[str, Method] = {}


def base_of(name: str) -> str:
    """A method's name without the steps after it (refit, rounding)."""
    return name.removesuffix(ROUNDED).removesuffix(REFIT)


def reads_text(name: str) -> bool:
    """Whether this method, or a step after it, needs the calibration text."""
    return METHODS[base_of(name)].reads or base_of(name) != name


def method(
    name: str, summary: str, *, refits: bool = True, fixed: bool = False, reads: bool = False
) -> Callable[[Make], Make]:
    """Register a method under this name."""

    def register(make: Make) -> Make:
        METHODS[name] = Method(name, summary, make, refits, fixed, reads)
        return make

    return register
