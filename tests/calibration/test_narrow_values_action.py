"""Narrow values have a cost curve, which a plan under a budget follows."""

from pathlib import Path

import pytest
import torch

import headshare as hs
from headshare.calibration.allocate import plan_for_bytes
from headshare.calibration.budget import Budget
from headshare.calibration.choose import plan_on, prices_on
from headshare.calibration.costs.actions import LOW_RANK, NARROW_VALUES, QKV, REMOVE
from headshare.calibration.costs.curves import CostCurve, CurveStep, curves_from_json, curves_to_json
from headshare.calibration.costs.kept import KeptCurves
from headshare.calibration.costs.local import price_units
from headshare.calibration.costs.to_plan import budgeted, plan_for_steps
from headshare.calibration.refit.run import refit
from headshare.errors import PlanError
from headshare.evaluation.verify import verify
from headshare.plan.units import HeadUnit, Sublayer
from headshare.sharing.size import estimate_plan
from support.priced import calibration, opened


def step(width: int, price: float = 0.1, groups: tuple[int, ...] = (0, 1)) -> CurveStep:
    return CurveStep(NARROW_VALUES, groups, price, 100, width=width)


@pytest.mark.parametrize("name", ["llama-biased", "llama-mha", "mixtral"])
def test_steps_save_what_a_plan_of_them_saves_and_cost_more_the_narrower_values_are(name: str, tmp_path: Path) -> None:
    dense = opened(name, tmp_path)
    prices = price_units(dense, calibration(), [NARROW_VALUES])
    curves = [curve for curve in prices.curves if curve.kind is Sublayer.ATTENTION]
    assert [curve.layer for curve in curves] == [0, 1, 2, 3]
    for curve in curves:
        assert [each.width for each in curve.steps] == [7, 6, 5, 4, 3, 2]
        costs = [each.price for each in curve.steps]
        assert costs == sorted(costs)
        for steps in (1, 6):
            plan = plan_for_steps(prices, curve, steps)
            assert plan.narrow_values is not None
            assert plan.narrow_values.widths == {curve.layer: 8 - steps}
            saved = sum(each.saved_bytes for each in curve.steps[:steps])
            assert estimate_plan(dense, plan).saved_bytes == saved
    assert curves_from_json(curves_to_json(curves)) == curves


def test_a_step_costs_what_the_output_loses_where_one_query_head_reads_each_head(tmp_path: Path) -> None:
    dense = opened("llama-mha", tmp_path)
    text = calibration()
    prices = price_units(dense, text, [NARROW_VALUES], tokens=text.tokens.numel(), held_out=0.0)
    curve = next(each for each in prices.curves if each.layer == 0)
    model = hs.load(dense.path)
    seen: dict[str, torch.Tensor] = {}
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(z=args[0]))
    attention.register_forward_hook(lambda _, __, output: seen.update(out=output[0]))
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _, args: seen.update(entered=args[0]))
    with torch.no_grad():
        model(input_ids=text.tokens)
    root = (seen["entered"] + seen["out"]).square().sum(-1, keepdim=True).rsqrt() / text.tokens.numel() ** 0.5
    z = (seen["z"] * root).flatten(0, 1).double()
    weight = attention.o_proj.weight.detach().double()
    lost = 0.0
    for head in range(4):
        own = slice(8 * head, 8 * head + 8)
        lost += float(torch.linalg.svdvals(z[:, own] @ weight[:, own].T)[5:8].square().sum())
    assert sum(each.price for each in curve.steps[:3]) == pytest.approx(lost, rel=1e-2)


def test_costs_are_in_nats_where_predictions_are_compared_and_measured_costs_take_their_place(tmp_path: Path) -> None:
    dense = opened("llama-gqa", tmp_path)
    text = calibration()
    errors = price_units(dense, text, [NARROW_VALUES])
    nats = price_units(dense, text, [NARROW_VALUES], sensitive=True)
    measured = prices_on(dense, text, (NARROW_VALUES,))
    assert nats.in_nats
    assert measured.in_nats
    for plain, sensitive, found in zip(errors.curves, nats.curves, measured.curves, strict=True):
        assert [each.width for each in found.steps] == [each.width for each in plain.steps] == [7, 6, 5, 4, 3, 2]
        costs = [[each.price for each in curve.steps] for curve in (plain, sensitive, found)]
        assert costs[0] != costs[1] != costs[2]
        # the last step leaves one dimension, which the refit of W_o makes up for in part
        assert 0 < sum(costs[2]) < 4 * sum(costs[1])
    kept = KeptCurves(tmp_path / "prices.json", {"model": "a"})
    kept.write([NARROW_VALUES], measured.curves)
    assert kept.read([NARROW_VALUES]) == list(measured.curves)
    assert Budget.parse(dense, parts="none", allow=["narrow_values"], ratio=0.3).saved_bytes is not None
    assert plan_on(dense, text, Budget((NARROW_VALUES,), saved_bytes=2000), kept=kept).plan.narrow_values is not None


