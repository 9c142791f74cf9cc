"""Walking a model layer by layer gives the hidden states that the stock model has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headshare as hs
from headshare.architecture.recognition import ffn_layout
from headshare.calibration.costs.measured import predicts
from headshare.calibration.layerwise import layers as streams
from headshare.calibration.layerwise.layers import Layers
from headshare.errors import ArchitectureError, CheckpointError, EvaluationError
from headshare.integrations.transformers.loading import load_model
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.ties import Selection
from headshare.plan.units import Part
from support import tiny
from support.walks import ALL, hidden_states, layers_in

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ENCODERS = ("bert", "roberta", "mpnet", "electra")
HEADS: dict[str, tuple[type, Any, str | None]] = {
    **{name: row for name, row in ALL.items() if name not in ENCODERS},
    "gemma2-capped": (tf.Gemma2ForCausalLM, tf.Gemma2Config(**tiny.WIDE_HEADS, final_logit_softcapping=0.5), "ffn"),
    "granite-scaled": (tf.GraniteForCausalLM, tf.GraniteConfig(**tiny.GROUPED, logits_scaling=3.0), "ffn"),
    "gpt2-untied": (tf.GPT2LMHeadModel, tf.GPT2Config(**tiny.GPT2, tie_word_embeddings=False), "ffn"),
    "opt-projected": (tf.OPTForCausalLM, tf.OPTConfig(**{**tiny.OPT, "word_embed_proj_dim": 16}), "ffn"),
    "mixtral-routed": (tf.MixtralForCausalLM, tf.MixtralConfig(**tiny.MOE, output_router_logits=True), None),
}


@pytest.fixture(autouse=True)
def _more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "FAMILIES", ALL)


def stock(name: str, folder: Path) -> Any:
    return ALL[name][0].from_pretrained(folder, dtype=torch.float32).eval()


def walked(layers: Layers, tokens: Tensor) -> list[Tensor]:
    found = [layers.start(tokens)]
    for layer in range(layers.count):
        built = layers.build(layer)
        size = layers.batch(tokens.shape[1])
        found.append(torch.cat([layers.run(built, layer, batch)[0] for batch in found[-1].split(size)]))
    return found


@pytest.mark.parametrize("name", ALL)
def test_every_family_is_walked_as_the_stock_model_walks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of two windows and a last one of one."""
    monkeypatch.setattr(streams, "BATCH_TOKENS", 25)
    folder, tokens = tiny.make(name, tmp_path / "dense"), tiny.tokens(10, 5)
    found = walked(Layers(hs.open_checkpoint(folder)), tokens)
    expected = hidden_states(stock(name, folder), tokens)
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_a_layer_remembers_nothing_of_what_it_was_run_on(name: str, tmp_path: Path) -> None:
    """Run on one batch, on another, and in a batch of a size that `start` has not seen, or without a start at all."""
    checkpoint = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    layers, fresh = Layers(checkpoint), Layers(checkpoint)
    stream = layers.start(tiny.tokens(10, 4))
    built = layers.build(1)
    whole = layers.run(built, 1, stream)[0]
    reversed_ = layers.run(built, 1, stream.flip(0))[0]
    torch.testing.assert_close(reversed_.flip(0), whole, **CLOSE)
    torch.testing.assert_close(layers.run(built, 1, stream[1:])[0], whole[1:], **CLOSE)
    torch.testing.assert_close(fresh.run(fresh.build(1), 1, stream[:3])[0], whole[:3], **CLOSE)
    assert fresh.start(tiny.tokens(10, 4)).equal(stream)


# ---- with its head


