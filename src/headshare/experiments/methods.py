"""The methods that are compared: ways to save so many bytes of a model, and controls. Each is a function of a case.

A method gives a plan, rounded matrices, an edit of a stock model that says what it would save, or the settings of a
training run that shares. Plans can be refitted: of a name `deletion` there is also `deletion+refit`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from headshare.calibration.allocate import plan_for_bytes, plan_for_units
from headshare.calibration.costs.curves import Form, Prices
from headshare.calibration.gptq import Rounded, round_by_gptq
from headshare.calibration.run import prices_on
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import EvaluationError
from headshare.experiments.baselines import (
    Importance,
    attention_of,
    magnitudes,
    overwrite_with_mean,
    removal_prices,
    round_to_integers,
    taylor,
    zero_smallest,
)
from headshare.experiments.controls import with_random_donors
from headshare.files.resume import Workspace
from headshare.matching.pairing import make_plan, units_at
from headshare.matching.scores import Scores
from headshare.matching.similarity import score_units
from headshare.plan.plan import Removal, SharePlan
from headshare.plan.units import HeadUnit, Kind
from headshare.sharing.size import estimate, estimate_plan
from headshare.text.tokens import Calibration
from headshare.training import Method as Training
from headshare.training import Sharing, TrainSettings

REFIT = "+refit"
ROUNDED = "+gptq4"
TIES = (Form.QKVO, Form.FACTORED)
MATCHES = ("q", "k", "v", "qkv", "separate")  # besides the paper's own, for its comparison of them
TRAINED = ("postshare", "both")
TYING = ("directshare", "output", "random-donors", *(f"match-{name}" for name in MATCHES))  # rows of q, k, v alone
SHARING = ("directshare", "output", "auto", "cheapest", *(f"match-{name}" for name in MATCHES))
DELETING = ("deletion", "deletion-same", "magnitude", "llm-pruner", "neurons")
GRADIENT_WINDOWS = 10  # as many samples as LLM-Pruner looks at


@dataclass(frozen=True)
class Common:
    """What all cases look at: the dense model, the text, and what is worked out of them once, whatever the ratio.
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
        """How alike units are, by this match function."""
        if match not in self._scores:
            self._scores[match] = score_units(self.dense, match, "qkv")
        return self._scores[match]

    @cached_property
    def magnitudes(self) -> Importance:
        """How large each unit's weights are."""
        return magnitudes(self.dense)

    @cached_property
    def taylor(self) -> Importance:
        """LLM-Pruner's importance of each unit."""
        some = replace(self.text, tokens=self.text.mixed().tokens[:GRADIENT_WINDOWS])
        return taylor(self.dense, some, device=self.device)

    def units(self, *forms: Form) -> Prices:
        """What attention could give up in these forms, in nats: measured once, and of removals too where ties follow
        those."""
        return prices_on(self.dense, self.text, forms, kinds=(Kind.ATTENTION,), device=self.device, workspace=self.work)

    def neurons(self) -> Prices:
        """What removing neurons costs, in nats, measured once."""
        return prices_on(
            self.dense, self.text, (Form.REMOVE,), kinds=(Kind.FFN,), device=self.device, workspace=self.work
        )


@dataclass(frozen=True)
class Case:
    """What is asked of a method: at least the bytes that sharing q, k and v of int(ratio x units) units saves."""

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


# ---- sharing


@method("directshare", "DirectShare: the paper's pairs, by cosine of q and k")
def _directshare(case: Case) -> SharePlan:
    return case.directshare()


@method("output", "q,k,v shared, pairs by what they do to their layer's output", reads=True)
def _output(case: Case) -> SharePlan:
    units = units_at(case.ratio, attention_of(case.dense).units)
    return plan_for_units(case.common.units(Form.QKV), units).plan


@method("auto", "ties with scales, with products of small rank, or removal of units, whichever costs least", reads=True)
def _auto(case: Case) -> SharePlan:
    return case.saving(case.common.units(*TIES))


@method("cheapest", "the same, and removal of neurons", reads=True)
def _cheapest(case: Case) -> SharePlan:
    units, neurons = case.common.units(*TIES), case.common.neurons()
    return case.saving(
        replace(neurons, layouts={**neurons.layouts, **units.layouts}, paths=units.paths + neurons.paths)
    )


@method("postshare", "PostShare: DirectShare's pairs pulled together by training, then shared", refits=False)
def _postshare(case: Case) -> TrainSettings:
    return case.trained(Training.POSTSHARE)


