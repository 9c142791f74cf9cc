"""Estimated bytes are the bytes that are written, and the fractions of well-known models are what their shapes say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import DTYPES, TensorInfo
from headshare.errors import ArchitectureError, CheckpointError, OptionError, PlanError
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from support import tiny

MODEL = "model.safetensors"
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MIXED = [name for name, (_, _, ffn) in tiny.FAMILIES.items() if ffn]


def written(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / MODEL).values())


def as_type(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """Store every floating-point tensor of a folder as another type."""
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / MODEL).items()}
    save_file(weights, folder / MODEL, metadata={"format": "pt"})
    return hs.open_checkpoint(folder)


def headers_only(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Checkpoint:
    """A checkpoint as the hub's metadata describes it, with no file behind it."""
    tensors = {}
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        tensors[name] = TensorInfo(name, dtype, shape, MODEL, 0, nbytes)
    return Checkpoint(name="somebody/model", config=config, tensors=tensors)


def llama_like(
    layers: int, hidden: int, heads: int, kv_heads: int, neurons: int, vocabulary: int, model_type: str = "llama"
) -> Checkpoint:
    """Names and shapes of a Llama or Qwen3 whose input and output embeddings are two."""
    head = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        base = f"model.layers.{layer}."
        for part, rows in (("q", hidden), ("k", kv_heads * head), ("v", kv_heads * head)):
            shapes[f"{base}self_attn.{part}_proj.weight"] = (rows, hidden)
        shapes[f"{base}self_attn.o_proj.weight"] = (hidden, hidden)
        for norm in ("q_norm", "k_norm") if model_type == "qwen3" else ():
            shapes[f"{base}self_attn.{norm}.weight"] = (head,)
        for part in ("gate", "up"):
            shapes[f"{base}mlp.{part}_proj.weight"] = (neurons, hidden)
        shapes[f"{base}mlp.down_proj.weight"] = (hidden, neurons)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{base}{norm}.weight"] = (hidden,)
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    return headers_only(config, shapes)


LLAMA_2_7B = (32, 4096, 32, 32, 11008, 32000)


@pytest.mark.parametrize("parts", ["qkv", "ffn", "gateup", "qkvo+ffn", "o+down"])
@pytest.mark.parametrize("name", MIXED)
def test_the_estimate_is_what_is_written(name: str, parts: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    before = hs.estimate(dense, 0.3, parts=parts, ffn_ratio=0.5)
    plan = hs.make_plan(hs.score_units(dense, parts=parts), 0.3, parts=parts, ffn_ratio=0.5)
    shared = hs.share(dense, plan)
    out = shared.save(tmp_path / "shared")
    assert before == shared.estimate
    assert (before.dense_bytes, before.shared_bytes) == (written(dense.path), written(out))
    assert before.saved_bytes == before.dense_bytes - before.shared_bytes > 0
    assert before.saved_fraction == pytest.approx(1 - written(out) / written(dense.path))
    assert before.recipients == plan.ties


@pytest.mark.parametrize("match", ["q", "k", "v", "qkv", "separate"])
@pytest.mark.parametrize("mode", ["star", "root"])
def test_the_estimate_is_exact_for_every_match_function_and_mode_that_saves_n(
    match: str, mode: str, tmp_path: Path
) -> None:
    dense = hs.open_checkpoint(tiny.make("phi3", tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense, match), 0.7, mode=mode)
    out = hs.share(dense, plan).save(tmp_path / "shared")
    found = hs.estimate(dense, 0.7, match=match)
    assert found.shared_bytes == hs.estimate(dense, plan).shared_bytes == written(out)
    assert found.units == (24 if match == "separate" else 8)


def test_the_estimate_of_a_published_plan_is_what_is_written(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-mha", tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense), 0.7, mode="published")
    shared = hs.share(dense, plan)
    assert shared.estimate.shared_bytes == written(shared.save(tmp_path / "shared"))
    assert shared.estimate.recipients == plan.ties < hs.estimate(dense, 0.7).recipients


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, *CODES])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "falcon-gqa"])
def test_the_estimate_is_exact_when_weights_are_converted(
    name: str, stored: torch.dtype, dtype: str | None, tmp_path: Path
) -> None:
    dense = as_type(tiny.make(name, tmp_path / "dense"), stored)
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo+ffn"), 0.4, parts="qkvo+ffn")
    shared = hs.share(dense, plan, dtype=dtype)
    assert hs.estimate(dense, 0.4, parts="qkvo+ffn", dtype=dtype) == shared.estimate
    assert shared.estimate.shared_bytes == written(shared.save(tmp_path / "shared"))


