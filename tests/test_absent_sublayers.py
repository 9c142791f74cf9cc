"""A layer that loses all its attention or all its neurons does nothing there, as a stock model of zeros does."""

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import headshare as hs
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.refit.run import record_of, refit_readouts
from headshare.errors import PlanError
from headshare.evaluation.verify import verify
from headshare.integrations.transformers.absent import AbsentAttention
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.plan.describe import describe, picture
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Tie
from headshare.training.adapters import plain_projections
from headshare.training.run import train
from support import tiny
from support.refits import calibration, last_states, missed
from support.texts import a_text, add_tokenizer
from support.trainings import settings

MODEL = "model.safetensors"
SLIDING = {**tiny.WIDE_HEADS, "num_hidden_layers": 6, "sliding_window": 4}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"] * 2

# Families whose attention is counted, masked or normed in other ways than those of tests/support/tiny.py.
MORE: dict[str, tuple[type, Any, str | None]] = {
    "olmo2": (tf.Olmo2ForCausalLM, tf.Olmo2Config(**tiny.GROUPED), "ffn"),
    "gemma3-mixed": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**SLIDING, layer_types=TYPES), "ffn"),
    "mistral-sliding": (tf.MistralForCausalLM, tf.MistralConfig(**{**SLIDING, "num_hidden_layers": 4}), "ffn"),
    "smollm3": (tf.SmolLM3ForCausalLM, tf.SmolLM3Config(**tiny.GROUPED, no_rope_layer_interval=2), "ffn"),
    "gpt2-scaled": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(**tiny.GPT2, n_inner=48, scale_attn_by_inverse_layer_idx=True),
        "ffn",
    ),
    "falcon-parallel": (
        tf.FalconForCausalLM,
        tf.FalconConfig(**tiny.FALCON, multi_query=True, parallel_attn=False, bias=True),
        "ffn",
    ),
}
ALL = {**tiny.FAMILIES, **MORE}
# What stock models themselves cannot do.
NO_STATIC_CACHE = ("falcon-mha",)


@pytest.fixture(autouse=True)
def _more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "FAMILIES", ALL)


def without(dense: hs.Checkpoint, attention: Sequence[int] = (0, 3), ffn: Sequence[int] = (2, 3)) -> SharePlan:
    """A plan that takes whole sublayers out of these layers."""
    layouts = [(dense.layouts.attention, attention), (dense.layouts.neurons, ffn)]
    removals = tuple(
        Removal(layout=layout, removed={layer: range(layout.groups) for layer in layers})
        for layout, layers in layouts
        if layout is not None and layers
    )
    return SharePlan(model_type=str(dense.config["model_type"]), removals=removals)


def shared_and_stock(dense: hs.Checkpoint, plan: SharePlan, folder: Path, **options: Any) -> tuple[Any, Any]:
    """The loaded model, and the stock model of zeros that the checkpoint expands to."""
    out = hs.share(dense, plan).save(folder / "shared")
    expanded = hs.expand(hs.open_checkpoint(out), folder / "expanded")
    return load_model(hs.open_checkpoint(out), **options), load_model(hs.open_checkpoint(expanded), **options)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=tiny.tokens())[0]
    return found


