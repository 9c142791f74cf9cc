"""A unit that a plan removes is gone: from the files, from memory and from the work; the rest computes as before."""

import copy
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.architecture.config import text_config
from headshare.architecture.recognition import attention_layout, ffn_layout
from headshare.cli.app import app
from headshare.errors import CheckpointError, PlanError
from headshare.evaluation.verify import verify
from headshare.experiments.controls import overwrite_recipients, with_random_donors
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.plan.describe import describe, picture
from headshare.plan.layout import Layout
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.section import Choice
from headshare.plan.spans import Span
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Sublayer, Tie
from headshare.storage.projection import SharedProjection
from support import tiny
from support.folders import unseal

MODEL = "model.safetensors"
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
FALCON = {**tiny.FALCON, "multi_query": False, "alibi": False, "bias": True}

# Model types that have no tiny model of their own, but the same attention.
MORE: dict[str, tuple[type, Any, str | None]] = {
    "falcon-rotary": (tf.FalconForCausalLM, tf.FalconConfig(**FALCON), "ffn"),
    **tiny.RELATIVES,
}
ALL = {**tiny.FAMILIES, **MORE}
REFUSED = {"falcon-mha": "with alibi", "mpnet": "'mpnet' models"}
CASES = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name, (_, _, ffn) in ALL.items()
    for kind in Sublayer
    if not (kind is Sublayer.ATTENTION and name in REFUSED) and (kind is Sublayer.ATTENTION or ffn)
]


@pytest.fixture(autouse=True)
def _more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "FAMILIES", ALL)


def layout_of(dense: hs.Checkpoint, kind: Sublayer, groups: int | None = None) -> Layout:
    config = text_config(dense.config)
    if kind is Sublayer.ATTENTION:
        return attention_layout(config, dense.shapes)
    place = ffn_layout(config, dense.shapes).parts[Part.DOWN]
    return ffn_layout(config, dense.shapes, groups or place.shape[place.axis])


def some_removed(dense: hs.Checkpoint, *kinds: Sublayer) -> SharePlan:
    """A plan that removes other units of each layer, but none of layer 1."""
    removals = []
    for kind in kinds:
        layout = layout_of(dense, kind)
        most = max(1, layout.groups // 3)
        layers = [layer for layer in range(layout.layers) if layer != 1]
        removed = {layer: random.Random(layer).sample(range(layout.groups), most) for layer in layers}
        removals.append(Removal(layout=layout, removed=removed, chosen=Choice(match="drawn", ratio=0.3)))
    return SharePlan(model_type=str(dense.config["model_type"]), removals=tuple(removals))


def silenced(dense: hs.Checkpoint, plan: SharePlan, model_class: Any, **options: object) -> Any:
    """The stock model with removed units' columns of o and down zeroed, by names and slices of our own making."""
    model = model_class.from_pretrained(dense.path, **options).eval()
    weights = dict(model.named_parameters())
    overwrite_recipients(model, SharePlan(selections=plan.selections))
    for removal in plan.removals:
        place = list(removal.layout.parts.values())[-1]
        for layer in removal.removed:
            for group in removal.indices(layer):
                name = next(name for name in weights if name.endswith(place.name(layer)))
                columns = [slice(None), slice(None)]
                columns[place.axis] = slice(
                    place.start + group * place.step, place.start + group * place.step + place.rows
                )
                weights[name].data[tuple(columns)] = 0
    return model


def outputs(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=tiny.tokens())[0]
    return found


def implementations(name: str, kind: Sublayer) -> list[dict[str, str]]:
    if kind is Sublayer.FFN:
        return [{}]
    return [{"attn_implementation": one} for one in (("eager",) if name == "gemma2" else ("eager", "sdpa"))]


# ---- whole models


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_model_without_units_equals_the_dense_model_with_their_outputs_zeroed(
    name: str, kind: Sublayer, tmp_path: Path
) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = some_removed(dense, kind)
    shared = hs.share(dense, plan)
    out = shared.save(tmp_path / "shared")
    for options in implementations(name, kind):
        model = load_model(hs.open_checkpoint(out), **options)
        stock = silenced(dense, plan, type(model), **options)
        torch.testing.assert_close(outputs(model), outputs(stock), **CLOSE)
        if hasattr(model, "generate") and model.can_generate():
            asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 10).long()}
            assert torch.equal(model.generate(tiny.tokens(), **asked), stock.generate(tiny.tokens(), **asked))
    assert not torch.allclose(outputs(stock), outputs(type(model).from_pretrained(dense.path).eval()), atol=1e-3)
    assert unique_parameter_bytes(model) == shared.estimate.shared_bytes < shared.estimate.dense_bytes
    assert sum(t.nbytes for t in load_file(out / MODEL).values()) == shared.estimate.shared_bytes
    assert plan.removed(kind) == plan.removals[0].count > 0


