"""Agreement of two models' embeddings of the same windows."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from headshare.architecture.config import text_config
from headshare.errors import EvaluationError
from headshare.integrations.transformers.loading import running
from headshare.progress import track
from headshare.text.windows import Windows


@dataclass(frozen=True)
class Agreement:
    """The agreement of an encoder with its dense model over the windows of a text, by mean-pooled last hidden states.

    `cosine` is the mean over windows of the cosine similarity between the two models' embeddings. For retrieval every
    window is cut in two. `retrieved` is the share of windows whose first part is nearer, by cosine, to its own second
    part than to any other's. `dense_retrieved` is that share for the dense model.
    """

    cosine: float
    retrieved: float
    dense_retrieved: float
    tokens: int
    window: int

    def to_dict(self) -> dict[str, Any]:
        """The agreement under the names that `--json` prints."""
        return asdict(self)


@torch.inference_mode()
def agreement(model: Any, dense: Any, windows: Windows) -> Agreement:
    """The agreement of two encoders' sentence embeddings, each the mean over tokens of the last hidden states.

    Raises:
        EvaluationError: if the embeddings are of different widths, or not finite.
    """
    widths = [text_config(encoder.config.to_dict())["hidden_size"] for encoder in (model, dense)]
    if len(set(widths)) > 1:
        raise EvaluationError(f"embeddings of {widths[0]} and of {widths[1]} numbers cannot be compared.")
    # both models read each window three times: all of it, its first half and its second half
    half = windows.length // 2
    pieces = (slice(None), slice(half), slice(half, None))
    embeddings = [
        [torch.stack([_embedding(encoder, window[piece]) for encoder in (model, dense)]) for piece in pieces]
        for window in track(windows.tokens, "windows", len(windows.tokens))
    ]
    whole, first, second = (torch.stack([window[piece] for window in embeddings]).unbind(1) for piece in range(3))
    cosine = functional.cosine_similarity(whole[0], whole[1], dim=-1).double().mean().item()
    retrieved, dense_retrieved = (_retrieved(*halves) for halves in zip(first, second, strict=True))
    return Agreement(cosine, retrieved, dense_retrieved, windows.tokens.numel(), windows.length)


def _embedding(model: Any, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, " hidden"]:
    embedding: Tensor = hidden_states(model, tokens[None])[0].float().mean(dim=0).cpu()
    if not torch.isfinite(embedding).all():
        raise EvaluationError("an embedding is NaN or infinite; the weights are damaged or overflow this dtype.")
    return embedding


def _retrieved(first: Float[Tensor, "windows hidden"], second: Float[Tensor, "windows hidden"]) -> float:
    """The share of first halves whose nearest second half is their own."""
    alike = functional.normalize(first, dim=-1) @ functional.normalize(second, dim=-1).T
    return (alike.argmax(dim=1) == torch.arange(len(alike))).double().mean().item()


def hidden_states(model: Any, tokens: Int[Tensor, "batch tokens"]) -> Tensor:
    """Last hidden states, whatever head the model carries. Shape: batch x tokens x hidden."""
    with running():
        out = model(input_ids=tokens.to(next(model.parameters()).device), output_hidden_states=True)
    return out.hidden_states[-1]  # type: ignore[no-any-return]
