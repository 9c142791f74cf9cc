"""Text that a model writes itself, as windows of tokens."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from headshare.architecture.config import text_config
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CalibrationError
from headshare.integrations.transformers.loading import load_model, quiet, running
from headshare.precision import short_type
from headshare.progress import say, track
from headshare.text.windows import check_finite, is_causal, not_causal

# windows that are written together; they share one seed, so their number is part of the result
BATCH = 16
AFTER_TEXT = 32


def first_tokens(
    checkpoint: Checkpoint, tokenizer: Any, first: int | None, count: int, seed: int
) -> Int[Tensor, "windows 1"]:
    """The first token of each window: the beginning-of-text token, or random tokens that are not special."""
    if first is not None:
        return torch.full((count, 1), first)
    size = min(text_config(checkpoint.config).get("vocab_size") or len(tokenizer), len(tokenizer))
    words = torch.tensor(sorted({*range(size)} - {*tokenizer.all_special_ids}))
    return words[torch.randint(len(words), (count, 1), generator=torch.Generator().manual_seed(seed))]


@torch.inference_mode()
def written_after(
    starts: Int[Tensor, "windows start"],
    checkpoint: Checkpoint,
    window: int,
    seed: int,
    device: str | None,
    batch: int = BATCH,
) -> Int[Tensor, "windows window"]:
    """Windows that the model writes after these first tokens, drawn from its own distribution.

    A dense model runs in bfloat16 where the device multiplies that. The global random state stays as it is. How much is
    written, and how far that is, is reported: on a CPU it takes minutes.

    Raises:
        CalibrationError: if the model writes no text.
        CheckpointError: if it cannot be loaded.
    """
    # Most of the time goes into reading weights, a step of a few tokens at a time: short ones are read twice as fast.
    number = short_type(device) if checkpoint.plan is None else None
    options: dict[str, Any] = {"device_map": device, "dtype": number}
    model = load_model(checkpoint, **{name: value for name, value in options.items() if value is not None})
    if not is_causal(model):
        raise CalibrationError(
            f"{checkpoint.name} writes no text to calibrate it on: {not_causal(model)}. "
            "Give a text file, a .jsonl file or hf:NAME instead of 'self'."
        )
    with running():
        logits = model(input_ids=starts[:1].to(model.device), use_cache=False).logits
    check_finite(logits)

    # The checkpoint's own settings may sharpen the distribution, penalise words, or stop at an end of text.
    model.generation_config = GenerationConfig()
    length = window - starts.shape[1]
    drawn = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length)

    batches = torch.split(starts.to(model.device), batch)
    steps = length * len(batches)
    say(f"{checkpoint.name} writes {len(starts) * length:,} tokens")
    cards = [model.device] if model.device.type == "cuda" else []
    with (
        running(),
        quiet(),
        torch.random.fork_rng(devices=cards),
        closing(track(range(steps), f"steps of writing, {batch} windows at a time", steps)) as report,
    ):
        torch.manual_seed(seed)
        reported = StoppingCriteriaList([_Reported(report)])
        written = [
            model.generate(
                some, attention_mask=torch.ones_like(some), generation_config=drawn, stopping_criteria=reported
            ).cpu()
            for some in batches
        ]
    return torch.cat(written)


class _Reported(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Stops no window, and passes each step on to a report of progress."""

    def __init__(self, report: Iterator[int]) -> None:
        self.report = report
        next(report, None)  # none is done yet

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Count one more step; no window is done."""
        next(self.report, None)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