def test_estimate_takes_the_same_names_of_types_as_share(llama: Path) -> None:
    dense = hs.open_checkpoint(llama)
    plan = hs.make_plan(hs.score_units(dense), 0.4)
    shared = hs.share(dense, plan, dtype="bfloat16")
    assert hs.estimate(dense, 0.4, dtype="bfloat16") == shared.estimate
    with pytest.raises(OptionError):
        hs.estimate(dense, 0.4, dtype="int3")


@pytest.mark.parametrize("groups", [1, 2, 16])
def test_neuron_groups_are_counted_as_units(groups: int, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("gpt_neox", tmp_path / "dense"))
    before = hs.estimate(dense, 0.5, parts="ffn", ffn_groups=groups)
    plan = hs.make_plan(hs.score_units(dense, parts="ffn", ffn_groups=groups), 0.5, parts="ffn")
    assert before.shared_bytes == written(hs.share(dense, plan).save(tmp_path / "shared"))
    assert (before.units, before.recipients) == (4 * groups, 2 * groups)


def test_a_scale_costs_one_number_for_each_shared_channel(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-mha", tmp_path / "dense"))
    plain = hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo")
    data = plain.model_dump(mode="json")
    data["selections"][0]["scale"] = True
    scaled = hs.share(dense, hs.SharePlan.from_dict(data))
    assert scaled.estimate.shared_bytes == hs.estimate(dense, plain).shared_bytes + 8 * 8 * 4
    assert scaled.estimate.shared_bytes == written(scaled.save(tmp_path / "shared"))


def test_layers_stored_in_different_types_are_counted_as_written_or_refused(llama: Path, tmp_path: Path) -> None:
    plan = hs.make_plan(hs.score_units(hs.open_checkpoint(llama)), 0.5)
    weights = load_file(llama / MODEL)
    for name in weights:
        if "layers.3." in name:
            weights[name] = weights[name].bfloat16()
    save_file(weights, llama / MODEL, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="stored as BF16, F32"):
        hs.score_units(hs.open_checkpoint(llama))
    try:
        shared = hs.share(hs.open_checkpoint(llama), plan)
    except hs.HeadshareError:
        return
    assert shared.estimate.shared_bytes == written(shared.save(tmp_path / "shared"))


def test_llama_2_7b_at_thirty_percent_of_heads_and_feed_forwards_is_27_6_percent_smaller() -> None:
    dense = llama_like(*LLAMA_2_7B)
    found = hs.estimate(dense, 0.3, parts="qkvo+ffn")
    assert found.dense_bytes == 2 * 6_738_415_616
    assert (found.units, found.recipients) == (1024 + 32, 307 + 9)
    assert found.saved_bytes == 2 * (307 * 4 * 128 * 4096 + 9 * 3 * 4096 * 11008)
    assert round(found.saved_fraction, 3) == 0.276
    assert "27.6% less" in found.in_words()


@pytest.mark.parametrize(
    ("shape", "parts", "percent"),
    [
        pytest.param((*LLAMA_2_7B, "llama"), "qkv", 23.9, id="Llama-2-7B"),
        pytest.param((*LLAMA_2_7B, "llama"), "qkvo", 31.9, id="Llama-2-7B with o"),
        pytest.param((40, 5120, 40, 40, 13824, 32000, "llama"), "qkv", 24.2, id="Llama-2-13B"),
        pytest.param((32, 4096, 32, 8, 14336, 128256, "llama"), "qkv", 10.0, id="Llama-3.1-8B"),
        pytest.param((36, 4096, 32, 8, 12288, 151936, "qwen3"), "qkv", 11.1, id="Qwen3-8B"),
        pytest.param((126, 16384, 128, 8, 53248, 128256, "llama"), "qkv", 9.4, id="Llama-3.1-405B"),
    ],
)
def test_the_share_of_well_known_models_that_is_at_stake(shape: tuple[Any, ...], parts: str, percent: float) -> None:
    found = hs.estimate(llama_like(*shape), 0.5, parts=parts)
    assert round(100 * found.parts_fraction, 1) == percent
    assert found.saved_fraction == pytest.approx(found.parts_fraction * found.recipients / found.units)


def test_matching_q_k_and_v_separately_puts_the_same_bytes_at_stake() -> None:
    together, apart = (hs.estimate(llama_like(*LLAMA_2_7B), 0.5, match=match) for match in ("qkv", "separate"))
    assert (apart.saved_bytes, apart.parts_fraction) == (together.saved_bytes, together.parts_fraction)
    assert (apart.units, apart.recipients) == (3 * together.units, 3 * together.recipients)


def test_an_estimate_needs_no_file() -> None:
    dense = llama_like(*LLAMA_2_7B)
    assert hs.estimate(dense, 0.1).recipients == 102
    with pytest.raises(CheckpointError, match="only the headers"):
        _ = dense.path


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_dense_bytes_are_those_of_the_stock_models_parameters(name: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    stock = tiny.FAMILIES[name][0].from_pretrained(folder)
    parameters = sum(parameter.nbytes for parameter in stock.parameters())
    assert hs.estimate(hs.open_checkpoint(folder), 0.3).dense_bytes == parameters


@pytest.mark.parametrize(
    "name", ["llama-gqa", "gpt2", "opt", "gemma2", "gemma3", "bert", "roberta", "falcon-mqa", "falcon-mha"]
)
def test_a_tied_output_embedding_that_is_stored_twice_is_counted_once(name: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    stock = tiny.FAMILIES[name][0].from_pretrained(folder)
    output = stock.get_output_embeddings().weight
    assert output is stock.get_input_embeddings().weight
    names = [key for key, parameter in stock.named_parameters(remove_duplicate=False) if parameter is output]
    weights = load_file(folder / MODEL)
    before = hs.estimate(hs.open_checkpoint(folder), 0.3)
    save_file({**weights, **{key: output.detach().clone() for key in names}}, folder / MODEL, metadata={"format": "pt"})
    dense = hs.open_checkpoint(folder)
    assert len(dense.tensors) == len(weights) + 1
    assert hs.estimate(dense, 0.3) == before
    assert before.dense_bytes == sum(parameter.nbytes for parameter in stock.parameters())


def test_a_tie_of_embeddings_that_the_configuration_leaves_to_its_default_is_known(tmp_path: Path) -> None:
    """As in the published config.json of GPT-2 and of Gemma, which do not mention it."""
    folder = tiny.make("gpt2", tmp_path / "dense")
    before = hs.estimate(hs.open_checkpoint(folder), 0.3)
    lines = (folder / "config.json").read_text().splitlines(keepends=True)
    (folder / "config.json").write_text("".join(line for line in lines if "tie_word_embeddings" not in line))
    weights = load_file(folder / MODEL)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, folder / MODEL, metadata={"format": "pt"})
    assert hs.estimate(hs.open_checkpoint(folder), 0.3) == before


def test_an_output_embedding_of_its_own_is_counted(tmp_path: Path) -> None:
    tied, untied = (tiny.make_llama(tmp_path / str(tie), tie_word_embeddings=tie) for tie in (True, False))
    both = [hs.estimate(hs.open_checkpoint(folder), 0.3).dense_bytes for folder in (tied, untied)]
    assert both[1] - both[0] == tiny.VOCABULARY * 32 * 4


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("llama-gqa", {"model.layers.{}.self_attn.rotary_emb.inv_freq": (4,)}),
        ("llama-gqa", {"model.rotary_emb.inv_freq": (4,)}),
        ("gpt2", {"transformer.h.{}.attn.bias": (1, 1, 64, 64), "transformer.h.{}.attn.masked_bias": ()}),
        (
            "gpt_neox",
            {
                "gpt_neox.layers.{}.attention.bias": (1, 1, 64, 64),
                "gpt_neox.layers.{}.attention.masked_bias": (),
                "gpt_neox.layers.{}.attention.rotary_emb.inv_freq": (1,),
            },
        ),
        ("bert", {"bert.embeddings.position_ids": (1, 64)}),
        ("roberta", {"roberta.embeddings.position_ids": (1, 64)}),
    ],
)
def test_rotary_tables_masks_and_positions_are_no_parameters(
    name: str, buffers: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    before = hs.estimate(hs.open_checkpoint(folder), 0.3)
    weights = load_file(folder / MODEL)
    for template, shape in buffers.items():
        for layer in range(4):
            kind = torch.long if "position_ids" in template else torch.float32
            weights[template.format(layer)] = torch.ones(shape, dtype=kind)
    save_file(weights, folder / MODEL, metadata={"format": "pt"})
    assert hs.estimate(hs.open_checkpoint(folder), 0.3) == before


def test_biases_of_attention_are_parameters(tmp_path: Path) -> None:
    """GPT-2's attention bias is a mask; Llama's and GPT-NeoX's are not."""
    for name in ("llama-biased", "gpt2", "gpt_neox"):
        folder = tiny.make(name, tmp_path / name)
        assert hs.estimate(hs.open_checkpoint(folder), 0.3).dense_bytes == written(folder)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_a_loaded_model_holds_as_many_bytes_as_estimated_whatever_else_is_stored(name: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    weights = load_file(folder / MODEL)
    embedding = next(tensor for key, tensor in weights.items() if key.endswith(("embed_tokens.weight", "wte.weight")))
    weights["lm_head.weight"] = embedding.clone()
    save_file(weights, folder / MODEL, metadata={"format": "pt"})
    dense = hs.open_checkpoint(folder)
    shared = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5))
    model = load_model(hs.open_checkpoint(shared.save(tmp_path / "shared")))
    assert unique_parameter_bytes(model) == shared.estimate.shared_bytes


