"""Other ways to make attention smaller, beside loops that do the same by their definitions."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch_pruning.pruner import function
from torch_pruning.pruner.importance import GroupTaylorImportance

import headshare as hs
from headshare.calibration.allocate import plan_for_bytes
from headshare.errors import CheckpointError, PlanError
from headshare.experiments.baselines import (
    magnitudes,
    overwrite_with_mean,
    removal_prices,
    round_to_integers,
    taylor,
    zero_smallest,
)
from headshare.experiments.controls import weight_of
from headshare.integrations.transformers.loading import load_model
from headshare.plan.units import HeadUnit
from headshare.sharing.size import estimate_plan
from headshare.text.tokens import Calibration
from support import tiny


@pytest.fixture
def dense(tmp_path: Path) -> hs.Checkpoint:
    """4 layers of 2 groups, each of 2 query heads of 8 channels and a key and value head."""
    return hs.open_checkpoint(tiny.make_llama(tmp_path / "llama", initializer_range=0.2))


def parts_of(model: nn.Module, layer: int, group: int) -> list[torch.Tensor]:
    attention = model.model.layers[layer].self_attn
    queries, keys = slice(16 * group, 16 * group + 16), slice(8 * group, 8 * group + 8)
    return [
        attention.q_proj.weight[queries],
        attention.k_proj.weight[keys],
        attention.v_proj.weight[keys],
        attention.o_proj.weight[:, queries],
    ]


def test_the_magnitude_of_a_unit_is_the_norm_of_all_its_weights(dense: hs.Checkpoint) -> None:
    model, found = load_model(dense), magnitudes(dense)
    with torch.no_grad():
        for unit in range(8):
            parts = parts_of(model, unit // 2, unit % 2)
            wanted = torch.cat([part.flatten() for part in parts]).double().norm()
            assert found[unit].item() == pytest.approx(wanted.item(), rel=1e-6)
    assert found.unique().numel() == 8


def test_taylors_importance_is_weight_times_gradient_element_by_element(dense: hs.Checkpoint) -> None:
    tokens = tiny.tokens(16, 5)
    found = taylor(dense, Calibration(tokens, False, "test", 0))
    model = load_model(dense)
    loss = model(input_ids=tokens, labels=tokens).loss  # all windows are as long, so this is the mean of theirs
    loss.backward()
    for unit in range(8):
        attention = model.model.layers[unit // 2].self_attn
        with torch.no_grad():
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                projection.weight.data, kept = projection.weight * projection.weight.grad, projection.weight.data
                projection.kept = kept
            wanted = sum(part.abs().sum().item() for part in parts_of(model, unit // 2, unit % 2))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                projection.weight.data = projection.kept
        assert found[unit].item() == pytest.approx(wanted, rel=1e-4)
    assert found.max() > 1.2 * found.min()


class Item(NamedTuple):
    """What Torch-Pruning's groups are made of, as its importance reads them."""

    dep: Any
    idxs: list[int]
    root_idxs: list[int]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dep, self.idxs))


def test_taylors_importance_is_torch_prunings_of_the_same_group(dense: hs.Checkpoint) -> None:
    """Its scorer of one group of coupled channels, which LLM-Pruner builds on: q, k and v by outputs, o by inputs."""
    tokens = tiny.tokens(16, 5)
    found, model = taylor(dense, Calibration(tokens, False, "test", 0)), load_model(dense)
    model(input_ids=tokens, labels=tokens).loss.backward()
    scorer = GroupTaylorImportance(group_reduction="sum", normalizer=None)
    for unit in range(8):
        attention, group = model.model.layers[unit // 2].self_attn, unit % 2
        queries, keys = list(range(16 * group, 16 * group + 16)), list(range(8 * group, 8 * group + 8))
        coupled = [
            (attention.q_proj, function.prune_linear_out_channels, queries),
            (attention.k_proj, function.prune_linear_out_channels, keys),
            (attention.v_proj, function.prune_linear_out_channels, keys),
            (attention.o_proj, function.prune_linear_in_channels, queries),
        ]
        items = [
            Item(SimpleNamespace(target=SimpleNamespace(module=module), handler=handler), idxs, list(range(len(idxs))))
            for module, handler, idxs in coupled
        ]
        assert found[unit].item() == pytest.approx(scorer(items).sum().item(), rel=1e-4)


def test_the_least_important_go_first_and_every_layer_keeps_one(dense: hs.Checkpoint) -> None:
    importance = torch.tensor([5.0, 6.0, 1.0, 2.0, 8.0, 3.0, 7.0, 4.0], dtype=torch.float64)
    prices = removal_prices(dense, importance)
    one = prices.curves[0].steps[0].saved_bytes
    for count, wanted in ((1, {(1, 0)}), (2, {(1, 0), (2, 1)}), (4, {(0, 0), (1, 0), (2, 1), (3, 1)})):
        plan = plan_for_bytes(prices, count * one).plan
        (removal,) = plan.removals
        found = {(layer, group) for layer in removal.removed for group in removal.indices(layer)}
        assert found == wanted
        assert estimate_plan(dense, plan).saved_bytes == count * one
    with pytest.raises(PlanError):
        plan_for_bytes(prices, 5 * one)


@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "gpt2", "gpt_neox"])
def test_the_smallest_numbers_of_attention_become_zero_and_no_others(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / name))
    model, before, layout = load_model(dense), load_model(dense).state_dict(), dense.layouts.attention
    zero_smallest(model, layout, 777)
    names = {place.name(layer) for place in layout.parts.values() for layer in range(layout.layers)}
    after = model.state_dict()
    gone, left = [], []
    for key, tensor in before.items():
        if not any(key.endswith(name.partition(".")[2]) for name in names):
            assert torch.equal(after[key], tensor)
            continue
        changed = after[key] != tensor
        assert bool((after[key][changed] == 0).all())
        gone.append(tensor[changed].abs())
        left.append(tensor[~changed].abs())
    assert torch.cat(gone).numel() == 777
    assert torch.cat(gone).max() <= torch.cat(left).min()


