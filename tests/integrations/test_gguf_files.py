"""GGUF files by their own contents: names, sizes, vocabulary and numbers; and what is refused, with nothing written."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.errors import ArchitectureError, CheckpointError, HeadshareError, OptionError, OutputError
from headshare.integrations.gguf import writing
from headshare.sharing.rounded.write import round_to_nearest
from support import tiny
from support.folders import WEIGHTS, left_behind
from support.gguf_models import byte_tokenizer, make, plan_of, reduce, sentencepiece_tokenizer
from support.texts import add_tokenizer

HUB = "somebody/a-model"
# the largest part of a number's block that rounding to the nearest takes it away by
GIVEN_BACK = {  # two ties; 11 and 13 dimensions of three units with two query heads; 64 outputs of columns
    ("ties",): {"ties": 2 * 2 * 64 * (32 + 16 + 16)},
    ("narrow values",): {"narrow_values": 2 * 64 * 3 * 3 * (11 + 13)},
    ("low rank",): {"low_rank": 2 * (3 * 64 * 32 - (3 + 5 + 4) * (64 + 32))},
}
STEP = {"q8_0": 1 / 254, "q5_1": 1 / 62, "q5_0": 1 / 31, "q4_1": 1 / 30, "q4_0": 1 / 15}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, in 16-bit numbers, with a card and a template."""
    folder = make("llama", tmp_path_factory.mktemp("dense") / "llama")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


def written(folder: Path, out: Path, **options: Any) -> gguf.GGUFReader:
    with hs.open_checkpoint(folder) as checkpoint:
        made = hs.export_gguf(checkpoint, out, **options)
    assert made.bytes == out.stat().st_size
    reader = gguf.GGUFReader(out)
    assert sum(tensor.n_bytes for tensor in reader.tensors) == made.tensor_bytes
    return reader


