"""The vocabulary of a GGUF file: tokens, merges, special tokens and templates of chats, from a folder's tokenizer."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from headshare.architecture.llama_cpp import ENGINE
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError
from headshare.files.untrusted import foreign, read_json
from headshare.integrations.gguf.splitting import is_of_bytes, name_of_splitting
from headshare.integrations.transformers.loading import load_tokenizer
from headshare.integrations.transformers.tokenizer import around

# kinds of tokenizer by GGUF's names, which are those of their first models
_OF_BYTES = "gpt2"
_SENTENCEPIECE = "llama"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BLANK = "\u2581"
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_NAMES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # the second is spelt so in GGUF
_PLAIN_NORMALIZERS = (None, "NFC")
# what GGUF files call the template that is used where none is asked for
_DEFAULT = "default"


class Kind(IntEnum):
    """Kinds of token, by GGUF's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer as its own library writes it down, with the name of its checkpoint."""

    name: str
    state: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.state["model"]
        return found

    @property
    def added(self) -> list[Mapping[str, Any]]:
        return list(self.state.get("added_tokens") or [])

    @property
    def merges(self) -> list[tuple[str, str]]:
        pairs = (each.split(" ", 1) if isinstance(each, str) else each for each in self.model["merges"])
        return [(left, right) for left, right in pairs]

    def refuse(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"the tokenizer of {self.name} {why}. GGUF files have byte-level BPE, and BPE of SentencePiece with bytes."
        )


def vocabulary(checkpoint: Checkpoint, rows: int) -> dict[str, Any]:
    """The keys of a file's tokenizer, for a model with so many rows of embeddings.

    Raises:
        CheckpointError: if the folder has no such tokenizer as llama.cpp has, or it has more tokens than rows.
        EvaluationError: if the folder has no tokenizer that transformers can load.
    """
    loaded = load_tokenizer(checkpoint)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.name} has no tokenizer.json. Load and save it with transformers."
        )
    with foreign(f"the tokenizer of {checkpoint.name} cannot be written as GGUF"):
        tokenizer = _Tokenizer(checkpoint.name, json.loads(backend.to_str()))
        _check_merges_bytes(tokenizer)
        merges_bytes = is_of_bytes(tokenizer.state.get("pre_tokenizer"))
        keys = _of_bytes(tokenizer) if merges_bytes else _sentencepiece(tokenizer)
        keys |= _tokens(tokenizer, rows, scored=keys["model"] == _SENTENCEPIECE)
        keys |= _special(checkpoint, loaded, rows)
        found = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        return found | _templates(loaded.chat_template)


