"""The divergence between two models' predictions, with its gradient, in little memory."""

from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

# rows of logits that are worked on at once: few enough to stay in a processor's cache
ROWS = 32


def divergences(
    wanted: Num[Tensor, "batch window vocabulary"], found: Num[Tensor, "batch window vocabulary"]
) -> Float[Tensor, "batch window"]:
    """KL(wanted | found) of each token's predictions, in nats, from both models' logits.

    The gradient is that of `found`. It is the difference of the probabilities, so it is made with the divergence, and
    none of the steps in between is kept.
    """
    kept: Tensor = _Divergences.apply(wanted.flatten(0, 1), found.flatten(0, 1))  # type: ignore[no-untyped-call]
    return kept.view(found.shape[:2])


class _Divergences(torch.autograd.Function):
    """Rows of logits to divergences."""

    @staticmethod
    def forward(ctx: Any, wanted: Tensor, found: Tensor) -> Tensor:
        """Work out divergences and, if it is asked for, their gradient, some rows at a time."""
        lost = torch.empty(len(found), device=found.device)
        slopes = torch.empty_like(found) if ctx.needs_input_grad[1] else None
        for start in range(0, len(found), ROWS):
            at = slice(start, start + ROWS)
            theirs = wanted[at].float().log_softmax(dim=-1)
            own = found[at].float().log_softmax(dim=-1)
            chances = theirs.exp()
            lost[at] = torch.einsum("rv,rv->r", chances, theirs.sub_(own))
            if slopes is not None:
                slopes[at] = own.exp_().sub_(chances)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return lost

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[None, Tensor]:
        """The gradient of the second logits; there is none of the first."""
        (slopes,) = ctx.saved_tensors
        return None, slopes * above[0][:, None].to(slopes)
