"""The cost of losing a readout's inputs is what plain least squares says it is."""

from typing import Any

import pytest
import torch
from torch import Tensor

from headshare.calibration.costs.least_squares import RIDGE, Fit, Remainder
from support.least_squares import Direct, solved

# ---- costs


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def group(number: int, size: int = 3) -> Tensor:
    return torch.arange(number * size, (number + 1) * size)


def price_of(left: Remainder, number: int, *arguments: Tensor) -> float:
    return left.price(left.fit.lost(group(number)[None]), *arguments)


ORDERS = {
    "removals": ["remove"] * 3,
    "own columns": ["own"] * 3,
    "scales": ["scaled"] * 3,
    "removals, then others": ["remove", "own", "scaled"],
    "own columns, then others": ["own", "scaled", "remove", "own"],
    "scales, then others": ["scaled", "own", "remove", "scaled"],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_step_costs_what_plain_least_squares_says_whatever_came_before(order: list[str]) -> None:
    inputs, weight = random(40, 15) @ random(15, 15), random(6, 15)
    left, direct, before = Remainder.of(Fit.of(inputs, weight)), Direct(inputs, weight), 0.0
    for number, what in enumerate(order):
        arguments = {"remove": (), "own": (random(40, 3),), "scaled": (random(40, 3), random(6, 3))}[what]
        price = price_of(left, number, *arguments)
        left = left.without(group(number), *arguments)
        direct.give_up(group(number), *arguments)
        assert direct.error() - before == pytest.approx(price, rel=1e-9)
        assert direct.error() == pytest.approx(left.error, rel=1e-9)
        before = direct.error()


def test_gains_of_many_units_at_once_are_those_of_each_alone() -> None:
    inputs, weight, features, donor = random(40, 12), random(6, 12), random(40, 3), random(6, 3)
    fit = Fit.of(inputs, weight)
    lost = fit.lost(torch.stack([group(number) for number in range(4)]))
    left = Remainder.of(fit)
    own = lost.costs - fit.beside(features).gains_for(lost)
    scaled = lost.costs - fit.beside(features).scaled_gains_for(lost, donor)
    for number in range(4):
        assert price_of(left, number) == pytest.approx(float(lost.costs[number]))
        assert price_of(left, number, features) == pytest.approx(float(own[number]))
        assert price_of(left, number, features, donor) == pytest.approx(float(scaled[number]))


def test_features_that_are_the_lost_channels_make_up_for_all_but_the_ridge() -> None:
    fit = Fit.of(random(40, 12), random(6, 12))
    left = Remainder.of(fit)
    assert price_of(left, 1, fit.inputs[:, group(1)]) < 0.01 * price_of(left, 1)


def test_the_same_features_may_come_again_and_again() -> None:
    """Two units of a layer can have the same donor; its features then tell the second nothing new."""
    inputs, weight, features = random(10, 15), random(6, 15), random(10, 3)
    left, direct = Remainder.of(Fit.of(inputs, weight)), Direct(inputs, weight)
    for number in range(5):
        left = left.without(group(number), features)
        direct.give_up(group(number), features)
        assert left.error == pytest.approx(direct.error(), rel=1e-6)


# ---- products of small rank


def small_case(hidden: int = 6, size: int = 3) -> tuple[Fit, Tensor, Tensor]:
    """A fit that has lost a unit already, so that something is missed; other columns and their features."""
    fit = Fit.of(random(40, 5 * size) @ random(5 * size, 5 * size), random(hidden, 5 * size))
    return fit.without(group(0, size)), group(2, size), random(40, size)


def missed_with(fit: Fit, columns: Tensor, features: Tensor, product: Tensor) -> float:
    """What the fit is once these features are read out by this product, ridges and all, as the module says."""
    ridge = RIDGE * float(features.square().sum(0).mean())
    return fit.with_fixed(columns, features, product).error + ridge * float(product.square().sum())


@pytest.mark.parametrize(("hidden", "size"), [(6, 3), (2, 5), (7, 7)])
def test_a_product_of_each_rank_is_the_best_of_it(hidden: int, size: int) -> None:
    fit, columns, features = small_case(hidden, size)
    products = fit.products(columns, features)
    inputs = torch.cat([fit.inputs, features], dim=1)
    for rank in range(1, min(hidden, size)):
        product = products.product(rank)
        assert torch.linalg.matrix_rank(product) == rank
        direct = Direct(fit.inputs, fit_weight := dense_of(fit))
        direct.kept[group(0, size)] = False
        direct.factor(columns, features, rank)
        taken = Remainder.of(fit.with_fixed(columns, features, product))
        assert torch.allclose(direct.target - inputs[:, : fit.inputs.shape[1]] @ fit_weight.T, -features @ product.T)
        assert direct.error() == pytest.approx(taken.error, rel=1e-8)
        gain = fit.without(columns).error - missed_with(fit, columns, features, product)
        assert gain == pytest.approx(float(products.gains[rank - 1]), rel=1e-8)


def dense_of(fit: Fit) -> Tensor:
    """The readout that a fit started with, of inputs that determine it."""
    return solved(fit.inputs, fit.target).T


def test_no_gradient_finds_a_better_product() -> None:
    fit, columns, features = small_case(4, 3)
    products, without = fit.products(columns, features), fit.without(columns)
    beside = without.beside(features)
    for rank in (1, 2):
        best = missed_with(fit, columns, features, products.product(rank))
        reached = []
        for _ in range(3):
            outer, inner = random(4, rank).requires_grad_(), random(rank, 3).requires_grad_()
            optimiser = torch.optim.LBFGS([outer, inner], max_iter=300, line_search_fn="strong_wolfe")
            ridged = beside.gram + RIDGE * beside.squares.mean() * torch.eye(3)

            def lost(outer: Tensor = outer, inner: Tensor = inner, ridged: Tensor = ridged) -> Tensor:
                product = outer @ inner
                return without.error - (product.T * (2 * beside.missed - ridged @ product.T)).sum()

            def closure(optimiser: Any = optimiser, lost: Any = lost) -> Tensor:
                optimiser.zero_grad()
                loss = lost()
                loss.backward()
                return loss

            optimiser.step(closure)
            reached.append(float(lost().detach()))
        assert min(reached) == pytest.approx(best, rel=1e-6)
        assert best <= min(reached) + 1e-9 * abs(best)


def test_products_gain_more_with_rank_and_at_full_rank_what_columns_of_their_own_gain() -> None:
    for hidden, size in ((6, 3), (3, 6), (5, 5)):
        fit, columns, features = small_case(hidden, size)
        gains = fit.products(columns, features).gains
        beside = fit.without(columns).beside(features)
        assert len(gains) == min(hidden, size)
        assert (gains.diff() > 0).all()
        assert gains[0] > 0
        assert float(gains[-1]) == pytest.approx(beside.gain(fit.weight[:, :0]), rel=1e-9)
        own = beside.products().product(len(gains))
        assert torch.allclose(own, fit.without(columns).with_features(columns, features).weight[:, columns])


def test_what_a_product_leaves_is_priced_further_like_plain_least_squares() -> None:
    inputs, weight, first, second = random(40, 12), random(6, 12), random(40, 3), random(40, 3)
    left, direct = Remainder.of(Fit.of(inputs, weight)), Direct(inputs, weight)
    product = left.fit.products(group(1), first).product(2)
    left = left.with_fixed(group(1), first, product)
    direct.factor(group(1), first, 2)
    assert left.error == pytest.approx(direct.error(), rel=1e-9)
    before = direct.error()
    for number, arguments in ((0, ()), (2, (second,))):
        price = price_of(left, number, *arguments)
        left = left.without(group(number), *arguments)
        direct.give_up(group(number), *arguments)
        assert direct.error() - before == pytest.approx(price, rel=1e-8)
        before = direct.error()
