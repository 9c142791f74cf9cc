"""Channels removed from an output projection one group after another, each time with the best refit of the others.

All that is needed of the tokens are two Gram matrices: of the inputs that the refit is made for, and of those on which
its error is counted. Exact at every step. Knows no model and no plan.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headshare.calibration import processes
from headshare.calibration.costs.least_squares import Columns, Inputs, Readout, inverted, ridged
from headshare.calibration.refit.normal_equations import CHUNK_TOKENS
from headshare.precision import full_float32

Gram = Float[Tensor, "channels channels"]


def gram_of(inputs: Inputs) -> Gram:
    """The Gram matrix of these inputs in all processes: products of chunks in their own precision, sums in float64."""
    gram = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64, device=inputs.device)
    with full_float32():
        for chunk in torch.split(inputs, CHUNK_TOKENS):
            gram += chunk.T @ chunk
    return processes.summed(gram)


def refitted_without(gram: Gram, weight: Readout, gone: Columns) -> Readout:
    """The output projection without these channels, the others refitted to what it gave with them.

    It is what `Surgery` leaves after any number of removals, in one step.
    """
    if len(gone) == len(gram):
        return torch.zeros_like(weight)
    left = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    left[gone] = False
    kept = left.nonzero()[:, 0]
    inner = ridged(gram, gram.diagonal())[kept[:, None], kept]
    lost = gram[kept[:, None], gone] @ weight[:, gone].double().T
    whole = torch.zeros_like(weight)
    whole[:, kept] = weight[:, kept] + torch.cholesky_solve(lost, torch.linalg.cholesky(inner)).T.to(weight)
    return whole


def refitted_through(gram: Gram, weight: Readout, into: Float[Tensor, "kept channels"]) -> Readout:
    """The output projection that sees its inputs only through this map, refitted to what it gave before.

    With P the map and G the Gram matrix, it is W G P^T (P G P^T)^-1 P.
    """
    rows = into.double()
    seen = rows @ gram
    inner = seen @ rows.T
    fitted = torch.cholesky_solve(seen @ weight.double().T, torch.linalg.cholesky(ridged(inner, inner.diagonal())))
    return (rows.T @ fitted).T.to(weight)


@dataclass
class Surgery:
    """An output projection that loses channels, by the formula of optimal brain surgery (Hassibi and Stork, 1993).

    With Q the inverse of the inputs' Gram matrix, removing channels r turns W into W - W_r Q_rr^-1 Q_r and adds
    tr(W_r Q_rr^-1 W_r^T) to the squared error on the inputs that are fitted to. On the other inputs, whose Gram matrix
    is `held`, the error is that of the difference from the matrix at first. The ridge is `RIDGE` times the inputs' mean
    square. `weight` is zero where a channel is gone. All in float64, and changed in place: a new matrix of this size
    costs more than what is computed of it.
    """

    weight: Readout
    inverse: Gram
    held: Gram | None
    _moved: Readout = field(init=False)  # the change of the projection so far, times `held`

    def __post_init__(self) -> None:
        self._moved = torch.zeros_like(self.weight)

    @classmethod
    def on(cls, fitted: Inputs, held: Float[Tensor, "held channels"], weight: Readout) -> "Surgery":
        """The projection as it is, fitted on some inputs and judged on others; on the same ones if there are none.

        Errors are scaled as if all inputs were such.
        """
        gram = gram_of(fitted)
        count = processes.total(len(held))
        judged = gram_of(held) * (processes.total(len(fitted) + len(held)) / count) if count else None
        return cls(weight.to(torch.float64, copy=True), inverted(ridged(gram, gram.diagonal())), judged)

    def cheapest(self, count: int) -> Int[Tensor, " count"]:
        """The channels left whose removal, each alone, costs least: |W_n|^2 / Q_nn."""
        inverse = self.inverse.diagonal()
        costs: Tensor = self.weight.square().sum(dim=0) / inverse  # a norm over columns takes three times as long
        costs[inverse == 0] = torch.inf
        return costs.topk(count, largest=False).indices.sort().values

    def remove(self, columns: Columns) -> float:
        """Remove these channels. Returns the error that this adds."""
        lost = self.weight[:, columns]
        rows = self.inverse[columns]
        inner = torch.linalg.cholesky(rows[:, columns])
        across = torch.cholesky_solve(rows, inner)
        added = self._added(lost, across, inner)

        # What is gone is set to zero, as rounding leaves a little.
        self.weight.addmm_(lost, across, alpha=-1)
        self.inverse.addmm_(rows.T, across, alpha=-1)
        self.weight[:, columns] = 0
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0
        return added

    def _added(
        self,
        lost: Float[Tensor, "hidden lost"],
        across: Float[Tensor, "lost channels"],
        inner: Float[Tensor, "lost lost"],
    ) -> float:
        """The error that is added when the projection changes by minus `lost` times `across`.

        `inner` is the Cholesky factor of the lost channels' block of the inverse Gram matrix.
        """
        if self.held is None:
            return float((torch.cholesky_solve(lost.T, inner) * lost.T).sum())
        # With C the change so far, |(C - L A) x|^2 - |C x|^2 summed over the inputs needs one product of A with their
        # Gram matrix, as thin as the channels are few. That of C is kept.
        seen = across @ self.held
        before = self._moved @ across.T
        self._moved.addmm_(lost, seen, alpha=-1)
        return float((lost * (lost @ (seen @ across.T)) - 2 * lost * before).sum())
