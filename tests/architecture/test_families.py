"""Every family: what is shared, saved and loaded equals a stock model with donors' rows written in."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import headshare as hs
from headshare.errors import ArchitectureError
from headshare.experiments.controls import overwrite_recipients
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.plan.units import Part
from support import tiny

CASES = [
    pytest.param(name, parts, id=f"{name}-{parts}")
    for name, (_, _, ffn) in tiny.FAMILIES.items()
    for parts in ("qkv", "qk", "qkvo", *([f"qkvo+{ffn}"] if ffn else []))
]


@pytest.mark.parametrize("storage", ["owner", "alias"])
@pytest.mark.parametrize(("name", "parts"), CASES)
def test_a_shared_model_equals_a_stock_model_with_donor_rows_written_in(
    name: str, parts: str, storage: str, tmp_path: Path
) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense, parts=parts), 0.5, parts=parts)
    shared = hs.share(dense, plan)
    out = shared.save(tmp_path / "shared")
    model = load_model(hs.open_checkpoint(out), storage=storage)
    stock = type(model).from_pretrained(dense.path).eval()
    overwrite_recipients(stock, plan)
    with torch.inference_mode():
        ours, theirs = model(input_ids=tiny.tokens())[0], stock(input_ids=tiny.tokens())[0]
    assert plan.ties > 0
    assert torch.equal(ours, theirs)
    assert unique_parameter_bytes(model) == shared.estimate.shared_bytes < shared.estimate.dense_bytes
    assert sum(t.nbytes for t in load_file(out / "model.safetensors").values()) == shared.estimate.shared_bytes


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_expanding_a_shared_model_gives_a_stock_folder_with_the_same_logits(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo")
    out = hs.share(dense, plan).save(tmp_path / "shared")
    stock_folder = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    stock = tiny.FAMILIES[name][0].from_pretrained(stock_folder).eval()
    shared = load_model(hs.open_checkpoint(out))
    with torch.inference_mode():
        assert torch.equal(stock(input_ids=tiny.tokens())[0], shared(input_ids=tiny.tokens())[0])
    assert "quantization_config" not in stock.config.to_dict()


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox", "falcon-gqa", "phi3", "opt", "mpnet"])
def test_feed_forward_neuron_groups_are_shared_like_whole_layers(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense, parts="ffn", ffn_groups=4), 0.4, parts="ffn")
    out = hs.share(dense, plan).save(tmp_path / "shared")
    model = load_model(hs.open_checkpoint(out))
    stock = type(model).from_pretrained(dense.path).eval()
    overwrite_recipients(stock, plan)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=tiny.tokens())[0], stock(input_ids=tiny.tokens())[0])
    assert plan.ties == int(0.4 * plan.selections[0].layout.units)


def test_baichuan_is_shared_and_expanded_without_running_its_code(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make_baichuan(tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo")
    out = hs.share(dense, plan).save(tmp_path / "shared")
    expanded = load_file(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded") / "model.safetensors")
    original = load_file(dense.path / "model.safetensors")
    recipient, donor = plan.selections[0].ties[0]
    for third in range(3):  # W_pack is q, then k, then v, four heads of eight rows each
        into = slice(third * 32 + recipient.group * 8, third * 32 + recipient.group * 8 + 8)
        taken = slice(third * 32 + donor.group * 8, third * 32 + donor.group * 8 + 8)
        ours = expanded[f"model.layers.{recipient.layer}.self_attn.W_pack.weight"][into]
        assert torch.equal(ours, original[f"model.layers.{donor.layer}.self_attn.W_pack.weight"][taken])
    assert (out / "modeling_baichuan.py").is_file()
    assert hs.open_checkpoint(out).shapes["model.layers.3.self_attn.W_pack.weight"][0] < 96


def test_units_of_fused_weights_are_the_heads_that_the_model_splits(tmp_path: Path) -> None:
    """Zeroing a unit's q, k and v silences just its head; the model's own attention says which head that is."""
    folder = tiny.make("gpt_neox", tmp_path / "dense")
    layout = hs.score_units(hs.open_checkpoint(folder)).tables[0].layout
    model = transformers.GPTNeoXForCausalLM.from_pretrained(folder, attn_implementation="eager")
    projection = model.gpt_neox.layers[1].attention.query_key_value
    for part in ("q", "k"):
        start, stop = layout.parts[Part(part)].span(2)
        with torch.no_grad():
            projection.weight[start:stop] = 0
            projection.bias[start:stop] = 0
    weights = model(input_ids=tiny.tokens(), output_attentions=True).attentions[1]
    uniform = torch.tril(torch.ones(10, 10)) / torch.arange(1, 11)[:, None]
    assert torch.allclose(weights[:, 2], uniform.expand(2, 10, 10), atol=1e-6)
    assert not torch.allclose(weights[:, 1], uniform.expand(2, 10, 10), atol=1e-3)


def test_experts_are_left_alone_and_said_so(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("mixtral", tmp_path / "dense"))
    with pytest.raises(ArchitectureError, match="Experts are left alone"):
        hs.score_units(dense, parts="ffn")


def test_an_unlisted_model_with_separate_projections_is_recognised(tmp_path: Path) -> None:
    config = transformers.StableLmConfig(**{**tiny.COMMON, "num_key_value_heads": 4})
    transformers.StableLmForCausalLM(config).save_pretrained(tmp_path / "dense")
    dense = hs.open_checkpoint(tmp_path / "dense")
    out = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.3)).save(tmp_path / "shared")
    assert hs.open_checkpoint(out).plan is not None


def test_an_unlisted_model_with_fused_projections_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, n_layer=3, n_head=4)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ArchitectureError, match=r"'bloom'.*query_key_value.*fused.*families\.py"):
        hs.score_units(hs.open_checkpoint(tmp_path / "dense"))


def test_a_model_with_cross_attention_is_refused(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=tiny.VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ArchitectureError, match="cross-attention"):
        hs.score_units(hs.open_checkpoint(tmp_path / "dense"))


def test_a_config_that_contradicts_the_shapes_is_refused(llama: Path) -> None:
    text = (llama / "config.json").read_text()
    (llama / "config.json").write_text(text.replace('"num_key_value_heads": 2', '"num_key_value_heads": 4'))
    with pytest.raises(ArchitectureError, match=r"k_proj.*headshare does not know"):
        hs.score_units(hs.open_checkpoint(llama))


def test_the_text_model_inside_a_vision_model_is_found_beside_its_tower(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = {**tiny.WIDE_HEADS, "vocab_size": 300}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    dense = hs.open_checkpoint(tmp_path / "dense")
    out = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "shared")
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(out).eval()
    stock = transformers.Gemma3ForConditionalGeneration.from_pretrained(dense.path).eval()
    plan = hs.open_checkpoint(out).plan
    assert plan is not None
    overwrite_recipients(stock, plan)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=tiny.tokens()).logits, stock(input_ids=tiny.tokens()).logits)
