"""Gradient steps after a refit bring a layer nearer to the dense one, and touch nothing that is shared."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headshare as hs
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.refit.normal_equations import token_weights
from headshare.calibration.refit.refinement import REFINEMENTS, Refinement
from headshare.calibration.refit.refitter import Refitter
from headshare.calibration.refit.result import Refit, RefitStep
from headshare.calibration.refit.run import record_of, refit_readouts
from headshare.calibration.refit.steps import block_steps, block_weights, descent
from headshare.calibration.refit.steps.block_steps import BlockTarget, refine_block
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import OptionError
from headshare.integrations.transformers.loading import load_model
from headshare.plan.narrow_values import NarrowValues
from headshare.plan.plan import SharePlan
from headshare.plan.units import Part
from headshare.precision import full_float32, short_products
from support import tiny
from support.refits import WINDOW, calibration, dense_of, last_states, missed, plan_of, same, stock
from support.walks import ALL

CASES = [
    ("llama-gqa", "scaled qkvo"),
    ("llama-biased", "qkv"),
    ("gpt2", "qkvo"),
    ("gpt2", "removed neurons"),
    ("phi3", "ffn"),
    ("gpt_neox", "qkv"),
    ("bert", "qkv"),
    ("gemma2", "removed attention"),
]
SMALL = 5e-4  # a rate for models so small
STEPS = Refinement(40, 2048, SMALL)


@pytest.fixture(autouse=True)
def _more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "FAMILIES", ALL)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_steps_bring_the_last_hidden_states_nearer_and_leave_alone_what_is_shared(
    name: str, kind: str, tmp_path: Path
) -> None:
    dense, tokens = dense_of(name, tmp_path), calibration(windows=256)
    plan = plan_of(dense, kind)
    wanted = last_states(stock(dense), tokens.tokens)
    before, found = refit_readouts(dense, plan, tokens), refit_readouts(dense, plan, tokens, refine=STEPS)
    missed_before = missed(last_states(stock(dense, plan, before), tokens.tokens), wanted)
    missed_after = missed(last_states(stock(dense, plan, found), tokens.tokens), wanted)
    assert missed_after < missed_before
    taken = [step for step in found.steps if "gradient steps, best" in step.note]
    assert [step.error_after < step.error_before for step in taken] == [True] * len(taken) != []
    check_untouched(dense, plan, before, found)


def test_of_a_mixture_of_experts_attention_and_norms_take_steps_and_experts_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So small a model only over-fits (routers choose other experts, which no gradient sees): so every look is taken
    to be better than the last."""
    errors = itertools.count(1)
    monkeypatch.setattr(block_steps, "_held_out", lambda *_: 1 / next(errors))
    dense, tokens = dense_of("mixtral", tmp_path), calibration(windows=64)
    plan = plan_of(dense, "qkv")
    found = refit_readouts(dense, plan, tokens, refine=STEPS)
    assert all(".self_attn." in name or "layernorm" in name for name in found.tensors)
    assert any("layernorm" in name for name in found.tensors)
    check_untouched(dense, plan, refit_readouts(dense, plan, tokens), found)


def check_untouched(dense: hs.Checkpoint, plan: SharePlan, before: Refit, found: Refit) -> None:
    """What others borrow is as the dense model has it, or as its readout was refitted."""
    changed = set(found.tensors) - set(before.tensors)
    assert any(".k" in name or "qkv" in name or "c_attn" in name or "query" in name for name in changed)
    tensors = plan.tensors
    for tensor in tensors.values():
        for gap in tensor.gaps:
            if gap.donor in changed:
                size = gap.stop - gap.start
                own = found.tensors[gap.donor].narrow(tensors[gap.donor].axis, gap.donor_start, size)
                was = dense.read(gap.donor).narrow(tensors[gap.donor].axis, gap.donor_start, size)
                assert torch.equal(own, was)


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [("llama-gqa", "scaled qkvo", "bfloat16"), ("gpt2", "qkv", "bfloat16"), ("gemma2", "ffn", "float32")],
)
def test_the_saved_model_is_the_one_that_was_walked(name: str, kind: str, dtype: str, tmp_path: Path) -> None:
    """The shared stream that leaves the last layer is what the loaded model computes."""
    tiny.make(name, tmp_path / "first")
    plain = load_model(hs.open_checkpoint(tmp_path / "first"), dtype=getattr(torch, dtype))
    plain.save_pretrained(tmp_path / "dense")
    dense, tokens = hs.open_checkpoint(tmp_path / "dense"), calibration(windows=256)
    plan = plan_of(dense, kind)
    refitter = Refitter(dense, plan, tokens, refinement=STEPS)
    assert list(refitter.advance()) == [0, 1, 2, 3]
    tensors = refitter.result.tensors
    fitted = tuple(sorted(key for key in tensors if key.endswith((".weight", ".bias"))))
    record = RefitRecord(tensors=fitted, text="drawn", text_digest="0" * 64, tokens=5120, window=WINDOW, seed=0)
    folder = hs.share(dense, plan).with_refit(record, tensors).save(tmp_path / "shared")
    model = load_model(hs.open_checkpoint(folder), storage="owner", dtype=torch.float32)
    loaded = last_states(model, refitter.tokens)
    torch.testing.assert_close(refitter.state()["shared"], loaded, rtol=1e-3, atol=1e-4)


