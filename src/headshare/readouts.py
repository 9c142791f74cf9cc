"""Fit a readout (W_o or W_down) in closed form: weighted ridge regression towards a prior, solved in float64.

A readout's inputs are *free* (columns it stores: all are solved for), *lent* (columns it takes from a donor's readout,
perhaps behind one scale a channel), *factored* (columns it stores as a product of small rank) or removed (none of
these: their columns are zero). Knows no model and no file.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headshare.factors import whitened_svd
from headshare.precision import full_float32

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
ALTERNATIONS = 3
CHUNK_TOKENS = 1024
NOISE = 1e-7
TINY = torch.finfo(torch.float64).tiny


@dataclass
class NormalEquations:
    """Weighted sums over tokens of products of a readout's inputs and targets; all that a fit needs of the tokens.

    With `bias`, a last input of ones is added, whose column is the bias. `target` is the targets' own weighted squared
    size; `left_out` counts tokens that were not added, as their numbers were not finite.
    """

    inputs: int
    outputs: int
    bias: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gram: Float[Tensor, "inputs inputs"] = field(init=False)
    cross: Float[Tensor, "inputs outputs"] = field(init=False)
    target: float = field(init=False, default=0.0)
    left_out: int = field(init=False, default=0)

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
        """Add these tokens, each with its weight; those whose numbers are not all finite are left out and counted.

        Tokens are multiplied as they are given, in chunks: float32 ones in full float32, whatever precision the process
        allows its products, and in float64 where that overflows. Sums over chunks are float64. What rounding in a
        chunk does to a fit is far below what the least ridge does (tests/calibration/test_regression.py measures it).
        """
        flat = inputs.reshape(-1, self.inputs), targets.reshape(-1, self.outputs), weights.reshape(-1, 1)
        finite = _finite_rows(*flat)
        if not bool(finite.all()):
            self.left_out += int((~finite).sum())
            flat = flat[0][finite], flat[1][finite], flat[2][finite]
        for z, y, w in zip(*(torch.split(tensor, CHUNK_TOKENS) for tensor in flat), strict=True):
            self._add_chunk(z, y, w.sqrt())

    def _add_chunk(
        self,
        inputs: Float[Tensor, "tokens inputs"],
        targets: Float[Tensor, "tokens outputs"],
        root: Float[Tensor, "tokens 1"],
    ) -> None:
        rows, wanted = inputs * root, targets * root
        if self.bias:
            rows = torch.cat([rows, root.to(rows.dtype)], dim=1)
        with full_float32():
            gram, cross = rows.T @ rows, rows.T @ wanted
        if not bool(torch.isfinite(gram.sum() + cross.sum())) and rows.dtype != torch.float64:
            self._add_chunk(inputs.double(), targets.double(), root.double())
            return
        self.gram += gram
        self.cross += cross
        self.target += float(wanted.double().square().sum())

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        both = NormalEquations(self.inputs, self.outputs, self.bias, self.device)
        both.gram, both.cross = self.gram + other.gram, self.cross + other.cross
        both.target, both.left_out = self.target + other.target, self.left_out + other.left_out
        return both

    def lost(self, weight: Float[Tensor, "outputs inputs"]) -> float:
        """Weighted squared error of this readout, bias column included; not below zero, whatever rounding says."""
        return max(0.0, self.target + float((weight.T * (self.gram @ weight.T - 2 * self.cross)).sum()))

    def error(self, weight: Float[Tensor, "outputs inputs"]) -> float:
        """The same as a part of the targets' own size; where all targets are zero, as it is."""
        return self.lost(weight) / (self.target or 1.0)


def token_weights(hidden: Float[Tensor, "batch window hidden"]) -> Float[Tensor, "batch window"]:
    """One over each token's squared size, so that the few tokens with enormous activations do not rule the fit; none
    for a token of size zero."""
    square = hidden.square().sum(dim=-1)
    return torch.where(square > torch.finfo(square.dtype).tiny, 1 / square, 0.0)


