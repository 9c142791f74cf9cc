"""Perplexity of a text in windows, and for encoders the agreement of their hidden states with the dense model's."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import EvaluationError
from headshare.evaluation.embeddings import Agreement, agreement
from headshare.integrations.transformers.loading import load_model, load_tokenizer
from headshare.progress import track
from headshare.text.windows import (
    WINDOW,
    Windows,
    check_finite,
    check_vocabulary,
    check_window,
    finite_or_null,
    is_causal,
    longest_window,
    windows_of,
)

TOGETHER = 2048
"""How many tokens are run at once: fewer leave a device idle, and more take memory for their logits."""

KEPT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token, over windows that do not overlap."""

    perplexity: float
    tokens: int
    window: int
    bos: bool

    def to_dict(self) -> dict[str, Any]:
        """The same under the names that `--json` prints; a perplexity past any float is null."""
        return finite_or_null(asdict(self))


def perplexity(model: Any, windows: Windows) -> Perplexity:
    """Windowed perplexity: every token after a window's first is predicted from those before it in the window.

    Log-likelihoods are computed in float32 and summed in float64.

    Raises:
        EvaluationError: if the model is not a causal language model, or its logits are not finite.
    """
    losses = window_losses(model, windows)
    mean, tokens = losses.mean().item(), len(losses) * (windows.length - 1)
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, tokens, windows.length, windows.bos)


@torch.inference_mode()
def window_losses(model: Any, windows: Windows) -> Float[Tensor, " windows"]:
    """What the tokens of each window but the first lose on average, nats; all windows predict as many. Two models'
    losses of the same windows can be compared in pairs.

    Raises:
        EvaluationError: as `perplexity` does.
    """
    _check_causal(model)
    found = zip(_logits_of_all(model, windows), windows.tokens, strict=True)
    losses = [_loss(logits.float(), window) for logits, window in found]
    return torch.tensor(losses, dtype=torch.float64)


class Predictions:
    """What the dense model predicts in each of these windows, to hold other models against. What it says of the first
    windows is kept, as far as `room` bytes reach, so that any number of models costs one run of it.

    Raises:
        EvaluationError: if it predicts no next token.
    """

    def __init__(self, dense: Any, windows: Windows, *, room: int = KEPT_BYTES) -> None:
        _check_causal(dense)
        self.windows = windows
        self._dense, self._room = dense, room
        self._kept: dict[int, Tensor] = {}

    @torch.inference_mode()
    def logits(self, window: int) -> Float[Tensor, "predicted words"]:
        """Of one window, as the dense model gives them.

        Raises:
            EvaluationError: if one is NaN or infinite.
        """
        if window in self._kept:
            return self._kept[window]
        found: Tensor = _logits(self._dense, self.windows.tokens[window][None])[0]
        if found.nbytes <= self._room:
            self._room -= found.nbytes
            self._kept[window] = found.cpu()
        return found


@torch.inference_mode()
def losses_and_divergences(
    model: Any, dense: Predictions
) -> tuple[Float[Tensor, " windows"], Float[Tensor, " windows"]]:
    """The model's `window_losses`, and how far its predictions are from the dense model's in each window, nats a token:
    KL(dense | model) of their next-token distributions. Loss says how well a text is predicted; divergence, how much
    of the dense model is left, whatever the text says.

    Raises:
        EvaluationError: as `perplexity` does, for either.
    """
    _check_causal(model)
    losses, divergences = [], []
    for index, logits in enumerate(_logits_of_all(model, dense.windows)):
        found = logits.float()
        losses.append(_loss(found, dense.windows.tokens[index]))
        wanted = dense.logits(index).to(found.device).float().log_softmax(dim=-1)
        apart = functional.kl_div(found.log_softmax(dim=-1), wanted, reduction="none", log_target=True)
        divergences.append(apart.sum(dim=-1).double().mean().item())
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(divergences, dtype=torch.float64)


def _check_causal(model: Any) -> None:
    if not is_causal(model):
        raise EvaluationError(
            f"{type(model).__name__} does not predict the next token, so it has no perplexity. "
            "For an encoder, compare it with its dense model: headshare eval SHARED --against MODEL --text FILE"
        )


def _logits_of_all(model: Any, windows: Windows) -> Iterator[Float[Tensor, "predicted words"]]:
    """Of one window after the other; several are run at once."""
    batches = torch.split(windows.tokens, max(1, TOGETHER // windows.length))
    for batch in track(batches, "batches of windows", len(batches)):
        yield from _logits(model, batch)


def _logits(model: Any, windows: Int[Tensor, "batch window"]) -> Float[Tensor, "batch predicted words"]:
    tokens = windows.to(next(model.parameters()).device)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    check_finite(logits)
    return logits


def _loss(logits: Float[Tensor, "predicted words"], window: Int[Tensor, " window"]) -> float:
    return functional.cross_entropy(logits, window[1:].to(logits.device), reduction="none").double().mean().item()


def evaluate(
    checkpoint: Checkpoint,
    text: str,
    *,
    against: Checkpoint | None = None,
    window: int = WINDOW,
    limit: int | None = None,
    bos: bool | None = None,
    **options: Any,
) -> Perplexity | Agreement:
    """Perplexity of the text, or with `against` (for encoders) the agreement of both models' embeddings. `options`,
    such as `dtype` and `device_map`, go to `from_pretrained`.

    Raises:
        EvaluationError, CheckpointError: if the model, its tokenizer or the text cannot be used.
    """
    windows = windows_of(load_tokenizer(checkpoint), text, window=window, limit=limit, bos=bos)
    for one in (checkpoint, *([] if against is None else [against])):
        check_window(window, longest_window(one.config))
        check_vocabulary(one.config, windows.tokens)
    model = load_model(checkpoint, **options)
    if against is not None:
        return agreement(model, load_model(against, **options), windows)
    return perplexity(model, windows)
