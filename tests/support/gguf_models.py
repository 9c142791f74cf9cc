"""Tiny models of the families that llama.cpp and vLLM run, with tokenizers of real kinds, and llama.cpp to run them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import headshare as hs
from headshare.integrations.transformers.loading import load_model
from headshare.plan.low_rank import LowRankUnits
from headshare.plan.narrow_values import NarrowValues
from headshare.plan.removal import Removal
from headshare.plan.section import Section
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Tie

VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.1,
}
MODELS: Mapping[str, tuple[type, Any]] = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama-biased": (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**{**SIZES, "head_dim": 8}, sliding_window=None)),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**{**SIZES, "head_dim": 8})),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**SIZES)),
}
TEXTS = [
    "The guinea pig went to the house because the cat was there, and it'll stay until 12.5 hours have passed.",
    "Question: does the river freeze in winter?\nAnswer: IT DOES!!\n\n  def f(x):\n\treturn x ** 2  # naïve 日本語",
    "In 1867 they've found 3000 letters; SHE'D WRITTEN them allToUs, on the 1/8/1867. ¿Qué? Ђ да… 👍🏽",
]
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START, SLASH = r"[^\r\n\p{L}\p{N}]?", REST.replace(r"[\r\n]*", r"[\r\n/]*")
# expressions by which tokenizers split texts, as their authors publish them; None: by words, as GPT-2 does
SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": rf"{ENGLISH}|{START}\p{{L}}+|\p{{N}}{{1,3}}| ?{REST}",
    "smaug-bpe": rf"{ENGLISH}|{START}\p{{L}}+|\p{{N}}{{1,3}}| ?{REST}",
    "qwen2": rf"{ENGLISH}|{START}\p{{L}}+|\p{{N}}| ?{REST}",
    "tekken": rf"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*|\p{{N}}| ?{SLASH}",
    "gpt-4o": rf"{START}{UPPER}*{LOWER}+{ENGLISH}?|{START}{UPPER}+{LOWER}*{ENGLISH}?|\p{{N}}{{1,3}}| ?{SLASH}",
}
WHOLE_WORDS = ("llama-bpe", "tekken")


def byte_tokenizer(split: str = "gpt-2", *, size: int = 310) -> tf.PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits texts as this one of llama.cpp's names says, trained on our texts.

    It was trained without splitting, so that it would merge whatever it is not kept from.
    """
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=6,
    )
    inner.train_from_iterator(TEXTS * 4, trainer)
    inner.model.ignore_merges = split in WHOLE_WORDS
    expression = SPLITS[split]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
    steps += [] if expression is None else [pre_tokenizers.Split(Regex(expression), "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps) if steps[1:] else steps[0]
    inner.normalizer = normalizers.NFC() if split == "qwen2" else None
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def sentencepiece_tokenizer(*, legacy: bool = True) -> tf.PreTrainedTokenizerFast:
    """BPE as it comes from SentencePiece, with bytes to fall back on; blanks are made visible in one of two ways."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    trained.train_from_iterator([text for text in TEXTS[:1] for _ in range(4)], trainer)
    model = json.loads(trained.to_str())["model"]
    first = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = first + sorted(model["vocab"], key=lambda token: model["vocab"][token])
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(pair) for pair in model["merges"]]
    inner = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if legacy:
        inner.normalizer = trained.normalizer
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    replace = decoders.Replace("\u2581", " ")
    inner.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make(name: str, folder: Path, tokenizer: Any = "gpt-2", **changes: object) -> Path:
    """A model of this name, whose predictions are far from uniform, with a tokenizer: a byte-level one by its split."""
    model_class, config = MODELS[name]
    config = type(config)(**{**config.to_diff_dict(), **changes})
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that a test can see them go missing
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    (byte_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer).save_pretrained(folder)
    return folder


def plan_of(dense: hs.Checkpoint, *words: str) -> hs.SharePlan:
    """A plan that does what these words say, each to some of the layers."""
    units, neurons = dense.layouts.attention, dense.layouts.neurons
    assert neurons is not None
    heads: dict[int, Any] = {}
    cells: dict[int, Any] = {}
    sections: list[Section] = []
    for word in words:
        match word:
            case "units":
                heads |= {0: [1], 1: [0, 3], 3: [2]}
            case "neurons":
                cells |= {0: range(10, 42), 2: range(64)}
            case "odd neurons":
                cells |= {0: range(5), 1: range(3, 40, 3)}
            case "alike":
                heads |= {0: [3], 1: [1], 2: [2], 3: [0]}
                cells |= {layer: range(layer, layer + 32) for layer in range(4)}
            case "attention":
                heads |= {2: range(units.groups)}
            case "first attention":
                heads |= {0: range(units.groups)}
            case "feed-forward":
                cells |= {1: range(neurons.groups)}
            case "last feed-forward":
                cells |= {3: range(neurons.groups)}
            case "layer":
                heads |= {2: range(units.groups)}
                cells |= {2: range(neurons.groups)}
            case "last layer":
                heads |= {3: range(units.groups)}
                cells |= {3: range(neurons.groups)}
            case "ties":
                ties = (Tie(HeadUnit(2, 1), HeadUnit(0, 0)), Tie(HeadUnit(3, 3), HeadUnit(1, 2)))
                sections.append(Selection(layout=units.only((Part.Q, Part.K, Part.V)), ties=ties))
            case "ties across":  # to units that another of two ranks has
                ties = (Tie(HeadUnit(2, 3), HeadUnit(0, 0)), Tie(HeadUnit(3, 0), HeadUnit(1, 2)))
                sections.append(Selection(layout=units.only((Part.Q, Part.K, Part.V)), ties=ties))
            case "scaled ties":
                ties = (Tie(HeadUnit(2, 1), HeadUnit(0, 0)), Tie(HeadUnit(3, 3), HeadUnit(1, 2)))
                sections.append(Selection(layout=units, ties=ties, scale=True))
            case "low rank":
                low = units.only((Part.O,))
                sections.append(LowRankUnits(layout=low, units={1: [1, 2], 2: [3]}, ranks={1: [3, 5], 2: [4]}))
            case "narrow values":
                sections.append(NarrowValues(layout=units.only((Part.V, Part.O)), widths={0: 5, 3: 3}))
    for layout, removed in ((units, heads), (neurons, cells)):
        if removed:
            sections.append(Removal(layout=layout, removed=removed))
    return hs.SharePlan.of_sections(sections, str(dense.config["model_type"]))


def reduce(folder: Path, out: Path, *words: str) -> Path:
    """The shared folder that such a plan makes."""
    with hs.open_checkpoint(folder) as dense:
        return hs.share(dense, plan_of(dense, *words)).save(out)


class LlamaCpp:
    """llama.cpp with a file loaded, which computes with numbers of 32 bits wherever the file lets it."""

    def __init__(self, file: Path, context: int = 128) -> None:
        import xllamacpp as xc

        params = xc.CommonParams()
        params.model.path = str(file)
        params.n_ctx = context
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        params.warmup = False
        params.verbosity = -1
        params.flash_attn_type = xc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xc.ggml_type.GGML_TYPE_F32
        self._server = xc.Server(params)

    def _ask(self, **asked: Any) -> dict[str, Any]:
        found = self._server.handle_completions({"temperature": 0, **asked})
        answer: dict[str, Any] = json.loads(found) if isinstance(found, str | bytes) else found
        assert "choices" in answer, answer
        return answer

    def log_probabilities(self, tokens: str | Sequence[int], size: int = VOCABULARY) -> NDArray[np.float64]:
        """Those of the next token, after these. Shape: size."""
        # some letter is forced, since a token that ends a text comes without its probabilities
        answer = self._ask(
            prompt=tokens if isinstance(tokens, str) else list(tokens),
            n_predict=1,
            n_probs=size,
            logit_bias=[[40, 1e4]],
            ignore_eos=True,
            cache_prompt=True,
        )
        found = np.full(size, np.nan)
        for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[each["id"]] = each["logprob"]
        return found

    def greedy(self, prompt: str, count: int) -> tuple[str, list[int]]:
        """The text that follows greedily, and its tokens."""
        answer = self._ask(prompt=prompt, n_predict=count, ignore_eos=True, return_tokens=True, verbose=True)
        return answer["choices"][0]["text"], answer["__verbose"]["tokens"]


def expected(folder: Path, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Log-probabilities of the next token after each of these, by transformers. Shape: tokens x vocabulary."""
    with hs.open_checkpoint(folder) as checkpoint:
        model = load_model(checkpoint)
    with torch.no_grad():
        logits = model(torch.tensor([list(tokens)])).logits[0]
    return logits.double().log_softmax(-1).numpy()  # type: ignore[no-any-return]


def missed_by(folder: Path, file: Path, count: int = 12) -> float:
    """The largest difference of a log-probability between transformers on a folder and llama.cpp on a file."""
    tokens = tf.AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"][:count]
    wanted = expected(folder, tokens)
    engine = LlamaCpp(file)
    return max(
        float(np.abs(engine.log_probabilities(tokens[: at + 1]) - wanted[at]).max()) for at in range(0, len(tokens), 3)
    )