def test_where_units_are_tied_layer_0_keeps_its_values_to_lend_them(tmp_path: Path) -> None:
    dense = opened("llama-gqa", tmp_path)
    prices = price_units(dense, calibration(), [QKV, NARROW_VALUES])
    assert {curve.layer for curve in prices.curves if curve.actions == {NARROW_VALUES}} == {0, 1, 2, 3}
    for saved in range(2000, 24000, 4000):
        chosen = plan_for_bytes(prices, saved).plan
        narrowed = chosen.narrow_values.widths if chosen.narrow_values else {}
        assert not (0 in narrowed and chosen.selections)
    narrow = next(curve for curve in prices.curves if curve.actions == {NARROW_VALUES} and curve.layer == 1)
    tied = [curve for curve in prices.curves if curve.actions == {QKV}]
    later = [curve for curve in tied if curve.layer > 1]
    plan = budgeted(prices, [(narrow, 3), *((curve, 2) for curve in later)], None).plan
    assert {tie.donor.layer for selection in plan.selections for tie in selection.ties} == {0}
    with pytest.raises(PlanError, match="values of layer 1 are narrow"):
        budgeted(prices, [(narrow, 3), (next(curve for curve in tied if curve.layer == 1), 1)], None)


def test_a_plan_that_follows_such_curves_beside_others_saves_their_bytes_and_verifies(tmp_path: Path) -> None:
    dense = opened("llama-gqa", tmp_path)
    prices = price_units(dense, calibration(), [NARROW_VALUES, REMOVE])
    narrow = {curve.layer: curve for curve in prices.curves if curve.actions == {NARROW_VALUES}}
    neurons = next(curve for curve in prices.curves if curve.is_of_neurons and curve.layer == 2)
    chosen = budgeted(prices, [(narrow[0], 2), (narrow[2], 4), (neurons, 3)], None)
    assert chosen.plan.narrow_values is not None
    assert chosen.plan.narrow_values.widths == {0: 6, 2: 4}
    shared = refit(hs.share(dense, chosen.plan), calibration())
    assert shared.estimate.saved_bytes == chosen.saved_bytes
    assert verify(hs.open_checkpoint(shared.save(tmp_path / "shared")), dense).ok


@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_a_model_whose_values_are_made_with_keys_has_no_such_curve(name: str, tmp_path: Path) -> None:
    dense = opened(name, tmp_path)
    with pytest.raises(PlanError, match=r"Narrow values: .* compute values in one matrix with queries and keys"):
        price_units(dense, calibration(), [NARROW_VALUES])
    prices = price_units(dense, calibration(), [NARROW_VALUES, REMOVE])
    assert NARROW_VALUES not in {action for curve in prices.curves for action in curve.actions}


def test_wrong_steps_cannot_be_made() -> None:
    with pytest.raises(PlanError, match="a step has a width if it narrows values, and only then"):
        step(0)
    with pytest.raises(PlanError, match="a step has a width if it narrows values, and only then"):
        CurveStep(REMOVE, (0,), 0.1, 100, width=3)
    with pytest.raises(PlanError, match="has values that do not become narrower"):
        CostCurve(Sublayer.ATTENTION, 1, (step(5), step(5)))
    donor = ((HeadUnit(0, 0), 0.1),)
    for other in (
        CurveStep(REMOVE, (1,), 0.1, 100),
        CurveStep(QKV, (1,), 0.1, 100, donor),
        CurveStep(LOW_RANK, (1,), 0.1, 100, donor, 1),
    ):
        with pytest.raises(PlanError, match="narrows values and does something else"):
            CostCurve(Sublayer.ATTENTION, 1, (step(5), other, step(4)))