@method("both", "DirectShare, then trained as long", refits=False)
def _both(case: Case) -> TrainSettings:
    return case.trained(Training.BOTH)


def _matched(name: str) -> Make:
    return lambda case: case.directshare(name)


for _name in MATCHES:
    method(f"match-{_name}", f"DirectShare with pairs by cosine of {_name}")(_matched(_name))


# ---- controls and baselines


@method("random-donors", "DirectShare's recipients, each tied to a random kept unit of an earlier layer")
def _random_donors(case: Case) -> SharePlan:
    return with_random_donors(case.directshare(), case.seed)


@method("mean-unit", "DirectShare's recipients, all with the mean of the units that stay", refits=False)
def _mean_unit(case: Case) -> Edit:
    plan = case.directshare()
    unit = case.saved_bytes // plan.ties if plan.ties else 0

    def change(model: Any) -> int:
        overwrite_with_mean(model, plan)
        return case.saved_bytes - unit

    return Edit(change, "computed in a stock model; what is saved is counted: one unit less than sharing saves")


@method("deletion", "attention units deleted, those that cost predictions least", reads=True)
def _deletion(case: Case) -> SharePlan:
    return case.saving(case.common.units(*TIES).only({Form.REMOVE}))


@method("deletion-same", "DirectShare's recipients deleted, the best matched first, as many as save the bytes")
def _deletion_same(case: Case) -> SharePlan:
    plan = case.directshare()
    layout, removed = attention_of(case.dense), dict[int, list[int]]()
    (scores,) = case.common.scores("qk").tables
    ties = [tie for selection in plan.selections for tie in selection.ties]
    ties.sort(key=lambda tie: -float(scores.scores[layout.index(tie.recipient), layout.index(tie.donor)]))
    found = SharePlan()
    for unit in _with_one_kept([tie.recipient for tie in ties], layout.groups):
        removed.setdefault(unit.layer, []).append(unit.group)
        found = SharePlan(model_type=plan.model_type, removals=(Removal(layout=layout, removed=removed),))
        if estimate_plan(case.dense, found).saved_bytes >= case.saved_bytes:
            break
    return found


def _with_one_kept(units: list[HeadUnit], groups: int) -> list[HeadUnit]:
    """The units, in order, without the last of a layer that would lose all."""
    left: dict[int, int] = {}
    kept = []
    for unit in units:
        left[unit.layer] = left.get(unit.layer, groups) - 1
        if left[unit.layer]:
            kept.append(unit)
    return kept


@method("neurons", "feed-forward neurons removed, those that cost predictions least", reads=True)
def _neurons(case: Case) -> SharePlan:
    return case.saving(case.common.neurons())


@method("magnitude", "attention units deleted, those of the smallest weights")
def _magnitude(case: Case) -> SharePlan:
    return case.saving(removal_prices(case.dense, case.common.magnitudes))


@method("llm-pruner", "attention units deleted, by LLM-Pruner's importance", reads=True)
def _llm_pruner(case: Case) -> SharePlan:
    return case.saving(removal_prices(case.dense, case.common.taylor))


def _stored_in(dense: Checkpoint) -> torch.dtype:
    """The type of its layers' matrices."""
    return dense.tensors[next(iter(attention_of(dense).parts.values())).name(0)].torch_dtype


@method("magnitude-zeros", "the attention's smallest numbers set to zero: zeros, not smaller", refits=False)
def _magnitude_zeros(case: Case) -> Edit:
    layout, item = attention_of(case.dense), _stored_in(case.dense).itemsize

    def change(model: Any) -> int:
        zero_smallest(model, layout, -(-case.saved_bytes // item))
        return 0

    return Edit(change, f"{case.saved_bytes:,} bytes of zeros, all of them stored")


@method(
    "int8", "every layer's matrices rounded to 8 bits, a scale an output, whatever the ratio", refits=False, fixed=True
)
def _int8(case: Case) -> Edit:
    def change(model: Any) -> int:
        return round_to_integers(model, stored=_stored_in(case.dense))

    return Edit(change, "computed with the rounded numbers as dense ones; what is saved is counted")


@method(
    "gptq4",
    "every layer's matrices rounded to 4 bits by GPTQ, whatever the ratio",
    refits=False,
    fixed=True,
    reads=True,
)
def _gptq4(case: Case) -> Rounded:
    return round_by_gptq(case.dense, case.common.text, device=case.common.device)
