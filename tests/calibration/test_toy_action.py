"""An action that is defined here, by one row, is priced, planned, shared and measured as the package's own are."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import pytest
import torch

import headshare as hs
from headshare.calibration.allocate import plan_for_bytes, plan_for_units
from headshare.calibration.budget import Budget
from headshare.calibration.choose import plan_on
from headshare.calibration.costs.actions import (
    ACTIONS,
    QKV,
    REMOVE,
    Action,
    GivenUp,
    Order,
    Output,
    register_action,
)
from headshare.calibration.costs.curves import CostCurve, CostCurves, CurveStep, curves_from_json, curves_to_json
from headshare.calibration.costs.local import price_units
from headshare.calibration.costs.measured import probe_prices
from headshare.calibration.costs.sections import (
    low_rank_sections,
    removal_sections,
)
from headshare.calibration.costs.sublayer import SublayerData
from headshare.calibration.costs.to_plan import plan_for_steps
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import PlanError
from headshare.evaluation.verify import verify
from headshare.plan.units import HeadUnit, Part, Sublayer
from headshare.sharing.size import estimate_plan
from support import tiny
from support.command_line import Run
from support.priced import Reference, calibration, check_path, fitted, isolated, opened, paths_of
from support.texts import a_text, add_tokenizer

LAST = 3


def narrowed(half: SublayerData) -> Iterator[GivenUp]:
    """Each unit on its own, at what its output loses when its columns become their best product of rank 1, nothing else
    being fitted again: the squares of all singular values but the first."""
    prices = []
    for columns in half.columns:
        output = half.inputs[:, columns] @ half.weight[:, columns].T
        prices.append(float(torch.linalg.svdvals(output)[1:].square().sum()))
    for group in sorted(range(len(prices)), key=prices.__getitem__):
        yield GivenUp((group,), prices[group], NARROW.saved_bytes(half.sizes, 1), rank=1)


def smallest_first(half: SublayerData) -> Iterator[GivenUp]:
    """The half of the units, or of the neurons, with the smallest columns, at the squares of those."""
    sizes = [float(half.weight[:, columns].square().sum()) for columns in half.columns]
    for group in sorted(range(len(sizes)), key=sizes.__getitem__)[: len(sizes) // 2]:
        yield GivenUp((group,), sizes[group], QUIET.saved_bytes(half.sizes))


# By traits alone: k and v are shared and q is the unit's own; or q and k are its own, and o is the donor's with scales,
# of the units that would be removed.
KV = Action("kv", Sublayer.ATTENTION, (Part.K, Part.V), Output.OWN)
VO = Action("vo", Sublayer.ATTENTION, (Part.V, Part.O), Output.SCALED, Order.REMOVAL, lasting=0.5)
# By functions of their own: products that no donor stands behind; and removal by magnitude, of neurons too.
NARROW = Action("narrow", Sublayer.ATTENTION, (), Output.LOW_RANK, costs=narrowed, sections=(low_rank_sections,))
QUIET = Action("quiet", None, (), Output.NONE, costs=smallest_first, sections=(removal_sections,))


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """The toys are actions while a test runs, and the table is afterwards as it was."""
    before = dict(ACTIONS)
    for action in (KV, VO, NARROW, QUIET):
        register_action(action)
    yield
    for action in (KV, VO, NARROW, QUIET):
        del ACTIONS[action.name]
    assert before == ACTIONS
    assert list(ACTIONS) == ["qk", "qkv", "qkvo", "low_rank", "gateup", "narrow_values", "remove", "sublayers"]


def steps_by(prices: CostCurves, action: Action) -> list[CurveStep]:
    return [step for path in prices.curves for step in path.steps if step.action == action]


def saved_in(checkpoint: Checkpoint, plan: hs.SharePlan) -> int:
    return estimate_plan(checkpoint, plan).saved_bytes


# ---- an action that is its traits


@pytest.mark.parametrize("name", ["llama-mha", "llama-biased", "gpt2"])
def test_parts_that_no_action_shared_before_are_priced_as_a_stock_model_with_those_rows(
    name: str, tmp_path: Folder
) -> None:
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [KV, QKV])
    (path,) = paths_of(prices, Sublayer.ATTENTION, LAST)
    check_path(checkpoint, prices.layouts[Sublayer.ATTENTION], path)
    alone = fitted(checkpoint, calibration(), [KV])
    (path,) = paths_of(alone, Sublayer.ATTENTION, LAST)
    assert path.actions == {KV}
    assert len(path.steps) == alone.layouts[Sublayer.ATTENTION].groups
    check_path(checkpoint, alone.layouts[Sublayer.ATTENTION], path)


@pytest.mark.parametrize("name", ["llama-mha", "gpt2"])
def test_scaled_ties_of_some_parts_follow_removals_as_others_do(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(4), [VO], protect=[1])
    removal, tied = paths_of(prices, Sublayer.ATTENTION, 2)
    assert (removal.actions, tied.actions) == ({REMOVE}, {VO})
    assert [step.groups for step in tied.steps] == [step.groups for step in removal.steps]
    shorter = replace(tied, steps=tied.steps[:2])
    check_path(checkpoint, prices.layouts[Sublayer.ATTENTION], shorter, windows=4)
    reference = Reference(checkpoint, prices.layouts[Sublayer.ATTENTION], 2, calibration(4))
    first = tied.steps[0]
    for donor, price in first.donors[:2]:
        assert price == pytest.approx(isolated(reference, first.groups[0], donor, VO), rel=5e-3)


def test_a_toys_part_of_what_lasts_is_its_own(tmp_path: Folder) -> None:
    dense = opened("llama-mha", tmp_path)
    text = calibration(14)
    prices = price_units(dense, text, [VO], tokens=160)
    found = probe_prices(dense, text, prices, tokens=160, probed=48)
    for layer in (1, 2, LAST):
        before, own = paths_of(prices, Sublayer.ATTENTION, layer)
        after, beside = paths_of(found, Sublayer.ATTENTION, layer)
        (removed, tied, lost, priced) = (sum(step.price for step in one.steps) for one in (before, own, after, beside))
        assert priced == pytest.approx(lost * (1 - 0.5 * (1 - tied / removed)))


@pytest.mark.parametrize("name", ["llama-mha", "phi3", "gpt2"])
@pytest.mark.parametrize("actions", [(KV,), (VO,), (KV, QKV, VO, REMOVE)], ids=["kv", "vo", "all"])
def test_a_plan_of_toys_saves_what_it_says_and_can_be_shared_expanded_and_verified(
    actions: Sequence[Action], name: str, tmp_path: Folder
) -> None:
    dense = opened(name, tmp_path)
    prices = price_units(dense, calibration(4), actions).only(actions)
    for path in prices.curves:
        plan = plan_for_steps(prices, path, len(path.steps))
        assert saved_in(dense, plan) == sum(step.saved_bytes for step in path.steps)
    most = sum(step.saved_bytes for step in longest(prices))
    found = plan_for_bytes(prices, most // 2)
    assert saved_in(dense, found.plan) == found.saved_bytes >= most // 2
    hs.share(dense, found.plan).save(tmp_path / "shared")
    assert verify(hs.open_checkpoint(tmp_path / "shared"), dense).ok


def longest(prices: CostCurves) -> list[CurveStep]:
    """The steps of the path that saves most of each half of each layer."""
    most: dict[tuple[Sublayer, int], CostCurve] = {}
    for path in sorted(prices.curves, key=lambda path: sum(step.saved_bytes for step in path.steps)):
        most[path.kind, path.layer] = path
    return [step for path in most.values() for step in path.steps]


def test_ties_of_a_toy_and_of_another_action_are_selections_by_part(tmp_path: Folder) -> None:
    dense = opened("llama-mha", tmp_path)
    donors = ((HeadUnit(0, 0), 0.1),)
    prices = price_units(dense, calibration(4), [KV, QKV])
    path = CostCurve(Sublayer.ATTENTION, 1, (CurveStep(KV, (0,), 0.1, 9, donors), CurveStep(QKV, (2,), 0.1, 9, donors)))
    plan = plan_for_steps(prices, path, 2)
    ties = {part: [tie.recipient.group for tie in one.ties] for one in plan.selections for part in one.parts}
    assert ties == {Part.Q: [2], Part.K: [0, 2], Part.V: [0, 2]}


# ---- an action with costs of its own


@pytest.mark.parametrize("name", ["llama-mha", "gpt2"])
def test_an_action_prices_units_by_its_own_formula_and_puts_its_own_section_in_a_plan(
    name: str, tmp_path: Folder
) -> None:
    dense = opened(name, tmp_path)
    prices = price_units(dense, calibration(), [NARROW, QKV], held_out=0.0)
    groups = prices.layouts[Sublayer.ATTENTION].groups
    own = [path for path in prices.curves if path.actions == {NARROW}]
    assert [path.layer for path in own] == [0, 1, 2, 3]
    for path in own:
        costs = [step.price for step in path.steps]
        assert costs == sorted(costs)
        assert len(costs) == groups
        assert min(costs) > 0
    assert [path for path in prices.curves if path.actions != {NARROW}] == list(
        price_units(dense, calibration(), [QKV], held_out=0.0).curves
    )
    found = plan_for_units(prices.only([NARROW]), 5)
    cheapest = sorted(step.price for step in steps_by(prices, NARROW))[:5]
    assert found.price == pytest.approx(sum(cheapest))
    assert not found.plan.selections
    (section,) = found.plan.factored
    assert section.count == 5
    assert {rank for layer in section.units for _, rank in section.ranked(layer)} == {1}
    assert saved_in(dense, found.plan) == found.saved_bytes
    mixed = plan_for_bytes(prices, sum(step.saved_bytes for step in longest(prices)) // 2)
    assert saved_in(dense, mixed.plan) == mixed.saved_bytes


def test_an_action_can_remove_by_its_own_measure_beside_the_removal_that_there_is(tmp_path: Folder) -> None:
    dense = opened("llama-mha", tmp_path)
    prices = price_units(dense, calibration(4), [QUIET, REMOVE, QKV])
    assert {(path.kind, action) for path in prices.curves for action in path.actions} == {
        (Sublayer.ATTENTION, QKV), (Sublayer.ATTENTION, REMOVE), (Sublayer.ATTENTION, QUIET),
        (Sublayer.FFN, REMOVE), (Sublayer.FFN, QUIET),
    }  # fmt: skip
    assert prices.only([REMOVE, QKV]) == price_units(dense, calibration(4), [REMOVE, QKV])
    weight = dense.read("model.layers.2.mlp.down_proj.weight")
    path = next(path for path in paths_of(prices, Sublayer.FFN, 2) if path.actions == {QUIET})
    assert {step.groups[0] for step in path.steps} == set(
        weight.square().sum(0).topk(24, largest=False).indices.tolist()
    )
    found = plan_for_bytes(prices.only([QUIET]), sum(step.saved_bytes for step in steps_by(prices, QUIET)))
    assert found.plan.removed(Sublayer.ATTENTION) == 4 * 2
    assert found.plan.removed(Sublayer.FFN) == 4 * 24
    assert saved_in(dense, found.plan) == found.saved_bytes


def test_what_a_toy_does_to_predictions_is_measured(tmp_path: Folder) -> None:
    dense = opened("llama-mha", tmp_path)
    prices = price_units(dense, calibration(14), [NARROW, KV], tokens=160)
    found = probe_prices(dense, calibration(14), prices, tokens=160, probed=48)
    assert found.in_nats
    for before, after in zip(prices.curves, found.curves, strict=True):
        assert [step.groups for step in before.steps] == [step.groups for step in after.steps]
        assert sum(step.price for step in after.steps) > 0
        assert before != after


# ---- its word


def test_a_budget_and_the_command_line_know_an_action_by_its_name(run: Run, tmp_path: Folder) -> None:
    add_tokenizer(tiny.make("llama-mha", tmp_path / "model"))
    a_text(tmp_path / "text", 600)
    dense = hs.open_checkpoint("model")
    budget = Budget.parse(dense, save="2%", parts="kv", allow=["narrow", "quiet"])
    assert budget.actions == (KV, NARROW, QUIET)
    assert Budget.parse(dense, ratio=0.5, parts="kv").units == 8
    assert Budget.parse(dense, ratio=0.5, parts="none", allow=["narrow"]).units is None
    words = ["--calibration", "text", "--calibration-window", "16", "--calibration-tokens", "256", "--no-measure"]
    found = run("plan", "model", "-o", "plan.json", "--parts", "kv", "--save", "2%", "--allow", "quiet,narrow", *words)
    assert found.status == 0
    text = hs.Calibration.load("text", dense, tokens=256, window=16)
    assert hs.SharePlan.load("plan.json") == plan_on(dense, text, budget).plan
    assert (
        run("plan", "model", "-o", "more.json", "--allow", "kv", *words).err.count(
            "There are: narrow_values, remove, sublayers, narrow, quiet"
        )
        == 1
    )


def test_saved_curves_name_an_action_and_are_refused_where_it_is_not_known() -> None:
    donors = ((HeadUnit(0, 0), 0.5),)
    paths = [CostCurve(Sublayer.ATTENTION, 1, (CurveStep(KV, (0,), 0.5, 9, donors),)),
             CostCurve(Sublayer.ATTENTION, 0, (CurveStep(NARROW, (0,), 0.5, 9, (), 1),))]  # fmt: skip
    text = curves_to_json(paths)
    assert '"form":"kv"' in text
    assert curves_from_json(text) == paths
    with pytest.MonkeyPatch.context() as patched:
        patched.delitem(ACTIONS, "kv")
        with pytest.raises(PlanError, match=r"steps.0.form.*no action 'kv'; there are qk, .*narrow"):
            curves_from_json(text)


# ---- what is no action


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "k+v"}, "a word without plus"),
        ({"name": ""}, "a word without plus"),
        ({"shares": (Part.K, Part.UP)}, "k,up, which units of attention do not share"),
        ({"sublayer": Sublayer.FFN}, "k,v, which units of ffn do not share"),
        ({"sublayer": None}, "do not share"),
        ({"output": Output.SCALED}, "share o if its columns are scaled"),
        ({"shares": (Part.V, Part.O)}, "share o if its columns are scaled"),
        ({"output": Output.NONE}, "share parts or remove"),
        ({"shares": ()}, "share parts or remove"),
        ({"shares": (), "costs": narrowed}, "sections of a plan that are no ties"),
        ({"sublayer": Sublayer.FFN, "shares": (Part.UP,), "order": Order.REMOVAL}, "must be for attention"),
        ({"sublayer": Sublayer.FFN, "shares": (Part.UP,), "output": Output.LOW_RANK}, "must be for attention"),
    ],
)
def test_traits_that_contradict_each_other_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        replace(KV, **changes)


@pytest.mark.parametrize("name", ["kv", "qkv", "auto"])
def test_a_name_stands_for_one_action(name: str) -> None:
    with pytest.raises(PlanError, match=f"an action '{name}' already"):
        register_action(replace(KV, name=name))


def test_an_action_that_is_not_in_the_table_is_not_priced(tmp_path: Folder) -> None:
    with pytest.raises(PlanError, match="'unknown' is not known"):
        price_units(opened("llama-mha", tmp_path), calibration(), [replace(KV, name="unknown"), QKV])
