"""Low-rank factors of a matrix and their product, and principal directions of values. Knows no model and no file."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# added to second moments of values, as a part of their mean, where values do not span all dimensions
RIDGE = 1e-6


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


@dataclass(frozen=True)
class ValueBases:
    """Principal directions of the values of each key/value head, in order: the first matter most.

    `into` takes a head's values to these directions, and `back` is its inverse: what reads v as W_o v reads `into` v as
    (W_o `back`) `into` v. `importance` is the squared error that dropping a direction adds to the output, in the unit
    of the Gram matrix: exactly where one query head reads a key/value head, else a bound of it.
    """

    into: Float[Tensor, "groups dims dims"]
    back: Float[Tensor, "groups dims dims"]
    importance: Float[Tensor, "groups dims"]

    def of_values(self, v: Float[Tensor, "channels inputs"]) -> Float[Tensor, "channels inputs"]:
        """The rows that make all heads' values, or a bias as one column, in the principal directions."""
        groups, dims, _ = self.into.shape
        return (self.into @ v.to(self.into).view(groups, dims, v.shape[1])).flatten(0, 1)

    def of_readers(self, o: Float[Tensor, "outputs channels"]) -> Float[Tensor, "outputs channels"]:
        """The columns that read all heads' values, each query head's in turn, for the principal directions."""
        groups, dims, _ = self.back.shape
        return (o.to(self.back).view(len(o), groups, -1, dims) @ self.back).flatten(1)

    def of_gram(self, gram: Float[Tensor, "channels any"]) -> Float[Tensor, "channels any"]:
        """Sums over tokens of the inputs of W_o times something, as those of inputs in the principal directions."""
        groups, dims, _ = self.into.shape
        return (self.into[:, None] @ gram.to(self.into).view(groups, -1, dims, gram.shape[1])).flatten(0, 2)


def principal_values(
    gram: Float[Tensor, "channels channels"], readout: Float[Tensor, "outputs channels"], groups: int, dims: int
) -> ValueBases:
    """Principal directions of values, by the inputs of W_o and by W_o itself, for heads of so many `dims`.

    `gram` is the Gram matrix of the inputs of `readout` over tokens; it may have only its blocks of query heads. Query
    heads that read one of the `groups` key/value heads lie one after the other. With S the sum of their blocks,
    S = C C^T, and A the sum of their W_o^T W_o, the directions are the eigenvectors E of C^T A C: v' = E^T C^-1 v has
    uncorrelated channels of equal size, and W_o C E reads it. Keeping the first w of them is the best approximation of
    rank w of the output if one query head reads each key/value head. Computed in float64.
    """
    heads = readout.shape[1] // dims
    blocks = gram.double().view(heads, dims, heads, dims).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    moments = blocks.reshape(groups, -1, dims, dims).sum(dim=1)
    readers = by_group(readout, groups, dims)
    return value_bases(moments, readers.mT @ readers)


def by_group(
    readout: Float[Tensor, "outputs channels"], groups: int, dims: int
) -> Float[Tensor, "groups outputs_of_readers dims"]:
    """The columns of W_o for each key/value head, in float64: those of all query heads that read it."""
    return readout.double().view(len(readout), groups, -1, dims).permute(1, 2, 0, 3).flatten(1, 2)


def value_bases(moments: Float[Tensor, "groups dims dims"], reading: Float[Tensor, "groups dims dims"]) -> ValueBases:
    """Principal directions by each head's second moments S and the sum A of W_o^T W_o over the heads that read it.

    `principal_values` has the formula. With S = W_v W_v^T, and no text, the first w directions are the best
    approximation of rank w of the products W_o W_v of all query heads together.
    """
    size = moments.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    eye = torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device)
    # values keep about the size that they have, so that no stored type is too narrow for them
    level = torch.where(size > 0, moments / size, eye) + RIDGE * eye
    root = torch.linalg.cholesky(level)
    importance, vectors = torch.linalg.eigh(root.mT @ reading @ root)
    importance, vectors = importance.flip(1), vectors.flip(2)
    # eigenvectors have no sign of their own; with one, equal models give equal files
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    into = torch.linalg.solve_triangular(root.mT, vectors, upper=True).mT
    return ValueBases(into, root @ vectors, importance.clamp_min(0) * size[:, :, 0])


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)
