"""A fitted readout is what an independent least-squares solver gives, and bad numbers never stop a fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from headshare.calibration.refit import regression as readouts
from headshare.calibration.refit.normal_equations import NormalEquations
from headshare.calibration.refit.regression import (
    RIDGES,
    BorrowedColumns,
    Fitted,
    LowRankColumns,
    assembled,
    fit_readout,
)
from headshare.precision import _both, full_float32

TOKENS, INPUTS, OUTPUTS = 300, 12, 7
UNSOLVED = "the equations cannot be solved"


class Tokens:
    """Readout inputs, targets and weights; the targets are a readout's outputs and noise."""

    def __init__(self, seed: int, *, tokens: int = TOKENS, noise: float = 0.3, truth: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.z, self.w = random(tokens, INPUTS), random(tokens).exp()
        self.truth = random(OUTPUTS, INPUTS) if truth is None else truth
        self.y = self.z @ self.truth.T + noise * random(tokens, OUTPUTS)

    def sums(self, dtype: torch.dtype = torch.float64, *, bias: bool = False) -> NormalEquations:
        sums = NormalEquations(self.z.shape[1], self.y.shape[1], bias)
        sums.add(self.z.to(dtype), self.y.to(dtype), self.w.to(dtype))
        return sums

    def rows(self, *, bias: bool = False) -> Tensor:
        return torch.cat([self.z, torch.ones(len(self.z), 1, dtype=torch.float64)], dim=1) if bias else self.z

    def lost(self, weight: Tensor) -> float:
        bias = weight.shape[1] > self.z.shape[1]
        missed = (self.rows(bias=bias) @ weight.T - self.y).square().sum(dim=1)
        return float((self.w * missed).sum())

    def error(self, weight: Tensor) -> float:
        return self.lost(weight) / float((self.w * self.y.square().sum(dim=1)).sum())


def pair(seed: int = 0, **options: Any) -> tuple[Tokens, Tokens]:
    fit = Tokens(seed, **options)
    return fit, Tokens(seed + 1000, **(options | {"truth": fit.truth, "tokens": 80}))


def both(fit: Tokens, held: Tokens) -> Tokens:
    joint = Tokens(0)
    joint.z, joint.y, joint.w = (torch.cat([getattr(fit, name), getattr(held, name)]) for name in ("z", "y", "w"))
    return joint


def by_lstsq(tokens: Tokens, ridge: float, prior: Tensor, free: Tensor, fixed: Tensor, *, bias: bool = False) -> Tensor:
    """The free columns that do best beside fixed ones: least squares on the tokens' rows and one row a column."""
    rows, root = tokens.rows(bias=bias), tokens.w.sqrt()[:, None]
    used = [at for at in range(fixed.shape[1]) if at in free or fixed[:, at].any()]
    strength = (ridge * (rows * root).square().sum(dim=0)[used].mean()).sqrt()
    wanted = (tokens.y - rows @ fixed.T) * root
    system = torch.cat([rows[:, free] * root, strength * torch.eye(len(free), dtype=torch.float64)])
    right = torch.cat([wanted, strength * prior[:, free].T])
    whole = fixed.clone()
    whole[:, free] = torch.linalg.lstsq(system, right, driver="gelsd").solution.T
    return whole


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


ALL = torch.arange(INPUTS)


# ---- fits


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_fit_is_what_least_squares_on_the_tokens_gives(seed: int, bias: bool) -> None:
    """Some columns are free, some lent as they are, and some (8 and 9) removed; the prior is not the start."""
    fit, held = pair(seed)
    size = INPUTS + bias
    start, prior = torch.randn(2, OUTPUTS, size, dtype=torch.float64)
    lent = (
        BorrowedColumns(torch.tensor([10, 11]), torch.randn(OUTPUTS, 2, dtype=torch.float64), False),
        BorrowedColumns(torch.tensor([4]), torch.randn(OUTPUTS, 1, dtype=torch.float64), False),
    )
    free = torch.tensor([0, 1, 2, 3, 5, 6, 7, *([INPUTS] if bias else [])])
    fixed = torch.zeros(OUTPUTS, size, dtype=torch.float64)
    fixed[:, [10, 11]], fixed[:, [4]] = lent[0].donor, lent[1].donor
    found = fit_readout(fit.sums(bias=bias), held.sums(bias=bias), start, free, lent, prior=prior)
    errors = {ridge: held.error(by_lstsq(fit, ridge, prior, free, fixed, bias=bias)) for ridge in RIDGES}
    assert found.ridge == min(errors, key=errors.__getitem__)
    assert found.error_after == pytest.approx(min(errors.values()), rel=1e-9)
    assert close(found.weight, by_lstsq(both(fit, held), found.ridge, prior, free, fixed, bias=bias))
    assert not found.weight[:, [8, 9]].any()
    assert torch.equal(found.weight[:, [10, 11, 4]], fixed[:, [10, 11, 4]])
    kept = fixed.clone()
    kept[:, free] = start[:, free]
    assert found.error_before == pytest.approx(held.error(kept), rel=1e-9)


@pytest.mark.parametrize("noise", [0.01, 3.0, 30.0])
def test_the_ridge_is_the_best_on_held_out_tokens(noise: float) -> None:
    fit, held = pair(5, tokens=20, noise=noise)
    start = fit.truth + torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    found = fit_readout(fit.sums(), held.sums(), start, ALL)
    errors = {r: held.lost(by_lstsq(fit, r, start, ALL, torch.zeros_like(start))) for r in RIDGES}
    assert found.ridge == min(errors, key=errors.__getitem__)


def test_more_noise_takes_a_larger_ridge() -> None:
    chosen = []
    for noise in (0.01, 10.0):
        fit, held = pair(5, tokens=20, noise=noise)
        chosen.append(fit_readout(fit.sums(), held.sums(), fit.truth + 2, ALL).ridge)
    assert chosen[0] < chosen[1] < float("inf")


def test_a_start_that_nothing_beats_is_kept_and_says_so() -> None:
    fit, held = pair(3, noise=5.0)
    held.y = held.z @ fit.truth.T  # the start is just right there
    found = fit_readout(fit.sums(), held.sums(), fit.truth, ALL)
    assert torch.equal(found.weight, fit.truth)
    assert (found.ridge, found.why_kept) == (float("inf"), "no ridge did better on held-out tokens")
    assert found.error_before == found.error_after == pytest.approx(0, abs=1e-12)


def test_a_readout_of_lent_columns_alone_is_the_donors() -> None:
    fit, held = pair()
    lent = (BorrowedColumns(ALL, torch.randn_like(fit.truth), False),)
    found = fit_readout(fit.sums(), held.sums(), fit.truth, ALL[:0], lent)
    assert torch.equal(found.weight, lent[0].donor)
    assert found.why_kept


# ---- scaled ties


def scaled_case(seed: int, scale: Tensor | None = None) -> tuple[Tokens, Tokens, Tensor, tuple[BorrowedColumns, ...]]:
    """Inputs 8 to 11 take a donor's columns, given in two pieces and out of order."""
    fit, held = pair(seed)
    donor = fit.truth[:, 8:] * torch.tensor([0.5, -2.0, 1.0, 4.0]) + 0.2 * torch.randn(OUTPUTS, 4, dtype=torch.float64)
    pieces = [
        BorrowedColumns(
            torch.arange(8 + first, 10 + first),
            donor[:, first : first + 2],
            True,
            None if scale is None else scale[first : first + 2],
        )
        for first in (2, 0)
    ]  # fmt: skip
    return fit, held, donor, tuple(pieces)


def objective(tokens: Tokens, weight: Tensor, scales: Tensor, donor: Tensor, prior: Tensor, ridge: float) -> float:
    """What the alternation makes small: the error, the pull on free columns, and the pull of scales to zero."""
    gram = (tokens.z * tokens.w.sqrt()[:, None]).square().sum(dim=0)
    pulled = ridge * gram.mean() * (weight[:, :8] - prior[:, :8]).square().sum()
    inner = (gram[8:] * donor.square().sum(dim=0)).mean()
    return tokens.lost(weight) + float(pulled + ridge * inner * scales.square().sum())


@pytest.mark.parametrize("seed", range(4))
def test_turns_of_columns_and_scales_never_make_the_objective_larger(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, held, donor, lent = scaled_case(seed)
    monkeypatch.setattr(readouts, "RIDGES", (1e-2,))
    prior, reached, found = torch.randn_like(fit.truth), [], None
    for turns in range(1, 8):
        monkeypatch.setattr(readouts, "ALTERNATIONS", turns)
        found = fit_readout(fit.sums(), held.sums(), prior, ALL[:8], lent)
        reached.append(objective(both(fit, held), found.weight, found.scales, donor, prior, 1e-2))
        assert torch.equal(found.weight[:, 8:], donor * found.scales)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(reached))
    assert reached[2] < reached[0]


@pytest.mark.parametrize("seed", range(4))
def test_a_scaled_tie_beats_deletion_on_the_tokens_it_is_fitted_on(seed: int) -> None:
    fit, held, _, lent = scaled_case(seed)
    start = torch.randn_like(fit.truth)
    tied = fit_readout(fit.sums(), held.sums(), start, ALL[:8], lent)
    deleted = fit_readout(fit.sums(), held.sums(), start, ALL[:8])
    assert both(fit, held).lost(tied.weight) < both(fit, held).lost(deleted.weight)
    assert tied.error_after < deleted.error_after
    assert tied.scales.all()


def test_many_turns_reach_the_joint_least_squares_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns and scales together are one linear problem: output by output, beside one column a scale."""
    monkeypatch.setattr(readouts, "ALTERNATIONS", 400)
    monkeypatch.setattr(readouts, "RIDGES", (1e-3,))
    fit, held, donor, lent = scaled_case(0)
    prior, tokens = torch.randn_like(fit.truth), both(fit, held)
    root = tokens.w.sqrt()[:, None]
    z, y = tokens.z * root, tokens.y * root
    gram = z.square().sum(dim=0)
    free_pull, scale_pull = (1e-3 * m for m in (gram.mean(), (gram[8:] * donor.square().sum(dim=0)).mean()))
    unknowns = OUTPUTS * 8 + 4
    system, right = torch.zeros(len(z) * OUTPUTS + unknowns, unknowns, dtype=torch.float64), []
    for out in range(OUTPUTS):
        at = slice(out * len(z), (out + 1) * len(z))
        system[at, out * 8 : out * 8 + 8] = z[:, :8]
        system[at, OUTPUTS * 8 :] = z[:, 8:] * donor[out]
        right.append(y[:, out])
    pulls = torch.cat([free_pull.expand(OUTPUTS * 8), scale_pull.expand(4)]).sqrt()
    system[len(z) * OUTPUTS :] = torch.diag(pulls)
    towards = torch.cat([prior[:, :8].flatten(), torch.zeros(4, dtype=torch.float64)]) * pulls
    solution = torch.linalg.lstsq(system, torch.cat([*right, towards])[:, None]).solution[:, 0]
    found = fit_readout(fit.sums(), held.sums(), prior, ALL[:8], lent)
    assert close(found.scales, solution[-4:], 1e-7)
    assert close(found.weight[:, :8], solution[:-4].view(OUTPUTS, 8), 1e-7)


def test_scales_that_were_fitted_before_are_what_they_are_pulled_to(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    for scale, towards in ((None, torch.zeros(4, dtype=torch.float64)), (given, given)):
        fit, held, _, lent = scaled_case(1, scale)
        monkeypatch.setattr(readouts, "RIDGES", (1e9,))
        found = fit_readout(fit.sums(), held.sums(), torch.zeros_like(fit.truth), ALL[:8], lent)
        assert torch.allclose(found.scales, towards, atol=1e-6)
        monkeypatch.setattr(readouts, "RIDGES", ())
        kept = fit_readout(fit.sums(), held.sums(), fit.truth, ALL[:8], lent)
        assert torch.equal(kept.scales, torch.ones_like(given) if scale is None else given)
        assert kept.error_before == kept.error_after


def test_scales_of_channels_that_are_silent_stay_finite() -> None:
    fit, held, _, lent = scaled_case(2)
    for tokens in (fit, held):
        tokens.z[:, 8:] = 0
    found = fit_readout(fit.sums(), held.sums(), torch.zeros_like(fit.truth), ALL[:8], lent)
    assert not found.why_kept
    assert not found.scales.any()


# ---- columns that are a product


def split_off(*units: tuple[int, int, int], bias: bool = False) -> tuple[Tensor, tuple[LowRankColumns, ...]]:
    """Free inputs, and units of (start, stop, rank)."""
    narrow = tuple(LowRankColumns(torch.arange(start, stop), rank) for start, stop, rank in units)
    taken = {int(at) for one in narrow for at in one.columns}
    return torch.tensor([at for at in range(INPUTS + bias) if at not in taken], dtype=torch.long), narrow


def eliminated(tokens: Tokens, ridge: float, prior: Tensor, free: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """What the free columns leave of the other inputs and of the targets, as rows: tokens, ridges, ridges of those
    inputs, which are as large a part of the mean square of what is left of them."""
    rows, root = tokens.rows(bias=prior.shape[1] > INPUTS) * tokens.w.sqrt()[:, None], tokens.w.sqrt()[:, None]
    used = torch.cat([free, columns])
    pull = (ridge * rows.square().sum(dim=0)[used].mean()).sqrt()
    system = torch.cat([rows[:, free], pull * torch.eye(len(free), dtype=torch.float64)])
    inputs = torch.cat([rows[:, columns], torch.zeros(len(free), len(columns), dtype=torch.float64)])
    targets = torch.cat([tokens.y * root, pull * prior[:, free].T])
    inputs, targets = (one - system @ torch.linalg.lstsq(system, one, driver="gelsd").solution if len(free) else one
                       for one in (inputs, targets))  # fmt: skip
    own = (ridge * inputs.square().sum(dim=0).mean()).sqrt() * torch.eye(len(columns), dtype=torch.float64)
    return torch.cat([inputs, own]), torch.cat([targets, torch.zeros(len(columns), OUTPUTS, dtype=torch.float64)])


def reduced_rank(rows: Tensor, wanted: Tensor, rank: int) -> Tensor:
    """The best columns of a rank: least squares, projected on the first directions of what it gives."""
    full = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
    directions = torch.linalg.svd(rows @ full).Vh[:rank]
    found: Tensor = (full @ directions.T @ directions).T
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_product_is_the_best_of_its_rank_once_free_columns_do_what_they_can(rank: int, bias: bool) -> None:
    fit, held = pair(rank)
    start, prior = torch.randn(2, OUTPUTS, INPUTS + bias, dtype=torch.float64)
    free, narrow = split_off((3, 8, rank), bias=bias)
    found = fit_readout(fit.sums(bias=bias), held.sums(bias=bias), start, free, narrow=narrow, prior=prior)
    tokens, columns = both(fit, held), narrow[0].columns
    fixed = torch.zeros_like(start)
    fixed[:, columns] = reduced_rank(*eliminated(tokens, found.ridge, prior, free, columns), rank)
    assert torch.linalg.matrix_rank(found.weight[:, columns]) == rank
    assert close(found.weight[:, columns], fixed[:, columns], 1e-8)
    assert close(found.weight, by_lstsq(tokens, found.ridge, prior, free, fixed, bias=bias), 1e-8)
    errors = []
    for ridge in RIDGES:
        fixed[:, columns] = reduced_rank(*eliminated(fit, ridge, prior, free, columns), rank)
        errors.append(held.error(by_lstsq(fit, ridge, prior, free, fixed, bias=bias)))
    assert (found.ridge, found.error_after) == (RIDGES[errors.index(min(errors))], pytest.approx(min(errors), rel=1e-8))
    kept = start.clone()
    assert found.error_before == pytest.approx(held.error(kept), rel=1e-9)
    gone = fit_readout(fit.sums(bias=bias), held.sums(bias=bias), start, free, prior=prior)
    assert found.error_after < gone.error_after
    assert tokens.lost(found.weight) < tokens.lost(gone.weight)


def test_a_readout_may_be_products_alone() -> None:
    fit, held = pair(7)
    free, narrow = split_off((0, INPUTS, 3))
    assert not len(free)
    found = fit_readout(fit.sums(), held.sums(), torch.zeros_like(fit.truth), free, narrow=narrow)
    expected = reduced_rank(*eliminated(both(fit, held), found.ridge, fit.truth, free, ALL), 3)
    assert close(found.weight, expected, 1e-8)
    assert found.error_after < found.error_before


def test_no_gradient_finds_better_columns_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readouts, "RIDGES", (1e-2,))
    fit, held = pair(8)
    free, narrow = split_off((5, 9, 2))
    tokens, columns = both(fit, held), narrow[0].columns
    found = fit_readout(fit.sums(), held.sums(), torch.zeros_like(fit.truth), free, narrow=narrow)
    rows, wanted = eliminated(tokens, 1e-2, torch.zeros_like(fit.truth), free, columns)
    best = float((rows @ found.weight[:, columns].T - wanted).square().sum())
    reached = []
    for _ in range(4):
        inner, outer = (torch.randn(size, dtype=torch.float64).requires_grad_() for size in ((4, 2), (2, OUTPUTS)))
        optimiser = torch.optim.LBFGS([inner, outer], max_iter=200, line_search_fn="strong_wolfe")

        def loss(inner: Tensor = inner, outer: Tensor = outer, optimiser: Any = optimiser) -> Tensor:
            optimiser.zero_grad()
            value: Tensor = (rows @ inner @ outer - wanted).square().sum()
            value.backward()
            return value

        optimiser.step(loss)
        reached.append(float(loss().detach()))
    assert min(reached) == pytest.approx(best, rel=1e-5)
    assert best <= min(reached) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_turns_of_several_products_never_make_the_objective_larger(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readouts, "RIDGES", (1e-2,))
    fit, held = pair(seed)
    for tokens in (fit, held):
        tokens.z = tokens.z + 2 * tokens.z[:, :1]  # so that units have to go with each other
    free, narrow = split_off((2, 5, 1), (5, 8, 2), (9, 12, 1))
    prior, columns = torch.randn_like(fit.truth), torch.cat([one.columns for one in narrow])
    tokens = both(fit, held)
    rows, wanted = eliminated(tokens, 1e-2, prior, free, columns)
    reached = [float(wanted.square().sum())]  # without any of them
    for turns in range(1, 8):
        monkeypatch.setattr(readouts, "ALTERNATIONS", turns)
        found = fit_readout(fit.sums(), held.sums(), prior, free, narrow=narrow, prior=prior)
        assert not found.why_kept
        reached.append(float((rows @ found.weight[:, columns].T - wanted).square().sum()))
        assert [int(torch.linalg.matrix_rank(found.weight[:, one.columns])) for one in narrow] == [1, 2, 1]
        fixed = torch.zeros_like(prior)
        fixed[:, columns] = found.weight[:, columns]
        assert close(found.weight, by_lstsq(tokens, 1e-2, prior, free, fixed), 1e-8)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(reached))
    assert reached[3] < reached[1] < reached[0]
    last, at = found.weight[:, columns].T, 0
    for one in narrow:  # and in the end each is the best beside the others
        mine = slice(at, at := at + len(one.columns))
        others = last.clone()
        others[mine] = 0
        best = reduced_rank(rows[:, mine], wanted - rows @ others, one.rank).T
        assert close(rows[:, mine] @ last[mine], rows[:, mine] @ best, 1e-2)


def test_products_of_silent_inputs_are_zero_and_bad_numbers_keep_the_start() -> None:
    fit, held = pair(9)
    free, narrow = split_off((2, 5, 1), (8, 12, 2))
    for tokens in (fit, held):
        tokens.z[:, 8:] = 0
    found = fit_readout(fit.sums(), held.sums(), torch.zeros_like(fit.truth), free, narrow=narrow)
    assert not found.why_kept
    assert not found.weight[:, 8:].any()
    assert torch.isfinite(found.weight).all()
    for tokens in (fit, held):
        tokens.z = torch.zeros_like(tokens.z)
    start = torch.randn_like(fit.truth)
    assert kept(fit_readout(fit.sums(), held.sums(), start, free, narrow=narrow), start, UNSOLVED)
    none = NormalEquations(INPUTS, OUTPUTS)
    assert kept(fit_readout(none, none, start, free, narrow=narrow), start, UNSOLVED)


# ---- sums


def test_tokens_may_come_in_any_pieces() -> None:
    fit = Tokens(0, tokens=2500)
    pieces = NormalEquations(INPUTS, OUTPUTS, bias=True)
    for at in (slice(0, 0), slice(0, 1), slice(1, 2000), slice(2000, None)):
        pieces.add(fit.z[at], fit.y[at], fit.w[at])
    whole = fit.sums(bias=True)
    assert close(pieces.gram, whole.gram, 1e-13)
    assert close(pieces.cross, whole.cross, 1e-13)
    assert pieces.target == pytest.approx(whole.target, rel=1e-13)
    rows = fit.rows(bias=True) * fit.w.sqrt()[:, None]
    assert close(whole.gram, rows.T @ rows, 1e-13)


@pytest.mark.parametrize("bias", [False, True])
def test_the_error_is_the_tokens_own(bias: bool) -> None:
    fit = Tokens(0)
    weight = torch.randn(OUTPUTS, INPUTS + bias, dtype=torch.float64)
    assert fit.sums(bias=bias).lost(weight) == pytest.approx(fit.lost(weight), rel=1e-12)
    assert fit.sums(bias=bias).error(weight) == pytest.approx(fit.error(weight), rel=1e-12)


def ill_conditioned(z: Tensor) -> Tensor:
    """Directions whose sizes span ten orders of magnitude, mixed over all columns."""
    mixed, _ = torch.linalg.qr(torch.randn(z.shape[1], z.shape[1], dtype=torch.float64))
    return z @ (mixed * torch.logspace(0, -10, z.shape[1], dtype=torch.float64)[:, None]) @ mixed.T


def coherent(z: Tensor) -> Tensor:
    """All columns nearly alike."""
    return z[:, :1] + 1e-3 * z


def one_column(z: Tensor) -> Tensor:
    """One input a thousand times the others, as activations are where attention sinks."""
    return torch.cat([z[:, :1] * 1e3 + 1e3, z[:, 1:]], dim=1)


def few_tokens(z: Tensor) -> Tensor:
    """Three tokens ten thousand times the others, and little weight on none."""
    return torch.cat([z[:3] * 1e4, z[3:]])


def of_one_sign(z: Tensor) -> Tensor:
    """Behind a ReLU: nothing averages out."""
    return z.abs() + 5


@pytest.mark.parametrize("shape", [ill_conditioned, coherent, one_column, few_tokens, of_one_sign])
def test_products_in_float32_fit_as_well_as_products_in_float64(shape: Callable[[Tensor], Tensor]) -> None:
    """The same tokens, rounded to float32, multiplied in either: 5,000 tokens, 96 inputs, at every ridge."""
    generator = torch.Generator().manual_seed(1)
    z = shape(torch.randn(5000, 96, generator=generator, dtype=torch.float64)).float().double()
    truth = torch.randn(16, 96, generator=generator, dtype=torch.float64)
    y = z @ truth.T
    y = (y + 0.05 * y.square().mean().sqrt() * torch.randn(5000, 16, generator=generator)).float().double()
    w = (1 / y.square().sum(dim=1)).float().double()
    tokens = Tokens(0)
    tokens.z, tokens.y, tokens.w = z, y, w
    start = (truth + 0.3 * torch.randn(16, 96, generator=generator)).double()
    everything, none = torch.arange(96), torch.zeros_like(start)
    for ridge in RIDGES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readouts, "RIDGES", (ridge,))
            found, exact = (fit_readout(tokens.sums(t), tokens.sums(t), start, everything) for t in FLOATS)
        independent = by_lstsq(both(tokens, tokens), ridge, start, everything, none)
        assert found.ridge == exact.ridge == ridge
        assert tokens.lost(found.weight) <= tokens.lost(independent) * (1 + 1e-5)
        assert found.error_after == pytest.approx(exact.error_after, rel=1e-4, abs=1e-7)


FLOATS = (torch.float32, torch.float64)


@contextmanager
def precision(choose: Callable[[], None]) -> Iterator[None]:
    """Within this block, the process multiplies float32 numbers as was chosen."""
    legacy = torch.get_float32_matmul_precision()
    try:
        choose()
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(legacy)


def by_backend() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]


def for_all() -> None:
    torch.set_float32_matmul_precision("medium")


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no such setting")
@pytest.mark.parametrize("choose", [by_backend, for_all])
def test_products_keep_all_their_bits_whatever_the_process_allows(choose: Callable[[], None]) -> None:
    tokens = Tokens(0, tokens=1024)
    tokens.z, tokens.y = torch.randn(1024, 256).double(), torch.randn(1024, 256).double()
    usual = tokens.sums(torch.float32)
    with precision(choose):
        before = settings()
        found = tokens.sums(torch.float32)
        assert settings() == before
    assert torch.equal(found.gram, usual.gram)
    assert torch.equal(found.cross, usual.cross)
    assert close(found.gram, tokens.sums().gram, 1e-6)


def settings() -> tuple[str, str]:
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]


def test_a_setting_is_put_back_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), _both("medium"):
        assert torch.get_float32_matmul_precision() == "medium" != before
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


# ---- numbers that are hard


def test_products_that_float32_cannot_hold_are_made_in_float64() -> None:
    fit, held = pair()
    for tokens in (fit, held):
        tokens.z, tokens.y = tokens.z * 1e25, tokens.y * 1e25
    found = fit_readout(fit.sums(torch.float32), held.sums(torch.float32), torch.zeros_like(fit.truth), ALL)
    assert found.error_after < 0.05
    assert close(found.weight, fit.truth, 0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["z", "y", "w"])
def test_tokens_that_are_not_finite_are_left_out_and_counted(where: str, bad: float) -> None:
    fit = Tokens(0)
    getattr(fit, where)[5] = bad
    getattr(fit, where)[7] = bad
    sums = fit.sums(torch.float32)
    good = [token for token in range(TOKENS) if token not in (5, 7)]
    fit.z, fit.y, fit.w = fit.z[good], fit.y[good], fit.w[good]
    alone = fit.sums(torch.float32)
    assert torch.equal(sums.gram, alone.gram)
    assert torch.equal(sums.cross, alone.cross)
    assert (sums.left_out, alone.left_out, (sums + sums).left_out) == (2, 0, 4)


def kept(found: Fitted, start: Tensor, why: str) -> bool:
    return torch.equal(found.weight, start) and found.why_kept == why and found.ridge == float("inf")


def test_no_tokens_at_all_keep_the_start() -> None:
    start = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    none = NormalEquations(INPUTS, OUTPUTS)
    none.add(torch.full((4, INPUTS), float("nan")), torch.zeros(4, OUTPUTS), torch.ones(4))
    found = fit_readout(none, none, start, ALL)
    assert kept(found, start, UNSOLVED)
    assert found.error_before == found.error_after == 0


def test_inputs_that_are_all_zero_keep_the_start() -> None:
    fit, held = pair()
    fit.z, held.z = torch.zeros_like(fit.z), torch.zeros_like(held.z)
    start = torch.randn_like(fit.truth)
    found = fit_readout(fit.sums(), held.sums(), start, ALL)
    assert kept(found, start, UNSOLVED)
    assert found.error_before == found.error_after == 1


def test_targets_that_are_all_zero_are_fitted_like_others() -> None:
    fit, held = pair()
    fit.y, held.y = torch.zeros_like(fit.y), torch.zeros_like(held.y)
    found = fit_readout(fit.sums(), held.sums(), fit.truth, ALL)
    assert found.ridge == RIDGES[0]
    assert found.weight.abs().max() < 1e-3 * fit.truth.abs().max()
    assert found.error_after < 1e-6 * found.error_before


def test_dead_inputs_and_few_tokens_leave_columns_where_they_are_pulled_to() -> None:
    fit, held = pair(tokens=4, noise=0.0)
    for tokens in (fit, held):
        tokens.z[:, [1, 6]] = 0
    start = torch.randn_like(fit.truth)
    found = fit_readout(fit.sums(torch.float32), held.sums(torch.float32), start, ALL)
    assert not found.why_kept
    assert torch.allclose(found.weight[:, [1, 6]], start[:, [1, 6]])
    exact = by_lstsq(both(fit, held), found.ridge, start, ALL, torch.zeros_like(start))
    assert close(found.weight, exact, 1e-2)


def test_equations_that_rounding_has_spoilt_take_the_next_larger_ridge() -> None:
    fit, held = pair()
    sums, mean = fit.sums(), float(fit.sums().gram.diagonal().mean())
    values, vectors = torch.linalg.eigh(sums.gram)
    values[0] = -0.005 * mean
    sums.gram = (vectors * values) @ vectors.T
    found = fit_readout(sums, held.sums(), torch.zeros_like(fit.truth), ALL)
    assert found.ridge >= 0.01
    assert found.error_after < 0.5


def test_a_fit_that_only_all_tokens_spoil_takes_the_next_larger_ridge() -> None:
    fit, held = pair()
    rest, mean = held.sums(), float(fit.sums().gram.diagonal().mean())
    rest.gram -= (float(torch.linalg.eigvalsh(fit.sums().gram + rest.gram)[0]) + 0.05 * mean) * torch.eye(INPUTS)
    rest.target += 1e6  # so that errors stay above zero
    found = fit_readout(fit.sums(), rest, 1e3 * torch.ones_like(fit.truth), ALL)
    assert found.ridge >= 0.01
    assert torch.isfinite(found.weight).all()


def test_equations_that_no_ridge_saves_keep_the_start() -> None:
    fit, held = pair()
    sums = fit.sums()
    sums.gram = -1e6 * torch.eye(INPUTS, dtype=torch.float64)
    start = torch.randn_like(fit.truth)
    assert kept(fit_readout(sums, held.sums(), start, ALL), start, UNSOLVED)


def test_numbers_that_the_checkpoint_cannot_hold_take_a_larger_ridge_or_keep_the_start() -> None:
    fit, held = pair(noise=0.0)
    fit.y, held.y = fit.y * 1e5, held.y * 1e5
    start, truth = torch.zeros_like(fit.truth), float((fit.truth * 1e5).abs().max())
    free = fit_readout(fit.sums(), held.sums(), start, ALL)
    bounded = fit_readout(fit.sums(), held.sums(), start, ALL, largest=truth / 2)
    assert free.weight.abs().max() > truth / 2 > bounded.weight.abs().max()
    assert free.ridge < bounded.ridge < float("inf")
    none = fit_readout(fit.sums(), held.sums(), start, ALL, largest=1.0)
    assert kept(none, start, UNSOLVED)


def test_a_readout_is_put_together_from_free_lent_and_removed_columns() -> None:
    weight = torch.arange(12.0).view(2, 6)
    lent = (
        BorrowedColumns(torch.tensor([4, 5]), torch.full((2, 2), 10.0), True),
        BorrowedColumns(torch.tensor([1]), torch.full((2, 1), 20.0), True),
        BorrowedColumns(torch.tensor([2]), torch.full((2, 1), 7.0), False),
    )
    found = assembled(weight, torch.tensor([0]), lent, torch.tensor([1.0, 2.0, 3.0]))
    assert found.tolist() == [[0, 20, 7, 0, 20, 30], [6, 20, 7, 0, 20, 30]]