def _finite_rows(*tensors: Float[Tensor, "tokens _"]) -> Bool[Tensor, " tokens"]:
    rows = [torch.isfinite(tensor).all(dim=1) for tensor in tensors]
    return torch.stack(rows).all(dim=0)


@dataclass(frozen=True)
class Lent:
    """Inputs whose columns come from a donor's readout: scaled, one number a channel to be fitted, or as they are.

    `scale` is the one that they have, and are pulled to. Without, the tie is fresh: it has one, which nobody has
    fitted, and is pulled to zero, as if the unit were deleted.
    """

    columns: Int[Tensor, " lent"]
    donor: Float[Tensor, "outputs lent"]
    scaled: bool
    scale: Float[Tensor, " lent"] | None = None


@dataclass(frozen=True)
class Narrow:
    """Inputs of one unit whose columns are stored as a product of this rank."""

    columns: Int[Tensor, " factored"]
    rank: int


@dataclass(frozen=True)
class Fitted:
    """A whole readout: bias column last if there is one, lent columns and products in place, removed ones zero.

    `scales` are those of all scaled inputs in order. Errors are on held-out tokens, before and after, as parts of the
    targets' size. `ridge` is infinite where the start was kept; `why_kept` says why.
    """

    weight: Float[Tensor, "outputs inputs"]
    scales: Float[Tensor, " scaled"]
    ridge: float
    error_before: float
    error_after: float
    why_kept: str = ""


def fit_readout(
    fit: NormalEquations,
    held: NormalEquations,
    start: Float[Tensor, "outputs inputs"],
    free: Int[Tensor, " free"],
    lent: tuple[Lent, ...] = (),
    narrow: tuple[Narrow, ...] = (),
    *,
    prior: Float[Tensor, "outputs inputs"] | None = None,
    largest: float = float("inf"),
    all_tokens: bool = True,
) -> Fitted:
    """argmin_W sum_t w_t |W z_t - y_t|^2 + ridge * mean(diag Gram) * |W - prior|^2 over the free columns of W, the mean
    being over inputs that are not removed.

    `start` is the readout as it is, of which only free columns are looked at; the prior is the start unless given. The
    ridge is the one with the least error on held-out tokens; the result is then fitted on `all_tokens`, or
    on those that are not held out, so that these can still judge what follows. Scales of lent
    columns are pulled to zero, or to what they were, and solved in turn with the free columns; the scales' own Gram
    matrix is the inputs' times, number by number, that of the donors' columns, whose mean diagonal scales their ridge.
    Columns of `narrow` inputs are the best of their rank, in closed form: what is left of inputs and targets once the
    free columns have done what they can is whitened, and cut to its largest singular values (Izenman, "Reduced-rank
    regression for the multivariate linear model", 1975); with several such units, one after the other in turns.
    The start is kept where no ridge does better on held-out tokens by more than rounding may (`NOISE` of the targets'
    size), or none gives finite numbers below `largest`. All in float64.
    """
    lent = _merged(lent)
    scales = _scales_of(lent, start)
    kept = assembled(start, torch.cat([free, *(one.columns for one in narrow)]), lent, scales)
    before = held.error(kept)
    prior = start if prior is None else prior
    found, ridge = _best_ridge(_Solver(fit, prior, free, lent, narrow, largest), held)
    if not found < held.lost(kept) - NOISE * held.target:
        why = "no ridge did better on held-out tokens" if found < float("inf") else "the equations cannot be solved"
        return Fitted(kept, scales, float("inf"), before, before, why)
    after = found / (held.target or 1.0)
    solver = _Solver(fit + held if all_tokens else fit, prior, free, lent, narrow, largest)
    for larger in RIDGES[RIDGES.index(ridge) :]:
        solved = solver.solve(larger)
        if solved is not None:
            return Fitted(*solved, larger, before, after)
    return Fitted(kept, scales, float("inf"), before, before, "the equations cannot be solved")