def check_logits(folder: Path) -> None:
    """The walk ends in a stock model's logits: of all positions, of some, and of states that nothing was before."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    checkpoint, tokens = hs.open_checkpoint(folder), tiny.tokens(10, 3)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    layers = Layers(checkpoint, head=True)
    found = walked(layers, tokens)
    torch.testing.assert_close(layers.logits(found[-1]), expected, **CLOSE)
    torch.testing.assert_close(layers.logits(found[-1][1:, ::4]), expected[1:, ::4], **CLOSE)
    torch.testing.assert_close(Layers(checkpoint, head=True).logits(found[-1][:, -1:]), expected[:, -1:], **CLOSE)
    assert layers.run(layers.build(1), 1, found[1])[0].equal(found[2])  # logits leave the layers as they were
    for with_head, bare in zip(found, walked(Layers(checkpoint), tokens), strict=True):
        assert with_head.equal(bare)


@pytest.mark.parametrize("name", HEADS)
def test_with_its_head_the_walk_ends_in_the_stock_models_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "FAMILIES", HEADS)
    folder = tiny.make(name, tmp_path / "dense")
    assert predicts(hs.open_checkpoint(folder))
    check_logits(folder)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As GPT-2 is stored by its authors, without the name of the bare model inside the one with its head."""
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_a_head_of_its_own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers does not tie two tensors that are both stored and differ, whatever the configuration says."""
    return {**tensors, "lm_head.weight": torch.randn(tiny.VOCABULARY, 32)}


@pytest.mark.parametrize(
    ("name", "change"),
    [("gpt2", renamed), ("llama-gqa", with_a_head_of_its_own)],
)
def test_a_head_is_found_however_it_is_stored(name: str, change: Any, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_logits(folder)


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral"])
def test_a_shared_checkpoint_with_its_head_ends_in_the_shared_models_logits(name: str, tmp_path: Path) -> None:
    shared = hs.open_checkpoint(shared_folder(name, tmp_path))
    layers, model = Layers(shared, head=True), load_model(shared, storage="owner")
    *_, left = walked(layers, tiny.tokens(10, 3))
    with torch.no_grad():
        expected = model(input_ids=tiny.tokens(10, 3)).logits
    torch.testing.assert_close(layers.logits(left), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lacking", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_model_that_lacks_what_its_head_needs_is_refused(lacking: str, tmp_path: Path) -> None:
    """torch multiplies with weights that are not there, and gives numbers."""
    folder = tiny.make("llama-mha", tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    del tensors[lacking]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks weights.*{lacking}"):
        Layers(hs.open_checkpoint(folder), head=True).logits(torch.randn(2, 5, 32))


# ---- what passes through a module


@pytest.mark.parametrize("name", ["llama-biased", "gpt2", "opt", "bert", "phi3", "falcon-mha", "gemma2"])
def test_what_passes_through_a_module_is_what_the_stock_model_passes(name: str, tmp_path: Path) -> None:
    folder, tokens = tiny.make(name, tmp_path / "dense"), tiny.tokens(10, 3)
    layers, model = Layers(hs.open_checkpoint(folder)), stock(name, folder)
    paths = tuple(layers.path(part) for part in (Part.O, Part.UP, Part.DOWN))
    passed: dict[str, tuple[Tensor, Tensor]] = {}
    for path in paths:
        layers_in(model)[2].get_submodule(path).register_forward_hook(
            lambda _, args, output, path=path: passed.update({path: (args[0].clone(), output.clone())})
        )
    entering = hidden_states(model, tokens)[2]
    built = layers.build(2)
    seen = layers.run(built, 2, entering, paths)[1]
    reached = layers.run_to(built, 2, entering, paths[2], paths[:2])
    for path, (given, made) in passed.items():
        torch.testing.assert_close(seen.inputs[path], given.reshape(3, 10, -1), **CLOSE)
        torch.testing.assert_close(seen.outputs[path], made.reshape(3, 10, -1), **CLOSE)
        torch.testing.assert_close(reached.inputs[path], seen.inputs[path])
    assert set(reached.outputs) == set(paths[:2])
    assert not built._forward_hooks and not built.get_submodule(paths[2])._forward_pre_hooks


def shared_folder(name: str, tmp_path: Path, *, removed: bool = False) -> Path:
    """A checkpoint shared by scaled ties of all of attention, its scales drawn; or with neurons removed."""
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo")
    selections = tuple(Selection(layout=one.layout, ties=one.ties, scale=True) for one in plan.selections)
    removals = ()
    if removed:
        layout = ffn_layout(dense.config, dense.shapes, 48)
        removals = (Removal(layout=layout, removed={0: [1, 2, 5], 3: [0, 47]}),)
    plan = SharePlan(model_type=plan.model_type, selections=selections, removals=removals)
    out = hs.share(dense, plan).save(tmp_path / "shared")
    tensors = load_file(out / "model.safetensors")
    for key, tensor in tensors.items():
        tensor += 0.05 * torch.randn_like(tensor) * (3 if key.endswith("tie_scale") else 1)  # as if it were trained
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("name", "removed"),
    [("llama-gqa", False), ("llama-biased", True), ("gpt2", False), ("phi3", False), ("bert", False), ("mpnet", False),
     ("falcon-mha", False), ("mixtral", False), ("qwen3-moe", False)],
)  # fmt: skip
def test_a_shared_checkpoint_is_walked_as_the_shared_model_walks(name: str, removed: bool, tmp_path: Path) -> None:
    shared = hs.open_checkpoint(shared_folder(name, tmp_path, removed=removed))
    found = walked(Layers(shared), tiny.tokens(10, 5))
    expected = hidden_states(load_model(shared, storage="owner"), tiny.tokens(10, 5))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_are_walked_in_float32(tmp_path: Path) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "dense")
    tf.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    found = walked(Layers(hs.open_checkpoint(tmp_path / "half")), tiny.tokens(10, 2))
    for ours, theirs in zip(found, hidden_states(stock("llama-gqa", tmp_path / "half"), tiny.tokens()), strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_old_names_of_norms_are_found_inside_and_outside_of_layers(tmp_path: Path) -> None:
    folder = tiny.make("bert", tmp_path / "dense")
    expected = hidden_states(stock("bert", folder), tiny.tokens())
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(folder / "model.safetensors")
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    assert "bert.embeddings.LayerNorm.gamma" in tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layers = Layers(hs.open_checkpoint(folder))
    assert not layers.shell.held
    for ours, theirs in zip(walked(layers, tiny.tokens()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_the_text_model_inside_a_vision_model_is_walked(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**tiny.GROUPED).to_dict(),
        vision_config=tf.CLIPVisionConfig(**vision).to_dict(),
        image_token_index=3,
    )
    tf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    model = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "dense").eval()
    text = next(one for one in model.modules() if isinstance(one, tf.LlamaModel))
    layers = Layers(hs.open_checkpoint(tmp_path / "dense"))
    expected = hidden_states(text, tiny.tokens(10, 3))
    built = layers.build(0)
    first = layers.run(built, 0, layers.start(tiny.tokens(10, 3)))[0]
    torch.testing.assert_close(first, expected[1], **CLOSE)
    torch.testing.assert_close(layers.run(built, 0, expected[0])[0], expected[1], **CLOSE)


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral"])
def test_replaced_tensors_stand_in_and_are_not_written_to(name: str, tmp_path: Path) -> None:
    layers = Layers(hs.open_checkpoint(tiny.make(name, tmp_path / "dense")))
    given = {layers.tensor(Part.O, 1): torch.randn(32, 32)}
    before = given[layers.tensor(Part.O, 1)].clone()
    built, path = layers.build(1, given), layers.path(Part.O)
    assert torch.equal(built.get_submodule(path).weight, before)
    built.get_submodule(path).weight.zero_()
    assert torch.equal(given[layers.tensor(Part.O, 1)], before)
    assert layers.build(1).get_submodule(path).weight.any()
    with pytest.raises(CheckpointError, match=r"o_proj.weight has shape \(2, 2\)"):
        layers.build(1, {layers.tensor(Part.O, 1): torch.zeros(2, 2)})


def test_parts_have_paths_and_tensors(tmp_path: Path) -> None:
    layers = Layers(hs.open_checkpoint(tiny.make("gpt2", tmp_path / "dense")))
    assert (layers.path(Part.Q), layers.path(Part.O), layers.path(Part.DOWN)) == (
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_proj",
    )
    assert layers.tensor(Part.DOWN, 3) == "transformer.h.3.mlp.c_proj.weight"
    assert layers.in_out
    with pytest.raises(ArchitectureError, match="no part gate"):
        layers.path(Part.GATE)
    experts = Layers(hs.open_checkpoint(tiny.make("mixtral", tmp_path / "experts")))
    assert experts.ffn is None
    assert not experts.in_out
    with pytest.raises(ArchitectureError, match="no part down"):
        experts.tensor(Part.DOWN, 0)


@pytest.mark.parametrize(("name", "post_norm"), [("bert", True), ("mpnet", True), ("electra", True), ("gpt2", False)])
def test_norms_after_the_sum_are_known_by_the_layers_names(name: str, post_norm: bool, tmp_path: Path) -> None:
    assert Layers(hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))).post_norm is post_norm


def test_a_model_that_lacks_what_its_layers_need_is_refused(tmp_path: Path) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights.*embed_tokens"):
        Layers(hs.open_checkpoint(folder)).start(tiny.tokens())


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="code of its own"):
        Layers(hs.open_checkpoint(tiny.make_baichuan(tmp_path / "dense")))


def test_a_module_that_is_never_reached_is_named(llama: Path) -> None:
    layers = Layers(hs.open_checkpoint(llama))
    built = layers.build(0)
    built.aside = nn.Identity()
    with pytest.raises(ArchitectureError, match="never calls its aside"):
        layers.run_to(built, 0, layers.start(tiny.tokens()), "aside")
    assert not built.aside._forward_pre_hooks


def test_an_error_inside_the_model_is_named(llama: Path) -> None:
    layers = Layers(hs.open_checkpoint(llama))
    with pytest.raises(EvaluationError, match=r"cannot be run as its config\.json describes it: IndexError"):
        layers.start(torch.full((1, 4), tiny.VOCABULARY + 5))
    assert layers.start(tiny.tokens()).shape == (2, 10, 32)


def test_logits_are_the_same_where_config_json_asks_for_outputs_without_names(llama: Path) -> None:
    leaving = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = Layers(hs.open_checkpoint(llama), head=True).logits(leaving)
    file = llama / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "return_dict": False}))
    assert torch.equal(Layers(hs.open_checkpoint(llama), head=True).logits(leaving), expected)


def test_what_is_seen_of_layers_with_short_numbers_is_float32(tmp_path: Path) -> None:
    """What is added to it must not be rounded as the layer's own products are."""
    layers = Layers(hs.open_checkpoint(tiny.make_llama(tmp_path / "llama")))
    path = layers.path(Part.O)
    entering = layers.start(tiny.tokens(10, 3))
    exact, wanted = layers.run(layers.build(0), 0, entering, (path,))
    with torch.autocast("cpu", torch.bfloat16):
        left, seen = layers.run(layers.build(0), 0, entering, (path,))
    assert {left.dtype, seen.inputs[path].dtype, seen.outputs[path].dtype} == {torch.float32}
    assert not torch.equal(left, exact)
    torch.testing.assert_close(seen.outputs[path], wanted.outputs[path], rtol=0.1, atol=1e-3)
