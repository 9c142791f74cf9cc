"""Errors of an output projection that gives channels up, after the best refit: least squares in float64, in blocks.

The output projection (here: readout) starts as the dense layer's. It is refitted against the dense layer's output
whenever channels are given up, by ridge regression towards where it started, with a ridge of `RIDGE` times the inputs'
mean square. Features in the place of lost channels have a ridge of their own, the same part of their own mean square.
So sums stay well conditioned, however often the same features come again. Errors are squared and summed over rows,
those of all processes. Knows no model and no plan.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headshare.calibration import processes
from headshare.calibration.refit.reduced_rank import Products

RIDGE = 1e-3

Inputs = Float[Tensor, "tokens channels"]
Readout = Float[Tensor, "hidden channels"]
Columns = Int[Tensor, " columns"]


@dataclass(frozen=True)
class Fit:
    """A readout fitted to give the dense layer's output from the inputs that are left. Exact at every step.

    `weight` is the refitted readout over all channels, zero where a channel is gone. `inverse` is the inverse of the
    inputs' Gram matrix with its ridge, zero likewise. `error` is the squared difference of the fitted outputs from
    `target`, ridge included. Channels are removed by the formula of optimal brain surgery (Hassibi and Stork, 1993) in
    blocks: with Q the inverse Gram matrix, removing block r costs tr(W_r Q_rr^-1 W_r^T), and W_k becomes
    W_k - W_r Q_rr^-1 Q_rk.
    """

    inputs: Inputs
    target: Float[Tensor, "tokens hidden"]
    inverse: Float[Tensor, "channels channels"]
    weight: Readout
    error: float

    @classmethod
    def of(cls, inputs: Inputs, weight: Readout) -> "Fit":
        """The fit of a dense readout to its own outputs, whose error is zero."""
        inputs = inputs.double()
        weight = weight.double()
        gram = processes.summed(inputs.T @ inputs)
        gram = ridged(gram, gram.diagonal())
        return cls(inputs, inputs @ weight.T, inverted(gram), weight, 0.0)

    def without(self, columns: Columns) -> "Fit":
        """The fit that is left when these channels are gone."""
        across = _solved(self.inverse[columns][:, columns], self.inverse[columns])
        inverse = self.inverse - self.inverse[:, columns] @ across
        weight = self.weight - self.weight[:, columns] @ across
        inverse[columns] = 0
        inverse[:, columns] = 0
        weight[:, columns] = 0
        return Fit(self.inputs, self.target, inverse, weight, self.error + self.cost_of(columns))

    def with_features(self, columns: Columns, features: Inputs) -> "Fit":
        """The fit with these features in the place of channels that are gone."""
        added = self.beside(features)
        inner = torch.cholesky_inverse(torch.linalg.cholesky(ridged(added.gram, added.squares)))
        new = inner @ added.missed
        inputs = self.inputs.clone()
        weight = self.weight - new.T @ added.known
        inverse = self.inverse + added.known.T @ inner @ added.known
        inputs[:, columns] = added.features
        weight[:, columns] = new.T
        inverse[columns] = -inner @ added.known
        inverse[:, columns] = (-inner @ added.known).T
        inverse[columns[:, None], columns] = inner
        return Fit(inputs, self.target, inverse, weight, self.error - float((new * added.missed).sum()))

    def beside(self, features: Inputs) -> "Beside":
        """The features as they stand beside this fit: the part of them that its inputs do not explain."""
        features = features.double()
        # A fit without error misses nothing, which saves the largest product.
        others = [features, self.inputs, *([self.target] if self.error else [])]
        products = processes.summed(torch.cat([features.T @ other for other in others], dim=1))
        gram, cross, *wanted = products.split_with_sizes([other.shape[1] for other in others], dim=1)
        known = cross @ self.inverse
        missed = wanted[0] - cross @ self.weight.T if wanted else cross.new_zeros(len(cross), len(self.weight))
        return Beside(features, cross, known, gram.diagonal(), gram - known @ cross.T, missed)

    def with_fixed(self, columns: Columns, features: Inputs, product: Float[Tensor, "hidden features"]) -> "Fit":
        """The fit without these channels, and with features read out by a product that stays as it is."""
        left = self.without(columns)
        added = left.beside(features)
        weight = left.weight - product @ added.known
        error = left.error - float((product.T * (2 * added.missed - added.gram @ product.T)).sum())
        return Fit(left.inputs, left.target - added.features @ product.T, left.inverse, weight, error)

    def products(self, columns: Columns, features: Inputs) -> Products:
        """The best low-rank products that read features out in the place of these channels."""
        return self.without(columns).beside(features).products()

    def cost_of(self, columns: Columns) -> float:
        """The error that removing these channels adds."""
        return float(self.lost(columns[None]).costs)

    def lost(self, columns: Int[Tensor, "units columns"]) -> "Lost":
        """Channels of several units, each unit given up alone, ready to be compared with many features."""
        gram = inverted(self.inverse[columns[:, :, None], columns[:, None, :]])
        return Lost(columns, gram, self.weight[:, columns].movedim(1, 0))


@dataclass(frozen=True)
class Lost:
    """Channels of several units, each of which is given up alone.

    `gram` is the Gram matrix of the part of a unit's channels that no other channel explains. `weight` holds the unit's
    columns of the readout.
    """

    columns: Int[Tensor, "units columns"]
    gram: Float[Tensor, "units columns columns"]
    weight: Float[Tensor, "units hidden columns"]

    @cached_property
    def weight_gram(self) -> Float[Tensor, "units columns columns"]:
        """The Gram matrix of each unit's columns of the readout."""
        return self.weight.mT @ self.weight

    @property
    def costs(self) -> Float[Tensor, " units"]:
        """The error that removing each unit adds."""
        return (self.gram * self.weight_gram).sum(dim=(1, 2))

    def only(self, units: range) -> "Lost":
        """The channels of this range of the units."""
        some = slice(units.start, units.stop)
        return Lost(self.columns[some], self.gram[some], self.weight[some])


