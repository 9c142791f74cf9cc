"""Kinds of hostile input: each changes a file of a good folder, and says which commands then read it."""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import headshare as hs
from fuzz.mutate import as_json, mutate_bytes, mutate_json, rewrite
from fuzz.run_here import Words, run_here
from fuzz.training import TRAIN, add_training, training
from support import tiny
from support.byte_level import make_writer
from support.questions import ROWS
from support.texts import a_text, add_tokenizer

# a kind changes files of a folder by a drawn number, and names the commands that may follow
Kind = Callable[[Random, Path], Sequence[Words]]
FAMILIES = ("llama-gqa", "gpt2", "bert", "mixtral", "falcon-mqa", "opt", "gemma3", "phi3")
TEXT = ("--text", "text", "--window", "16", "--tokens", "64")
CALIBRATION = ("--calibration-window", "16", "--calibration-tokens", "64")
SHARED: tuple[Words, ...] = (
    ("inspect", "shared"),
    ("inspect", "shared", "--json"),
    ("inspect", "shared", "--split", "2"),
    ("verify", "shared"),
    ("verify", "shared", "--against", "model"),
    ("expand", "shared", "out"),
    ("export", "shared", "out.gguf"),
    ("eval", "shared", *TEXT),
    ("quantize", "shared", "out", "--bits", "8"),
    ("quantize", "shared", "out", "--group", "8", "--calibration", "text", *CALIBRATION),
    (*TRAIN, "--method", "recover", "--data", "text"),
)
DENSE: tuple[Words, ...] = (
    ("estimate", "model"),
    ("estimate", "model", "--json"),
    ("estimate", "model", "--bits", "4", "--json"),
    ("share", "model", "out"),
    ("share", "model", "out", "--parts", "qkvo+ffn", "--ffn-groups", "2"),
    ("score", "model", "-o", "new.safetensors"),
    ("eval", "model", *TEXT),
    ("share", "model", "out", "--save", "2%", "--calibration", "text", *CALIBRATION),
    ("quantize", "model", "out", "--calibration", "text", *CALIBRATION),
    (*TRAIN, "--data", "text"),
)


def make_good(folder: Path, families: Sequence[str]) -> None:
    """Write the good folder: models of several families, shared ones, a tokenizer, texts, plans and results."""
    for name in families:
        place = folder / name
        place.mkdir(parents=True)
        add_tokenizer(tiny.make(name, place / "model"))
        checkpoint = hs.open_checkpoint(place / "model")
        plan = hs.make_plan(hs.score_units(checkpoint, parts="qkvo"), 0.4, parts="qkvo")
        hs.share(checkpoint, plan).save(place / "shared")
        plan.save(place / "plan.json")
        hs.score_units(checkpoint).save(place / "scores.safetensors")
        a_text(place / "text", 120)
        rows = [json.dumps({"text": line}) for line in (place / "text").read_text().split("w9")]
        (place / "rows.jsonl").write_text("\n".join(rows))
    _add_inputs(folder / families[0])
    make_writer(folder / families[0] / "writer")
    add_training(folder / families[0])