@pytest.mark.parametrize(
    ("shape", "ratio", "expected"),
    [
        (
            (32, 4096, 32, 8, 14336, 128256),
            0.1,
            ["1.0% less", "That is little", "only 10.0% of this model", "qkvo+ffn"],
        ),
        ((32, 4096, 32, 8, 14336, 128256), 0.5, ["5.0% less", "10.0% of this model; no ratio can save more"]),
        (LLAMA_2_7B, 0.3, ["307 of 1024 units shared: 12,852.5 MiB becomes 11,931.5 MiB, 7.2% less."]),
    ],
)
def test_an_estimate_says_in_words_how_much_and_where_it_is_little(
    shape: tuple[Any, ...], ratio: float, expected: list[str]
) -> None:
    words = hs.estimate(llama_like(*shape), ratio).in_words()
    for some in expected:
        assert some in words


def test_a_good_saving_comes_without_a_warning() -> None:
    words = hs.estimate(llama_like(*LLAMA_2_7B), 0.3, parts="qkvo+ffn").in_words()
    assert words == "316 of 1056 units shared: 12,852.5 MiB becomes 9,302.5 MiB, 27.6% less."


def test_a_small_ratio_is_not_blamed_on_the_parts() -> None:
    words = hs.estimate(llama_like(*LLAMA_2_7B), 0.01, parts="qkvo+ffn").in_words()
    assert "only 96" not in words
    assert "--parts qkvo" not in words