def test_one_step_is_adams_on_the_relative_error_of_what_leaves_the_layer(tmp_path: Path) -> None:
    """Against a stock layer in float64, differentiated by numbers."""
    dense = dense_of("llama-gqa", tmp_path)
    layers, generator = Layers(dense), torch.Generator().manual_seed(1)
    entering, leaving = (torch.randn(3, WINDOW, layers.start(torch.zeros(1, 2).long()).shape[-1], generator=generator)
                         for _ in range(2))  # fmt: skip
    module, name = layers.build(1), layers.tensor(Part.Q, 1)
    weight = module.get_submodule(layers.path(Part.Q)).weight
    assert isinstance(weight, nn.Parameter)
    first, free = weight.detach().clone(), torch.arange(weight.numel()).view_as(weight) % 3 > 0
    wanted = BlockTarget(entering, leaving, 1)
    one = Refinement(1, WINDOW, SMALL)
    found = refine_block(layers, 1, module, wanted, {name: weight}, {name: free}, one, seed=0)
    assert torch.equal(weight, first)  # the module is as it was

    def error(changed: Tensor, at: slice) -> float:
        with torch.no_grad():
            weight.copy_(changed)
        out = layers.run(module, 1, entering[at])[0].double()
        return float(((out - leaving[at].double()).square().sum(-1) / leaving[at].double().square().sum(-1)).mean())

    moved = found.weights[name] - first
    assert found.error_before == pytest.approx(error(first, slice(1, 3)), rel=1e-5)
    assert found.error_after == pytest.approx(error(found.weights[name], slice(1, 3)), rel=1e-5)
    fitted = slice(0, 1)
    assert found.step
    assert not moved[~free].any()
    assert torch.allclose(moved[free].abs(), torch.full_like(moved[free], SMALL), rtol=0.02)
    compared = 0
    for at in torch.randperm(first.numel(), generator=generator)[:20].tolist():
        if not free.flatten()[at]:
            continue
        nudge = torch.zeros(first.numel())
        nudge[at] = 1e-2
        slope = error(first + nudge.view_as(first), fitted) - error(first - nudge.view_as(first), fitted)
        if abs(slope) > 1e-5:
            compared += 1
            assert moved.flatten()[at] * slope < 0
    assert compared > 5


def test_without_the_feed_forward_only_attention_takes_steps(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    found = refit_readouts(dense, plan_of(dense, "qkv"), calibration(windows=256), ffn=False, refine=STEPS)
    assert any("gradient steps, best" in step.note for step in found.steps)
    assert all(".self_attn." in name or "norm" in name for name in found.tensors)


def test_what_layers_are_called_with_is_exact_whatever_products_are_allowed(tmp_path: Path) -> None:
    """Positions are made once, in whichever context a shape is first met in, and serve all later runs."""
    dense = dense_of("llama-gqa", tmp_path)
    layers, seen = Layers(dense), list[str]()
    layers.shell.model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.mkldnn.matmul.fp32_precision))
    with short_products():
        layers.start(calibration().tokens)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert seen
    assert set(seen) == {"ieee"}


