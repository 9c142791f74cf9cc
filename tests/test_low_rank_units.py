"""Units whose columns of W_o are stored as a product compute what a stock model does with the product written in."""

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.architecture.config import text_config
from headshare.architecture.recognition import attention_layout
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CheckpointError, PlanError
from headshare.evaluation.verify import verify
from headshare.experiments.controls import overwrite_recipients, with_random_donors
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.plan.describe import describe, picture
from headshare.plan.layout import Layout
from headshare.plan.low_rank import LowRankRange, LowRankUnits
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.section import Choice
from headshare.plan.tensors import TensorPlan, tensor_plans
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Tie
from headshare.sharing.expand import write_overwritten
from headshare.sharing.fits import fit_plan, open_shared
from headshare.sharing.rewrite import write_refitted
from headshare.storage.low_rank import LowRankProjection
from support import tiny
from support.folders import unseal

MODEL = "model.safetensors"
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
RANKS = (2, 3)


def layout_of(dense: hs.Checkpoint) -> Layout:
    return attention_layout(text_config(dense.config), dense.shapes)


def some_factored(dense: hs.Checkpoint, units: dict[int, dict[int, int]] | None = None) -> SharePlan:
    """A plan that factors other units of each layer, but none of layer 1; `units` maps layers to groups to ranks."""
    layout = layout_of(dense)
    if units is None:
        count = max(1, layout.groups // 2)
        drawn = {layer: sorted(random.Random(layer).sample(range(layout.groups), count)) for layer in (0, 2, 3)}
        units = {layer: {group: RANKS[(layer + group) % 2] for group in groups} for layer, groups in drawn.items()}
    factored = LowRankUnits(
        layout=layout.only((Part.O,)),
        units={layer: list(ranks) for layer, ranks in units.items()},
        ranks={layer: list(ranks.values()) for layer, ranks in units.items()},
        chosen=Choice(match="drawn", ratio=0.3),
    )
    return SharePlan(model_type=str(dense.config["model_type"]), factored=(factored,))


def mixed(dense: hs.Checkpoint) -> SharePlan:
    """Ties of q, k and v; scaled ties of o in other layers; removed units; and factored ones, tied or not."""
    layout = layout_of(dense)

    def ties(*four: tuple[int, int, int, int]) -> tuple[Tie, ...]:
        return tuple(Tie(HeadUnit(a, b), HeadUnit(c, d)) for a, b, c, d in four)

    removals = {"removals": (Removal(layout=layout, removed={1: [0], 3: [0]}),)} if layout.groups > 1 else {}
    last = layout.groups - 1
    return SharePlan(
        model_type=str(dense.config["model_type"]),
        selections=(
            Selection(layout=layout.only((Part.Q, Part.K, Part.V)), ties=ties((2, 0, 0, last), (3, last, 0, last))),
            Selection(layout=layout.only((Part.O,)), ties=ties((1, last, 0, 0)), scale=True),
        ),
        factored=some_factored(dense, {2: dict.fromkeys(range(layout.groups), 3), 3: {last: 2}}).factored,
        **removals,
    )


def products(
    plan: SharePlan, folder: Path, dtype: torch.dtype | None = None
) -> dict[str, list[tuple[slice, torch.Tensor]]]:
    """The columns that the stored factors make of each readout, by slices of our own making: one rank-one sum each."""
    stored, found = load_file(folder / MODEL), {}
    for one in plan.factored:
        for layer in one.units:
            name = one.place.name(layer)
            factor_in = stored[name.removesuffix("weight") + "factor_in"].double()
            factor_out = stored[name.removesuffix("weight") + "factor_out"].double()
            at, found[name] = 0, []
            for group, rank in one.ranked(layer):
                columns = torch.zeros(len(factor_out), one.place.rows, dtype=torch.float64)
                for r in range(at, at + rank):
                    columns += factor_out[:, r, None] * factor_in[None, r]
                at += rank
                start = one.place.start + group * one.place.step
                found[name].append((slice(start, start + one.place.rows), columns))
            assert at == len(factor_in) == factor_out.shape[1]
    return found


def with_products(model: Any, plan: SharePlan, folder: Path) -> Any:
    """A stock model with the products in its readouts' columns, recipients overwritten and removed units zeroed."""
    overwrite_recipients(model, plan)
    weights = dict(model.named_parameters())
    for name, columns in products(plan, folder).items():
        weight = next(weight for key, weight in weights.items() if key.endswith(name)).data
        for span, product in columns:
            if plan.factored[0].place.axis == 1:
                weight[:, span] = product
            else:
                weight[span] = product.T
    return model


def outputs(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=tiny.tokens())[0]
    return found


def shared_with_other_factors(dense: hs.Checkpoint, plan: SharePlan, folder: Path) -> Path:
    """A shared checkpoint whose factors and scales are not the ones that share writes of itself."""
    out = hs.share(dense, plan).save(folder)
    tensors = load_file(out / MODEL)
    for name in tensors:
        if name.endswith("tie_scale"):
            tensors[name] = torch.linspace(0.5, 2, tensors[name].numel())
        if name.endswith(("factor_in", "factor_out")):
            tensors[name] += torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1)) * 0.1
    save_file(tensors, out / MODEL, metadata={"format": "pt"})
    (out / "headshare.json").unlink()
    return out