def assembled(
    weight: Float[Tensor, "outputs inputs"],
    free: Int[Tensor, " free"],
    lent: tuple[Lent, ...],
    scales: Float[Tensor, " scaled"],
) -> Float[Tensor, "outputs inputs"]:
    """A whole readout: its own free columns, its donors' lent ones, scaled ones times their scales (in the order of
    their inputs), and zeros elsewhere."""
    whole = torch.zeros_like(weight)
    whole[:, free] = weight[:, free]
    for one in _merged(lent):
        whole[:, one.columns] = one.donor * scales if one.scaled else one.donor
    return whole


def _best_ridge(solver: "_Solver", held: NormalEquations) -> tuple[float, float]:
    """The least squared error on held-out tokens, and the ridge it is had with; infinite if none can be solved."""
    found = []
    for ridge in RIDGES:
        solved = solver.solve(ridge)
        if solved is not None:
            found.append((held.lost(solved[0]), ridge))
    return min(found, default=(float("inf"), float("inf")))


def _merged(lent: tuple[Lent, ...]) -> tuple[Lent, ...]:
    """At most one entry of each sort, its inputs in order."""
    merged = []
    for scaled in (True, False):
        some = [one for one in lent if one.scaled == scaled]
        if some:
            columns, donor = torch.cat([one.columns for one in some]), torch.cat([one.donor for one in some], dim=1)
            order = columns.argsort()
            given = [one.scale for one in some if one.scale is not None]
            scale = torch.cat(given)[order] if len(given) == len(some) else None
            merged.append(Lent(columns[order], donor[:, order], scaled, scale))
    return tuple(merged)


def _scales_of(lent: tuple[Lent, ...], like: Tensor) -> Float[Tensor, " scaled"]:
    """The scales that merged lent inputs have to begin with."""
    scaled = next((one for one in lent if one.scaled), None)
    if scaled is None:
        return like.new_zeros(0)
    return torch.ones_like(like[0, scaled.columns]) if scaled.scale is None else scaled.scale.to(like)


