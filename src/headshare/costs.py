"""What giving a unit up does to its layer's output on calibration text, after the best refit: the cost of a step.

Costs are exact for the layer at hand: the least-squares error of its output, each token weighted by 1 / |hidden|^2,
given everything else the layer still has. Layers are walked one at a time; a *path* is the order in which one layer
would give units up, each step priced with the earlier ones taken. Chooses nothing across layers.
"""

from dataclasses import dataclass

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGE = 1e-3

Inputs = Float[Tensor, "tokens channels"]
Columns = Int[Tensor, " columns"]


class Fit:
    """A layer's readout, fitted to give the dense layer's output from the inputs that are left. Exact at every step.

    `weight` is the refitted readout over all channels, zero where one is gone. Taking channels away uses the formula of
    optimal brain surgery (Hassibi and Stork, 1993) in blocks: with Q the inverse Gram matrix, removing block r costs
    tr(W_r Q_rr^-1 W_r^T), and W_k becomes W_k - W_r Q_rr^-1 Q_rk.
    """

    def __init__(self, inputs: Inputs, weight: Float[Tensor, "hidden channels"]) -> None:
        self.dense = weight.double()
        self.inputs = inputs.double()
        gram = self.inputs.T @ self.inputs
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self.weight = self.dense.clone()
        self.target = self.inputs @ self.dense.T
        self.error = 0.0

    def without(self, columns: Columns) -> "Fit":
        """The fit that is left when these channels are gone."""
        left = object.__new__(Fit)
        left.dense, left.target, left.inputs = self.dense, self.target, self.inputs
        across = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])
        left.inverse = self.inverse - self.inverse[:, columns] @ across
        left.weight = self.weight - self.weight[:, columns] @ across
        left.error = self.error + self.lost(columns).cost
        left.inverse[columns] = 0
        left.inverse[:, columns] = 0
        left.weight[:, columns] = 0
        return left

    def residual(self) -> Float[Tensor, "tokens hidden"]:
        """What the fit misses of the dense layer's output."""
        return self.target - self.inputs @ self.weight.T

    def beside(self, features: Inputs) -> "Beside":
        """What these features would add to what is left."""
        features = features.double()
        cross = features.T @ self.inputs
        known = cross @ self.inverse
        gram = features.T @ features - known @ cross.T
        gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
        return Beside(features, gram, features.T @ self.target - cross @ self.weight.T, known)

    def with_features(self, columns: Columns, added: "Beside") -> "Fit":
        """The fit with these features in the place of channels that are gone."""
        inner = torch.cholesky_inverse(torch.linalg.cholesky(added.gram))
        columns_of = inner @ added.missed
        more = object.__new__(Fit)
        more.dense, more.target = self.dense, self.target
        more.inputs = self.inputs.clone()
        more.inputs[:, columns] = added.features
        more.inverse = self.inverse + added.known.T @ inner @ added.known
        more.inverse[columns] = -inner @ added.known
        more.inverse[:, columns] = (-inner @ added.known).T
        more.inverse[columns[:, None], columns] = inner
        more.weight = self.weight - columns_of.T @ added.known
        more.weight[:, columns] = columns_of.T
        more.error = self.error - float((columns_of * added.missed).sum())
        return more

    def lost(self, columns: Columns) -> "Lost":
        """These channels beside all others of a fit that has them, ready to be compared with many features."""
        gram = torch.linalg.inv(self.inverse[columns][:, columns])
        weight = self.weight[:, columns]
        return Lost(columns, gram, weight, weight.T @ weight)


@dataclass(frozen=True)
class Beside:
    """Features beside a fit: their Gram matrix less what the fit's inputs explain of them, their products with what the
    fit misses, and the coefficients that explain them."""

    features: Inputs
    gram: Float[Tensor, "features features"]
    missed: Float[Tensor, "features hidden"]
    known: Float[Tensor, "features channels"]

    def gain(self) -> float:
        """How much less the error would be with these features read out by columns of their own."""
        return float((torch.linalg.solve(self.gram, self.missed) * self.missed).sum())

    def scaled_gain(self, donor: Float[Tensor, "hidden features"]) -> float:
        """The same where they are read out by a donor's columns, each behind one scale."""
        return _scaled_gain(self.gram, (self.missed * donor.double().T).sum(dim=1), donor.double())

    def gain_for(self, lost: "Lost") -> float:
        """`gain` in the fit without those channels, when this was made beside the fit that has them."""
        gram, across = self._without(lost)
        return float(((across.T @ torch.linalg.solve(gram, across)) * lost.weight_gram).sum())

    def scaled_gain_for(self, lost: "Lost", donor: Float[Tensor, "hidden features"]) -> float:
        """`scaled_gain` likewise."""
        gram, across = self._without(lost)
        missed = (across * (donor.double().T @ lost.weight)).sum(dim=1)
        return _scaled_gain(gram, missed, donor.double())

    def _without(self, lost: "Lost") -> tuple[Tensor, Tensor]:
        """The features' Gram matrix beside what is left without the lost channels, and their products with those."""
        coefficients = self.known[:, lost.columns]
        across = coefficients @ lost.gram
        return self.gram + across @ coefficients.T, across


@dataclass(frozen=True)
class Lost:
    """Channels on their way out: what others do not explain of them, as a Gram matrix, and the columns they have."""

    columns: Columns
    gram: Float[Tensor, "lost lost"]
    weight: Float[Tensor, "hidden lost"]
    weight_gram: Float[Tensor, "lost lost"]

    @property
    def cost(self) -> float:
        """What removing them adds to the error."""
        return float((self.gram * self.weight_gram).sum())


def _scaled_gain(gram: Tensor, missed: Tensor, donor: Tensor) -> float:
    inner = gram * (donor.T @ donor)
    inner.diagonal().add_(RIDGE * inner.diagonal().mean() + torch.finfo(torch.float64).tiny)
    return float(missed @ torch.linalg.solve(inner, missed))
