"""Narrow values: key/value heads whose values have fewer dimensions than keys, in files, memory and the cache."""

import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

import headshare as hs
from headshare.errors import CheckpointError, PlanError, StorageError
from headshare.evaluation.verify import verify
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.integrations.transformers.shrinking import check_attention
from headshare.plan.describe import describe, given_up, picture
from headshare.plan.low_rank import LowRankUnits
from headshare.plan.narrow_values import NarrowValues
from headshare.plan.removal import Removal
from headshare.plan.section import Section
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Tie
from headshare.sharing.expanded import ExpandedTensors
from support import tiny
from support.command_line import Run
from support.folders import unseal

MODEL = "model.safetensors"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WIDTHS = {0: 5, 2: 3}
# Model types that have no tiny model of their own, but the same attention.
MORE: dict[str, tuple[type, Any, str | None]] = {
    **tiny.RELATIVES,
    "olmo2": (tf.Olmo2ForCausalLM, tf.Olmo2Config(**tiny.GROUPED), "ffn"),
    "olmo-clipped": (tf.OlmoForCausalLM, tf.OlmoConfig(**tiny.GROUPED, clip_qkv=1.0), "ffn"),
    "stablelm": (tf.StableLmForCausalLM, tf.StableLmConfig(**tiny.GROUPED), "ffn"),
}
ALL = {**tiny.FAMILIES, **MORE}
# Families that every run looks at: grouped heads, biases, and experts. The others take long together.
SOME = ("llama-biased", "opt", "mixtral")
FUSED = ("phi3", "gpt2", "gpt_neox", "falcon-mqa", "falcon-mha", "falcon-gqa")
REFUSED = {"olmo-clipped": "with clip_qkv", "stablelm": "'stablelm' models is not known to work"}


def some_of(every: Iterable[str], *some: str) -> list[Any]:
    """All of them, of which those that are not in `some` are slow."""
    return [each if each in (some or SOME) else pytest.param(each, marks=pytest.mark.slow) for each in every]


@pytest.fixture(autouse=True)
def _more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "FAMILIES", ALL)


def narrow(dense: hs.Checkpoint, widths: dict[int, int] | None = None) -> NarrowValues:
    layout = dense.layouts.attention.only((Part.V, Part.O))
    return NarrowValues(layout=layout, widths=WIDTHS if widths is None else widths)


def planned(dense: hs.Checkpoint, *more: Section, widths: dict[int, int] | None = None) -> hs.SharePlan:
    return hs.SharePlan.of_sections([narrow(dense, widths), *more], str(dense.config["model_type"]))


def outputs(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=tiny.tokens())[0]
    return found


def stock(shared: Path, folder: Path, model_class: type) -> Any:
    """The stock model of what `expand` writes."""
    expanded = hs.expand(hs.open_checkpoint(shared), folder)
    return model_class.from_pretrained(expanded).eval()  # type: ignore[attr-defined]


@pytest.fixture
def dense(llama: Path) -> hs.Checkpoint:
    return hs.open_checkpoint(llama)


@pytest.fixture
def shared(dense: hs.Checkpoint, tmp_path: Path) -> Path:
    return hs.share(dense, planned(dense)).save(tmp_path / "shared")


# ---- families


@pytest.mark.parametrize("name", some_of(name for name in ALL if name not in (*FUSED, *REFUSED)))
def test_a_model_of_narrow_values_equals_the_stock_model_that_it_expands_to(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    found = hs.share(dense, planned(dense))
    out = found.save(tmp_path / "shared")
    eager = load_model(hs.open_checkpoint(out), attn_implementation="eager")
    expanded = stock(out, tmp_path / "expanded", type(eager))
    torch.testing.assert_close(outputs(eager), outputs(expanded), **CLOSE)
    model = load_model(hs.open_checkpoint(out))
    torch.testing.assert_close(outputs(model), outputs(expanded), **CLOSE)
    if hasattr(model, "generate") and model.can_generate():
        asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 10).long()}
        assert torch.equal(model.generate(tiny.tokens(), **asked), expanded.generate(tiny.tokens(), **asked))
    assert not torch.allclose(outputs(model), outputs(type(model).from_pretrained(dense.path).eval()), atol=1e-3)
    assert unique_parameter_bytes(model) == found.estimate.shared_bytes < found.estimate.dense_bytes
    assert sum(t.nbytes for t in load_file(out / MODEL).values()) == found.estimate.shared_bytes
    assert verify(hs.open_checkpoint(out), dense).ok


