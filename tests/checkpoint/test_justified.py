"""Numbers of config.json are held against the tensors before transformers builds anything of that size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.checkpoint.header import read_header
from headshare.checkpoint.justified import check_config, justified_numbers
from headshare.errors import CheckpointError
from headshare.integrations.transformers.loading import load
from support import tiny
from support.command_line import Run, assert_one_error_line

Shapes = dict[str, tuple[int, ...]]


def changed(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


HUGE: dict[str, Any] = {
    "num_labels": 10**9,
    "num_hidden_layers": 10**6,
    "vocab_size": 50_000_000,
    "intermediate_size": 10**8,
    "hidden_size": 2**40,
    "num_attention_heads": 10**9,
    "num_key_value_heads": 10**7,
    "text_config": {"num_hidden_layers": 10**7},
    "vision_config": {"depths": [2, 10**8], "model_type": "swin"},
    "num_local_experts": 10**8,
    "n_layer": 1e300,
}


@pytest.mark.parametrize(("key", "value"), HUGE.items(), ids=HUGE.keys())
def test_a_number_that_no_tensor_justifies_is_named_and_nothing_is_built(
    key: str, value: Any, llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise AssertionError("a configuration was built")

    monkeypatch.setattr(transformers.PreTrainedConfig, "__init__", build)
    changed(llama, **{key: value})
    for words in (["estimate", llama], ["share", llama, "out"], ["eval", llama, "--text", "text"]):
        Path("text").write_text("w4 w5")
        found = run(*words)
        assert_one_error_line(found)
        inner = next(iter(value)) if isinstance(value, dict) else key
        assert inner in found.err
        assert "at most" in found.err


def test_a_model_far_larger_than_its_tensors_is_not_built(llama: Path) -> None:
    changed(llama, intermediate_size=4_000_000)  # as large as a side may be: 1.5 thousand million numbers
    with pytest.raises(CheckpointError, match=r"describes a model of 1,5\d\d,\d{3},\d{3} numbers"):
        load(llama)


def test_a_table_of_positions_is_held_against_the_table_and_computed_positions_are_not(tmp_path: Path) -> None:
    bert = changed(tiny.make("bert", tmp_path / "bert"), max_position_embeddings=10**7)
    with pytest.raises(CheckpointError, match="max_position_embeddings: 1e"):
        hs.open_checkpoint(bert)
    llama = changed(tiny.make_llama(tmp_path / "llama"), max_position_embeddings=10**9, rope_theta=1e12)
    assert load(llama).config.max_position_embeddings == 10**9


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_passes_dense_and_shared(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo")
    shared = hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "shared"))
    model = load(dense.path)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for checkpoint in (dense, shared):
        assert numbers <= justified_numbers(checkpoint.tensors, checkpoint.plan) <= 2 * numbers + 2**25


def large(layers: int, hidden: int, vocabulary: int, *more: tuple[int, ...], each: int = 9) -> Shapes:
    """Shapes such as a published model has: so many tensors a layer, an embedding, and a few others."""
    stored: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    stored |= {f"model.layers.{layer}.{n}.weight": (hidden, hidden) for layer in range(layers) for n in range(each)}
    return stored | {f"other.{n}": shape for n, shape in enumerate(more)}


# numbers of published configurations that are large and size nothing, or size something large
PUBLISHED: dict[str, tuple[dict[str, Any], Shapes]] = {
    "llama 4": (
        {"text_config": {"max_position_embeddings": 10485760, "rope_theta": 500000.0, "attn_scale": 0.1,
                         "num_hidden_layers": 48, "num_local_experts": 128, "intermediate_size_mlp": 16384,
                         "floor_scale": 8192, "vocab_size": 202048, "attention_chunk_size": 8192},
         "image_token_index": 200092, "eos_token_id": [200001, 200007, 200008]},
        large(48, 5120, 202048),
    ),
    "mixture of many": (
        {"num_hidden_layers": 61, "n_routed_experts": 384, "vocab_size": 163840, "rope_theta": 5e7, "n_group": 1,
         "rope_scaling": {"factor": 64.0, "original_max_position_embeddings": 4096}, "moe_intermediate_size": 2048},
        large(61, 7168, 163840),
    ),
    "stacked experts": (
        {"num_hidden_layers": 36, "num_local_experts": 512, "sliding_window": 128, "vocab_size": 201088},
        large(36, 2880, 201088, (512, 5760, 2880), each=4),
    ),
    "one stored layer": ({"num_hidden_layers": 12, "num_hidden_groups": 1, "vocab_size": 30000}, large(1, 768, 30000)),
    "mamba": (
        {"num_hidden_layers": 64, "time_step_limit": [0.0, float("inf")], "state_size": 128, "seed": 2**62},
        large(64, 4096, 32768),
    ),
    "image classes": (
        {"id2label": {str(n): str(n) for n in range(21843)}, "num_labels": 21843, "image_size": 384},
        large(12, 768, 21843),
    ),
    "padded": ({"vocab_size": 50304, "pad_vocab_size_multiple": 128, "bos_token_id": 10**9}, large(12, 768, 50257)),
    "long sound": ({"acoustic_tokenizer_chunk_size": 1440000, "sampling_rate": 24000, "embed_dim_per_stage": [768]},
                   large(28, 3584, 152064)),
    "hashed words": ({"ngram_vocab_size_base": 20000000, "doc_stride": 10**6}, large(28, 2048, 152064)),
}  # fmt: skip


@pytest.mark.parametrize(("config", "shapes"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_what_published_models_say_is_believed(config: dict[str, Any], shapes: Shapes) -> None:
    check_config("model", config, shapes)


SPOILT: dict[str, Callable[[Any], Any]] = {
    "an axis of 2^47 without numbers": lambda header: {"dtype": "F32", "shape": [2**47, 0], "data_offsets": [0, 0]},
    "axes whose product overflows": lambda header: {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]},
}


@pytest.mark.parametrize("entry", SPOILT.values(), ids=SPOILT.keys())
def test_a_tensor_of_no_bytes_has_bounded_axes(entry: Callable[[Any], Any], llama: Path, run: Run) -> None:
    file = llama / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = {**json.loads(raw[8 : 8 + length]), "extra": entry(None)}
    written = json.dumps(header).encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + raw[8 + length :])
    found = run("share", llama, "out")
    assert_one_error_line(found)
    assert "extra has no numbers in shape" in found.err
    assert not Path("out").exists()


def test_an_empty_tensor_of_a_usual_shape_is_read(llama: Path) -> None:
    file = llama / "model.safetensors"
    save_file({**load_file(file), "extra": torch.zeros(0, 4096)}, file, metadata={"format": "pt"})
    assert (0, 4096) in {info.shape for info in read_header(file)}


def test_more_tensors_than_any_model_has_are_not_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headshare.checkpoint.header.MAX_TENSORS", 35)
    with pytest.raises(CheckpointError, match=r"39 tensors; at most 35 are read"):
        hs.open_checkpoint(llama)


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\u202eabc", "x" * 600])
def test_a_tensors_name_that_a_terminal_would_act_on_is_refused(name: str, llama: Path, run: Run) -> None:
    file = llama / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(1)}, file, metadata={"format": "pt"})
    found = run("estimate", llama)
    assert_one_error_line(found)
    assert "a terminal would act on it" in found.err
    assert found.err.isprintable() or found.err.rstrip("\n").isprintable()