def keys(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def numbers(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
        for tensor in reader.tensors
    }


def test_a_dense_file_says_what_the_folder_says(dense: Path, tmp_path: Path) -> None:
    found = keys(written(dense, tmp_path / "a.gguf"))
    sizes = {key.removeprefix("llama."): value for key, value in found.items() if key.startswith("llama.")}
    assert sizes == {
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 4,
        "feed_forward_length": 128,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "vocab_size": 320,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
    }
    assert (found["general.name"], found["general.license"], found["general.file_type"]) == ("llama", "apache-2.0", 1)
    assert found["tokenizer.chat_template"].startswith("{% for m")
    assert "general.base_model.count" not in found
    tokens = found["tokenizer.ggml.tokens"]
    assert (len(tokens), tokens[:2], tokens[-1]) == (320, ["<s>", "</s>"], "[PAD319]")
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_a_reduced_file_has_sizes_by_layer_and_names_its_base(dense: Path, tmp_path: Path) -> None:
    folder = reduce(dense, tmp_path / "reduced", "units", "neurons", "ties")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["base_model"] = HUB
    (folder / "config.json").write_text(json.dumps(config))
    found = keys(written(folder, tmp_path / "a.gguf"))
    assert found["general.architecture"] == "deci"
    assert found["deci.attention.head_count_kv"] == [3, 2, 4, 3]
    assert found["deci.attention.head_count"] == [6, 4, 8, 6]
    assert found["deci.feed_forward_length"] == [96, 128, 64, 128]
    assert found["general.name"] == "a-model headshare"
    assert found["general.base_model.0.repo_url"] == f"https://huggingface.co/{HUB}"
    assert found["headshare.plan_digest"] == hs.open_checkpoint(folder).require_sharing().plan.digest


def test_numbers_of_16_bits_are_the_folders_own(dense: Path, tmp_path: Path) -> None:
    """Rows of q and k are in other places, and nothing else; bfloat16 is not rounded again."""
    found, stored = numbers(written(dense, tmp_path / "a.gguf", dtype="bf16")), load_file(dense / WEIGHTS)
    assert np.array_equal(found["blk.2.ffn_down.weight"], stored["model.layers.2.mlp.down_proj.weight"].float())
    assert np.array_equal(found["token_embd.weight"], stored["model.embed_tokens.weight"].float())
    assert "output.weight" not in found
    theirs = stored["model.layers.1.self_attn.k_proj.weight"].float().numpy()
    ours = found["blk.1.attn_k.weight"]
    for head in range(4):
        for row in range(16):
            assert np.array_equal(ours[16 * head + row], theirs[16 * head + row // 2 + 8 * (row % 2)])


@pytest.mark.parametrize("dtype", STEP)
def test_numbers_are_rounded_to_the_nearest_that_their_block_has(dtype: str, dense: Path, tmp_path: Path) -> None:
    reader = written(dense, tmp_path / "a.gguf", dtype=dtype)
    exact = load_file(dense / WEIGHTS)["model.layers.2.mlp.up_proj.weight"]
    blocks, rounded = exact.float().numpy().reshape(-1, 32), numbers(reader)["blk.2.ffn_up.weight"].reshape(-1, 32)
    widest = blocks.max(1) - blocks.min(1) if dtype.endswith("1") else 2 * np.abs(blocks).max(1)
    assert (np.abs(rounded - blocks).max(1) <= 1.05 * STEP[dtype] * widest).all()
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.2.ffn_up.weight"] == dtype.upper()
    assert types["token_embd.weight"] == "Q8_0"  # predictions are read from it
    assert types["output_norm.weight"] == "F32"


@pytest.mark.parametrize("words", GIVEN_BACK)
def test_bytes_are_those_of_the_dense_model_less_what_is_gone_and_more_what_is_given_back(
    words: tuple[str, ...], dense: Path, tmp_path: Path
) -> None:
    folder = reduce(dense, tmp_path / "reduced", "units", "odd neurons", *words)
    with hs.open_checkpoint(folder) as checkpoint, hs.open_checkpoint(dense) as before:
        made = hs.export_gguf(checkpoint, tmp_path / "a.gguf", dtype="f16")
        whole = hs.export_gguf(before, tmp_path / "b.gguf", dtype="f16")
        saved = sum(info.nbytes for info in before.tensors.values())
        saved -= sum(info.nbytes for info in checkpoint.tensors.values())
    assert made.dense_bytes == whole.tensor_bytes == whole.dense_bytes
    assert whole.given_back.all == 0
    assert {reason: count for reason, count in asdict(made.given_back).items() if count} == GIVEN_BACK[words]
    assert all(f"{count:,}" in made.in_words() for count in GIVEN_BACK[words].values())
    assert made.dense_bytes - made.tensor_bytes == saved - made.given_back.all
    rounded = written(folder, tmp_path / "c.gguf", dtype="q8_0")
    assert keys(rounded)["deci.feed_forward_length"] == [128, 128, 128, 128]


def test_the_same_folder_gives_the_same_bytes(dense: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        written(dense, tmp_path / name, dtype="q4_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_rows_that_no_blocks_fill_are_stored_as_16_bit_numbers(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model", hidden_size=48)
    with hs.open_checkpoint(folder) as checkpoint:
        made = hs.export_gguf(checkpoint, tmp_path / "a.gguf", dtype="q8_0")
    assert "stored as f16, because blocks of 32 do not fill their rows: token_embd.weight, ..." in made.notes[0]
    assert made.notes[0].startswith("21 matrices")  # all that read the hidden state, and the embedding


def test_attention_that_looks_back_a_few_tokens_says_how_many(tmp_path: Path) -> None:
    folder = make("mistral", tmp_path / "model", sliding_window=24)
    with hs.open_checkpoint(folder) as checkpoint:
        made = hs.export_gguf(checkpoint, tmp_path / "a.gguf")
    assert keys(gguf.GGUFReader(made.out))["llama.context_length"] == 24
    assert made.notes == ("attention looks back 24 tokens in some layers, so that is the context of the file",)


def test_tokens_of_sentencepiece_have_kinds_and_scores_in_the_order_of_merges(dense: Path, tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model", sentencepiece_tokenizer())
    found = keys(written(folder, tmp_path / "a.gguf"))
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert [kinds[tokens.index(token)] for token in ("<s>", "<unk>", "<0x0A>", "e", "[PAD319]")] == [3, 2, 6, 1, 5]
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    scores = [found["tokenizer.ggml.scores"][tokens.index("".join(pair))] for pair in merges]
    assert scores == sorted(scores, reverse=True)
    assert found["tokenizer.ggml.add_bos_token"] is True


# ---- what is refused


def with_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name] if name in tensors else torch.ones(16))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def with_setting(folder: Path, key: str, value: object, file: str = "config.json") -> Path:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    return folder


def with_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    return folder


def without_end(folder: Path) -> Path:
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        for key in ("eos_token_id", "eos_token", "pad_token_id"):
            with_setting(folder, key, None, file)
    return folder


NORM = "model.layers.1.input_layernorm.weight"
REFUSED: dict[str, tuple[Callable[[Path], Path], type[HeadshareError], str]] = {
    "another family": (
        lambda f: tiny.make("phi3", f),
        ArchitectureError,
        "is a 'phi3' model. headshare writes GGUF for",
    ),
    "norms of q": (
        lambda f: with_tensor(make("llama", f), "model.layers.0.self_attn.q_norm.weight", lambda t: t),
        ArchitectureError,
        "q_norm.weight, which llama.cpp's llama has no place for",
    ),
    "another activation": (lambda f: make("llama", f, hidden_act="gelu"), ArchitectureError, "use 'gelu'"),
    "other positions": (
        lambda f: make("llama", f, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        ArchitectureError,
        "positions are of kind 'dynamic'",
    ),
    "a YaRN of its own": (
        lambda f: make("llama", f, rope_parameters={"rope_type": "yarn", "factor": 2.0, "beta_fast": 8.0}),
        ArchitectureError,
        "YaRN has beta_fast 8.0 here",
    ),
    "no tokenizer": (lambda f: tiny.make("llama-gqa", f), HeadshareError, "no tokenizer"),
    "a tokenizer of words": (lambda f: add_tokenizer(tiny.make("llama-gqa", f)), CheckpointError, "is a WordLevel"),
    "unknown splitting": (
        lambda f: with_tokenizer(make("llama", f), lambda s: s["pre_tokenizer"].update(add_prefix_space=True)),
        CheckpointError,
        "splits texts by (('ByteLevel', True, True),)",
    ),
    "texts changed before": (
        lambda f: with_tokenizer(make("llama", f), lambda s: s.update(normalizer={"type": "Lowercase"})),
        CheckpointError,
        "changes texts before it reads them (Lowercase)",
    ),
    "too many tokens": (
        lambda f: make("llama", f, byte_tokenizer(size=320), vocab_size=300),
        CheckpointError,
        "has 320 tokens, and its model embeds 300",
    ),
    "no end of texts": (lambda f: without_end(make("llama", f)), CheckpointError, "names a token that ends texts"),
    "a number that is none": (
        lambda f: with_tensor(make("llama", f), NORM, lambda t: t * float("nan")),
        CheckpointError,
        f"{NORM} holds NaN",
    ),
    "too large a number": (
        lambda f: with_tensor(make("llama", f), "model.embed_tokens.weight", lambda t: t * 1e6),
        CheckpointError,
        "and f16 ends at 65504. Export it as bf16 or f32",
    ),
    "a vector of another size": (
        lambda f: with_tensor(make("llama", f), NORM, lambda t: t[:7].clone()),
        CheckpointError,
        f"holds {NORM} as (7,); it should be (64,)",
    ),
    "a size that is none": (
        lambda f: with_setting(make("llama", f), "max_position_embeddings", 2**40),
        CheckpointError,
        "context_length would be 1099511627776",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_written_is_refused_in_words_and_nothing_is_left(what: str, tmp_path: Path) -> None:
    broken, error, words = REFUSED[what]
    folder = broken(tmp_path / "model")
    with hs.open_checkpoint(folder) as checkpoint, pytest.raises(error) as told:
        hs.export_gguf(checkpoint, tmp_path / "a.gguf")
    assert words in str(told.value)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "a.gguf").exists()
    assert left_behind(tmp_path) == []


def test_a_missing_tensor_is_named(dense: Path, tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with hs.open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        hs.export_gguf(checkpoint, tmp_path / "a.gguf")


def test_an_output_is_replaced_only_if_it_is_a_gguf_file_and_that_is_asked_for(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    with hs.open_checkpoint(dense) as checkpoint:
        hs.export_gguf(checkpoint, out, dtype="q4_0")
        with pytest.raises(OutputError, match="exists"):
            hs.export_gguf(checkpoint, out)
        size = out.stat().st_size
        hs.export_gguf(checkpoint, out, overwrite=True)
        assert out.stat().st_size > size
        (tmp_path / "b.gguf").write_text("a letter")
        with pytest.raises(OutputError, match="not a GGUF file"):
            hs.export_gguf(checkpoint, tmp_path / "b.gguf", overwrite=True)
        with pytest.raises(OutputError, match="inside the model"):
            hs.export_gguf(checkpoint, dense / "a.gguf")
        with pytest.raises(OutputError, match="there is no folder"):
            hs.export_gguf(checkpoint, tmp_path / "none" / "a.gguf")
        with pytest.raises(OptionError, match=r"should end in \.gguf"):
            hs.export_gguf(checkpoint, tmp_path / "a.bin")
        with pytest.raises(OptionError, match="'q4_k_m' is not one of f32, f16"):
            hs.export_gguf(checkpoint, tmp_path / "c.gguf", dtype="q4_k_m")


def test_what_a_disk_changes_is_seen_when_the_file_is_read_back(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_padded", lambda size, padded=writing._padded: padded(size) + 32)
    with hs.open_checkpoint(dense) as checkpoint, pytest.raises(OutputError, match="not what was written"):
        hs.export_gguf(checkpoint, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with hs.open_checkpoint(dense) as checkpoint, pytest.raises(OutputError, match="has 1,000 bytes free"):
        hs.export_gguf(checkpoint, tmp_path / "a.gguf")


def test_the_package_that_writes_the_format_is_asked_for(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with hs.open_checkpoint(dense) as checkpoint, pytest.raises(OptionError, match=r"not installed. Run: pip install"):
        hs.export_gguf(checkpoint, tmp_path / "a.gguf")


def test_what_is_rounded_already_is_not_rounded_again(dense: Path, tmp_path: Path) -> None:
    packed = Path(__file__).parents[1] / "sharing" / "format" / "packed"
    round_to_nearest(hs.open_checkpoint(dense)).save(tmp_path / "eight")
    for folder, dtype in ((packed, "f16"), (packed, "q8_0"), (tmp_path / "eight", "q4_0")):
        with (
            hs.open_checkpoint(folder) as checkpoint,
            pytest.raises(CheckpointError, match="are rounded already"),
        ):
            hs.export_gguf(checkpoint, tmp_path / "a.gguf", dtype=dtype)


@pytest.mark.parametrize("kinds", [(), ("units", "neurons", "ties")])
def test_whole_numbers_of_8_bits_are_those_of_the_file(kinds: tuple[str, ...], dense: Path, tmp_path: Path) -> None:
    folder = reduce(dense, tmp_path / "reduced", *kinds) if kinds else dense
    eight = round_to_nearest(hs.open_checkpoint(folder)).save(tmp_path / "eight")
    found, stored = numbers(written(eight, tmp_path / "a.gguf", dtype="q8_0")), load_file(eight / WEIGHTS)

    def meant(name: str) -> Any:
        return stored[f"{name}_int8"].float().numpy() * stored[f"{name}_scale"].float().numpy()

    assert np.array_equal(found["token_embd.weight"], meant("model.embed_tokens.weight"))
    down = meant("model.layers.1.mlp.down_proj.weight")
    assert np.array_equal(found["blk.1.ffn_down.weight"][:, : down.shape[1]], down)
    k = meant("model.layers.1.self_attn.k_proj.weight")
    for head in range(len(k) // 16):
        for row in range(16):
            assert np.array_equal(
                found["blk.1.attn_k.weight"][16 * head + row], k[16 * head + row // 2 + 8 * (row % 2)]
            )


def test_4_bits_are_a_file_of_8_bits_and_next_to_nothing_is_lost(dense: Path, tmp_path: Path) -> None:
    four = round_to_nearest(hs.open_checkpoint(dense), bits=4, group=32).save(tmp_path / "four")
    found = numbers(written(four, tmp_path / "a.gguf", dtype="q8_0"))["blk.1.ffn_up.weight"]
    wanted = hs.open_checkpoint(four).read("model.layers.1.mlp.up_proj.weight").float().numpy()
    own = hs.open_checkpoint(dense).read("model.layers.1.mlp.up_proj.weight").float().numpy()
    assert np.abs(found - wanted).mean() < 0.1 * np.abs(own - wanted).mean()


def test_a_plan_of_these_tests_is_what_its_words_say(dense: Path) -> None:
    with hs.open_checkpoint(dense) as checkpoint:
        plan = plan_of(checkpoint, "layer", "last feed-forward")
    assert [removal.whole_layers for removal in plan.removals] == [(2,), (2, 3)]
