"""Train a small model in a minute or two, so that the other examples need no download.

    python examples/small_model.py OUT

It is a Llama of six layers that learns Python's own help texts (the topics of `help()`, which come with Python). OUT
gets `model`, `calibration.txt`, which is text that the model was trained on, and `test.txt`, which it has not seen.
"""

import argparse
import pydoc_data.topics
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT = 128  # tokens
WORDS = 1024  # of the vocabulary


def texts() -> tuple[str, str]:
    """The texts to train on and to measure on: nine topics of ten, and the others."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    random.Random(0).shuffle(topics)
    cut = len(topics) * 9 // 10
    return "\n\n".join(topics[:cut]), "\n\n".join(topics[cut:])


def a_tokenizer(text: str) -> transformers.PreTrainedTokenizerFast:
    """Byte pairs of this text, and a token that opens each window."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=WORDS, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def a_model() -> transformers.LlamaForCausalLM:
    """Six layers of four key/value heads, each read by two query heads: 1.3 million weights."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def train(model: transformers.LlamaForCausalLM, tokens: torch.Tensor, steps: int, batch: int = 8) -> None:
    """Adam, at a rate that rises for a tenth of the steps and falls to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps + 1, pct_start=0.1)
    opening = torch.zeros(batch, 1, dtype=torch.long)
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - CONTEXT, (batch,)).tolist()
        windows = torch.stack([tokens[start : start + CONTEXT - 1] for start in starts])
        windows = torch.cat([opening, windows], dim=1)
        loss = model(windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


def make(out: Path, steps: int = 400) -> None:
    """Train the model and write it with its texts, unless it is there."""
    if (out / "model" / "config.json").exists():
        return
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    seen, unseen = texts()
    tokenizer, model = a_tokenizer(seen), a_model()
    train(model, torch.tensor(tokenizer(seen).input_ids), steps)
    out.mkdir(parents=True, exist_ok=True)
    (out / "calibration.txt").write_text(seen)
    (out / "test.txt").write_text(unseen)
    tokenizer.save_pretrained(out / "model")
    model.save_pretrained(out / "model")


def main() -> None:
    """Make the model that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    make(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