def test_an_estimate_refuses_what_share_would_refuse(llama: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(llama)
    with pytest.raises(PlanError, match=r"cannot be met.*0\.7500 \(6 units\)"):
        hs.estimate(dense, 0.9)
    with pytest.raises(OptionError, match="'xyz' does not name parts"):
        hs.estimate(dense, 0.3, parts="xyz")
    with pytest.raises(PlanError, match="48 neurons do not divide into 5 equal groups"):
        hs.estimate(dense, 0.3, parts="ffn", ffn_groups=5)
    out = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.3)).save(tmp_path / "shared")
    with pytest.raises(CheckpointError, match="already shared"):
        hs.estimate(hs.open_checkpoint(out), 0.3)
    with pytest.raises(ArchitectureError, match="Experts are left alone"):
        hs.estimate(hs.open_checkpoint(tiny.make("mixtral", tmp_path / "mixtral")), 0.3, parts="ffn")


@pytest.mark.parametrize(
    ("name", "match", "parts", "error"),
    [
        pytest.param("llama-gqa", "cosine", "qkv", OptionError, id="no such match function"),
        pytest.param("llama-gqa", "ffn", "qkv", OptionError, id="a match function for feed-forwards"),
        pytest.param("llama-gqa", "separate", "qkvo", PlanError, id="no ties for o"),
        pytest.param("gpt2", "qk", "gate", PlanError, id="no such part"),
    ],
)
def test_an_estimate_refuses_a_request_that_cannot_be_planned(
    name: str, match: str, parts: str, error: type[hs.HeadshareError], tmp_path: Path
) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    with pytest.raises(error):
        hs.make_plan(hs.score_units(dense, match, parts), 0.3, parts=parts)
    with pytest.raises(error):
        hs.estimate(dense, 0.3, match=match, parts=parts)


def test_estimates_are_the_same_numbers_under_the_names_that_json_prints() -> None:
    found = hs.estimate(llama_like(*LLAMA_2_7B), 0.3)
    assert found.to_dict() == {name: getattr(found, name) for name in found.to_dict()}
    assert list(found.to_dict()) == [
        *("units", "recipients", "dense_bytes", "shared_bytes", "saved_bytes", "saved_fraction", "parts_fraction"),
        *("removed_units", "removed_neurons", "narrow_layers", "identical_tensors"),
    ]
