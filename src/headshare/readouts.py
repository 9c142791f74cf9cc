"""Fit a readout (W_o or W_down) in closed form: weighted ridge regression towards where it started, in float64.

A readout's inputs are *free* (columns it stores: all are solved for), *lent* (columns it takes from a donor's readout,
perhaps behind one scale a channel) or removed (neither). Knows no model and no file.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
ALTERNATIONS = 3
CHUNK_TOKENS = 4096


@dataclass
class NormalEquations:
    """Weighted sums over tokens of products of a readout's inputs and targets; all that a fit needs of the tokens.

    With `bias`, a last input of ones is added, whose column is the bias.
    """

    inputs: int
    outputs: int
    bias: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gram: Float[Tensor, "inputs inputs"] = field(init=False)
    cross: Float[Tensor, "inputs outputs"] = field(init=False)
    target: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        size = self.inputs + self.bias
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        self.cross = torch.zeros(size, self.outputs, dtype=torch.float64, device=self.device)

    def add(
        self,
        inputs: Float[Tensor, "*tokens inputs"],
        targets: Float[Tensor, "*tokens outputs"],
        weights: Float[Tensor, "*tokens"],
    ) -> None:
        """Add these tokens, each with its weight. Products and sums are float64."""
        flat = inputs.reshape(-1, self.inputs), targets.reshape(-1, self.outputs), weights.reshape(-1, 1)
        for z, y, w in zip(*(tensor.split(CHUNK_TOKENS) for tensor in flat), strict=True):
            root = w.double().sqrt()
            rows = z.double() * root
            wanted = y.double() * root
            if self.bias:
                rows = torch.cat([rows, root], dim=1)
            self.gram.addmm_(rows.T, rows)
            self.cross.addmm_(rows.T, wanted)
            self.target += float(wanted.square().sum())

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        both = NormalEquations(self.inputs, self.outputs, self.bias, self.device)
        both.gram, both.cross = self.gram + other.gram, self.cross + other.cross
        both.target = self.target + other.target
        return both

    def error(self, weight: Float[Tensor, "outputs inputs"]) -> float:
        """Weighted squared error of this readout, bias column included, as a part of the targets' own size."""
        found = self.target - 2 * (weight.T * self.cross).sum() + ((weight @ self.gram) * weight).sum()
        return float(found) / self.target if self.target else 0.0


@dataclass(frozen=True)
class Lent:
    """Inputs whose columns come from a donor's readout: scaled, one number a channel to be fitted, or as they are."""

    columns: Int[Tensor, " lent"]
    donor: Float[Tensor, "outputs lent"]
    scaled: bool


@dataclass(frozen=True)
class Fitted:
    """A whole readout: bias column last if there is one, lent columns in place, removed ones zero.

    `scales` are those of all scaled inputs in order. Errors are on held-out tokens, before and after, as parts of the
    targets' size; `ridge` is infinite where the start was kept, as nothing fitted did better on held-out tokens.
    """

    weight: Float[Tensor, "outputs inputs"]
    scales: Float[Tensor, " scaled"]
    ridge: float
    error_before: float
    error_after: float


def fit_readout(
    fit: NormalEquations,
    held: NormalEquations,
    start: Float[Tensor, "outputs inputs"],
    free: Int[Tensor, " free"],
    lent: tuple[Lent, ...] = (),
) -> Fitted:
    """argmin_W sum_t w_t |W z_t - y_t|^2 + ridge * mean(diag Gram) * |W - start|^2 over the free columns of W.

    The ridge is the one with the least error on held-out tokens; the result is then fitted on all tokens. Scales of
    lent columns are pulled to 0, as if the unit were deleted, and solved in turn with the free columns; the scales'
    own Gram matrix is the inputs' times, number by number, that of the donors' columns.
    """
    lent = _merged(lent)
    before = held.error(_with_lent(start, free, lent, None))
    found = [(held.error(_solved(fit, start, free, lent, ridge)[0]), ridge) for ridge in RIDGES]
    error, ridge = min(found)
    if error >= before:
        weight, scales = _with_lent(start, free, lent, None), _zeros(lent, start)
        return Fitted(weight, scales, float("inf"), before, before)
    weight, scales = _solved(fit + held, start, free, lent, ridge)
    return Fitted(weight, scales, ridge, before, error)


def _merged(lent: tuple[Lent, ...]) -> tuple[Lent, ...]:
    """At most one entry of each sort."""
    merged = []
    for scaled in (True, False):
        some = [one for one in lent if one.scaled == scaled]
        if some:
            columns, donor = torch.cat([one.columns for one in some]), torch.cat([one.donor for one in some], dim=1)
            order = columns.argsort()
            merged.append(Lent(columns[order], donor[:, order], scaled))
    return tuple(merged)


def _zeros(lent: tuple[Lent, ...], like: Tensor) -> Tensor:
    return like.new_zeros(sum(len(one.columns) for one in lent if one.scaled))


def _with_lent(start: Tensor, free: Tensor, lent: tuple[Lent, ...], scales: Tensor | None) -> Tensor:
    """The whole readout: free columns as they start, lent ones from their donors, scaled ones times their scales."""
    whole = torch.zeros_like(start)
    whole[:, free] = start[:, free]
    for one in lent:
        if not one.scaled:
            whole[:, one.columns] = one.donor
        elif scales is not None:
            whole[:, one.columns] = one.donor * scales
    return whole


def _solved(
    equations: NormalEquations, start: Tensor, free: Tensor, lent: tuple[Lent, ...], ridge: float
) -> tuple[Tensor, Tensor]:
    gram, cross = equations.gram, equations.cross
    mean = gram.diagonal().mean()
    inner = gram[free][:, free]
    inner.diagonal().add_(ridge * mean)
    factor = torch.linalg.cholesky(inner)
    scaled = next((one for one in lent if one.scaled), None)
    scales = _zeros(lent, start)
    whole = _with_lent(start, free, lent, scales)
    others = whole.clone()
    for turn in range(ALTERNATIONS if scaled is not None else 1):
        others.copy_(whole)
        others[:, free] = 0
        right = cross[free] - gram[free] @ others.T + ridge * mean * start[:, free].T
        whole[:, free] = torch.cholesky_solve(right, factor).T
        if scaled is not None and turn < ALTERNATIONS - 1:
            whole[:, scaled.columns] = 0
            left = cross[scaled.columns] - gram[scaled.columns] @ whole.T
            inner = gram[scaled.columns][:, scaled.columns] * (scaled.donor.T @ scaled.donor)
            inner.diagonal().add_(ridge * inner.diagonal().mean() + torch.finfo(torch.float64).tiny)
            scales = torch.linalg.solve(inner, (left * scaled.donor.T).sum(dim=1))
            whole[:, scaled.columns] = scaled.donor * scales
    return whole, scales