# One of each way to count, mask, norm or multiply; all others are slow.
SOME = ("llama-biased", "gemma3-mixed", "gpt2-scaled", "phi3", "falcon-mha", "opt", "bert", "mixtral")
CASES = [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
GENERATING = {name for name, (kind, _, _) in ALL.items() if "CausalLM" in kind.__name__ or "LMHead" in kind.__name__}


@pytest.mark.parametrize("name", CASES)
def test_a_model_without_sublayers_equals_the_stock_model_of_zeros(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    # a layer that loses both, a first layer without attention, and one of each kind of attention that stays
    plan = without(dense, (0, 1, 3) if name == "gemma3-mixed" else (0, 3))
    options = {"attn_implementation": "eager"} if name.startswith("gemma") else {}
    model, stock = shared_and_stock(dense, plan, tmp_path, **options)
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(stock), logits(load_model(dense)), atol=1e-3)
    check_stored(dense, plan, tmp_path, model)
    if name in GENERATING:
        check_generated(model, stock, {})
        if name not in NO_STATIC_CACHE:
            check_generated(model, stock, {"cache_implementation": "static", "disable_compile": True})
        if name == "gemma3-mixed":
            check_generated(model, stock, {"num_beams": 3})
    # and the model can be made whole again
    torch.testing.assert_close(logits(model.dequantize()), logits(stock), rtol=0, atol=0)
    if name in GENERATING:
        check_generated(model, stock, {})


def check_stored(dense: hs.Checkpoint, plan: SharePlan, folder: Path, model: Any) -> None:
    """Nothing but biases of output projections, and norms, is left of those sublayers, to the byte."""
    stored = load_file(folder / "shared" / MODEL)
    expanded = load_file(folder / "expanded" / MODEL)
    for name in {**plan.tensors, **plan.biases}.keys() & stored.keys():
        assert stored[name].numel() == 0
        assert not expanded.pop(name).any()
    assert all(torch.equal(tensor, dense.read(name)) for name, tensor in expanded.items())
    estimate = hs.estimate(dense, plan)
    assert estimate.shared_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert unique_parameter_bytes(model) == estimate.shared_bytes


def check_generated(model: Any, stock: Any, options: dict[str, Any]) -> None:
    """The same tokens by the same logits, from two texts of other lengths, and a cache only where attention is left."""
    mask = torch.ones(2, 10).long()
    mask[0, :3] = 0
    asked = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": mask,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
        **options,
    }
    found, wanted = (one.generate(tiny.tokens(), **asked) for one in (model, stock))
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-5, atol=1e-5)
    kept, all_layers = (
        [layer.is_initialized for layer in one["past_key_values" if "past_key_values" in one else "cache"].layers]
        for one in (found, wanted)
    )
    absent = sum(isinstance(module, AbsentAttention) for module in model.modules())
    assert kept.count(True) == len(all_layers) - absent


def test_a_model_cannot_lose_all_attention_of_a_kind(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "llama"))
    with pytest.raises(PlanError, match=r"all attention of the model, which counts tokens by it\. Keep a unit"):
        hs.share(dense, without(dense, range(4)))
    hs.share(dense, without(dense, range(3), range(4))).save(tmp_path / "shared")
    assert logits(hs.load(tmp_path / "shared")).isfinite().all()
    mixed = hs.open_checkpoint(tiny.make("gemma3-mixed", tmp_path / "gemma"))
    with pytest.raises(PlanError, match="all full attention"):
        hs.share(mixed, without(mixed, (1, 4)))


def test_families_that_need_all_heads_lose_some_layers_attention_or_none(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("mpnet", tmp_path / "dense"))
    hs.share(dense, without(dense))
    (whole, ffn) = without(dense).removals
    partly = whole.model_copy(
        update={"removed": {**whole.removed, **Removal(layout=whole.layout, removed={1: [0]}).removed}}
    )
    with pytest.raises(PlanError, match="'mpnet' models"):
        hs.share(dense, SharePlan(removals=(Removal.model_validate(partly.model_dump()), ffn)))


def beside_ties(dense: hs.Checkpoint) -> SharePlan:
    """Whole sublayers, single units and neurons, and ties of other units, in one plan."""
    units, neurons = dense.layouts.attention, dense.layouts.neurons
    assert neurons is not None
    tie = Tie(HeadUnit(2, 0), HeadUnit(1, 1))
    every = range(units.groups)
    return SharePlan(
        model_type=str(dense.config["model_type"]),
        selections=(Selection(layout=units.only((Part.Q, Part.K, Part.V, Part.O)), ties=(tie,), scale=True),),
        removals=(
            Removal(layout=units, removed={0: every, 2: [1]}),
            Removal(layout=neurons, removed={1: range(neurons.groups), 2: [3, 4]}),
        ),
    )


