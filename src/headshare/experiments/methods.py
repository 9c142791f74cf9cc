"""The methods of a comparison: ways to save a number of bytes of a model, and controls. Each is a function of a case.

A method returns a plan, rounded matrices, an edit of a stock model that says what it would save, or the settings of a
training run that shares. Plans can be refitted: beside `deletion` there is also `deletion+refit`.
"""

from dataclasses import replace
from typing import Any

import torch

import headshare.experiments.peers.registry  # noqa: F401 - registers the methods of others
from headshare.calibration.allocate import plan_for_units
from headshare.calibration.costs.actions import AUTO_ACTIONS, QKV, REMOVE
from headshare.calibration.gptq import round_by_gptq
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.experiments.baselines import (
    overwrite_with_mean,
    removal_prices,
    round_to_integers,
    zero_smallest,
)
from headshare.experiments.case import METHODS as METHODS  # all of them, once this module is imported
from headshare.experiments.case import Case, Edit, Make, Noted, method
from headshare.experiments.controls import layer_by_layer, whole_layers, with_random_donors
from headshare.matching.pairing import best_pairs, make_plan, published_count, units_at
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.units import HeadUnit
from headshare.sharing.rounded.write import RoundedCheckpoint
from headshare.sharing.size import estimate_plan
from headshare.training import TrainingMethod as Training
from headshare.training import TrainSettings

MATCHES = ("q", "k", "v", "qkv", "separate")  # besides the paper's own, for its comparison of them
MATCHED = tuple(f"match-{name}" for name in (*MATCHES, "circuit"))
BY_COSINE = ("directshare", "directshare-root", "directshare-published", "layerwise", "headwise")
TYING = (*BY_COSINE, "output", "random-donors", *MATCHED)  # rows of q, k, v alone
SHARING = (*BY_COSINE, "output", "auto", "cheapest", *MATCHED)
DELETING = ("deletion", "deletion-same", "magnitude", "llm-pruner", "neurons", "budget")


# ---- sharing


@method("directshare", "DirectShare: the paper's pairs, by cosine of q and k")
def _directshare(case: Case) -> SharePlan:
    return case.directshare()


@method("directshare-root", "the same, where Algorithm 1's own pairs are followed to the first head of each chain")
def _root(case: Case) -> SharePlan:
    return case.directshare(mode="root")


@method("directshare-published", "the same, as in the code of the paper's authors: heads that lend keep their weights")
def _published(case: Case) -> Noted:
    (table,) = case.common.scores("qk").tables
    asked = units_at(case.ratio, table.layout.units)
    count = published_count(list(best_pairs(table.layout, table.scores, asked).items()))
    note = (
        f"the authors' code takes {count.pairs} pairs for {asked} heads, and {count.changed} heads change. What is "
        f"saved is counted for those. As their code stores it, a copy for each pair, it would be {count.saved} heads"
    )
    return Noted(case.directshare(mode="published"), note)


@method("layerwise", "the attention of whole layers shared, by cosine of all their q and k")
def _layerwise(case: Case) -> SharePlan:
    return layer_by_layer(case.dense, case.ratio)


@method("headwise", "DirectShare of as many heads as layerwise shares, so that both save the same")
def _headwise(case: Case) -> SharePlan:
    layout = case.dense.layouts.attention
    units = whole_layers(layout, case.ratio) * layout.groups
    # half a unit more, so that rounding of the ratio loses none
    return make_plan(case.common.scores("qk"), (units + 0.5) / layout.units)


@method("output", "q,k,v shared, pairs by what they do to their layer's output", reads=True)
def _output(case: Case) -> SharePlan:
    units = units_at(case.ratio, case.dense.layouts.attention.units)
    return plan_for_units(case.common.units(QKV), units).plan


@method("auto", "ties with scales, with products of small rank, or removal of units, whichever costs least", reads=True)
def _auto(case: Case) -> SharePlan:
    return case.saving(case.common.units(*AUTO_ACTIONS))


@method("cheapest", "the same, and removal of neurons", reads=True)
def _cheapest(case: Case) -> SharePlan:
    units = case.common.units(*AUTO_ACTIONS)
    neurons = case.common.neurons()
    return case.saving(
        replace(neurons, layouts={**neurons.layouts, **units.layouts}, curves=units.curves + neurons.curves)
    )


@method(
    "budget",
    "what --save takes: units, neurons and sublayers removed, values narrowed, where it costs least",
    reads=True,
)
def _budget(case: Case) -> SharePlan:
    return case.saving(case.common.by_default())


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
method("match-circuit", "DirectShare with pairs by cosine of W_q^T W_k, by which heads score tokens")(
    _matched("circuit")
)


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
    return case.saving(case.common.units(*AUTO_ACTIONS).only({REMOVE}))


@method("deletion-same", "DirectShare's recipients deleted, the best matched first, as many as save the bytes")
def _deletion_same(case: Case) -> SharePlan:
    plan = case.directshare()
    layout = case.dense.layouts.attention
    removed: dict[int, list[int]] = {}
    (scores,) = case.common.scores("qk").tables
    ties = [tie for selection in plan.selections for tie in selection.ties]
    ties.sort(key=lambda tie: -float(scores.scores[layout.index(tie.recipient), layout.index(tie.donor)]))
    # one unit more at a time, until the bytes are saved
    shortened = SharePlan()
    for unit in _with_one_kept([tie.recipient for tie in ties], layout.groups):
        removed.setdefault(unit.layer, []).append(unit.group)
        shortened = SharePlan(model_type=plan.model_type, removals=(Removal(layout=layout, removed=removed),))
        if estimate_plan(case.dense, shortened).saved_bytes >= case.saved_bytes:
            break
    return shortened


def _with_one_kept(units: list[HeadUnit], groups: int) -> list[HeadUnit]:
    """The units in order, without the last unit of a layer that would lose all of them."""
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
    """The type in which the matrices of its layers are stored."""
    return dense.tensors[next(iter(dense.layouts.attention.parts.values())).name(0)].torch_dtype


@method("magnitude-zeros", "the attention's smallest numbers set to zero: zeros, not smaller", refits=False)
def _magnitude_zeros(case: Case) -> Edit:
    layout = case.dense.layouts.attention
    item = _stored_in(case.dense).itemsize

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
def _gptq4(case: Case) -> RoundedCheckpoint:
    return round_by_gptq(case.dense, case.common.text, device=case.common.device)