def scale_columns(model: Any, plan: SharePlan) -> None:
    place = plan.selections[1].layout.parts[Part.O]
    for tie in plan.selections[1].ties:
        name, (start, stop) = place.name(tie.recipient.layer), place.span(tie.recipient.group)
        weight = next(weight for key, weight in model.named_parameters() if key.endswith(name))
        scale = torch.linspace(0.5, 2, stop - start)
        weight.data.narrow(place.axis, start, stop - start).mul_(scale if place.axis else scale[:, None])


def raw(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    tensors = load_file(folder / MODEL)
    return {name: (t.dtype, t.shape, t.flatten().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


# ---- whole models


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_factored_model_equals_a_stock_model_with_the_products_written_in(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = some_factored(dense)
    shared = hs.share(dense, plan)
    out = shared.save(tmp_path / "shared")
    for implementation in ("eager",) if name == "gemma2" else ("eager", "sdpa"):
        options = {} if name == "mpnet" else {"attn_implementation": implementation}
        model = load_model(hs.open_checkpoint(out), **options)
        stock = with_products(type(model).from_pretrained(dense.path, **options).eval(), plan, out)
        torch.testing.assert_close(outputs(model), outputs(stock), **CLOSE)
        if hasattr(model, "generate") and model.can_generate():
            asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 10).long()}
            assert torch.equal(model.generate(tiny.tokens(), **asked), stock.generate(tiny.tokens(), **asked))
    assert sum(isinstance(module, LowRankProjection) for module in model.modules()) == 3
    assert not torch.allclose(outputs(stock), outputs(type(model).from_pretrained(dense.path).eval()), atol=1e-3)
    assert unique_parameter_bytes(model) == shared.estimate.shared_bytes < shared.estimate.dense_bytes
    assert sum(t.nbytes for t in load_file(out / MODEL).values()) == shared.estimate.shared_bytes


MIXED = ["llama-gqa", "llama-mqa", "llama-biased", "gpt2", "phi3", "gpt_neox", "falcon-gqa", "bert"]


@pytest.mark.parametrize("storage", ["owner", "alias", "indirect"])
@pytest.mark.parametrize("name", MIXED)
def test_ties_removals_and_factors_in_one_layer_do_what_each_does(name: str, storage: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = mixed(dense)
    out = shared_with_other_factors(dense, plan, tmp_path / "shared")
    model = load_model(hs.open_checkpoint(out), storage=storage)
    stock = with_products(type(model).from_pretrained(dense.path).eval(), plan, out)
    scale_columns(stock, plan)
    torch.testing.assert_close(outputs(model), outputs(stock), **CLOSE)
    if storage == "owner":
        assert unique_parameter_bytes(model) == hs.share(dense, plan).estimate.shared_bytes
    model.save_pretrained(tmp_path / "again")
    assert raw(tmp_path / "again") == raw(out)
    assert hs.open_checkpoint(tmp_path / "again").plan == plan


@pytest.mark.parametrize("name", MIXED)
def test_expanding_and_dequantising_multiply_the_factors_out(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = mixed(dense)
    out = shared_with_other_factors(dense, plan, tmp_path / "shared")
    folder = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    expanded, original = load_file(folder / MODEL), load_file(dense.path / MODEL)
    assert {key: one.shape for key, one in expanded.items()} == {key: one.shape for key, one in original.items()}
    axis = plan.factored[0].place.axis
    for key, columns in products(plan, out).items():
        for span, product in columns:
            found = expanded[key][:, span] if axis else expanded[key][span].T
            torch.testing.assert_close(found.double(), product, rtol=1e-5, atol=1e-6)
    model = load_model(hs.open_checkpoint(out), storage="owner")
    stock = type(model).from_pretrained(folder).eval()
    torch.testing.assert_close(outputs(model), outputs(stock), **CLOSE)
    whole = model.dequantize()
    assert not any(isinstance(module, LowRankProjection) for module in whole.modules())
    torch.testing.assert_close(outputs(whole), outputs(stock), rtol=0, atol=0)
    whole.save_pretrained(tmp_path / "dequantised")
    assert raw(tmp_path / "dequantised") == raw(folder)


def test_the_text_model_inside_a_vision_model_is_factored(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = {**tiny.WIDE_HEADS, "vocab_size": 300}
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    tf.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    dense = hs.open_checkpoint(tmp_path / "dense")
    out = hs.share(dense, mixed(dense)).save(tmp_path / "shared")
    model = tf.Gemma3ForConditionalGeneration.from_pretrained(out).eval()
    folder = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    stock = tf.Gemma3ForConditionalGeneration.from_pretrained(folder).eval()
    torch.testing.assert_close(outputs(model), outputs(stock), **CLOSE)
    model.save_pretrained(tmp_path / "again")
    assert raw(tmp_path / "again") == raw(out)


def test_share_writes_the_nearest_product_in_the_type_of_the_weight(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    plan = some_factored(dense, {2: {1: 5}})
    name = "model.layers.2.self_attn.o_proj.weight"
    whole = load_file(dense.path / MODEL)[name]
    values = torch.linalg.svdvals(whole[:, 16:].double())
    for dtype in (torch.float32, torch.bfloat16):
        out = hs.share(dense, plan, dtype=str(dtype).removeprefix("torch.")).save(tmp_path / str(dtype))
        stored = load_file(out / MODEL)
        assert torch.equal(stored[name], whole[:, :16].to(dtype))
        assert {stored[name.replace("weight", end)].dtype for end in ("factor_in", "factor_out")} == {dtype}
        ((_, product),) = products(plan, out)[name]
        missed = (product - whole[:, 16:]).norm() / values[5:].norm()
        assert missed == pytest.approx(1, rel=1e-5 if dtype is torch.float32 else 1e-2)


def test_factors_that_were_fitted_are_written_as_they_are(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("gpt2", tmp_path / "dense"))
    plan = some_factored(dense, {2: {1: 2, 3: 3}})
    base = "transformer.h.2.attn.c_proj."
    fitted = {base + "factor_in": torch.randn(5, 8), base + "factor_out": torch.randn(32, 5)}
    whole = torch.randn(32, 32)
    record = RefitRecord(tensors=(base + "weight",), text="t", text_digest="d" * 64, tokens=1, window=1, seed=0)
    shared = hs.share(dense, plan).with_refit(record, {base + "weight": whole, **fitted})
    stored = load_file(shared.save(tmp_path / "shared") / MODEL)
    assert all(torch.equal(stored[key], tensor) for key, tensor in fitted.items())
    assert torch.equal(stored[base + "weight"], torch.cat([whole[:8], whole[16:24]]))
    later = hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "shared first"))
    write_refitted(open_shared(later), record, {base + "weight": whole, **fitted}, tmp_path / "refitted later")
    assert raw(tmp_path / "refitted later") == raw(tmp_path / "shared")
    given = hs.share(dense, plan).with_refit(record, {base + "weight": whole}).save(tmp_path / "weight alone")
    for span, product in products(plan, given)[base + "weight"]:
        rank = 2 if span.start == 8 else 3
        left, values, right = torch.linalg.svd(whole[span].T.double())
        near = left[:, :rank] * values[:rank] @ right[:rank]
        torch.testing.assert_close(product, near, rtol=1e-4, atol=1e-5)
    for wrong in (
        {base + "factor_in": fitted[base + "factor_in"]},
        {**fitted, base + "factor_out": torch.randn(5, 32)},
        {**fitted, base + "factor_out": torch.full((32, 5), torch.nan)},
    ):
        with pytest.raises(CheckpointError, match="factor"):
            hs.share(dense, plan).with_refit(record, wrong).save(tmp_path / "wrong")
        assert not (tmp_path / "wrong").exists()


def test_a_dense_readout_with_nan_is_not_factored(tmp_path: Path) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "dense")
    tensors = load_file(folder / MODEL)
    tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    dense = hs.open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="NaN"):
        hs.share(dense, some_factored(dense, {0: {0: 2}})).save(tmp_path / "shared")


def test_files_in_shards_keep_factors_beside_their_readout(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense", max_shard_size="20KB"))
    out = hs.open_checkpoint(hs.share(dense, some_factored(dense)).save(tmp_path / "shared"))
    for name, extra in some_factored(dense).added_tensors.items():
        assert out.tensors[name].file == out.tensors[extra.weight].file
    assert len({info.file for info in out.tensors.values()}) > 2
    assert verify(out, dense).ok


# ---- a loaded model is an ordinary one


def test_a_factored_model_is_copied_converted_and_placed_like_any_other(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    out = hs.share(dense, mixed(dense)).save(tmp_path / "shared")
    model = load_model(hs.open_checkpoint(out), storage="owner")
    expected = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), expected)
    for device_map in ("auto", {"": "cpu"}):
        placed = tf.LlamaForCausalLM.from_pretrained(out, device_map=device_map).eval()
        torch.testing.assert_close(outputs(placed), expected, **CLOSE)
    for found in (copy.deepcopy(model).to(torch.bfloat16), load_model(hs.open_checkpoint(out), dtype=torch.bfloat16)):
        o_proj = found.model.layers[2].self_attn.o_proj
        assert {one.dtype for one in o_proj.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(outputs(found).float(), expected, rtol=0.1, atol=0.1)
    assert "ranks=3,3" in repr(o_proj)
    assert [name for name, _ in o_proj.named_parameters()] == ["weight", "factor_in", "factor_out"]


def test_a_factored_model_runs_from_disk(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    out = hs.share(dense, mixed(dense)).save(tmp_path / "shared")
    layers = {f"model.layers.{n}": "disk" if n in (0, 2) else "cpu" for n in range(4)}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **layers}
    model = load_model(
        hs.open_checkpoint(out), storage="owner", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    expected = outputs(load_model(hs.open_checkpoint(out), storage="owner"))
    torch.testing.assert_close(outputs(model), expected, **CLOSE)


def test_every_stored_number_gets_the_gradient_of_the_product(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    plan = some_factored(dense, {2: {0: 2, 1: 3}, 3: {1: 2}})
    out = hs.share(dense, plan).save(tmp_path / "shared")
    model = tf.LlamaForCausalLM.from_pretrained(out)
    stock = with_products(tf.LlamaForCausalLM.from_pretrained(dense.path), plan, out)
    for one in (model, stock):
        one(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.hf_quantizer.is_trainable
    ours, theirs = (one.model.layers[3].self_attn.o_proj for one in (model, stock))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad[:, :16], **CLOSE)
    columns = theirs.weight.grad[:, 16:]
    torch.testing.assert_close(ours.factor_out.grad, columns @ ours.factor_in.T, **CLOSE)
    torch.testing.assert_close(ours.factor_in.grad, ours.factor_out.T @ columns, **CLOSE)


KINDS = {"linear": (torch.nn.Linear, 1), "conv1d": (tf.pytorch_utils.Conv1D, 0)}


@pytest.mark.parametrize("units", [{0: 2}, {1: 2}, {0: 2, 1: 2}, {0: 3, 2: 3}, {1: 2, 3: 4}, {0: 2, 1: 2, 2: 2, 3: 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_factored_module_equals_a_float64_loop(kind: str, units: dict[int, int]) -> None:
    made, axis = KINDS[kind]
    dense = made(12, 20) if kind == "conv1d" else made(20, 12)
    module = module_of(dense, axis, units)
    x = torch.randn(2, 3, 20)
    weight, (kept, at) = torch.zeros(12, 20, dtype=torch.float64), (0, 0)
    stored = module.weight.double() if axis else module.weight.double().T
    for group in range(4):
        for channel in range(5):
            if group in units:
                for r in range(at, at + units[group]):
                    weight[:, group * 5 + channel] += module.factor_out[:, r] * module.factor_in[r, channel].double()
            else:
                weight[:, group * 5 + channel] = stored[:, kept]
                kept += 1
        at += units.get(group, 0)
    expected = x.double() @ weight.T + module.bias.double()
    torch.testing.assert_close(module(x).double(), expected, **CLOSE)
    torch.testing.assert_close(module(x[0]), module(x)[0], **CLOSE)
    assert module(x[:, :0]).shape == (2, 0, 12)
    torch.testing.assert_close(module(x.mT.contiguous().mT), module(x), **CLOSE)
    torch.testing.assert_close(module.whole_weight().double(), weight if axis else weight.T, **CLOSE)


def module_of(dense: torch.nn.Module, axis: int, units: dict[int, int]) -> LowRankProjection:
    spans = tuple(LowRankRange(group * 5, group * 5 + 5, rank) for group, rank in units.items())
    tensor = TensorPlan("o.weight", (12, 20) if axis else (20, 12), axis, made=spans)
    module = LowRankProjection(dense, tensor)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


COMPILED = """
import sys, torch
import headshare as hs
from support import tiny
from headshare.integrations.transformers.loading import load_model
model = load_model(hs.open_checkpoint(sys.argv[1]), storage="owner")
with torch.no_grad():
    expected = model(tiny.tokens(), use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tiny.tokens(), use_cache=False).logits, expected)
"""


@pytest.mark.slow
def test_torch_compile_takes_a_factored_model_as_one_graph(tmp_path: Path) -> None:
    """In a process of its own: the run-time checks of types that this suite switches on cannot be traced."""
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "dense", num_key_value_heads=4))
    plan = some_factored(dense, {0: {1: 2}, 1: {0: 2, 3: 2}, 2: {1: 2, 2: 3}, 3: dict.fromkeys(range(4), 2)})
    out = hs.share(dense, plan).save(tmp_path / "shared")
    where = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(tiny.__file__).parents[1]), *sys.path]),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run([sys.executable, "-c", COMPILED, out], capture_output=True, text=True, check=False, env=where)
    assert done.returncode == 0, done.stderr[-2000:]


def test_transformers_without_headshare_is_told_of_columns_that_are_missing(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    out = hs.share(dense, some_factored(dense)).save(tmp_path / "shared")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        tf.AutoModelForCausalLM.from_pretrained(out)


# ---- verify, estimate, inspect, controls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-biased", "gpt2"])
def test_verify_compares_what_is_computed_and_every_number_but_the_factors(
    name: str, dtype: str, tmp_path: Path
) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    shared = hs.open_checkpoint(hs.share(dense, mixed(dense), dtype=dtype).save(tmp_path / "shared"))
    for against in (None, dense):
        found = verify(shared, against)
        assert found.ok, found.problems
        assert found.max_logit_diff is not None and found.max_logit_diff < 1e-4
        assert any("logits compared to" in note for note in found.notes)
    assert any("factors" in note for note in found.notes if "not compared" in note)
    assert found.tensors_checked == len(dense.tensors)


def test_verify_finds_one_wrong_number_beside_the_factored_columns(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-biased", tmp_path / "dense"))
    out = hs.share(dense, some_factored(dense)).save(tmp_path / "shared")
    tensors = load_file(out / MODEL)
    tensors["model.layers.2.self_attn.o_proj.weight"].flatten()[-1] += 1
    save_file(tensors, out / MODEL, metadata={"format": "pt"})
    (out / "headshare.json").unlink()
    found = verify(hs.open_checkpoint(out), dense, logits=False)
    assert [problem.partition(" ")[0] for problem in found.problems] == ["model.layers.2.self_attn.o_proj.weight"]


def test_verify_finds_a_model_that_forgets_a_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    out = hs.open_checkpoint(hs.share(dense, some_factored(dense)).save(tmp_path / "shared"))

    def load_wrong(checkpoint: hs.Checkpoint, **options: object) -> Any:
        model = load_model(checkpoint, **options)
        if checkpoint.plan is not None:
            with torch.no_grad():
                model.model.layers[2].self_attn.o_proj.factor_in[0] = 0
        return model

    monkeypatch.setattr("headshare.evaluation.verify.load_model", load_wrong)
    found = verify(out)
    assert not found.ok and "should be equal to" in found.problems[0]


def test_inspect_shows_factored_units_by_sign_and_their_ranks(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    plan = some_factored(dense, {0: {1: 4}, 2: {0: 2, 1: 5}})
    lines = picture(plan).splitlines()
    assert lines[0] == "attention, part o: 3 of 8 units factored (37.5%; asked 30.0%), match drawn, mode given"
    assert lines[1:4] == ["  layer 0  ■f  1 of rank 4", "  layer 1  ■■", "  layer 2  ff  2 of rank 2 to 5"]
    assert "f W_o stored as a product" in lines[-1]
    assert max(map(len, lines)) <= 120
    assert max(map(len, picture(mixed(dense)).splitlines())) <= 150
    (data,) = describe(plan)["factored"]
    assert (data["factored"], data["indices"], data["ranks"]) == (3, {"0": "1", "2": "0-1"}, {"0": [4], "2": [2, 5]})
    json.dumps(describe(plan), allow_nan=False)
    assert describe(SharePlan())["factored"] == []
    assert "product" not in picture(SharePlan())


def test_overwriting_recipients_leaves_factored_columns_as_they_are(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    model = tf.LlamaForCausalLM.from_pretrained(dense.path)
    before = copy.deepcopy(model.state_dict())
    overwrite_recipients(model, some_factored(dense))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name in ("llama-gqa", "gpt2"):
        dense = hs.open_checkpoint(tiny.make(name, tmp_path / name))
        files = fit_plan(some_factored(dense), dense)
        assert raw(write_overwritten(files, tmp_path / f"{name} overwritten")) == raw(dense.path)


def test_random_donors_lend_from_readouts_that_may(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    layout = layout_of(dense)
    selections = (Selection(layout=layout, ties=(Tie(HeadUnit(3, 0), HeadUnit(1, 1)),)),)
    plan = SharePlan(selections=selections, factored=some_factored(dense, {0: {0: 2}, 2: {0: 2}}).factored)
    drawn = [with_random_donors(plan, seed) for seed in range(20)]
    assert {one.selections[0].ties[0].donor.layer for one in drawn} == {1}
    assert all(one.factored == plan.factored for one in drawn)


# ---- hostile checkpoints

STRAY = "model.layers.2.self_attn.o_proj."


def damaged(out: Path, change: str) -> None:
    tensors = load_file(out / MODEL)
    factor = STRAY + "factor_in"
    match change:
        case "missing":
            del tensors[factor]
        case "turned":
            tensors[factor] = tensors[factor].T.contiguous()
        case "longer":
            tensors[factor] = tensors[factor].repeat(2, 1)
        case "other type":
            tensors[factor] = tensors[factor].half()
        case "integers":
            tensors[factor] = tensors[factor].to(torch.int64)
        case "whole readout":
            tensors[STRAY + "weight"] = torch.zeros(32, 32)
    save_file(tensors, out / MODEL, metadata={"format": "pt"})
    (out / "headshare.json").unlink()


@pytest.mark.parametrize("change", ["missing", "turned", "longer", "other type", "integers", "whole readout"])
def test_factors_must_be_what_the_plan_says(change: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    out = hs.share(dense, some_factored(dense, {2: {0: 3}})).save(tmp_path / "shared")
    damaged(out, change)
    shared = hs.open_checkpoint(out)
    with pytest.raises(CheckpointError, match=r"o_proj"):
        open_shared(shared)
    with pytest.raises(CheckpointError):
        hs.expand(shared, tmp_path / "expanded")
    assert not verify(shared).ok
    if change not in ("other type", "integers"):
        with pytest.raises(hs.HeadshareError):
            load_model(shared)


@pytest.mark.parametrize("change", ["huge", "axis", "tensor"])
def test_transformers_does_not_load_factored_units_that_are_not_the_models(change: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    out = hs.share(dense, some_factored(dense, {2: {0: 3}})).save(tmp_path / "shared")
    config = json.loads((out / "config.json").read_text())
    place = config["quantization_config"]["plan"]["factored"][0]["layout"]["parts"]["o"]
    place |= {
        "huge": {"shape": [2**39, 32]},
        "axis": {"axis": 0},
        "tensor": {"tensor": "model.layers.{layer}.input_layernorm.weight"},
    }[change]
    (out / "config.json").write_text(json.dumps(config))
    unseal(out)
    with pytest.raises((PlanError, CheckpointError)):
        tf.AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(CheckpointError):
        hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")


def test_a_plan_for_another_model_is_not_shared(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    other = hs.open_checkpoint(tiny.make("gpt2", tmp_path / "other"))
    with pytest.raises(PlanError, match="another model"):
        hs.share(dense, some_factored(other))
    tensors = load_file(dense.path / MODEL)
    tensors[STRAY + "factor_in"] = torch.zeros(1)
    save_file(tensors, dense.path / MODEL, metadata={"format": "pt"})
    again = hs.open_checkpoint(dense.path)
    with pytest.raises(PlanError, match="factor_in, which is a tensor of"):
        hs.share(again, some_factored(again, {2: {0: 3}}))


@pytest.mark.parametrize("load", [hs.load, tf.AutoModelForCausalLM.from_pretrained])
def test_loading_works_out_once_what_each_plan_that_it_reads_means_for_tensors(
    load: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shrinking, low-rank modules, the storage and the checkpoint's layouts all ask for it."""
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    plan = mixed(dense)
    out = hs.share(dense, plan).save(tmp_path / "shared")
    counted: list[int] = []
    read: list[SharePlan] = []
    from_dict = SharePlan.from_dict
    monkeypatch.setattr(
        "headshare.plan.plan.tensor_plans", lambda sections: counted.append(1) or tensor_plans(sections)
    )
    monkeypatch.setattr(SharePlan, "from_dict", lambda data: read.append(from_dict(data)) or read[-1])
    load(out)
    assert 1 <= len(counted) <= len(read)


def test_what_a_plan_means_for_its_tensors_is_no_part_of_the_plan(tmp_path: Path) -> None:
    plan = mixed(hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense")))
    fresh = SharePlan.from_json(plan.to_json())
    assert plan.tensors is plan.tensors
    assert plan.tensors == tensor_plans(plan.sections)
    assert (plan, plan.digest) == (fresh, fresh.digest)
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == fresh
