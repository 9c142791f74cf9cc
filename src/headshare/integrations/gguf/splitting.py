"""Names of the ways in which byte-level tokenizers split a text before they merge bytes, as llama.cpp knows them.

transformers writes such a way down as steps: digits, expressions, bytes. llama.cpp has a name for each that it knows
(`tokenizer.ggml.pre`), and rules of its own under that name. So the steps are compared with those of tokenizers whose
names are known, and others are refused: a text that is split in another way is read as other tokens.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from headshare.architecture.llama_cpp import ENGINE
from headshare.errors import CheckpointError

_BYTES = "ByteLevel"
# kinds of steps with what decides about them, and what that is where nothing is said
_KINDS: Mapping[str, Mapping[str, Any]] = {
    _BYTES: {"add_prefix_space": False, "use_regex": True},
    "Digits": {"individual_digits": False},
    "Split": {"pattern": None, "behavior": None, "invert": False},
}

_BY_WORDS = (_BYTES, False, True)
_ONLY_BYTES = (_BYTES, False, False)
_DIGITS = ("Digits", True)


def _split(expression: str) -> tuple[Any, ...]:
    return "Split", expression, "Isolated", False


_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = r"[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_THREE_DIGITS = _split(rf"{_ENGLISH}|{_START}\p{{L}}+|\p{{N}}{{1,3}}| ?{_REST}")
_ONE_DIGIT = _split(rf"{_ENGLISH}|{_START}\p{{L}}+|\p{{N}}| ?{_REST}")
_CASES = _split(rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}| ?{_REST_WITH_SLASH}")
_CASES_IN_ENGLISH = _split(
    rf"{_START}{_UPPER}*{_LOWER}+{_ENGLISH}?|{_START}{_UPPER}+{_LOWER}*{_ENGLISH}?|\p{{N}}{{1,3}}| ?{_REST_WITH_SLASH}"
)

# steps, and whether whole words are taken from the vocabulary before anything is merged
_NAMES: Mapping[tuple[tuple[Any, ...], bool], str] = {
    ((_BY_WORDS,), False): "gpt-2",
    ((_DIGITS, _BY_WORDS), False): "smollm",
    ((_THREE_DIGITS, _ONLY_BYTES), True): "llama-bpe",
    ((_THREE_DIGITS, _ONLY_BYTES), False): "smaug-bpe",
    ((_ONE_DIGIT, _ONLY_BYTES), False): "qwen2",
    ((_CASES, _ONLY_BYTES), True): "tekken",
    ((_CASES_IN_ENGLISH, _ONLY_BYTES), False): "gpt-4o",
}


def is_of_bytes(pre_tokenizer: Any) -> bool:
    """True if this is the splitting of a tokenizer that merges bytes."""
    return any(step.get("type") == _BYTES for step in _flat(pre_tokenizer))


def name_of_splitting(pre_tokenizer: Any, *, whole_words: bool, name: str) -> str:
    """llama.cpp's name for the splitting of a byte-level tokenizer.

    Raises:
        CheckpointError: if it has none that is known here. `name` is the checkpoint's.
    """
    steps = tuple(map(_step, _flat(pre_tokenizer)))
    found = _NAMES.get((steps, whole_words))
    if found is None:
        raise CheckpointError(
            f"the tokenizer of {name} splits texts by {steps!r:.300}, for which {ENGINE} has no name that headshare "
            f"knows; it knows {', '.join(_NAMES.values())}. Give the folder that headshare expand writes to "
            f"{ENGINE}'s own converter."
        )
    return found


def _flat(pre_tokenizer: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a splitting, those of sequences within it too."""
    if not isinstance(pre_tokenizer, Mapping):
        return
    inner = pre_tokenizer.get("pretokenizers")
    if pre_tokenizer.get("type") == "Sequence" and isinstance(inner, list):
        for step in inner:
            yield from _flat(step)
    else:
        yield pre_tokenizer


def _step(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """A step as a tuple: its kind, and what decides about it."""
    kind = str(step.get("type"))
    values = [step.get(key, usual) for key, usual in _KINDS.get(kind, {}).items()]
    return kind, *(_expression(value) if isinstance(value, Mapping) else value for value in values)


def _expression(pattern: Mapping[str, Any]) -> str:
    return str(pattern.get("Regex", pattern))