@dataclass(frozen=True)
class Beside:
    """Features beside a fit, as sums over tokens.

    `cross` are their products with the fit's inputs, and `known` the coefficients by which these inputs explain them.
    `squares` are the sums of their squares. `gram` is the Gram matrix of the part of them that is not explained.
    `missed` are their products with the part of the target that the fit misses.
    """

    features: Float[Tensor, "tokens features"]
    cross: Float[Tensor, "features channels"]
    known: Float[Tensor, "features channels"]
    squares: Float[Tensor, " features"]
    gram: Float[Tensor, "features features"]
    missed: Float[Tensor, "features hidden"]

    def joined(self, other: "Beside") -> "Beside":
        """The features together with others beside the same fit."""
        across = processes.summed(self.features.T @ other.features) - self.known @ other.cross.T
        return Beside(
            torch.cat([self.features, other.features], dim=1),
            torch.cat([self.cross, other.cross]),
            torch.cat([self.known, other.known]),
            torch.cat([self.squares, other.squares]),
            torch.cat([torch.cat([self.gram, across], dim=1), torch.cat([across.T, other.gram], dim=1)]),
            torch.cat([self.missed, other.missed]),
        )

    def gains_for(self, lost: Lost) -> Float[Tensor, " units"]:
        """The drop of the error with these features, read out by columns of their own, in place of each lost unit.

        It holds only beside a fit without error.
        """
        gram, across = self._without(lost)
        explained: Tensor = across.mT @ _solved(ridged(gram, self.squares), across)
        return (explained * lost.weight_gram).sum(dim=(1, 2))

    def scaled_gains_for(self, lost: Lost, donor: Float[Tensor, "hidden features"]) -> Float[Tensor, " units"]:
        """The drop of the error with these features, read out by a donor's columns, each behind one scale."""
        gram, across = self._without(lost)
        missed = (across * (donor.double().T @ lost.weight)).sum(dim=2)
        return (missed * _scales(gram, self.squares, missed, donor.double())).sum(dim=1)

    def gain(self, donor: Float[Tensor, "hidden scaled"], lost: Lost | None = None) -> float:
        """The drop of the error with these features beside any fit; if a unit is lost, beside the fit without it.

        The first features are read out by the donor's columns, as many as there are, each behind one scale. The
        features after them are read out by columns of their own. All are solved for together with the fit's columns.
        """
        gram = self.gram
        missed = self.missed
        count = donor.shape[1]
        if lost is not None:
            grams, across = self._without(lost)
            gram = grams[0]
            missed = missed + across[0] @ lost.weight[0].T

        # Columns of their own are eliminated first; the scales explain the rest.
        between = gram[:count, count:]
        wanted = missed[count:]
        own = ridged(gram[count:, count:], self.squares[count:])
        solved = _solved(own, torch.cat([between.T, wanted], dim=1))
        gain = float((solved[:, count:] * wanted).sum())
        gram = gram[:count, :count] - between @ solved[:, :count]
        missed = ((missed[:count] - between @ solved[:, count:]) * donor.double().T).sum(dim=1)
        return gain + float((missed * _scales(gram, self.squares[:count], missed, donor.double())).sum())

    def products(self) -> Products:
        """The best columns of every rank for these features."""
        return Products.of(torch.linalg.cholesky(ridged(self.gram, self.squares)), self.missed)

    def _without(
        self, lost: Lost
    ) -> tuple[Float[Tensor, "units features features"], Float[Tensor, "units features lost"]]:
        """The features' Gram matrix beside the fit without each unit, and their products with that unit's channels."""
        coefficients = self.known[:, lost.columns].movedim(1, 0)
        across = coefficients @ lost.gram
        return self.gram + across @ coefficients.mT, across


