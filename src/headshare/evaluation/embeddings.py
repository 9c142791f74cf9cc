"""Agreement of two models' embeddings of the same windows."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from headshare.architecture.config import text_config
from headshare.errors import EvaluationError
from headshare.progress import track
from headshare.text.windows import Windows


@dataclass(frozen=True)
class Agreement:
    """How an encoder compares with its dense model, over the windows of a text, by mean-pooled last hidden states.

    `cosine` is the mean one between the two models' embeddings of each window. `retrieved` is the share of windows
    whose first half finds its own second half, which is nearer to it by cosine than all others' second halves; and
    `dense_retrieved` the same of the dense model.
    """

    cosine: float
    retrieved: float
    dense_retrieved: float
    tokens: int
    window: int

    def to_dict(self) -> dict[str, Any]:
        """The same under the names that `--json` prints."""
        return asdict(self)


@torch.inference_mode()
def agreement(model: Any, dense: Any, windows: Windows) -> Agreement:
    """How alike two encoders' sentence embeddings (mean over tokens of the last hidden state) are, and how well each
    finds a window's second half by its first.

    Raises:
        EvaluationError: if the embeddings are of different widths, or not finite.
    """
    widths = [text_config(one.config.to_dict())["hidden_size"] for one in (model, dense)]
    if len(set(widths)) > 1:
        raise EvaluationError(f"embeddings of {widths[0]} and of {widths[1]} numbers cannot be compared.")
    half = windows.length // 2
    pieces = slice(None), slice(half), slice(half, None)
    found = [
        [torch.stack([_embedding(one, window[piece]) for one in (model, dense)]) for piece in pieces]
        for window in track(windows.tokens, "windows", len(windows.tokens))
    ]
    whole, first, second = (torch.stack([window[piece] for window in found]).unbind(1) for piece in range(3))
    cosine = functional.cosine_similarity(whole[0], whole[1], dim=-1).double().mean().item()
    retrieved, dense_retrieved = (_retrieved(one, other) for one, other in zip(first, second, strict=True))
    return Agreement(cosine, retrieved, dense_retrieved, windows.tokens.numel(), windows.length)


def _embedding(model: Any, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, " hidden"]:
    found: Tensor = hidden_states(model, tokens[None])[0].float().mean(dim=0).cpu()
    if not torch.isfinite(found).all():
        raise EvaluationError("an embedding is NaN or infinite; the weights are damaged or overflow this dtype.")
    return found


def _retrieved(first: Float[Tensor, "windows hidden"], second: Float[Tensor, "windows hidden"]) -> float:
    """The share of first halves whose nearest second half is their own."""
    alike = functional.normalize(first, dim=-1) @ functional.normalize(second, dim=-1).T
    return (alike.argmax(dim=1) == torch.arange(len(alike))).double().mean().item()


def hidden_states(model: Any, tokens: Int[Tensor, "batch tokens"]) -> Tensor:
    """Last hidden states, whatever head the model carries. Shape: batch x tokens x hidden."""
    out = model(input_ids=tokens.to(next(model.parameters()).device), output_hidden_states=True)
    return out.hidden_states[-1]  # type: ignore[no-any-return]
