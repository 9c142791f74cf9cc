"""Tiny models that read any text, one of which writes, and the sentences that their tokenizer has seen."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from support import tiny

SENTENCES = [
    "the guinea pig went to the house because the cat was there",
    "Question: does the river freeze in winter?\nAnswer: yes",
    "Article: a kite flies when the wind is strong, and falls when it is not.",
]


def make_writer(folder: Path) -> Path:
    """A tiny Llama whose logits are far from uniform, with a byte-level tokenizer."""
    tiny.make_llama(folder, vocab_size=340, max_position_embeddings=256, initializer_range=0.3)
    return _with_tokenizer(folder)


def make_encoder(folder: Path) -> Path:
    """A tiny MPNet, which writes nothing, with the same tokenizer."""
    config = transformers.MPNetConfig(**{**tiny.COMMON, "vocab_size": 340})
    torch.manual_seed(0)
    transformers.MPNetModel(config).save_pretrained(folder)
    return _with_tokenizer(folder)


def _with_tokenizer(folder: Path) -> Path:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(SENTENCES, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(folder)
    return folder