@dataclass(frozen=True)
class Remainder:
    """The rest of a readout that gives units up.

    It is a fit of the columns that the readout stores, with `scaled` features that it reads out by a donor's columns,
    each behind one scale. Columns and scales are fitted jointly.
    """

    fit: Fit
    scaled: Beside
    donor: Float[Tensor, "hidden scaled"]

    @classmethod
    def of(cls, fit: Fit) -> "Remainder":
        """The rest while nothing is given up: all columns are stored."""
        return cls(fit, fit.beside(fit.inputs[:, :0]), fit.weight[:, :0])

    @cached_property
    def error(self) -> float:
        """The error of the best columns and scales."""
        return self.fit.error - self.scaled.gain(self.donor)

    def price(self, lost: Lost, features: Inputs | None = None, donor: Readout | None = None) -> float:
        """The error that giving up one unit's channels adds.

        Without features nothing comes in their place. Features are read out by columns of their own or, with a donor,
        by the donor's columns behind scales.
        """
        new = self.scaled if features is None else self.scaled.joined(self.fit.beside(features))
        donors = self.donor if donor is None else torch.cat([self.donor, donor.double()], dim=1)
        return self.fit.error + float(lost.costs) - new.gain(donors, lost) - self.error

    @property
    def scales(self) -> Float[Tensor, " scaled"]:
        """The best scales."""
        missed = (self.scaled.missed * self.donor.T).sum(dim=1)
        return _scales(self.scaled.gram, self.scaled.squares, missed, self.donor)

    def predicted(self, inputs: Inputs, scaled: Float[Tensor, "tokens scaled"]) -> Float[Tensor, "tokens hidden"]:
        """The output for other tokens' inputs and scaled features, without the part of fixed products."""
        product = self.donor * self.scales
        return inputs.double() @ (self.fit.weight - product @ self.scaled.known).T + scaled.double() @ product.T

    def with_fixed(self, columns: Columns, features: Inputs, product: Float[Tensor, "hidden features"]) -> "Remainder":
        """The rest with features in the place of these channels, read out by a product that stays as it is."""
        fit = self.fit.with_fixed(columns, features, product)
        return Remainder(fit, fit.beside(self.scaled.features), self.donor)

    def without(self, columns: Columns, features: Inputs | None = None, donor: Readout | None = None) -> "Remainder":
        """The rest once one unit's channels are given up, with features and a donor as in `price`."""
        fit = self.fit.without(columns)
        scaled = self.scaled.features
        donors = self.donor
        if features is not None and donor is not None:
            scaled = torch.cat([scaled, features.double()], dim=1)
            donors = torch.cat([donors, donor.double()], dim=1)
        elif features is not None:
            fit = fit.with_features(columns, features)
        return Remainder(fit, fit.beside(scaled), donors)


def inverted(matrix: Float[Tensor, "*units size size"]) -> Float[Tensor, "*units size size"]:
    """The inverse of positive definite matrices.

    It is made by Cholesky factors: factors with pivots of several matrices at once never end in some builds of torch
    once the number of threads was set.
    """
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def _solved(matrix: Float[Tensor, "*units size size"], right: Tensor) -> Tensor:
    """The solution of equations with positive definite matrices."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def ridged(
    gram: Float[Tensor, "*units size size"], squares: Float[Tensor, " size"]
) -> Float[Tensor, "*units size size"]:
    """The Gram matrix with the ridge that these squares of the features give."""
    whole = gram.clone()
    whole.diagonal(dim1=-2, dim2=-1).add_(RIDGE * squares.mean() + torch.finfo(gram.dtype).tiny)
    return whole


def _scales(
    gram: Float[Tensor, "*units size size"],
    squares: Float[Tensor, " size"],
    missed: Float[Tensor, "*units size"],
    donor: Float[Tensor, "hidden size"],
) -> Float[Tensor, "*units size"]:
    """The best scales. Their Gram matrix is the element-wise product of the features' and the donor columns'."""
    columns = donor.T @ donor
    inner = ridged(gram * columns, squares * columns.diagonal())
    scales: Tensor = _solved(inner, missed[..., None])[..., 0]
    return scales