class _Solver:
    """The equations of one readout, to be solved with one ridge after another."""

    def __init__(
        self,
        equations: NormalEquations,
        prior: Tensor,
        free: Tensor,
        lent: tuple[Lent, ...],
        narrow: tuple[Narrow, ...],
        largest: float,
    ) -> None:
        self.narrow = narrow
        self.equations, self.prior, self.free, self.largest = equations, prior[:, free], free, largest
        self.given = torch.cat([free[:0], *(one.columns for one in lent), *(one.columns for one in narrow)])
        self.mean = float(equations.gram.diagonal()[torch.cat([free, self.given])].mean())
        self.inner = equations.gram[free[:, None], free]
        self.scaled = next((one for one in lent if one.scaled), None)
        self.fixed = assembled(torch.zeros_like(prior), free, lent, torch.zeros_like(_scales_of(lent, prior)))
        self.with_given = equations.gram[free[:, None], self.given]

    def solve(self, ridge: float) -> tuple[Float[Tensor, "outputs inputs"], Float[Tensor, " scaled"]] | None:
        """The readout and its scales; None where rounding leaves nothing to be solved, or numbers are too large."""
        factor = _factor(self.inner, ridge * self.mean)
        if factor is None:
            return None
        whole, scales = self.fixed.clone(), self._towards()
        if self.narrow and not self._solve_narrow(whole, factor, ridge):
            return None
        for turn in range(ALTERNATIONS if self.scaled is not None else 1):
            if self.scaled is not None:
                if turn:
                    found = self._solve_scales(whole, ridge)
                    if found is None:
                        return None
                    scales = found
                whole[:, self.scaled.columns] = self.scaled.donor * scales
            self._solve_free(whole, factor, ridge)
        return (whole, scales) if all(self._fits(numbers) for numbers in (whole, scales)) else None

    def _fits(self, numbers: Tensor) -> bool:
        return not numbers.numel() or float(numbers.abs().max()) < self.largest  # NaN is not

    def _towards(self) -> Float[Tensor, " scaled"]:
        """What scales are pulled to, and start at."""
        if self.scaled is None or self.scaled.scale is None:
            return self.fixed.new_zeros(0 if self.scaled is None else len(self.scaled.columns))
        return self.scaled.scale.to(self.fixed)

    def _solve_free(self, whole: Tensor, factor: Tensor, ridge: float) -> None:
        """Solve for the free columns of `whole`, in place; the others stay."""
        right = self.equations.cross[self.free] - self.with_given @ whole[:, self.given].T
        right += ridge * self.mean * self.prior.T
        whole[:, self.free] = torch.cholesky_solve(right, factor).T

    def _solve_narrow(self, whole: Tensor, factor: Tensor, ridge: float) -> bool:
        """Set the factored columns of `whole` to the best of their ranks, given all others but the free ones, which
        will be solved for; False where rounding leaves nothing to be solved."""
        columns = torch.cat([one.columns for one in self.narrow])
        gram, cross = self.equations.gram, self.equations.cross - self.equations.gram @ whole.T
        known = torch.cholesky_solve(gram[self.free[:, None], columns], factor).T
        right = cross[self.free] + ridge * self.mean * self.prior.T
        left, missed = (
            gram[columns[:, None], columns] - known @ gram[self.free[:, None], columns],
            cross[columns] - known @ right,
        )
        left.diagonal().add_(ridge * float(left.diagonal().mean()) + TINY)
        found = torch.zeros_like(missed)
        edges = torch.tensor([0, *(len(one.columns) for one in self.narrow)]).cumsum(0).tolist()
        for _ in range(ALTERNATIONS if len(self.narrow) > 1 else 1):
            for one, start, stop in zip(self.narrow, edges[:-1], edges[1:], strict=True):
                found[start:stop] = 0
                own = _factor(left[start:stop, start:stop], 0.0)
                if own is None:
                    return False
                found[start:stop] = _best_of_rank(own, missed[start:stop] - left[start:stop] @ found, one.rank)
        whole[:, columns] = found.T
        return bool(torch.isfinite(found).all())

    def _solve_scales(self, whole: Tensor, ridge: float) -> Float[Tensor, " scaled"] | None:
        """The scales that go best with the other columns of `whole`; sets the scaled columns to zero."""
        assert self.scaled is not None
        columns, donor = self.scaled.columns, self.scaled.donor
        whole[:, columns] = 0
        left = self.equations.cross[columns] - self.equations.gram[columns] @ whole.T
        inner = self.equations.gram[columns[:, None], columns] * (donor.T @ donor)
        added = ridge * float(inner.diagonal().mean())
        factor = _factor(inner, added + TINY)
        if factor is None:
            return None
        right = (left * donor.T).sum(dim=1) + added * self._towards()
        return torch.cholesky_solve(right[:, None], factor)[:, 0]


def _best_of_rank(
    factor: Float[Tensor, "inputs inputs"], wanted: Float[Tensor, "inputs outputs"], rank: int
) -> Float[Tensor, "inputs outputs"]:
    """argmin of |L' X - L^-1 wanted| over X of this rank, L the Cholesky factor of the inputs' Gram matrix."""
    left, values, right = whitened_svd(factor, wanted)
    cut = (left[:, :rank] * values[:rank]) @ right[:rank]
    found: Tensor = torch.linalg.solve_triangular(factor.T, cut, upper=True)
    return found


def _factor(matrix: Float[Tensor, "n n"], added: float) -> Float[Tensor, "n n"] | None:
    """The Cholesky factor of the matrix with this added along its diagonal; None where there is none."""
    definite = matrix.clone()
    definite.diagonal().add_(added)
    factor, failed = torch.linalg.cholesky_ex(definite)
    return None if bool(failed) else factor
