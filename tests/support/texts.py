"""Texts of words that tiny models know, tokenizers that read them, and their windows cut by hand."""

import random
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from support import tiny

WORDS = [f"w{number}" for number in range(4, tiny.VOCABULARY)]


def add_tokenizer(folder: Path, *, bos: bool = True, extra: int = 0) -> Path:
    """Put a tokenizer beside a model: w4 is token 4, and so on to the end of the vocabulary (and `extra` beyond)."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {
        f"w{n}": n for n in range(4, tiny.VOCABULARY + extra)
    }  # fmt: skip
    tokenizer = tokenizers.Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"bos_token": "<s>"} if bos else {})
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def a_text(path: Path, words: int = 300, seed: int = 0) -> Path:
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=words)))
    return path


def windows_by_hand(folder: Path, text: Path, window: int, bos: bool, limit: int | None = None) -> torch.Tensor:
    """Equal windows of the text's tokens, the rest left out."""
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False)["input_ids"]
    body = window - bos
    ids = ids[: limit or len(ids)]
    rows = [([1] if bos else []) + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
    return torch.tensor(rows)
