"""A tokenizer as it is needed here: with its vocabulary, and without the special tokens that some put behind texts.

transformers makes an empty tokenizer where the files of its vocabulary are missing.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from headshare.errors import EvaluationError
from headshare.files.printable import reason_of

# names of files that are a whole vocabulary, whatever the tokenizer's class, as transformers looks for them
_WHOLE = re.compile(r"tokenizer(\.[^/]+)?\.json|tokenizer\.model.*|tekken\.json|tiktoken\.model|.+\.tiktoken")
_SENTENCES = ".model"
# what transformers reads such a file with: it tries one after the other, and its error names the last
_LIBRARIES = ("sentencepiece", "tiktoken")
# a text that shows what a tokenizer puts before and behind all texts
_LETTER = "a"
_ADVICE = "Put the tokenizer's files beside the weights: tokenizer.json and tokenizer_config.json"


def check_vocabulary(tokenizer: Any, folder: Path, name: str) -> None:
    """Refuse a tokenizer that transformers made without its files, or whose files hold no token of text.

    `folder` is where it was loaded from, and `name` the checkpoint's name.

    Raises:
        EvaluationError: naming the files that are missing.
    """
    present = _files(folder)
    named = set(type(tokenizer).vocab_files_names.values())
    # a class that names no file, as of bytes, needs none; tokenizer.json stands for all files that a class names
    parts = {file for file in named if not _WHOLE.fullmatch(file)}
    if named and not (parts and parts <= present) and not any(map(_WHOLE.fullmatch, present)):
        lacking = " and ".join(sorted(parts - present))
        instead = f", and no {lacking}, which {type(tokenizer).__name__} reads in its place" if lacking else ""
        raise EvaluationError(f"{name} has no tokenizer: there is no tokenizer.json{instead}. {_ADVICE}.")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise EvaluationError(
            f"{name} has no tokenizer: its files hold {len(tokenizer)} tokens, all of them special. {_ADVICE}."
        )


def leave_unended(tokenizer: Any) -> None:
    """Keep a tokenizer from putting special tokens behind texts; those that it puts before them stay.

    A prompt that is ended is not gone on from, and the tokens of an ending would not be those that follow its context.
    Where documents are joined, their ends are put there explicitly.

    Raises:
        EvaluationError: if such tokens cannot be kept away.
    """
    before, behind = around(tokenizer)
    if not behind:
        return
    words = tokenizer.convert_ids_to_tokens(before)
    if hasattr(tokenizer, "backend_tokenizer"):
        special = list(zip(words, before, strict=True))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=[*words, "$A"], special_tokens=special)
    else:
        tokenizer.build_inputs_with_special_tokens = lambda ids, other=None: [*before, *ids, *(other or [])]
    if around(tokenizer)[1]:
        raise EvaluationError(
            f"{type(tokenizer).__name__} puts {tokenizer.convert_ids_to_tokens(behind)} behind every text, so that no "
            "text can be gone on from. Set add_eos_token to false in tokenizer_config.json."
        )


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, and those behind it."""
    plain = list(tokenizer(_LETTER, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_LETTER)["input_ids"])
    if not plain:
        return [], []
    start = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]


def unloadable(error: BaseException, folder: Path, name: str) -> EvaluationError:
    """The error for a tokenizer that transformers cannot load: what is missing, or else transformers' own reason."""
    models = sorted(file for file in _files(folder) if file.endswith(_SENTENCES))
    lacking = [library for library in _LIBRARIES if find_spec(library) is None]
    if models and lacking and any(library in str(error) for library in _LIBRARIES):
        return EvaluationError(
            f"{name} has its tokenizer only as {models[0]}, and {lacking[0]}, which reads it, is not installed. "
            "Run: pip install sentencepiece protobuf. Or put a tokenizer.json beside it."
        )
    reason = reason_of(error)
    if not models and "tokenizer.json" not in _files(folder):
        reason = "there is no tokenizer.json"
    return EvaluationError(f"{name} has no tokenizer that transformers can load ({reason}). {_ADVICE}.")


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}
