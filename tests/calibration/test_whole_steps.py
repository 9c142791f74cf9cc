"""Gradient steps on the whole model bring its predictions back, and touch nothing that is shared or gone."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import headshare as hs
from headshare.architecture.modules import module_path
from headshare.calibration.refit import whole
from headshare.calibration.refit.columns import PlannedColumns
from headshare.calibration.refit.refinement import REFINEMENTS, Refinement
from headshare.calibration.refit.refitter import Refitter
from headshare.calibration.refit.result import Refit
from headshare.calibration.refit.run import record_of, refit_readouts, run_refit
from headshare.calibration.refit.steps import divergence as divergence_module
from headshare.calibration.refit.steps import whole_steps
from headshare.calibration.refit.steps.divergence import divergences
from headshare.calibration.refit.steps.whole_model import check_room
from headshare.calibration.refit.steps.whole_steps import highest_rate
from headshare.errors import CalibrationError
from headshare.files.state_files import Workspace
from headshare.plan.plan import SharePlan
from headshare.sharing.expanded import ExpandedTensors
from headshare.text.tokens import Calibration
from support import tiny
from support.refits import calibration, dense_of, plan_of, same, stock
from support.walks import ALL

RATE = 3e-4
STEPS = Refinement(0, 160, whole=12, whole_rate=RATE)
CASES = [
    ("llama-gqa", "scaled qkvo"),
    ("llama-biased", "removed neurons"),
    ("gpt2", "removed neurons"),
    ("phi3", "ffn"),
    ("gpt_neox", "qkv"),
    ("gemma2", "removed attention"),
]


@pytest.fixture(autouse=True)
def _more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "FAMILIES", ALL)


@pytest.fixture
def every_look_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small and random a model may only over-fit."""
    errors = itertools.count(1)
    monkeypatch.setattr(whole_steps, "_held_out", lambda *_: 1 / next(errors))


def divergence(dense: Any, changed: Any, tokens: Tensor) -> Tensor:
    """KL(dense | changed), averaged over tokens."""
    wanted, found = (functional.log_softmax(model(input_ids=tokens).logits, dim=-1) for model in (dense, changed))
    return functional.kl_div(found, wanted.detach(), log_target=True, reduction="none").sum(-1).mean()


