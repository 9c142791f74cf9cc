"""The penalty is the paper's equation 4, and its derivative is what autograd finds tie by tie."""

from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import headshare as hs
from headshare.architecture.modules import module_path
from headshare.errors import PlanError
from headshare.experiments.controls import overwrite_recipients
from headshare.integrations.transformers.loading import load_model
from headshare.plan.plan import SharePlan
from headshare.training.choices import Distance
from headshare.training.penalty import TiePenalty
from support import tiny

Case = tuple[Any, SharePlan]


def made(name: str, folder: Folder, parts: str = "qkv", ratio: float = 0.5, **how: Any) -> Case:
    dense = hs.open_checkpoint(tiny.make(name, folder / name))
    plan = hs.make_plan(hs.score_units(dense, parts=parts, **how), ratio, parts=parts)
    return load_model(dense, dtype=torch.float64), plan


def one_by_one(model: Any, plan: SharePlan, distance: Distance) -> Tensor:
    """Equation 4 as it is written."""
    total, ties = torch.zeros((), dtype=torch.float64), set()
    for selection in plan.selections:
        ties |= {(selection.layout.kind, tie) for tie in selection.ties}
        for place in selection.layout.parts.values():
            for tie in selection.ties:
                first, second = (
                    model.get_submodule(module_path(model, place.name(unit.layer)))
                    .weight.narrow(place.axis, place.start + unit.group * place.step, place.rows)
                    .flatten()
                    for unit in tie
                )
                total = total + {
                    Distance.FROBENIUS: lambda a, b: (a - b).norm(),
                    Distance.SQUARED: lambda a, b: (a - b).square().sum(),
                    Distance.COSINE: lambda a, b: 1 - functional.cosine_similarity(a, b, dim=0),
                }[distance](first, second)
    return total / len(ties)


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (0.7 * value).backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("distance", Distance)
@pytest.mark.parametrize(
    ("name", "parts"),
    [("llama-gqa", "qkv"), ("phi3", "qkv"), ("gpt2", "qkvo"), ("gpt_neox", "qk"), ("llama-mha", "qkvo+ffn")],
)
def test_it_and_its_derivative_are_those_of_the_equation_tie_by_tie(
    name: str, parts: str, distance: Distance, tmp_path: Folder
) -> None:
    model, plan = made(name, tmp_path, parts)
    penalty = TiePenalty(model, plan, distance)
    found, wanted = penalty(), one_by_one(model, plan, distance)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    ours, theirs = gradients(model, found), gradients(model, wanted)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-9, atol=1e-12)
        assert gradient.any()


def test_donors_of_several_recipients_get_the_sum(tmp_path: Folder) -> None:
    model, plan = made("llama-gqa", tmp_path, ratio=0.7)
    donors = [tie.donor for selection in plan.selections for tie in selection.ties]
    assert len(set(donors)) < len(donors)
    ours = gradients(model, TiePenalty(model, plan)())
    theirs = gradients(model, one_by_one(model, plan, Distance.FROBENIUS))
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-9, atol=1e-12)


def test_parts_with_pairs_of_their_own_count_by_their_own_ties(tmp_path: Folder) -> None:
    model, plan = made("llama-gqa", tmp_path, match="separate")
    assert len(plan.selections) > 1
    for distance in Distance:
        found = TiePenalty(model, plan, distance)().item()
        assert found == pytest.approx(one_by_one(model, plan, distance).item(), rel=1e-12)


def test_what_each_tie_contributes_has_the_penalty_for_its_mean(tmp_path: Folder) -> None:
    model, plan = made("llama-gqa", tmp_path)
    penalty = TiePenalty(model, plan)
    found = penalty.distances()
    (selection,) = plan.selections
    assert [tie for _, tie in penalty.ties] == sorted(selection.ties)
    assert found.mean().item() == pytest.approx(penalty().item(), rel=1e-12)
    assert not found.requires_grad
    recipient, donor = penalty.ties[0][1]
    for place in selection.layout.parts.values():
        into, taken = (
            model.get_submodule(module_path(model, place.name(unit.layer))).weight for unit in (recipient, donor)
        )
        with torch.no_grad():
            start, stop = place.span(recipient.group)
            first, last = place.span(donor.group)
            into[start:stop] = taken[first:last]
    assert penalty.distances()[0].item() == 0
    assert penalty.distances()[1:].equal(found[1:])


@pytest.mark.parametrize("distance", Distance)
def test_ties_that_are_closed_pull_at_nothing(distance: Distance, tmp_path: Folder) -> None:
    model, plan = made("llama-gqa", tmp_path)
    overwrite_recipients(model, plan)
    found = TiePenalty(model, plan, distance)()
    assert found.item() == pytest.approx(0, abs=1e-12)
    for gradient in gradients(model, found).values():
        assert gradient.abs().max() < 1e-12


def test_low_precision_is_summed_in_float32(tmp_path: Folder) -> None:
    model, plan = made("llama-gqa", tmp_path)
    exact = one_by_one(model, plan, Distance.FROBENIUS).item()
    found = TiePenalty(model.to(torch.bfloat16), plan)()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, rel=0.01)
    found.backward()
    assert {each.grad.dtype for each in model.parameters() if each.grad is not None} == {torch.bfloat16}


def test_a_descent_along_it_closes_the_ties(tmp_path: Folder) -> None:
    model, plan = made("llama-gqa", tmp_path)
    penalty = TiePenalty(model, plan, Distance.SQUARED)
    before = penalty().item()
    step = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(30):
        step.zero_grad()
        penalty().backward()
        step.step()
    assert penalty().item() < 0.01 * before


def test_weights_that_were_put_in_place_later_are_the_ones_that_count(tmp_path: Folder) -> None:
    model, plan = made("llama-gqa", tmp_path)
    penalty = TiePenalty(model, plan)
    before = penalty().item()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(3 * module.weight.detach())
    assert penalty().item() == pytest.approx(3 * before, rel=1e-12)


def test_a_plan_without_ties_and_a_plan_of_another_model_are_refused(tmp_path: Folder) -> None:
    model, plan = made("llama-gqa", tmp_path)
    other, _ = made("gpt2", tmp_path)
    with pytest.raises(PlanError, match="ties nothing"):
        TiePenalty(model, SharePlan())
    with pytest.raises(PlanError, match="does not have"):
        TiePenalty(other, plan)


@pytest.mark.parametrize(("name", "parts"), [("llama-gqa", "qkv"), ("phi3", "qkv"), ("gpt2", "qkvo")])
def test_closed_is_what_sharing_gives_and_then_everything_is_as_it_was(name: str, parts: str, tmp_path: Folder) -> None:
    model, plan = made(name, tmp_path, parts)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shared, _ = made(name, tmp_path / "again", parts)
    overwrite_recipients(shared, plan)
    penalty = TiePenalty(model, plan)
    for failing in (False, True):
        try:
            with penalty.closed():
                assert penalty.distances().max() == 0
                assert all(value.equal(shared.state_dict()[key]) for key, value in model.state_dict().items())
                if failing:
                    raise RuntimeError
        except RuntimeError:
            assert failing
        assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("distance", Distance)
def test_derivatives_are_those_that_autograd_gives(distance: Distance, tmp_path: Folder) -> None:
    model, plan = made("llama-gqa", tmp_path)
    penalty = TiePenalty(model, plan, distance)
    value, found = penalty.derivatives()
    wanted = torch.autograd.grad(penalty(), penalty.parameters())
    assert value.item() == pytest.approx(penalty().item(), rel=1e-12)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