@pytest.mark.parametrize(("name", "kind"), [("llama-biased", "scaled qkvo"), ("gpt2", "removed neurons")])
def test_steps_that_were_stopped_go_on_bit_for_bit(name: str, kind: str, tmp_path: Path) -> None:
    dense, tokens = dense_of(name, tmp_path), calibration(windows=256)
    plan = plan_of(dense, kind)
    whole = Refitter(dense, plan, tokens, refinement=STEPS)
    for layer in whole.advance():
        save_file(whole.state(), tmp_path / f"{layer}.streams")
        save_file(dict(whole.result.tensors), tmp_path / f"{layer}.tensors")
        (tmp_path / f"{layer}.json").write_text(json.dumps(whole.result.to_dict()))
    again = Refitter(dense, plan, tokens, refinement=STEPS)
    steps = [RefitStep(**step) for step in json.loads((tmp_path / "1.json").read_text())["steps"]]
    again.resume(2, load_file(tmp_path / "1.streams"), load_file(tmp_path / "1.tensors"), steps)
    assert list(again.advance()) == [2, 3]
    assert same(whole.result, again.result)


def test_the_best_step_is_kept_and_none_where_none_is_better(tmp_path: Path) -> None:
    dense, tokens = dense_of("llama-gqa", tmp_path), calibration(windows=256)
    plan = plan_of(dense, "qkv")
    found = refit_readouts(dense, plan, tokens, refine=Refinement(4, 2048, 100.0))
    assert found.tensors.keys() == refit_readouts(dense, plan, tokens).tensors.keys()  # readouts, and no more
    notes = [step.note for step in found.steps if "gradient" in step.note]
    assert notes == ["4 gradient steps, none was better"] * len(notes) != []


def test_tokens_that_are_not_finite_count_for_nothing(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    layers = Layers(dense)
    generator = torch.Generator().manual_seed(1)
    entering = torch.randn(4, WINDOW, layers.start(torch.zeros(1, 2).long()).shape[-1], generator=generator)
    module, name = layers.build(1), layers.tensor(Part.V, 1)
    weight = module.get_submodule(layers.path(Part.V)).weight
    assert isinstance(weight, nn.Parameter)
    leaving = layers.run(module, 1, entering)[0] + 0.1
    leaving[:, -1] = torch.inf

    own = {name: torch.ones_like(weight, dtype=torch.bool)}
    target = BlockTarget(entering, leaving, 3)
    found = refine_block(layers, 1, module, target, {name: weight}, own, Refinement(8, 2048, SMALL), seed=2**64 - 1)
    assert found.step
    assert found.error_after < found.error_before < 1
    assert torch.isfinite(found.weights[name]).all()
    assert not token_weights(torch.zeros(1, 1, 4)).any()


def test_a_refinement_is_a_name_or_a_number_of_steps() -> None:
    assert [Refinement.of(word) for word in ("none", "0", 0, None)] == [None] * 4
    assert Refinement.of("fast") == REFINEMENTS["fast"] is not None
    assert Refinement.of(7) == Refinement.of("7") == Refinement(7)
    for wrong in ("-1", "slow", "", "1e3", "9" * 99, "\u0664", -1):
        with pytest.raises(OptionError, match=r"is no refinement\. Give none, text, fast, best, or a number of steps"):
            Refinement.of(wrong)


def test_no_window_is_drawn_twice_before_all_were() -> None:
    target = BlockTarget(torch.zeros(12, WINDOW, 1), torch.zeros(12, WINDOW, 1), 10)
    drawn = [at for at, _ in target.drawn(Refinement(7, 3 * WINDOW), torch.Generator().manual_seed(0))]
    assert [len(at) for at in drawn] == [3] * 7
    order = torch.cat(drawn).tolist()
    assert [sorted(order[:10]), sorted(order[10:20])] == [list(range(10))] * 2


def test_the_rate_rises_and_then_falls_towards_nothing() -> None:
    shares = [descent.share_of_rate(step, 40) for step in range(40)]
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, shares[3]])
    assert shares[3:] == sorted(shares[3:], reverse=True)
    assert 0 < shares[-1] < 0.01


def test_norms_and_biases_take_steps_too(tmp_path: Path) -> None:
    dense = dense_of("llama-biased", tmp_path)
    found = refit_readouts(dense, plan_of(dense, "qkv"), calibration(windows=256), refine=STEPS)
    for leaf in ("input_layernorm.weight", "post_attention_layernorm.weight", "q_proj.bias", "up_proj.bias"):
        changed = [name for name in found.tensors if name.endswith(leaf)]
        assert changed, leaf
        assert all(not torch.equal(found.tensors[name], dense.read(name)) for name in changed)