@pytest.mark.parametrize("name", [*REFUSED, "olmo2", "stablelm"])
def test_attention_that_was_not_shown_to_work_with_fewer_heads_keeps_them(name: str, tmp_path: Path) -> None:
    if name == "olmo2":  # its q_norm spans all heads
        tf.Olmo2ForCausalLM(tf.Olmo2Config(**tiny.GROUPED)).save_pretrained(tmp_path / "dense")
    elif name == "stablelm":
        config = tf.StableLmConfig(**tiny.COMMON, num_key_value_heads=4)
        tf.StableLmForCausalLM(config).save_pretrained(tmp_path / "dense")
    else:
        tiny.make(name, tmp_path / "dense")
    dense = hs.open_checkpoint(tmp_path / "dense")
    with pytest.raises(PlanError, match=REFUSED.get(name, f"'{name}' models")):
        hs.share(dense, some_removed(dense, Sublayer.ATTENTION))


def test_experts_and_unlisted_feed_forwards_keep_their_neurons(tmp_path: Path) -> None:
    experts = hs.open_checkpoint(tiny.make("mixtral", tmp_path / "experts"))
    llama = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "llama"))
    with pytest.raises(hs.HeadshareError, match=r"another model|mixture of experts"):
        hs.share(experts, some_removed(llama, Sublayer.FFN))
    tf.StableLmForCausalLM(tf.StableLmConfig(**tiny.COMMON)).save_pretrained(tmp_path / "unlisted")
    unlisted = hs.open_checkpoint(tmp_path / "unlisted")
    with pytest.raises(PlanError, match="'stablelm'"):
        hs.share(unlisted, some_removed(unlisted, Sublayer.FFN))