def _check_merges_bytes(tokenizer: _Tokenizer) -> None:
    """Refuse what is no BPE, or a BPE that marks beginnings or ends of words."""
    model = tokenizer.model
    if model.get("type") != "BPE":
        raise tokenizer.refuse(f"is a {model.get('type')!s:.40}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise tokenizer.refuse(f"marks parts of words ({key}: {model[key]!r:.40})")


def _of_bytes(tokenizer: _Tokenizer) -> dict[str, Any]:
    """Keys of a tokenizer that merges bytes."""
    normalizer = (tokenizer.state.get("normalizer") or {}).get("type")
    if normalizer not in _PLAIN_NORMALIZERS:
        raise tokenizer.refuse(f"changes texts before it reads them ({normalizer!s:.40})")
    pre = name_of_splitting(
        tokenizer.state.get("pre_tokenizer"),
        whole_words=bool(tokenizer.model.get("ignore_merges")),
        name=tokenizer.name,
    )
    return {"model": _OF_BYTES, "pre": pre, "merges": [" ".join(pair) for pair in tokenizer.merges]}


def _sentencepiece(tokenizer: _Tokenizer) -> dict[str, Any]:
    """Keys of a tokenizer that came from SentencePiece, by what makes blanks visible there."""
    if not tokenizer.model.get("byte_fallback"):
        raise tokenizer.refuse("neither merges bytes nor falls back on them")
    steps = [*_steps(tokenizer.state.get("normalizer"), "normalizers"),
             *_steps(tokenizer.state.get("pre_tokenizer"), "pretokenizers")]  # fmt: skip
    before = False
    for step in steps:
        match step.get("type"):
            case "Prepend" if step.get("prepend") == _BLANK:
                before = True
            case "Replace" if step.get("content") == _BLANK and step.get("pattern") == {"String": " "}:
                pass
            case "Metaspace" if step.get("replacement") == _BLANK and not step.get("split"):
                before = before or step.get("prepend_scheme") != "never"
            case other:
                raise tokenizer.refuse(f"has a step {other!s:.40} that SentencePiece has not")
    return {"model": _SENTENCEPIECE, "pre": "default", "add_space_prefix": before}


def _steps(part: Any, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(part, Mapping):
        return []
    return list(part[key]) if part.get("type") == "Sequence" else [part]


def _tokens(tokenizer: _Tokenizer, rows: int, *, scored: bool) -> dict[str, Any]:
    """Tokens in the order of their numbers, their kinds, and scores where the kind of tokenizer has them."""
    vocab: Mapping[str, int] = tokenizer.model["vocab"]
    added = {each["id"]: each for each in tokenizer.added}
    count = max([*vocab.values(), *added], default=-1) + 1
    if count > rows:
        raise tokenizer.refuse(f"has {count} tokens, and its model embeds {rows}")
    texts = {number: text for text, number in vocab.items()} | {
        number: each["content"] for number, each in added.items()
    }
    unknown = tokenizer.model.get("unk_token")
    kinds = {number: _kind(texts[number], added.get(number), unknown, scored=scored) for number in texts}
    keys: dict[str, Any] = {
        "tokens": [texts.get(number, f"[PAD{number}]") for number in range(rows)],
        "token_type": [int(kinds.get(number, Kind.UNUSED)) for number in range(rows)],
    }
    if scored:
        keys["scores"] = _scores(tokenizer, keys["tokens"])
    return keys


def _kind(text: str, added: Mapping[str, Any] | None, unknown: str | None, *, scored: bool) -> Kind:
    if scored and text == unknown:
        return Kind.UNKNOWN
    if added is not None:
        return Kind.CONTROL if added.get("special") else Kind.USER_DEFINED
    return Kind.BYTE if scored and _BYTE.fullmatch(text) else Kind.NORMAL


def _scores(tokenizer: _Tokenizer, tokens: list[str]) -> list[float]:
    """Scores by which llama.cpp merges what transformers merges: the earlier a merge stands, the higher its result."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(tokenizer.merges):
        first.setdefault("".join(pair), rank)
    return [-float(first.get(token, len(first))) for token in tokens]


def _special(checkpoint: Checkpoint, loaded: Any, rows: int) -> dict[str, Any]:
    """Numbers of special tokens, and whether texts begin with one."""
    numbers = {name: getattr(loaded, f"{name}_token_id", None) for name in _SPECIAL}
    for name in ("bos", "eos"):
        if numbers[name] is None:
            numbers[name] = _configured(checkpoint, f"{name}_token_id")
    known = {name: number for name, number in numbers.items() if type(number) is int and 0 <= number < rows}
    if "eos" not in known:
        raise CheckpointError(
            f"neither the tokenizer nor the configuration of {checkpoint.name} names a token that ends texts, and "
            f"{ENGINE} would take another for it. Set eos_token in tokenizer_config.json."
        )
    before, _ = around(loaded)
    if before not in ([], [known.get("bos")]):
        raise CheckpointError(
            f"the tokenizer of {checkpoint.name} puts {loaded.convert_ids_to_tokens(before)} before texts; {ENGINE} "
            "puts one token there, that which begins texts (bos_token)."
        )
    keys: dict[str, Any] = {f"{_NAMES.get(name, name)}_token_id": number for name, number in known.items()}
    return keys | {"add_bos_token": bool(before), "add_eos_token": False}


def _configured(checkpoint: Checkpoint, key: str) -> int | None:
    """The number of a special token as the settings of generation, or else of the model, give it."""
    file = checkpoint.path / "generation_config.json"
    for settings in (read_json(file) if file.is_file() else {}, checkpoint.config):
        value = settings.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int:
            return value
    return None


def _templates(template: Any) -> dict[str, Any]:
    """Templates of chats, by the keys that GGUF has for one and for several."""
    named = template if isinstance(template, Mapping) else {_DEFAULT: template}
    found = {str(name): text for name, text in named.items() if isinstance(text, str) and text}
    keys: dict[str, Any] = {}
    if _DEFAULT in found:
        keys["tokenizer.chat_template"] = found.pop(_DEFAULT)
    if found:
        keys["tokenizer.chat_templates"] = sorted(found)
        keys |= {f"tokenizer.chat_template.{name}": found[name] for name in sorted(found)}
    return keys