@pytest.mark.parametrize("storage", ["owner", "alias", "indirect"])
@pytest.mark.parametrize("name", ["gpt2", pytest.param("phi3", marks=pytest.mark.slow)])
def test_every_storage_holds_a_model_without_sublayers(name: str, storage: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = beside_ties(dense)
    out = hs.share(dense, plan).save(tmp_path / "shared")
    model = load_model(hs.open_checkpoint(out), storage=storage)
    stock = load_model(hs.open_checkpoint(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")))
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=1e-5)
    found = verify(hs.open_checkpoint(out), dense)
    assert found.ok, found.problems
    if storage != "indirect":
        model.save_pretrained(tmp_path / "again")
        again, before = load_file(tmp_path / "again" / MODEL), load_file(out / MODEL)
        assert again.keys() == before.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())
        assert hs.open_checkpoint(tmp_path / "again").plan == plan


@pytest.mark.parametrize("name", ["llama-gqa", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_copies_of_a_model_without_sublayers_compute_the_same(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    model, stock = shared_and_stock(dense, without(dense), tmp_path)
    expected = logits(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert torch.equal(logits(other), expected)
        absent = [module for module in other.modules() if isinstance(module, AbsentAttention)]
        assert len(absent) == 2 and all(module._modules is module.stock._modules for module in absent)
    assert torch.equal(logits(copies[0].dequantize()), logits(stock))
    assert torch.equal(logits(model), expected)


def test_a_model_without_sublayers_has_the_stock_models_gradients(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-biased", tmp_path / "dense"))
    model, stock = shared_and_stock(dense, without(dense), tmp_path)
    for one in (model, stock):
        one(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    wanted = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel():
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)
    # queries of a layer without attention are read by nobody; the bias of its output projection is
    attention = model.model.layers[0].self_attn
    assert not attention.q_proj.weight.requires_grad
    assert attention.o_proj.bias.grad.abs().sum() > 0
    assert not any(".0.self_attn" in path or ".3.mlp" in path for path in plain_projections(model))


def test_what_is_left_of_sublayers_is_trained(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(add_tokenizer(tiny.make("llama-biased", tmp_path / "dense")))
    text = a_text(tmp_path / "text.txt", words=600)
    out = hs.share(dense, without(dense)).save(tmp_path / "shared")
    train(out, tmp_path / "trained", settings(text, "recover"))
    before, after = hs.open_checkpoint(out), hs.open_checkpoint(tmp_path / "trained")
    assert before.shapes == after.shapes and before.plan == after.plan
    bias = "model.layers.0.self_attn.o_proj.bias"
    assert not torch.equal(before.read(bias), after.read(bias))


# ---- the refit


@pytest.mark.parametrize(("name", "steps"), [("llama-gqa", 8), ("llama-biased", 0), ("bert", 0)])
def test_a_refit_walks_layers_without_sublayers(name: str, steps: int, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    tokens = calibration()
    plan = without(dense, (1,), (1, 2))
    found = refit_readouts(dense, plan, tokens, refine=steps)
    before = load_model(hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "shared")))
    refitted = hs.share(dense, plan).with_refit(record_of(tokens, found.tensors), found.tensors)
    after = load_model(hs.open_checkpoint(refitted.save(tmp_path / "refitted")))
    wanted = last_states(load_model(dense), tokens.tokens)
    assert missed(last_states(after, tokens.tokens), wanted) < missed(last_states(before, tokens.tokens), wanted)
    # a readout without inputs is fitted where it has a bias, which takes the mean
    fitted = {step.tensor for step in found.steps if step.ridge is not None or step.note}
    layout = dense.layouts.attention.parts[Part.O]
    assert (layout.name(1) in fitted) == (layout.name(1).removesuffix("weight") + "bias" in dense.tensors)
    for key in found.tensors.keys() & plan.tensors.keys():
        for start, stop in plan.tensors[key].removed:
            assert not found.tensors[key].narrow(plan.tensors[key].axis, start, stop - start).any()


def test_the_bias_of_an_absent_attention_takes_the_mean_of_what_is_missing(tmp_path: Path) -> None:
    """Compared with the stock model's own outputs: without other inputs, the best constant is their weighted mean."""
    dense = hs.open_checkpoint(tiny.make("llama-biased", tmp_path / "dense"))
    tokens = calibration()
    found = refit_readouts(dense, without(dense, (0,), ()), tokens, ffn=False)
    layers = Layers(dense)
    stream = layers.start(tokens.tokens)
    left, seen = layers.run(layers.build(0), 0, stream, (layers.path(Part.O), layers.path(Part.DOWN)))
    wanted = seen.outputs[layers.path(Part.O)].flatten(0, 1).double()
    carried = (stream + seen.outputs[layers.path(Part.O)]).flatten(0, 1).double()
    weights = 1 / carried.square().sum(dim=1, keepdim=True)
    mean = (weights * wanted).sum(dim=0) / weights.sum()
    bias = found.tensors["model.layers.0.self_attn.o_proj.bias"].double()
    assert (bias - mean).norm() < 0.02 * mean.norm()
    assert left.shape == stream.shape


# ---- what people see


def test_inspect_says_which_layers_go_without(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    lines = picture(without(dense)).splitlines()
    assert "  layer 0  xx  2 of 2  no attention" in lines
    assert f"  layer 3  {'x' * 32}  48 of 48  no feed-forward" in lines
    assert [one["whole_layers"] for one in describe(without(dense))["removals"]] == [[0, 3], [2, 3]]
