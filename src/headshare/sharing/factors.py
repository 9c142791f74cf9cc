"""Low-rank factors of a matrix, and their product. This module knows no model and no file."""

import torch
from jaxtyping import Float
from torch import Tensor


def split_columns(
    columns: Float[Tensor, "outputs channels"], rank: int
) -> tuple[Float[Tensor, "rank channels"], Float[Tensor, "outputs rank"]]:
    """The factors (in, out) whose product is the nearest of this rank: the truncated singular value decomposition.

    Computed and returned in float32 or better. Each factor takes the root of the singular values, so that both have
    numbers of like size, whatever type they are stored in.
    """
    left, values, right = torch.linalg.svd(columns.to(widened(columns.dtype)), full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def join_columns(
    factor_in: Float[Tensor, "rank channels"], factor_out: Float[Tensor, "outputs rank"]
) -> Float[Tensor, "outputs channels"]:
    """The product of two factors, in float32 or better."""
    wide = widened(factor_in.dtype)
    return factor_out.to(wide) @ factor_in.to(wide)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)
