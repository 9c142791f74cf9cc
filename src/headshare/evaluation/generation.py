"""Text that models write after a prompt: samples side by side, and translations with their BLEU and METEOR."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from headshare.errors import EvaluationError
from headshare.evaluation.harness import Runner
from headshare.files.untrusted import foreign
from headshare.integrations.transformers.loading import quiet, running
from headshare.progress import track
from headshare.tables import Table, in_one_line


@dataclass(frozen=True)
class Writing:
    """Settings of writing text: its length, its end, and the choice of each token.

    At most `tokens` tokens are written, fewer where `stop` comes. The likeliest token is chosen each time. With a
    temperature tokens are drawn, by the seed.
    """

    tokens: int = 64
    stop: str | None = None
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise EvaluationError(f"{self.tokens} tokens say nothing; write at least 1.")
        if self.temperature < 0:
            raise EvaluationError(
                f"a temperature of {self.temperature} draws nothing; use 0 for the likeliest, or more."
            )


def continuations(runner: Runner, prompts: Sequence[str], writing: Writing) -> list[str]:
    """The text that the model writes after each prompt, without the prompt, cut before `stop`.

    Prompts of similar length form a batch, padded on the left. With a temperature every prompt is a batch of its own,
    so that its text does not depend on the other prompts.

    Raises:
        EvaluationError: if a prompt has no tokens, or more than leave room for what is to be written.
    """
    encoded = [_encoded(runner, prompt, writing) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    size = 1 if writing.temperature else runner.settings.batch_size
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    texts = [""] * len(prompts)
    for batch in track(batches, "batches", len(batches)):
        for number, text in zip(batch, _written(runner, [encoded[index] for index in batch], writing), strict=True):
            texts[number] = text
    return texts


def _encoded(runner: Runner, prompt: str, writing: Writing) -> list[int]:
    with foreign("the model's tokenizer cannot read a prompt", EvaluationError, "Its files are damaged."), quiet():
        tokens: list[int] = runner.tokenizer(prompt)["input_ids"]
    if not tokens:
        raise EvaluationError(f"the prompt {prompt!r:.60} has no tokens; there is nothing to go on from.")
    if runner.longest is not None and len(tokens) + writing.tokens > runner.longest:
        raise EvaluationError(
            f"a prompt of {len(tokens)} tokens and {writing.tokens} to be written are more than the model's "
            f"{runner.longest}. Shorten it, or write fewer."
        )
    return tokens


@torch.inference_mode()
def _written(runner: Runner, prompts: Sequence[list[int]], writing: Writing) -> Iterator[str]:
    # padding goes on the left, so that every prompt ends where writing begins
    longest = max(map(len, prompts))
    device = next(runner.model.parameters()).device
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    # the settings say all about the choice of tokens: top_k and top_p would cut the distribution that is drawn from
    end = runner.tokenizer.eos_token_id
    chosen: dict[str, Any] = {"do_sample": False}
    if writing.temperature:
        chosen = {"do_sample": True, "temperature": writing.temperature, "top_k": 0, "top_p": 1.0}
    stop = {"stop_strings": [writing.stop], "tokenizer": runner.tokenizer} if writing.stop else {}
    # the generators of the processor and of this device are put back afterwards, so that nobody else's draws change
    cards = [] if device.type == "cpu" else [device]
    with running(), _without_habits(runner.model) as own, quiet(), torch.random.fork_rng(devices=cards):
        torch.manual_seed(writing.seed)
        config = GenerationConfig(
            max_new_tokens=writing.tokens,
            pad_token_id=0 if end is None else end,
            eos_token_id=end if own.eos_token_id is None else own.eos_token_id,
            **chosen,
        )
        out = runner.model.generate(input_ids=tokens, attention_mask=mask, generation_config=config, **stop)
    # generation ends with the token in which `stop` comes, which may hold more than it
    for row in out[:, longest:]:
        text: str = runner.tokenizer.decode(row, skip_special_tokens=True)
        yield text.partition(writing.stop)[0] if writing.stop else text


@contextmanager
def _without_habits(model: Any) -> Iterator[GenerationConfig]:
    """Put the checkpoint's own settings of generation aside, which may suppress, penalise or sharpen tokens."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield own
    finally:
        model.generation_config = own


def samples_of(texts: Sequence[tuple[str, Sequence[str]]], prompts: Sequence[str]) -> str:
    """Markdown tables, one below each prompt, of the text that every model wrote.

    `texts` has a model's name and its texts, in the order of the prompts.
    """
    lines = []
    for number, prompt in enumerate(prompts):
        table = Table(["model", "writes"], [[name, written[number]] for name, written in texts], words=(0, 1))
        lines += [f"**{in_one_line(prompt)}**", "", table.markdown(), ""]
    return "\n".join(lines).rstrip()