def test_the_text_model_inside_a_vision_model_goes_without_units(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = {**tiny.WIDE_HEADS, "vocab_size": 300}
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    tf.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    dense = hs.open_checkpoint(tmp_path / "dense")
    plan = some_removed(dense, *Sublayer)
    out = hs.share(dense, plan).save(tmp_path / "shared")
    model = tf.Gemma3ForConditionalGeneration.from_pretrained(out).eval()
    stock = tf.Gemma3ForConditionalGeneration.from_pretrained(dense.path).eval()
    overwrite_recipients(stock, plan)
    torch.testing.assert_close(outputs(model), outputs(stock), **CLOSE)


MIXED = ["llama-gqa", "llama-biased", "gpt2", "phi3", "gpt_neox", "bert"]


def mixed(dense: hs.Checkpoint) -> SharePlan:
    """Ties, scaled ties, removed units and removed neurons, in the same layers."""
    units, neurons, quarters = (
        layout_of(dense, Sublayer.ATTENTION),
        layout_of(dense, Sublayer.FFN),
        layout_of(dense, Sublayer.FFN, 4),
    )

    def ties(*four: tuple[int, int, int, int]) -> tuple[Tie, ...]:
        return tuple(Tie(HeadUnit(a, b), HeadUnit(c, d)) for a, b, c, d in four)

    return SharePlan(
        model_type=str(dense.config["model_type"]),
        selections=(
            Selection(layout=units.only((Part.Q, Part.K)), ties=ties((2, 0, 0, 0), (3, 1, 0, 0))),
            Selection(layout=units.only((Part.V, Part.O)), ties=ties((3, 1, 0, 0), (2, 0, 1, 0)), scale=True),
            Selection(layout=quarters, ties=ties((1, 0, 0, 0), (3, 2, 0, 0), (3, 3, 0, 1))),
        ),
        removals=(
            Removal(layout=units, removed={0: [1], 2: [1], 3: [0]}),
            Removal(layout=neurons, removed={0: [25, 30, 31, 32, 33], 1: [12, 47], 2: [1, 2, 40], 3: [0, 5, 6]}),
        ),
    )


def shared_with_scales(dense: hs.Checkpoint, plan: SharePlan, folder: Path) -> Path:
    """A shared checkpoint whose scales are no longer the ones that they begin as."""
    out = hs.share(dense, plan).save(folder)
    tensors = load_file(out / MODEL)
    for name in tensors:
        if name.endswith("tie_scale"):
            tensors[name] = torch.linspace(0.5, 2, tensors[name].numel(), dtype=tensors[name].dtype)
    save_file(tensors, out / MODEL, metadata={"format": "pt"})
    (out / "headshare.json").unlink()
    return out


def scale_columns(model: Any, plan: SharePlan) -> None:
    """What the scales do, in a stock model: recipients' columns of o, each by its number."""
    place = plan.selections[1].layout.parts[Part.O]
    for tie in plan.selections[1].ties:
        name, (start, stop) = place.name(tie.recipient.layer), place.span(tie.recipient.group)
        weight = next(weight for key, weight in model.named_parameters() if key.endswith(name))
        scale = torch.linspace(0.5, 2, stop - start)
        weight.data.narrow(place.axis, start, stop - start).mul_(scale if place.axis else scale[:, None])


@pytest.mark.parametrize("storage", ["owner", "alias", "indirect"])
@pytest.mark.parametrize("name", MIXED)
def test_ties_scales_and_removals_in_one_model_do_what_each_does(name: str, storage: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = mixed(dense)
    out = shared_with_scales(dense, plan, tmp_path / "shared")
    model = load_model(hs.open_checkpoint(out), storage=storage)
    stock = silenced(dense, plan, type(model))
    scale_columns(stock, plan)
    torch.testing.assert_close(outputs(model), outputs(stock), **CLOSE)
    assert sum(isinstance(module, SharedProjection) for module in model.modules()) > 5
    if storage == "owner":
        assert unique_parameter_bytes(model) == hs.share(dense, plan).estimate.shared_bytes


@pytest.mark.parametrize("name", MIXED)
def test_expanding_and_dequantising_write_zeros_where_units_were(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = mixed(dense)
    out = shared_with_scales(dense, plan, tmp_path / "shared")
    folder = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    expanded, original = load_file(folder / MODEL), load_file(dense.path / MODEL)
    assert {key: one.shape for key, one in expanded.items()} == {key: one.shape for key, one in original.items()}
    tensors = {**plan.tensors, **plan.biases}
    lost = 0
    for key in set(tensors) & set(expanded):
        for start, stop in tensors[key].removed:
            removed = expanded[key].narrow(tensors[key].axis, start, stop - start)
            assert not removed.any()
            lost += removed.numel()
    assert lost > 0
    biases = [key for key in expanded if key.endswith(".bias") and key not in tensors]
    assert all(torch.equal(expanded[key], original[key]) for key in biases)
    model = load_model(hs.open_checkpoint(out), storage="owner")
    stock = type(model).from_pretrained(folder).eval()
    torch.testing.assert_close(outputs(model), outputs(stock), **CLOSE)
    whole = model.dequantize()
    assert {key: one.shape for key, one in whole.state_dict().items()} == {
        key: one.shape for key, one in stock.state_dict().items()
    }
    torch.testing.assert_close(outputs(whole), outputs(stock), rtol=0, atol=0)
    whole.save_pretrained(tmp_path / "dequantised")
    assert stored(tmp_path / "dequantised") == stored(folder)


def stored(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    tensors = load_file(folder / MODEL)
    return {name: (t.dtype, t.shape, t.flatten().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


@pytest.mark.parametrize("storage", ["owner", "alias"])
@pytest.mark.parametrize("name", MIXED)
def test_a_model_without_units_saves_what_it_loaded(name: str, storage: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    out = shared_with_scales(dense, mixed(dense), tmp_path / "shared")
    load_model(hs.open_checkpoint(out), storage=storage).save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(out)
    assert hs.open_checkpoint(tmp_path / "again").plan == mixed(dense)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "falcon-gqa"])
def test_copies_and_later_changes_of_attention_know_the_smaller_layers(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    out = hs.share(dense, some_removed(dense, *Sublayer)).save(tmp_path / "shared")
    model = load_model(hs.open_checkpoint(out), attn_implementation="sdpa")
    expected = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), expected)
    model.set_attn_implementation("eager")
    eager = load_model(hs.open_checkpoint(out), attn_implementation="eager")
    torch.testing.assert_close(outputs(model), outputs(eager), **CLOSE)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi3", "falcon-gqa", "opt"])
def test_a_static_cache_holds_what_each_layer_has(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    out = hs.share(dense, some_removed(dense, Sublayer.ATTENTION)).save(tmp_path / "shared")
    model = load_model(hs.open_checkpoint(out), attn_implementation="eager")
    asked = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones(2, 10).long(),
        "disable_compile": True,
    }
    fixed = model.generate(tiny.tokens(), **asked, cache_implementation="static")
    assert torch.equal(fixed, model.generate(tiny.tokens(), **asked, use_cache=False))


def test_a_model_without_units_trains_and_is_placed_by_a_device_map(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    plan = some_removed(dense, *Sublayer)
    out = hs.share(dense, plan).save(tmp_path / "shared")
    model = tf.LlamaForCausalLM.from_pretrained(out, device_map="auto")
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.hf_quantizer.is_trainable
    mlp = model.model.layers[0].mlp
    assert (mlp.gate_proj.out_features, mlp.down_proj.in_features) == (32, 32)
    assert type(mlp.gate_proj) is torch.nn.Linear  # what is not tied needs no other module


def test_transformers_without_headshare_stops_at_the_smaller_shapes(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    out = hs.share(dense, some_removed(dense, Sublayer.FFN)).save(tmp_path / "shared")
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "mismatch" in done.stderr


# ---- verify, estimate, inspect, the command line, controls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_compares_every_number_and_what_is_computed(dtype: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-biased", tmp_path / "dense"))
    shared = hs.open_checkpoint(hs.share(dense, mixed(dense), dtype=dtype).save(tmp_path / "shared"))
    for against in (None, dense):
        found = verify(shared, against)
        assert found.ok, found.problems
        assert found.max_logit_diff is not None and found.max_logit_diff < 1e-4
        assert any("rounded" in note for note in found.notes)
    assert found.tensors_checked == len(dense.tensors)


@pytest.mark.parametrize("tensor", ["self_attn.q_proj.bias", "self_attn.q_proj.weight", "mlp.down_proj.weight"])
def test_verify_finds_one_wrong_number_beside_what_was_removed(tensor: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-biased", tmp_path / "dense"))
    out = hs.share(dense, some_removed(dense, *Sublayer)).save(tmp_path / "shared")
    tensors = load_file(out / MODEL)
    tensors[f"model.layers.2.{tensor}"].flatten()[-1] += 1
    save_file(tensors, out / MODEL, metadata={"format": "pt"})
    (out / "headshare.json").unlink()
    found = verify(hs.open_checkpoint(out), dense, logits=False)
    assert found.problems == [f"model.layers.2.{tensor} differs from the dense model's beyond what the plan gave up"]


def test_verify_finds_a_model_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    out = hs.open_checkpoint(hs.share(dense, some_removed(dense, *Sublayer)).save(tmp_path / "shared"))

    def load_wrong(checkpoint: hs.Checkpoint, **options: object) -> Any:
        model = load_model(checkpoint, **options)
        if checkpoint.plan is not None:
            with torch.no_grad():
                model.model.layers[2].mlp.down_proj.weight[:, 0] = 0
        return model

    monkeypatch.setattr("headshare.evaluation.verify.load_model", load_wrong)
    found = verify(out)
    assert not found.ok and "should be equal to" in found.problems[0]


def test_an_estimate_says_what_is_removed(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-biased", tmp_path / "dense"))
    plan = mixed(dense)
    found = hs.estimate(dense, plan)
    assert (found.removed_units, found.removed_neurons) == (3, 13)
    assert "3 attention units and 13 neurons removed" in found.in_words()
    out = hs.share(dense, plan).save(tmp_path / "shared")
    assert found.shared_bytes == sum(t.nbytes for t in load_file(out / MODEL).values())
    half = hs.estimate(dense, plan, dtype="float16")
    assert half.shared_bytes * 2 == found.shared_bytes


def test_inspect_shows_removed_units_by_sign_and_neurons_by_count(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    plan = mixed(dense)
    lines = picture(plan).splitlines()
    assert "  layer 2  ·x  0<-0.0" in lines
    assert "attention: 3 of 8 units removed (37.5%; asked 0.0%), match given, mode given" in lines
    assert "  layer 0  ■x  1 of 2" in lines
    assert "ffn: 13 of 192 neurons removed (6.8%; asked 0.0%), match given, mode given" in lines
    assert f"  layer 0  {'■' * 29}xxx   5 of 48" in lines
    assert lines[-1].endswith("x removed")
    assert max(map(len, lines)) <= 120
    data = describe(plan)
    assert [one["removed"] for one in data["removals"]] == [3, 13]
    assert data["removals"][1]["indices"] == {"0": "25,30-33", "1": "12,47", "2": "1-2,40", "3": "0,5-6"}
    json.dumps(data, allow_nan=False)
    assert describe(SharePlan())["removals"] == []
    assert "removed" not in picture(SharePlan())


def test_a_plan_file_with_removals_is_shared_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    dense = hs.open_checkpoint(tiny.make("gpt2", tmp_path / "dense"))
    plan = mixed(dense)
    plan.save(tmp_path / "plan.json")
    assert SharePlan.load(tmp_path / "plan.json") == plan
    runner = CliRunner()
    for words in (
        ["share", "dense", "shared", "--plan", "plan.json"],
        ["verify", "shared", "--against", "dense"],
        ["inspect", "shared"],
        ["expand", "shared", "expanded"],
    ):
        monkeypatch.chdir(tmp_path)
        done = runner.invoke(app, words)
        assert done.exit_code == 0, done.output
    assert hs.open_checkpoint(tmp_path / "shared").plan == plan


def test_random_donors_are_units_that_are_there(tmp_path: Path) -> None:
    plan = mixed(hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense")))
    for seed in range(20):
        drawn = with_random_donors(plan, seed)
        assert drawn.removals == plan.removals
        assert [{tie.recipient for tie in one.ties} for one in drawn.selections] == [
            {tie.recipient for tie in one.ties} for one in plan.selections
        ]


@pytest.mark.parametrize("change", ["shape", "families", "layout"])
def test_transformers_does_not_load_removals_that_are_not_the_models(change: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    out = hs.share(dense, some_removed(dense, Sublayer.ATTENTION)).save(tmp_path / "shared")
    config = json.loads((out / "config.json").read_text())
    layout = config["quantization_config"]["plan"]["removals"][0]["layout"]
    if change == "shape":
        layout["parts"]["o"]["shape"][0] = 2**39
    elif change == "families":
        config |= {"model_type": "stablelm", "architectures": ["StableLmForCausalLM"]}
    else:  # q and k say that heads are half as wide, and lie in the first half
        for place in layout["parts"].values():
            place |= {"rows": place["rows"] // 2, "step": place["step"] // 2}
    (out / "config.json").write_text(json.dumps(config))
    unseal(out)
    with pytest.raises((PlanError, CheckpointError)):
        tf.AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(PlanError if change == "families" else CheckpointError):
        hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")


def test_a_tensor_that_only_loses_units_needs_no_storage(tmp_path: Path) -> None:
    plan = some_removed(hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense")), *Sublayer)
    assert plan.reduced_tensors == {}
    assert len(plan.tensors) == 3 * 7
    assert plan.tensors["model.layers.0.self_attn.o_proj.weight"].removed in ((Span(0, 16),), (Span(16, 32),))


@pytest.mark.parametrize("layer", [{"intermediate_size": 32}, {"num_key_value_heads": 2, "num_attention_heads": 2}])
def test_stock_models_do_not_read_widths_by_layer_yet(layer: dict[str, int]) -> None:
    """The day that they do, plans that only remove can be written for them as `per_layer_config`: this fails then."""
    if "per_layer_config" not in tf.PretrainedConfig.__doc__:
        pytest.skip("this transformers has no widths by layer at all")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    with pytest.raises(Exception, match="per-layer attribute"):
        tf.AutoModelForCausalLM.from_config(
            tf.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=32, per_layer_config={1: layer})
        )