@pytest.mark.parametrize("rows", [1, 32])
def test_divergences_and_their_gradient_are_those_of_the_definition(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_module, "ROWS", rows)
    wanted, found = (torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    weights = torch.rand(2, 7)
    slopes = []
    for made in (
        divergences(wanted, mine := found.clone().requires_grad_()),
        functional.kl_div(
            functional.log_softmax(theirs := found.clone().requires_grad_(), -1),
            functional.log_softmax(wanted, -1),
            log_target=True,
            reduction="none",
        ).sum(-1),
    ):
        (made * weights).sum().backward()
        slopes.append(made)
    torch.testing.assert_close(slopes[0], slopes[1])
    torch.testing.assert_close(mine.grad, theirs.grad)
    with torch.no_grad():
        torch.testing.assert_close(divergences(wanted, found), slopes[1])


def owned(dense: hs.Checkpoint, plan: SharePlan, name: str) -> Tensor:
    columns = PlannedColumns(plan, ExpandedTensors.planned(dense, plan), torch.device("cpu"))
    return columns.owned(name, dense.read(name))


@pytest.mark.parametrize(("name", "kind"), CASES[:3])
def test_the_divergences_that_it_reports_are_those_of_the_models_before_and_after(
    name: str, kind: str, tmp_path: Path
) -> None:
    dense, tokens = dense_of(name, tmp_path), calibration(windows=24)
    plan = plan_of(dense, kind)
    before = refit_readouts(dense, plan, tokens, refine=Refinement(0, whole=1, whole_rate=0.0))
    found = refit_readouts(dense, plan, tokens, refine=STEPS)
    held = tokens.split()[1].tokens
    step = found.steps[-1]
    assert step.tensor == "model"
    with torch.no_grad():
        was = divergence(stock(dense), stock(dense, plan, before), held)
        now = divergence(stock(dense), stock(dense, plan, found), held)
    assert step.error_before == pytest.approx(float(was), rel=1e-4)
    assert step.error_after == pytest.approx(float(now), rel=1e-4)
    assert "none was better" in before.steps[-1].note


def test_steps_bring_predictions_nearer(tmp_path: Path) -> None:
    dense, tokens = dense_of("llama-gqa", tmp_path), calibration(windows=24)
    faster = replace(STEPS, whole_rate=10 * RATE)
    step = refit_readouts(dense, plan_of(dense, "scaled qkvo"), tokens, refine=faster).steps[-1]
    assert step.error_after < 0.95 * step.error_before
    assert "12 gradient steps on the whole model, best after" in step.note


def test_the_rate_follows_from_the_divergence_before_the_first_step(tmp_path: Path) -> None:
    dense, tokens = dense_of("llama-gqa", tmp_path), calibration(windows=24)
    plan = plan_of(dense, "scaled qkvo")
    by_itself = refit_readouts(dense, plan, tokens, refine=replace(STEPS, whole_rate=None))
    rate = highest_rate(by_itself.steps[-1].error_before)
    given = refit_readouts(dense, plan, tokens, refine=replace(STEPS, whole_rate=rate))
    assert by_itself.steps[-1].error_after < by_itself.steps[-1].error_before
    assert all(torch.equal(tensor, given.tensors[name]) for name, tensor in by_itself.tensors.items())


def test_the_rate_goes_with_the_square_of_the_divergence() -> None:
    rates = [highest_rate(divergence) for divergence in (0.0, 0.01, 0.1, 0.2, 3.0)]
    assert rates == pytest.approx([2e-5, 2e-5, 5e-5, 2e-4, 2e-4])


@pytest.mark.usefixtures("every_look_is_better")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_one_step_goes_down_the_gradient_and_only_where_a_layer_stores_numbers_for_itself(
    name: str, kind: str, tmp_path: Path
) -> None:
    """Against the gradient of the stock model that computes the same."""
    dense, tokens = dense_of(name, tmp_path), calibration(windows=8)
    plan = plan_of(dense, kind)
    fit = tokens.split()[0].tokens
    zero = refit_readouts(dense, plan, tokens, refine=Refinement(0, fit.numel(), whole=1, whole_rate=0.0))
    one = refit_readouts(dense, plan, tokens, refine=Refinement(0, fit.numel(), whole=1, whole_rate=RATE))
    model = stock(dense, plan, zero)
    divergence(stock(dense), model, fit).backward()

    compared = 0
    for key, after in one.tensors.items():
        if key.endswith(("tie_scale", "factor_in", "factor_out")):
            continue
        stem, _, leaf = key.rpartition(".")
        weight = getattr(model.get_submodule(module_path(model, f"{stem}.weight")), leaf)
        own = owned(dense, plan, key) if leaf == "weight" else torch.ones_like(after, dtype=torch.bool)
        moved = after - weight.detach()
        assert not moved[~own].any()
        # Adam's first step is as long whatever the gradient's size
        clear = own & (weight.grad.abs() > 1e-6)
        assert torch.equal(moved[clear].sign(), -weight.grad[clear].sign())
        assert torch.allclose(moved[clear].abs(), torch.full_like(moved[clear], RATE), rtol=0.05)
        compared += int(clear.sum())
    assert compared > 1000
    changed = set(one.tensors)
    assert any("norm" in key or "ln_" in key for key in changed)


def stopped(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a descent end after so many looks, as if it were killed."""
    descend = whole_steps.descend

    def short(*given: Any, **more: Any) -> Iterator[int]:
        for number, step in enumerate(descend(*given, **more), start=1):
            yield step
            if number == steps:
                raise KeyboardInterrupt

    monkeypatch.setattr(whole, "descend", short)


@pytest.mark.parametrize("looks", [2, 6])
def test_steps_that_were_stopped_go_on_bit_for_bit(looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, tokens = dense_of("llama-gqa", tmp_path), calibration(windows=24)
    plan = plan_of(dense, "removed neurons")
    expected = refit_readouts(dense, plan, tokens, refine=STEPS)
    (tmp_path / "state").mkdir()
    workspace = Workspace(tmp_path / "state", CalibrationError)
    with monkeypatch.context() as patched:
        stopped(looks, patched)
        with pytest.raises(KeyboardInterrupt):
            run_refit(Refitter(dense, plan, tokens, refinement=STEPS), workspace, "key")
    taken: list[int] = []
    descend = whole_steps._add_gradients
    monkeypatch.setattr(whole_steps, "_add_gradients", lambda *given: (taken.append(1), descend(*given)))
    looked: list[int] = []
    look = whole_steps._held_out
    monkeypatch.setattr(whole_steps, "_held_out", lambda *given: (looked.append(1), look(*given))[1])
    again = Refitter(dense, plan, tokens, refinement=STEPS)
    run_refit(again, workspace, "key")
    assert len(looked) == STEPS.whole // 2 - looks  # what is known of the weights before the first step is kept
    assert len(taken) == STEPS.whole - 2 * looks  # twelve steps, looked at after every second one
    assert same(again.result, Refit(dict(expected.tensors), expected.steps))


def test_a_damaged_state_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, tokens = dense_of("llama-gqa", tmp_path), calibration(windows=24)
    plan = plan_of(dense, "removed neurons")
    (tmp_path / "state").mkdir()
    workspace = Workspace(tmp_path / "state", CalibrationError)
    with monkeypatch.context() as patched:
        stopped(1, patched)
        with pytest.raises(KeyboardInterrupt):
            run_refit(Refitter(dense, plan, tokens, refinement=STEPS), workspace, "key")
    workspace.write_tensors("whole-key.safetensors", {"numbers": torch.zeros(4, dtype=torch.float64)})
    with pytest.raises(CalibrationError, match="does not fit the run"):
        run_refit(Refitter(dense, plan, tokens, refinement=STEPS), workspace, "key")


def test_without_the_feed_forward_only_attention_and_norms_take_steps(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    found = refit_readouts(dense, plan_of(dense, "qkv"), calibration(windows=24), ffn=False, refine=STEPS)
    assert found.steps[-1].tensor == "model"
    assert all(".self_attn." in name or "norm" in name for name in found.tensors)


def test_a_model_that_predicts_no_next_token_takes_none(tmp_path: Path) -> None:
    dense = dense_of("bert", tmp_path)
    found = refit_readouts(dense, plan_of(dense, "qkv"), calibration(windows=24), refine=STEPS)
    assert all(step.tensor != "model" for step in found.steps)
    check_room(dense, STEPS, "cpu")


def test_a_plan_that_changes_nothing_takes_none(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    nothing = SharePlan(model_type="llama")
    assert refit_readouts(dense, nothing, calibration(), refine=STEPS).steps == []


def test_a_model_that_does_not_fit_is_refused_with_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    check_room(dense, STEPS, "cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100_000})())
    check_room(dense, REFINEMENTS["fast"], "cpu")
    check_room(dense, None, "cpu")
    with pytest.raises(CalibrationError, match=r"take about .* GiB of memory, and 0\.0 GiB are free on cpu\. Use"):
        check_room(dense, STEPS, "cpu")


def test_a_record_says_how_many_steps_the_whole_model_took() -> None:
    tokens = Calibration(torch.zeros(2, 8, dtype=torch.long), False, "a text", 0)
    both = record_of(tokens, {"a.weight"}, refinement=Refinement(60, 2048, whole=64))
    assert both.in_words().endswith(
        "of a text, 60 gradient steps a layer and 64 gradient steps on the whole model of 2,048 tokens"
    )
    assert record_of(tokens, {"a.weight"}, both, refinement=None).whole == 64
    assert "whole" not in record_of(tokens, {"a.weight"}).model_dump()