def test_removed_neurons_are_not_there_in_steps_and_that_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, tokens = dense_of("llama-biased", tmp_path), calibration(windows=64)
    plan = plan_of(dense, "removed neurons")
    few = Refinement(4, 2048, SMALL)
    widths, steps = set[int](), block_steps._descend

    def seen(layers: Layers, layer: int, module: nn.Module, *rest: Any) -> None:
        widths.add(module.get_submodule(layers.path(Part.UP)).weight.shape[0])
        steps(layers, layer, module, *rest)

    errors = itertools.count(1)  # the last look is the best, whatever rounding makes of so few steps
    monkeypatch.setattr(block_steps, "_held_out", lambda *_: 1 / next(errors))
    monkeypatch.setattr(block_steps, "_descend", seen)
    monkeypatch.setattr(block_steps, "short_layers", lambda _: full_float32())
    found = refit_readouts(dense, plan, tokens, refine=few)
    assert dense.layouts.ffn is not None
    whole = dense.layouts.ffn.parts[Part.UP].shape[0]
    assert widths == {whole - len(plan.removals[0].indices(1)), whole}
    monkeypatch.setattr(block_weights, "_narrow", lambda *_: frozenset())
    with_zeros = refit_readouts(dense, plan, tokens, refine=few)
    assert found.tensors.keys() == with_zeros.tensors.keys()
    kept = torch.tensor([neuron for neuron in range(whole) if neuron not in plan.removals[0].indices(1)])
    names = [name for name in found.tensors if "layers.1.mlp." in name]
    assert len(names) == 6  # gate, up and down, with their biases
    for name in names:  # of the first layer that is refined: those after it start from what rounding made of it
        first, second = (each.tensors[name] for each in (found, with_zeros))
        if whole in first.shape:
            first, second = (each.index_select(first.shape.index(whole), kept) for each in (first, second))
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_a_refined_model_is_the_same_in_every_storage(tmp_path: Path) -> None:
    dense, tokens = dense_of("llama-gqa", tmp_path), calibration(windows=64)
    plan = plan_of(dense, "scaled qkvo")
    shared = hs.refit(hs.share(dense, plan), tokens, refine=STEPS)
    assert shared.refit is not None
    assert (shared.refit.steps, shared.refit.step_tokens) == (STEPS.steps, STEPS.tokens)
    folder = shared.save(tmp_path / "shared")
    assert hs.verify(hs.open_checkpoint(folder), dense).ok
    expected = last_states(
        load_model(hs.open_checkpoint(hs.expand(hs.open_checkpoint(folder), tmp_path / "stock"))), tokens.tokens
    )
    for storage in ("alias", "owner", "indirect"):
        found = last_states(hs.load(folder, storage=storage), tokens.tokens)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_refit_for_a_price_takes_no_steps(tmp_path: Path) -> None:
    dense, tokens = dense_of("llama-gqa", tmp_path), calibration(windows=256)
    plan = plan_of(dense, "qkv")
    with_steps, without = Refitter(dense, plan, tokens, refinement=STEPS), Refitter(dense, plan, tokens)
    layer = without.first  # a layer that ties nothing would be the dense one in any case
    entering = without.layers.start(without.tokens)
    plain = without.refitted(layer, entering).state_dict()
    refitted = with_steps.refitted(layer, entering).state_dict()
    original = without.layers.build(layer).state_dict()
    fitted = {name for name in plain if name.endswith(("o_proj.weight", "down_proj.weight"))}
    assert all(not torch.equal(refitted[name], original[name]) for name in fitted)
    # steps would change the other matrices that the layer does not share, such as gate and up
    for name in plain.keys() - fitted:
        assert torch.equal(refitted[name], plain[name]), name


def test_values_that_were_narrowed_stay_as_narrow(tmp_path: Path) -> None:
    dense, tokens = dense_of("llama-biased", tmp_path), calibration(windows=64)
    values = NarrowValues(layout=dense.layouts.attention.only((Part.V, Part.O)), widths={1: 5, 2: 3})
    plan = SharePlan.of_sections([values], str(dense.config["model_type"]))
    refitter = Refitter(dense, plan, tokens, refinement=STEPS)
    assert list(refitter.advance()) == [0, 1, 2, 3]
    found = refitter.result
    assert "model.layers.1.self_attn.v_proj.weight" in found.tensors
    folder = hs.share(dense, plan).with_refit(record_of(tokens, found.tensors, refinement=STEPS), found.tensors)
    loaded = load_model(hs.open_checkpoint(folder.save(tmp_path / "shared")), dtype=torch.float32)
    torch.testing.assert_close(refitter.state()["shared"], last_states(loaded, refitter.tokens), rtol=1e-3, atol=1e-4)