def test_of_numbers_alike_the_first_become_zero(dense: hs.Checkpoint) -> None:
    model, layout = load_model(dense), dense.layouts.attention
    weights = [weight_of(model, place.name(layer)) for layer in range(4) for place in layout.parts.values()]
    with torch.no_grad():
        for weight in weights:
            weight.fill_(-0.5)
        weights[1][0, 0] = 0.25
    zero_smallest(model, layout, weights[0].numel() + 3)
    assert [int((weight == 0).sum()) for weight in weights[:3]] == [weights[0].numel(), 3, 0]
    assert bool((weights[1].flatten()[:3] == 0).all())
    zero_smallest(model, layout, 0)
    assert int((weights[1] == 0).sum()) == 3


def test_recipients_get_the_mean_of_the_units_that_stay(dense: hs.Checkpoint) -> None:
    plan = hs.make_plan(hs.score_units(dense), 0.5)
    recipients = {tie.recipient for selection in plan.selections for tie in selection.ties}
    model, before = load_model(dense), load_model(dense)
    overwrite_with_mean(model, plan)
    units = [HeadUnit(layer, group) for layer in range(4) for group in range(2)]
    kept = [parts_of(before, *unit) for unit in units if unit not in recipients]
    with torch.no_grad():
        for unit in units:
            now, then = parts_of(model, *unit), parts_of(before, *unit)
            for part in range(3):
                wanted = sum(one[part] for one in kept) / len(kept) if unit in recipients else then[part]
                assert torch.allclose(now[part], wanted, atol=1e-6)
            assert torch.equal(now[3], then[3])
    assert 0 < len(recipients) < 8


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_rows_have_whole_multiples_of_their_scale(bits: int, dense: hs.Checkpoint) -> None:
    model, before = load_model(dense), load_model(dense)
    saved = round_to_integers(model, bits=bits)
    most, numbers, rows = 2 ** (bits - 1) - 1, 0, 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        dense_weight = before.get_submodule(name).weight
        if name == "lm_head":
            assert torch.equal(module.weight, dense_weight)
            continue
        scale = dense_weight.abs().amax(dim=1, keepdim=True) / most
        steps = module.weight / scale
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert steps.abs().max() <= most + 1e-3
        assert ((module.weight - dense_weight).abs() <= scale / 2 * 1.001).all()
        numbers, rows = numbers + dense_weight.numel(), rows + len(dense_weight)
    assert saved == numbers * 4 - numbers * bits // 8 - rows * 4
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_are_not_left_as_they_are_unsaid(family: str, tmp_path: Path) -> None:
    model = load_model(hs.open_checkpoint(tiny.make(family, tmp_path / "experts")))
    with pytest.raises(CheckpointError, match=r"experts\..* holds the matrices of several experts"):
        round_to_integers(model)


def test_matrices_that_stand_the_other_way_round_have_a_scale_an_output_too(tmp_path: Path) -> None:
    folder = tiny.make("gpt2", tmp_path / "gpt2")
    model, before = (load_model(hs.open_checkpoint(folder)) for _ in range(2))
    saved = round_to_integers(model)
    weight, then = (one.transformer.h[1].mlp.c_fc.weight for one in (model, before))
    steps = weight / (then.abs().amax(dim=0, keepdim=True) / 127)
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert saved > 0