@pytest.mark.parametrize("name", some_of(FUSED, "phi3"))
def test_values_in_one_matrix_with_queries_stay_as_they_are(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    with pytest.raises(PlanError, match="should hold v and o of all units and nothing else"):
        narrow(dense)


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_was_not_shown_to_take_narrow_values_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    with pytest.raises(PlanError, match=f"values cannot be narrowed in this model: .*{REFUSED[name]}") as error:
        hs.share(dense, planned(dense))
    assert "\n" not in str(error.value)


# ---- the numbers


def test_values_are_cut_to_the_best_of_their_rank_by_the_weights_alone(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "dense"))
    out = hs.share(dense, planned(dense)).save(tmp_path / "shared")
    expanded = hs.open_checkpoint(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded"))
    for layer, width in WIDTHS.items():
        v, o = (f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "vo")
        for group in range(2):
            products = [product(dense.read(v), dense.read(o), head, group) for head in (2 * group, 2 * group + 1)]
            found = [product(expanded.read(v), expanded.read(o), head, group) for head in (2 * group, 2 * group + 1)]
            left, values, right = torch.linalg.svd(torch.cat(products), full_matrices=False)
            best = left[:, :width] * values[:width] @ right[:width]
            torch.testing.assert_close(torch.cat(found), best, rtol=1e-4, atol=1e-6)
    untouched = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(expanded.read(untouched), dense.read(untouched))


def product(v: Tensor, o: Tensor, head: int, group: int) -> Tensor:
    """What one query head of 8 dimensions gives of what enters."""
    return (o[:, head * 8 : head * 8 + 8] @ v[group * 8 : group * 8 + 8]).double()


def test_a_plan_on_a_dense_model_has_the_tensors_of_what_it_shares_to(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-biased", tmp_path / "dense"))
    plan = planned(dense, removal(dense, {2: [1]}))
    out = hs.share(dense, plan).save(tmp_path / "shared")
    before = ExpandedTensors.planned(dense, plan)
    after = ExpandedTensors.of(hs.open_checkpoint(out))
    for name in dense.tensors:
        torch.testing.assert_close(before.read(name), after.read(name), rtol=0, atol=0)


def test_values_that_do_not_span_their_dimensions_are_cut_all_the_same(dense: hs.Checkpoint, tmp_path: Path) -> None:
    tensors = load_file(dense.path / MODEL)
    tensors["model.layers.0.self_attn.v_proj.weight"].zero_()
    tensors["model.layers.2.self_attn.v_proj.weight"][3:8] = 0
    save_file(tensors, dense.path / MODEL, metadata={"format": "pt"})
    dense = hs.open_checkpoint(dense.path)
    out = hs.share(dense, planned(dense)).save(tmp_path / "shared")
    expanded = stock(out, tmp_path / "expanded", tf.LlamaForCausalLM)
    torch.testing.assert_close(outputs(hs.load(out)), outputs(expanded), **CLOSE)


def test_numbers_that_are_not_finite_are_one_error(dense: hs.Checkpoint, tmp_path: Path) -> None:
    tensors = load_file(dense.path / MODEL)
    tensors["model.layers.2.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(tensors, dense.path / MODEL, metadata={"format": "pt"})
    dense = hs.open_checkpoint(dense.path)
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.o_proj\.weight holds NaN"):
        hs.share(dense, planned(dense)).save(tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


# ---- beside other sections


def removal(dense: hs.Checkpoint, removed: dict[int, list[int]]) -> Removal:
    return Removal(layout=dense.layouts.attention, removed=removed)


def neurons(dense: hs.Checkpoint) -> Removal:
    assert dense.layouts.neurons is not None
    removed = {layer: random.Random(layer).sample(range(48), 16) for layer in (0, 1, 2)}
    return Removal(layout=dense.layouts.neurons, removed=removed)


def ties(dense: hs.Checkpoint, *parts: Part, layers: tuple[int, int] = (2, 0)) -> Selection:
    tie = Tie(HeadUnit(layers[0], 1), HeadUnit(layers[1], 0))
    return Selection(layout=dense.layouts.attention.only(parts), ties=(tie,))


@pytest.mark.parametrize("storage", some_of(["owner", "alias", "indirect", "auto"], "auto"))
def test_units_and_neurons_go_from_a_narrow_layer_and_its_queries_and_keys_are_tied(
    storage: str, dense: hs.Checkpoint, tmp_path: Path
) -> None:
    more = (removal(dense, {0: [1], 3: [0]}), neurons(dense), ties(dense, Part.Q, Part.K))
    found = hs.share(dense, planned(dense, *more))
    out = found.save(tmp_path / "shared")
    model = hs.load(out, storage=storage)
    expanded = stock(out, tmp_path / "expanded", tf.LlamaForCausalLM)
    torch.testing.assert_close(outputs(model), outputs(expanded), **CLOSE)
    attention = model.model.layers[0].self_attn
    assert tuple(attention.v_proj.weight.shape) == (5, 32)
    assert tuple(attention.o_proj.weight.shape) == (32, 2 * 5)
    assert sum(t.nbytes for t in load_file(out / MODEL).values()) == found.estimate.shared_bytes
    assert verify(hs.open_checkpoint(out), dense).ok
    torch.testing.assert_close(outputs(model.dequantize()), outputs(expanded), **CLOSE)


@pytest.mark.parametrize("layers", [(2, 1), (3, 2)], ids=["borrows", "lends"])
@pytest.mark.parametrize("part", [Part.V, Part.O])
def test_v_and_o_of_a_narrow_layer_are_neither_borrowed_nor_lent(
    part: Part, layers: tuple[int, int], dense: hs.Checkpoint
) -> None:
    selection = ties(dense, part, layers=layers)
    with pytest.raises(PlanError, match="values of layer 2 are narrow: there, v and o are neither borrowed nor lent"):
        planned(dense, selection)
    plan = planned(dense)
    assert not plan.may_lend(HeadUnit(2, 0), selection)
    assert plan.may_lend(HeadUnit(1, 0), selection)
    assert plan.may_lend(HeadUnit(2, 0), ties(dense, Part.Q, Part.K))


def test_a_narrow_layer_has_no_factored_units(dense: hs.Checkpoint) -> None:
    layout = dense.layouts.attention.only((Part.O,))
    factored = LowRankUnits(layout=layout, units={2: [0]}, ranks={2: [2]})
    with pytest.raises(PlanError, match="layer 2 has narrow values and factored units"):
        planned(dense, factored)
    planned(dense, LowRankUnits(layout=layout, units={1: [0]}, ranks={1: [2]}))


def test_a_layer_without_attention_has_no_values_to_narrow(dense: hs.Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="layer 2 loses all its attention, so it has no values to narrow"):
        planned(dense, removal(dense, {2: [0, 1]}))
    out = hs.share(dense, planned(dense, removal(dense, {1: [0, 1]}))).save(tmp_path / "shared")
    expanded = stock(out, tmp_path / "expanded", tf.LlamaForCausalLM)
    model = hs.load(out)
    torch.testing.assert_close(outputs(model), outputs(expanded), **CLOSE)
    torch.testing.assert_close(outputs(model.dequantize()), outputs(expanded), **CLOSE)


def test_narrow_values_stand_beside_factored_units_of_other_layers(dense: hs.Checkpoint, tmp_path: Path) -> None:
    factored = LowRankUnits(layout=dense.layouts.attention.only((Part.O,)), units={1: [0]}, ranks={1: [2]})
    out = hs.share(dense, planned(dense, factored)).save(tmp_path / "shared")
    expanded = stock(out, tmp_path / "expanded", tf.LlamaForCausalLM)
    torch.testing.assert_close(outputs(hs.load(out)), outputs(expanded), **CLOSE)


# ---- running


def test_the_cache_of_values_is_narrow_and_grows_or_has_its_place(shared: Path, tmp_path: Path) -> None:
    model = hs.load(shared)
    cache = model(input_ids=tiny.tokens(), use_cache=True)["past_key_values"]
    assert [tuple(layer.values.shape[1:]) for layer in cache.layers] == [(2, 10, 5), (2, 10, 8), (2, 10, 3), (2, 10, 8)]
    assert {tuple(layer.keys.shape[1:]) for layer in cache.layers} == {(2, 10, 8)}
    asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 10).long()}
    expanded = stock(shared, tmp_path / "expanded", tf.LlamaForCausalLM)
    tokens = expanded.generate(tiny.tokens(), **asked)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(tiny.tokens(), **asked, **static), tokens)


def test_values_are_plain_tensors_once_they_are_viewed_as_heads(shared: Path) -> None:
    projection = hs.load(shared).model.layers[0].self_attn.v_proj
    values = projection(torch.randn(2, 7, 32))
    assert tuple(values.shape) == (2, 7, 10)
    for view in (values.view(2, 7, -1, 8), values.view((2, 7, -1, 8)), (values * 2).view(torch.Size((2, 7, -1, 8)))):
        assert type(view) is Tensor
        assert tuple(view.shape) == (2, 7, 2, 5)
    assert "width=5" in repr(projection)


def test_it_trains_and_its_gradients_are_those_of_the_stock_model(shared: Path, tmp_path: Path) -> None:
    model = hs.load(shared, storage="owner").train()
    expanded = stock(shared, tmp_path / "expanded", tf.LlamaForCausalLM).train()
    for each in (model, expanded):
        each(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    rows = [row for head in range(2) for row in range(head * 8, head * 8 + 5)]
    columns = [column for head in range(4) for column in range(head * 8, head * 8 + 5)]
    ours = model.model.layers[0].self_attn
    theirs = expanded.model.layers[0].self_attn
    torch.testing.assert_close(ours.v_proj.weight.grad, theirs.v_proj.weight.grad[rows], **CLOSE)
    torch.testing.assert_close(ours.o_proj.weight.grad, theirs.o_proj.weight.grad[:, columns], **CLOSE)


def test_it_is_saved_again_byte_for_byte_and_dequantized(shared: Path, tmp_path: Path) -> None:
    model = hs.load(shared)
    before = outputs(model)
    model.save_pretrained(tmp_path / "again")
    again, first = (load_file(folder / MODEL) for folder in (tmp_path / "again", shared))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert torch.equal(outputs(hs.load(tmp_path / "again")), before)
    whole = model.dequantize()
    torch.testing.assert_close(outputs(whole), before, **CLOSE)
    assert tuple(whole.model.layers[0].self_attn.v_proj.weight.shape) == (16, 32)


@pytest.mark.slow
def test_torch_compile_takes_a_model_of_narrow_values_as_one_graph(shared: Path) -> None:
    """In a fresh process, where nothing checks types at run time, which torch.compile cannot trace."""
    script = f"""
import torch, headshare
model = headshare.load({str(shared)!r}).eval()
tokens = torch.arange(5, 15)[None]
with torch.no_grad():
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    print(float((compiled(input_ids=tokens).logits - model(input_ids=tokens).logits).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_flash_attention_which_needs_equal_widths_is_refused_in_one_line(shared: Path) -> None:
    config = tf.AutoConfig.from_pretrained(shared)
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(StorageError, match=r'whose values are as wide as keys.* attn_implementation="sdpa"'):
        check_attention(config, plan)
    config._attn_implementation_internal = "sdpa"
    check_attention(config, plan)
    config._attn_implementation_internal = "flash_attention_2"
    check_attention(config, hs.SharePlan())


# ---- plans and checks


def test_its_plan_is_json_like_any_and_wrong_ones_cannot_be_made(dense: hs.Checkpoint) -> None:
    plan = planned(dense)
    assert hs.SharePlan.from_json(plan.to_json()) == plan
    written = json.loads(plan.to_json())
    assert written["narrow_values"][0]["widths"] == {"0": 5, "2": 3}
    for widths in ({"0": 8}, {"0": 0}, {"0": True}, {"0": "5"}, {"0": 2.0}, {"4": 5}, {"-1": 5}, [5], {"0": 10**30}):
        written["narrow_values"][0]["widths"] = widths
        with pytest.raises(PlanError):
            hs.SharePlan.from_dict(written)
    with pytest.raises(PlanError, match="lists narrow values twice"):
        planned(dense, narrow(dense, {1: 4}))
    with pytest.raises(PlanError, match="in parts v,o; this layout is of attention units and has q,k"):
        NarrowValues(layout=dense.layouts.attention.only((Part.Q, Part.K)), widths={0: 5})


def test_a_plan_of_another_grid_is_refused(dense: hs.Checkpoint, tmp_path: Path) -> None:
    other = hs.open_checkpoint(tiny.make_llama(tmp_path / "other", num_key_value_heads=4))
    with pytest.raises(PlanError, match="another model"):
        hs.share(dense, planned(other))
    halves = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    other = hs.open_checkpoint(tiny.make_llama(tmp_path / "halves", **halves))
    with pytest.raises(PlanError, match="see the attention units of this model in different ways"):
        planned(dense, removal(other, {}))


def test_it_is_described_drawn_and_estimated(dense: hs.Checkpoint, shared: Path, run: Run) -> None:
    plan = planned(dense)
    assert describe(plan)["narrow_values"][0]["widths"] == {"0": 5, "2": 3}
    assert "5 of 8 dimensions" in picture(plan)
    assert "v dimensions of values dropped" in picture(plan)
    assert given_up(plan) == [1, 0, 1, 0]
    assert "narrow values in 2 layers" in hs.share(dense, plan).estimate.in_words()
    assert "3 of 8 dimensions" in run("inspect", shared).out
    assert run("verify", shared, "--against", dense.path).status == 0


def test_a_changed_number_is_noticed_in_a_narrow_layer_too(dense: hs.Checkpoint, shared: Path) -> None:
    tensors = load_file(shared / MODEL)
    tensors["model.layers.2.self_attn.v_proj.weight"][1, 2] += 0.1
    save_file(tensors, shared / MODEL, metadata={"format": "pt"})
    unseal(shared)
    found = verify(hs.open_checkpoint(shared), dense)
    digest, values = found.problems
    assert "digest differs" in digest
    assert values == "the narrow values of layer 2 are not as near to the dense model's as they can be"


def test_a_checkpoint_that_does_not_hold_what_its_plan_says_is_refused(shared: Path) -> None:
    config = json.loads((shared / "config.json").read_text())
    config["quantization_config"]["plan"]["narrow_values"][0]["widths"]["0"] = 4
    (shared / "config.json").write_text(json.dumps(config))
    unseal(shared)
    with pytest.raises(CheckpointError, match="does not hold what its plan says"):
        hs.load(shared)
