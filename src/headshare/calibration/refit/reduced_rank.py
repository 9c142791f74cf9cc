"""Reduced-rank regression: the best columns of every rank, from one factorisation. Knows no model and no plan."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Products:
    """The best columns of every rank for some inputs, as products of two matrices.

    They are those of Izenman, "Reduced-rank regression for the multivariate linear model", 1975. `gains` are the drops
    of the squared error with rank 1, 2 and so on.
    """

    gains: Float[Tensor, " ranks"]
    left: Float[Tensor, "inputs ranks"]
    right: Float[Tensor, "ranks outputs"]

    @classmethod
    def of(cls, factor: Float[Tensor, "inputs inputs"], cross: Float[Tensor, "inputs outputs"]) -> "Products":
        """The products for inputs whose Gram matrix has this Cholesky factor, and whose products with targets are
        `cross`."""
        # Whitened, the squared error is a distance between matrices, to which the nearest of a rank is a cut of the
        # singular value decomposition.
        white = torch.linalg.solve_triangular(factor, cross, upper=False)
        left, values, right = torch.linalg.svd(white, full_matrices=False)
        return cls(values.square().cumsum(0), torch.linalg.solve_triangular(factor.T, left * values, upper=True), right)

    def product(self, rank: int) -> Float[Tensor, "outputs inputs"]:
        """The columns of this rank."""
        return (self.left[:, :rank] @ self.right[:rank]).T