def _add_inputs(place: Path) -> None:
    """Files of ours in one folder: a recipe, settings of training, tasks, results of `compare` and of `eval`."""
    (place / "recipe.yaml").write_text(
        "title: a grid\nmodel: model\nmethods: [magnitude]\nratios: [0.25]\ntext: text\nwindow: 16\ntokens: 64\n"
    )
    (place / "train.yaml").write_text("text: text\nlearning: {rate: 1.0e-4, steps: 2}\n")
    published = Path(__file__).parent.parent / "recipes" / "published" / "2402.11819.yaml"
    (place / "published.yaml").write_bytes(published.read_bytes())
    (place / "data").mkdir()
    for name in ("piqa", "boolq", "winogrande"):
        (place / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    (place / "data" / "mmlu").mkdir()
    (place / "data" / "mmlu" / "law_test.csv").write_text('why,"w4 w5",w6,w7,w8,A\n"w9, w9",w4,w5,w6,w7,D\n')
    (place / "prompts").write_text("w4 w5\nw6 w7\n")
    for words in (
        ("compare", "--config", "recipe.yaml", "--out", "compared"),
        ("eval", "model", *TEXT, "--out", "evaluated"),
    ):
        run_here(words, place)


# ---------------------------------------------------------------- configurations

SIZES = (
    "num_labels", "num_hidden_layers", "n_layer", "vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner",
    "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions",
    "type_vocab_size", "num_local_experts", "num_experts", "num_experts_per_tok", "sliding_window", "ffn_dim",
    "word_embed_proj_dim", "num_kv_heads", "num_ln_in_parallel_attn", "chunk_size_feed_forward", "max_window_layers",
    "original_max_position_embeddings", "rotary_dim", "partial_rotary_factor", "rope_theta", "pad_token_id",
)  # fmt: skip
EXTRA: list[tuple[str, Sequence[Any]]] = [
    *((name, (10**9, 10**6, 0, -1, 2**40, 1.5, "4", None)) for name in SIZES),
    ("id2label", ({}, {"0": "a"}, {"x": "a"}, {str(n): "a" for n in range(5000)}, [], {"0": "\x1b[2J"})),
    ("label2id", ({}, {"a": 10**9})),
    ("architectures", (["LlamaForCausalLM"], ["GPT2Model"], [], ["Nothing"], "LlamaForCausalLM", [None], ["\x1b[1m"])),
    ("model_type", ("llama", "gpt2", "bert", "t5", "clip", "llava", "mamba", "nothing", "", "longformer", "whisper")),
    ("torch_dtype", ("float32", "float64", "int8", "auto", "nothing", "torch.float16")),
    ("dtype", ("bfloat16", "complex64", "float8_e4m3fn", 7, {"": "float16"})),
    ("rope_scaling", ({"type": "linear", "factor": 0}, {"rope_type": "yarn", "factor": 1e9}, {"rope_type": "nothing"})),
    ("rope_parameters", ({"rope_type": "dynamic"}, {"rope_theta": 0.0}, {"full_attention": {}}, {"factor": "x"})),
    ("layer_types", ([], ["full_attention"], ["full_attention"] * 4, ["nothing"] * 4, ["full_attention"] * 10**4)),
    ("quantization_config", ({}, {"quant_method": "gptq"}, {"quant_method": "headshare"}, [], {"quant_method": [1]})),
    ("text_config", ({}, {"model_type": "llama"}, {"vocab_size": 10**9}, [], {"model_type": "nothing"})),
    ("vision_config", ({}, {"model_type": "clip_vision_model"}, {"num_hidden_layers": 10**7, "image_size": 10**7})),
    ("auto_map", ({}, {"AutoModel": "x.y"}, [])),
    ("attn_implementation", ("eager", "sdpa", "nothing", "a/b", 3)),
    ("_attn_implementation", ("eager", "nothing")),
    ("hidden_act", ("silu", "relu", "nothing", ["silu"], 5)),
    ("tie_word_embeddings", (True, False, "yes")),
    ("use_cache", (True, "x")),
    ("is_decoder", (True,)),
    ("is_encoder_decoder", (True, "x")),
    ("problem_type", ("regression", "nothing")),
    ("pruned_heads", ({"0": [0]}, {"x": [1]}, {"0": [10**9]})),
    ("transformers_version", ("4.0", None, 7)),
    ("transformers_weights", ("model.safetensors", "adapter_model.bin", 5)),
    ("pad_token_id", (10**9, -5, "x")),
    ("eos_token_id", ([], [1, 2], 10**9, "x")),
    ("generation_config", ({}, 5)),
    ("return_dict", (False, "x")),
    ("output_attentions", (True, "x")),
    ("task_specific_params", ({}, 5)),
]


def configurations(random: Random, folder: Path) -> Sequence[Words]:
    """Change config.json of the dense or of the shared model."""
    dense = random.random() < 0.6
    path = folder / ("model" if dense else "shared") / "config.json"
    config = json.loads(path.read_bytes())
    if random.random() < 0.08:
        rewrite(path, mutate_bytes(random, path.read_bytes()))
    elif dense or random.random() < 0.7:
        entry = config.pop("quantization_config", None)
        changed = mutate_json(random, config, EXTRA)
        if entry is not None and isinstance(changed, dict) and "quantization_config" not in changed:
            changed["quantization_config"] = entry
        rewrite(path, as_json(changed))
    else:
        rewrite(path, as_json(mutate_json(random, config, EXTRA)))
    return DENSE if dense else SHARED


# ---------------------------------------------------------------- headers of safetensors

HEADER: list[tuple[str, Sequence[Any]]] = [
    ("extra", ({"dtype": "F32", "shape": [2**47, 0], "data_offsets": [0, 0]},)),
    ("\x1b[31m", ({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},)),
    ("empty", ({"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]},)),
    ("__metadata__", ({}, {"format": "tf"}, {"format": 1}, [], {"format": "pt", "x": "\x1b"})),
]


def headers(random: Random, folder: Path) -> Sequence[Words]:
    """Change the header of a file of weights, and say its new length; the numbers stay."""
    dense = random.random() < 0.5
    path = folder / ("model" if dense else "shared") / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, rest = raw[8 : 8 + length], raw[8 + length :]
    kind = random.randrange(10)
    if kind == 0:
        rewrite(path, mutate_bytes(random, raw))
    elif kind == 1:
        changed = mutate_bytes(random, header)
        rewrite(path, struct.pack("<Q", len(changed)) + changed + rest)
    else:
        data = json.loads(header)
        changed = as_json(_moved(random, data) if kind < 6 else mutate_json(random, data, HEADER))
        rewrite(path, struct.pack("<Q", len(changed)) + changed + rest)
    return DENSE if dense else SHARED


def _moved(random: Random, header: dict[str, Any]) -> dict[str, Any]:
    """The header with changes that leave the offsets whole: names, types, shapes of as many numbers, empty tensors."""
    for _ in range(random.choice((1, 1, 2, 5))):
        names = [name for name in header if name != "__metadata__"]
        name = random.choice(names)
        entry = header[name]
        kind = random.randrange(6)
        if kind == 0:
            entry["shape"] = entry["shape"][::-1]
        elif kind == 1:
            entry["shape"] = [1, *entry["shape"]] if random.random() < 0.5 else [*entry["shape"], 1]
        elif kind == 2:
            entry["dtype"] = random.choice(("I32", "F16", "F64", "U32", "I64", "F8_E8M0", "C64", "BF16"))
        elif kind == 3:
            other = random.choice((*names, "a" * 600, "\x1b]0;x\x07", "model", "x.weight", "\ud800", "..", "a/b"))
            header[other] = header.pop(name)
        elif kind == 4:
            shape = random.choice(([0], [0, 2**40], [2**47, 0], [2**40, 2**40, 2**40, 0], [10**6, 0, 10**6]))
            header[random.choice(("extra", "model.extra.weight", "lm_head.bias"))] = {
                "dtype": "F32", "shape": shape, "data_offsets": [0, 0],
            }  # fmt: skip
        else:
            count = 1
            for number in entry["shape"]:
                count *= number
            entry["shape"] = [count]
    return header


# ---------------------------------------------------------------- plans

PLANS: list[tuple[str, Sequence[Any]]] = [
    ("removals", ([], [{}], [{"layout": {}, "units": []}])),
    ("factored", ([], [{}])),
    ("narrow_values", ([], [{}], [{"layout": {}, "widths": {"0": 4}}])),
    ("widths", ({}, {"0": 0}, {"0": 7}, {"1": 10**9}, {"-1": 3})),
    ("selections", ([], {}, [{}])),
    ("others", ([], [{}])),
    ("format", (1, 2, "1", True)),
]


def plans(random: Random, folder: Path) -> Sequence[Words]:
    """Change our entry in a shared model's config.json, or a plan's file."""
    if random.random() < 0.35:
        path = folder / "plan.json"
        raw = path.read_bytes()
        spoilt = mutate_bytes(random, raw) if random.random() < 0.2 else None
        rewrite(path, spoilt or as_json(mutate_json(random, json.loads(raw), PLANS)))
        return (
            ("inspect", "plan.json"),
            ("inspect", "plan.json", "--json"),
            ("share", "model", "out", "--plan", "plan.json"),
        )
    path = folder / "shared" / "config.json"
    config = json.loads(path.read_bytes())
    entry = config["quantization_config"]
    if random.random() < 0.6:
        entry["plan"] = mutate_json(random, entry["plan"], PLANS)
    else:
        extra = [
            ("refit", ({}, {"tensors": []}, 5)),
            ("quantization_config", ({}, {"quant_method": "compressed-tensors"})),
            ("base_model", ("\x1b", "x" * 9999, "../model")),
            ("storage", ("owner", "nothing", 5)),
        ]
        config["quantization_config"] = mutate_json(random, entry, extra)
    rewrite(path, as_json(config))
    return SHARED


# ---------------------------------------------------------------- tokenizers

TOKENIZER: list[tuple[str, Sequence[Any]]] = [
    ("tokenizer_class", ("LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer", "T5Tokenizer", "Nothing", None, 5, [])),
    ("auto_map", ({}, {"AutoTokenizer": ["a.b", None]}, [])),
    ("model_max_length", (0, -1, 1e30, "x", None)),
    ("chat_template", ("{{ 1/0 }}", "{% for x in y %}", [], {"a": "b"})),
    ("added_tokens_decoder", ({}, {"x": {}}, {"5": {"content": "w5"}}, {"-1": {"content": ""}}, {"9" * 30: {}})),
    ("special_tokens_map", ({}, 5)),
    ("extra_special_tokens", ({}, [], ["<x>"], {"x": "<x>"})),
    ("padding_side", ("left", "nothing")),
    ("bos_token", ("<s>", None, 5, {"content": "<s>"}, {}, "new")),
    ("tokenizer_file", ("/etc/passwd", 5)),
    ("vocab_file", ("/etc/passwd", 5)),
    ("model", ({}, {"type": "BPE"}, {"type": "WordLevel", "vocab": {}}, {"type": "Unigram", "vocab": []})),
    ("pre_tokenizer", (None, {"type": "ByteLevel"}, {"type": "Split", "pattern": {"Regex": "(a+)+$"}}, {})),
    ("normalizer", (None, {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}, {"type": "NFC"}, {})),
    ("truncation", (None, {"max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}, {})),
    ("padding", (None, {"strategy": {"Fixed": 10**6}}, {})),
    ("post_processor", (None, {"type": "TemplateProcessing"}, {"type": "BertProcessing"}, {})),
    ("decoder", (None, {"type": "ByteLevel"}, {})),
]
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
FILES_TOO = (*FILES[2:], "merges.txt", "vocab.txt", "tokenizer.model", "generation_config.json", "chat_template.jinja")


def tokenizer_files(random: Random, folder: Path) -> Sequence[Words]:
    """Change the files of a tokenizer, or add one that is not of it."""
    model = "writer" if (folder / "writer").is_dir() and random.random() < 0.5 else "model"
    path = folder / model / random.choice(FILES[:2])
    kind = random.randrange(10)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        new = folder / model / random.choice(FILES_TOO)
        new.unlink(missing_ok=True)
        new.write_bytes(mutate_bytes(random, random.choice((b"{}", b"[]", b"a b\n", b'{"a": 0}', b"\x0a\x08\x01"))))
    elif kind == 2:
        rewrite(path, mutate_bytes(random, path.read_bytes()))
    else:
        rewrite(path, as_json(mutate_json(random, json.loads(path.read_bytes()), TOKENIZER)))
    return (
        ("eval", model, *TEXT),
        ("generate", model, "--prompt", "w4 w5", "--tokens", "2"),
        ("export", model, "out.gguf", "--dtype", "q8_0"),
        ("share", model, "out", "--save", "2%", "--calibration", "text", *CALIBRATION),
        ("eval", model, "--tasks", "piqa", "--data-dir", "data") if model == "writer" else ("eval", model, *TEXT),
    )


# ---------------------------------------------------------------- files of ours

OURS: Mapping[str, tuple[Words, ...]] = {
    "recipe.yaml": (("compare", "--config", "recipe.yaml", "--out", "new"),),
    "train.yaml": (("compare", "--config", "recipe.yaml", "--train", "train.yaml", "--out", "new"),),
    "published.yaml": (("report", "compared", "--paper", "published.yaml"),),
    "compared/cells.json": (("report", "compared"), ("compare", "--config", "recipe.yaml", "--out", "compared")),
    "compared/about.json": (("report", "compared"), ("report", "compared", "--json")),
    "evaluated/results.json": (("report", "evaluated"), ("eval", "model", *TEXT, "--out", "evaluated")),
    "data/piqa.jsonl": (("eval", "model", "--tasks", "piqa", "--data-dir", "data"),),
    "data/winogrande.jsonl": (("eval", "model", "--tasks", "winogrande", "--data-dir", "data"),),
    "data/mmlu/law_test.csv": (("eval", "model", "--tasks", "mmlu", "--data-dir", "data"),),
    "rows.jsonl": (("share", "model", "out", "--save", "2%", "--calibration", "rows.jsonl", *CALIBRATION),),
    "text": (("eval", "model", *TEXT), ("share", "model", "out", "--refit", "--calibration", "text", *CALIBRATION)),
    "prompts": (("generate", "model", "--prompts", "prompts", "--tokens", "2"),),
    "scores.safetensors": (("plan", "--from-scores", "scores.safetensors"),),
    "shared/headshare.json": (("verify", "shared", "--no-logits"),),
}
WORDS = (
    b"!!python/object:os.system", b"!!binary x", b"!!int x", b"!!float z", b"!!timestamp 1", b"!!set {a}", b"!!omap",
    b"&a [*a]", b"*a", b"<<: *x", b"? ", b"? [a]\n: b\n", b"\t", b": ", b"- ", b"\n---\n", b"...\n", b"%YAML 9.9\n",
    b"NaN", b"Infinity", b"-Infinity", b"null", b'"', b",", b"{},", b"[1e999]", b"\xff\xfe", b"\xef\xbb\xbf", b"\x00",
    b"\x1b[31m", b"\r", b"\xe2\x80\xa8", b"'", b"0x10", b"1_000", b"12:30:45", b".inf", b".nan", b"~", b"2001-13-45",
)  # fmt: skip


def our_files(random: Random, folder: Path) -> Sequence[Words]:
    """Change a file that we wrote or that a person writes for us: YAML, JSON, CSV, text, scores, digests."""
    name = random.choice(list(OURS))
    path = folder / name
    raw = path.read_bytes()
    if path.suffix == ".json" and random.random() < 0.7:
        rewrite(path, as_json(mutate_json(random, json.loads(raw))))
    elif path.suffix == ".jsonl" and random.random() < 0.6:
        lines = raw.split(b"\n")
        at = random.randrange(len(lines))
        lines[at] = as_json(mutate_json(random, json.loads(lines[at] or b"{}")))
        rewrite(path, b"\n".join(lines))
    else:
        rewrite(path, mutate_bytes(random, raw, WORDS))
    return OURS[name]


KINDS: Mapping[str, Kind] = {
    "configurations": configurations,
    "headers": headers,
    "plans": plans,
    "tokenizers": tokenizer_files,
    "ours": our_files,
    "training": training,
}


def good_folder(kind: str, random: Random, good: Path, families: Sequence[str]) -> Path:
    """The good folder that an input of this kind starts from; only the first has a tokenizer and files of ours."""
    return good / (random.choice(families) if kind in ("configurations", "headers", "plans") else families[0])


def linked(source: Path, folder: Path) -> Iterator[Path]:
    """Link every file of a folder into a new one, and name them."""
    for path in source.rglob("*"):
        place = folder / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.hardlink_to(path)
            yield place
