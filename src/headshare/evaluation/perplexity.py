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
from headshare.checkpoint.fingerprint import ANY_BASE, check_origin
from headshare.errors import EvaluationError
from headshare.evaluation.embeddings import Agreement, agreement
from headshare.integrations.transformers.loading import load_model, load_tokenizer, running
from headshare.progress import say, track
from headshare.text.windows import (
    Windows,
    check_finite,
    check_vocabulary,
    check_window,
    finite_or_null,
    is_causal,
    lacks_head,
    longest_window,
    not_causal,
    window_for,
    windows_of,
)

# tokens that are run at once: fewer leave a device idle, and more take memory for their logits
TOGETHER = 2048
# bytes of the dense model's logits that are kept
KEPT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text: exp of the mean negative log-likelihood per predicted token, over disjoint windows."""

    perplexity: float
    tokens: int
    window: int
    bos: bool

    def to_dict(self) -> dict[str, Any]:
        """The result under the names that `--json` prints, with null for a perplexity past any float."""
        return finite_or_null(asdict(self))


def perplexity(model: Any, windows: Windows) -> Perplexity:
    """Windowed perplexity: every token after a window's first is predicted from those before it in the window.

    Log-likelihoods are computed in float32 and summed in float64.

    Raises:
        EvaluationError: if the model is not a causal language model, or its logits are not finite.
    """
    losses = window_losses(model, windows)
    mean = losses.mean().item()
    tokens = len(losses) * (windows.length - 1)
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, tokens, windows.length, windows.bos)


@torch.inference_mode()
def window_losses(model: Any, windows: Windows) -> Float[Tensor, " windows"]:
    """The mean loss of each window, in nats per token, over all its tokens but the first.

    All windows predict the same number of tokens. Two models' losses on the same windows can be compared in pairs.

    Raises:
        EvaluationError: as `perplexity` does.
    """
    _check_causal(model)
    pairs = zip(_logits_of_all(model, windows), windows.tokens, strict=True)
    losses = [_loss(logits.float(), window) for logits, window in pairs]
    return torch.tensor(losses, dtype=torch.float64)


class Predictions:
    """The dense model's predictions in each of these windows, for other models to be compared with.

    Its logits are kept for the first windows, as far as `room` bytes reach. So comparing more models does not run it on
    those again.

    Raises:
        EvaluationError: if it predicts no next token.
    """

    def __init__(self, dense: Any, windows: Windows, *, room: int = KEPT_BYTES) -> None:
        _check_causal(dense)
        self.windows = windows
        self._dense = dense
        self._room = room
        self._kept: dict[int, Tensor] = {}

    @torch.inference_mode()
    def logits(self, window: int) -> Float[Tensor, "predicted words"]:
        """Logits of the dense model in a window.

        Raises:
            EvaluationError: if one is NaN or infinite.
        """
        if window in self._kept:
            return self._kept[window]
        logits: Tensor = _logits(self._dense, self.windows.tokens[window][None])[0]
        if logits.nbytes <= self._room:
            self._room -= logits.nbytes
            self._kept[window] = logits.cpu()
        return logits


@torch.inference_mode()
def losses_and_divergences(
    model: Any, dense: Predictions
) -> tuple[Float[Tensor, " windows"], Float[Tensor, " windows"]]:
    """The model's `window_losses`, and the divergence of its predictions from the dense model's in each window.

    The divergence is KL(dense | model) of next-token distributions, in nats per token. Loss says how well a text is
    predicted. Divergence says how much of the dense model is left, whatever the text.

    Raises:
        EvaluationError: as `perplexity` does, for either.
    """
    _check_causal(model)
    losses = []
    divergences = []
    for index, logits in enumerate(_logits_of_all(model, dense.windows)):
        own = logits.float()
        losses.append(_loss(own, dense.windows.tokens[index]))
        wanted = dense.logits(index).to(own.device).float().log_softmax(dim=-1)
        apart = functional.kl_div(own.log_softmax(dim=-1), wanted, reduction="none", log_target=True)
        divergences.append(apart.sum(dim=-1).double().mean().item())
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(divergences, dtype=torch.float64)


def _check_causal(model: Any) -> None:
    if not is_causal(model):
        advice = (
            "Download it again, with its head."
            if lacks_head(model)
            else "For an encoder, compare it with its dense model: headshare eval SHARED --against MODEL --text FILE"
        )
        raise EvaluationError(f"{not_causal(model)}, so it has no perplexity. {advice}")


def _logits_of_all(model: Any, windows: Windows) -> Iterator[Float[Tensor, "predicted words"]]:
    """Logits of one window after the other; several windows are run at once."""
    batches = torch.split(windows.tokens, max(1, TOGETHER // windows.length))
    for batch in track(batches, "batches of windows", len(batches)):
        yield from _logits(model, batch)


def _logits(model: Any, windows: Int[Tensor, "batch window"]) -> Float[Tensor, "batch predicted words"]:
    tokens = windows.to(next(model.parameters()).device)
    with running():
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
    window: int | None = None,
    limit: int | None = None,
    bos: bool | None = None,
    any_base: bool = False,
    **options: Any,
) -> Perplexity | Agreement:
    """The perplexity of the text, or with `against` (for encoders) the agreement of both models' embeddings.

    A shared encoder is compared with the dense model that it came from, unless `any_base` takes any.

    Windows have 512 tokens by default, or as many as both models read at once if those are fewer. `options`, such as
    `dtype` and `device_map`, go to `from_pretrained`.

    Raises:
        EvaluationError, CheckpointError: if the model, its tokenizer or the text cannot be used.
    """
    if against is not None and checkpoint.sharing is not None:
        note = check_origin(checkpoint, against, None if any_base else ANY_BASE)
        if note is not None:
            say(note)
    readers = (checkpoint, *([] if against is None else [against]))
    window = window_for(window, *(read_by.config for read_by in readers))
    windows = windows_of(load_tokenizer(checkpoint), text, window=window, limit=limit, bos=bos)
    for read_by in readers:
        check_window(window, longest_window(read_by.config))
        check_vocabulary(read_by.config, windows.tokens)
    model = load_model(checkpoint, **options)
    if against is not None:
        return agreement(model, load_model(against, **options), windows)
    return perplexity(model, windows)
