"""Prices are what a stock model whose rows were really overwritten, and a plain least-squares solve, say they are.

The solve sees the first tokens; what is compared is its error on them, or on the others, which prices are of.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from torch import Tensor

import headshare as hs
import tiny
from headshare.architecture.config import text_config
from headshare.architecture.recognition import attention_layout, ffn_layout
from headshare.calibration.costs import descent as layerprices
from headshare.calibration.costs import local as pricing
from headshare.calibration.costs.curves import Form, Path, Prices, Step, paths_from_json, paths_to_json
from headshare.calibration.costs.least_squares import RIDGE, Fit, Products, Remainder
from headshare.calibration.costs.local import fitted_windows, looked_at, price_units
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
from headshare.errors import CheckpointError, OptionError, PlanError
from headshare.integrations.transformers.loading import load_model
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit, Kind, Part
from headshare.text.tokens import Calibration

TIES = (Form.QK, Form.QKV, Form.QKVO)
OWN = (Form.QK, Form.QKV, Form.FACTORED, Form.REMOVE)  # those that one readout may have together
READOUT = {Kind.ATTENTION: Part.O, Kind.FFN: Part.DOWN}
LAST = 3
CLOSE = 2e-3  # of what was removed: the walk is float32, and so is the stock model


def calibration(windows: int = 8, window: int = 16) -> Calibration:
    return Calibration(tiny.tokens(window, windows), False, "a text", 0)


def unmixed(tokens: torch.Tensor) -> Calibration:
    """The calibration that gives these windows in this order once it is mixed."""
    numbers = Calibration(torch.arange(len(tokens))[:, None], False, "numbers", 0)
    return replace(calibration(), tokens=tokens[numbers.mixed().tokens[:, 0].argsort()])


def opened(name: str, tmp_path: Folder) -> Checkpoint:
    return open_checkpoint(tiny.make(name, tmp_path / name))


# ---- the reference: a stock model, and plain least squares


class Reference:
    """A stock model, whose layer's readout inputs are seen with donors' rows in place."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, layer: int, text: Calibration | None = None) -> None:
        self.model, self.tokens = load_model(checkpoint), (text or calibration()).mixed().tokens
        self.layout, self.layer = layout, layer
        self.post_norm = layout.kind is Kind.FFN and checkpoint.config["model_type"] in ("bert", "mpnet")
        self.readout = layout.parts[READOUT[layout.kind]]
        self.own = {name: value.clone() for name, value in self.model.state_dict().items()}
        module = self.module(self.readout.name(layer))
        weight = module.weight.detach().double()
        self.weight = weight.T if self.readout.axis == 0 else weight
        seen = self.seen()
        out, hidden = seen["out"], seen["hidden"]
        squares = (hidden + out if layout.kind is Kind.ATTENTION else hidden).square().sum(-1, keepdim=True)
        self.root = (squares * len(squares)).rsqrt()
        self.inputs = seen["in"] * self.root

    def module(self, weight: str) -> Any:
        return self.model.get_submodule(weight.removesuffix(".weight"))

    @torch.no_grad()
    def seen(self) -> dict[str, Tensor]:
        """What enters and leaves the readout, and the hidden state that enters the layer (leaves it, for neurons)."""
        seen: dict[str, Tensor] = {}
        layer = self.model.get_submodule(self.readout.tensor.split("{layer}")[0] + str(self.layer))

        def note_readout(_: Any, args: Any, out: Tensor) -> None:
            seen["in"], seen["out"] = flat(args[0]), flat(out)

        def note_up(_: Any, args: Any, out: Tensor) -> None:
            seen["up"] = flat(args[0])

        def note_layer(_: Any, args: Any, kwargs: Any, out: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            left = out[0] if isinstance(out, tuple) else out
            seen["hidden"] = flat(entered if self.layout.kind is Kind.ATTENTION else left)

        handles = [
            self.module(self.readout.name(self.layer)).register_forward_hook(note_readout),
            layer.register_forward_hook(note_layer, with_kwargs=True),
        ]
        if self.post_norm:
            handles.append(self.module(self.layout.parts[Part.UP].name(self.layer)).register_forward_hook(note_up))
        self.model(input_ids=self.tokens)
        if self.post_norm:
            seen["hidden"] = seen["up"] + seen["out"]  # what is added, before its norm
        for handle in handles:
            handle.remove()
        return seen

    def features(self, group: int, donor: HeadUnit, form: Form) -> Tensor:
        """The group's own inputs of the readout, once its rows are the donor's."""
        state = self.model.state_dict()
        for part in form.parts:
            if part is not Part.O and part in self.layout.parts:
                place = self.layout.parts[part]
                (first, last), (start, stop) = place.span(group), place.span(donor.group)
                from_donor = self.own[place.name(donor.layer)].transpose(0, place.axis)[start:stop]
                state[place.name(self.layer)].transpose(0, place.axis)[first:last] = from_donor
        found = self.seen()["in"] * self.root
        self.model.load_state_dict(self.own)
        return found[:, self.columns(group)]

    def columns(self, *groups: int) -> Tensor:
        return torch.cat([torch.arange(*self.readout.span(group)) for group in groups])

    def donor_columns(self, donor: HeadUnit) -> Tensor:
        weight = self.module(self.readout.name(donor.layer)).weight.detach().double()
        return (weight.T if self.readout.axis == 0 else weight)[:, self.columns(donor.group)]

    def errors(self, steps: Sequence[Step], held_out: float = 0.0) -> list[float]:
        """The error after each of these steps, on held-out tokens where there are some."""
        direct = self.direct(held_out)
        found = []
        for step in steps:
            self.give_up(direct, step)
            found.append(direct.error_held_out() if held_out else direct.error())
        return found

    def direct(self, held_out: float = 0.0) -> "Direct":
        """The readout fitted to all windows but the last ones: as many as are wholly within the share held out, or one
        if it is too small for that."""
        windows, window = self.tokens.shape
        held = max(int(held_out * windows), held_out > 0)
        return Direct(self.inputs, self.weight, (windows - held) * window)

    def give_up(self, direct: "Direct", step: Step) -> None:
        """Take the step, with its first donor."""
        columns = self.columns(*step.groups)
        features = [self.features(step.groups[0], step.donors[0][0], step.form)] if step.donors else []
        donor = [self.donor_columns(step.donors[0][0])] if step.form is Form.QKVO else []
        if step.rank:
            direct.factor(columns, *features, step.rank)
        else:
            direct.give_up(columns, *features, *donor)


def flat(value: Tensor) -> Tensor:
    return value.detach().double().flatten(0, -2).clone()


class Direct:
    """A readout's best columns and scales, all solved for at once by torch.linalg.lstsq: nothing is updated.

    They are fitted to the first tokens. A product of small rank is found when its unit is given up, and then stays.
    """

    def __init__(self, inputs: Tensor, weight: Tensor, fitted: int | None = None) -> None:
        self.all, self.weight, self.target = inputs, weight, inputs @ weight.T
        self.fitted = len(inputs) if fitted is None else fitted
        self.ridge = self.ridge_of(inputs)
        self.kept = torch.ones(inputs.shape[1], dtype=torch.bool)
        self.added: list[tuple[Tensor, float]] = []
        self.scaled: list[tuple[Tensor, Tensor]] = []

    def ridge_of(self, features: Tensor) -> float:
        return RIDGE * float(features[: self.fitted].square().sum(0).mean())

    def give_up(self, columns: Tensor, features: Tensor | None = None, donor: Tensor | None = None) -> None:
        self.kept[columns] = False
        if features is not None and donor is not None:
            self.scaled.append((features, donor))
        elif features is not None:
            self.added.append((features, self.ridge_of(features)))

    def factor(self, columns: Tensor, features: Tensor, rank: int) -> None:
        """Give these columns up for the best product of this rank: least squares of what other columns leave of target
        and features, whose fitted values are projected on their first directions (Izenman, 1975)."""
        self.kept[columns] = False
        design, size = self.design(), features.shape[1]
        padded = torch.cat([features[: self.fitted], torch.zeros(design.shape[1], size, dtype=torch.float64)])
        rows, wanted = (right - design @ solved(design, right) for right in (padded, self.start()))
        rows = torch.cat([rows, self.ridge_of(features) ** 0.5 * torch.eye(size, dtype=torch.float64)])
        wanted = torch.cat([wanted, torch.zeros(size, wanted.shape[1], dtype=torch.float64)])
        full = solved(rows, wanted)
        directions = torch.linalg.svd(rows @ full).Vh[:rank]
        self.target = self.target - features @ full @ directions.T @ directions

    def design(self) -> Tensor:
        """What is left, above the roots of its ridges."""
        left = self.left()[: self.fitted]
        ridges = [self.ridge] * int(self.kept.sum()) + [ridge for f, ridge in self.added for _ in range(f.shape[1])]
        return torch.cat([left, torch.tensor(ridges, dtype=torch.float64).sqrt().diag()])

    def left(self) -> Tensor:
        return torch.cat([self.all[:, self.kept], *(features for features, _ in self.added)], dim=1)

    def start(self) -> Tensor:
        """The target, above what columns are pulled to."""
        width = sum(features.shape[1] for features, _ in self.added)
        pulled = torch.cat([self.weight[:, self.kept].T, torch.zeros(width, len(self.weight), dtype=torch.float64)])
        return torch.cat([self.target[: self.fitted], self.roots()[:, None] * pulled])

    def roots(self) -> Tensor:
        return self.design()[self.fitted :].diagonal()

    def error(self) -> float:
        return self.ridge * float(self.weight[:, ~self.kept].square().sum()) + self.solve()[0]

    def error_held_out(self) -> float:
        """What the readout misses on the tokens that it is not fitted to, as if all were such."""
        _, columns, scales = self.solve()
        found = self.left() @ columns
        if self.scaled:
            found = found + sum_of(self.scaled, scales)
        held = (found - self.target)[self.fitted :]
        return float(held.square().sum()) * len(self.all) / len(held)

    def solve(self) -> tuple[float, Tensor, Tensor]:
        """What is missed, the columns and the scales."""
        design, wanted = self.design(), self.start()
        if not self.scaled:
            columns = solved(design, wanted)
            return float((wanted - design @ columns).square().sum()), columns, columns[:0, 0]
        features = torch.cat([features[: self.fitted] for features, _ in self.scaled], dim=1)
        donors = torch.cat([donor for _, donor in self.scaled], dim=1)
        ridge = RIDGE * float((features.square().sum(0) * donors.square().sum(0)).mean())
        return self._with_scales(design, wanted, features, donors, ridge)

    def _with_scales(
        self, design: Tensor, wanted: Tensor, features: Tensor, donors: Tensor, ridge: float
    ) -> tuple[float, Tensor, Tensor]:
        """Columns and scales are unknowns of one system, with a row for each token and output."""
        hidden, count = len(self.weight), features.shape[1]
        padded = torch.cat([features, torch.zeros(len(design) - len(features), count, dtype=torch.float64)])
        made = torch.einsum("tc,hc->htc", padded, donors).reshape(-1, count)
        whole = torch.cat([torch.block_diag(*[design] * hidden), made], dim=1)
        last = torch.zeros(count, whole.shape[1], dtype=torch.float64)
        last[:, -count:] = ridge**0.5 * torch.eye(count, dtype=torch.float64)
        whole = torch.cat([whole, last])
        right = torch.cat([wanted.T.reshape(-1), torch.zeros(count, dtype=torch.float64)])[:, None]
        found = solved(whole, right)
        missed = float((right - whole @ found).square().sum())
        return missed, found[:-count, 0].reshape(hidden, -1).T, found[-count:, 0]


def solved(system: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.lstsq(system, right, driver="gelsd").solution


def sum_of(scaled: Sequence[tuple[Tensor, Tensor]], scales: Tensor) -> Tensor:
    features, donors = (torch.cat([pair[at] for pair in scaled], dim=1) for at in (0, 1))
    return features * scales @ donors.T


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
        own = Products.of(beside).product(len(gains))
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


# ---- prices of models


def fitted(checkpoint: Checkpoint, text: Calibration, forms: Sequence[Form], **options: Any) -> Prices:
    """Prices on the tokens that are fitted to, which are all there are."""
    return price_units(checkpoint, text, forms, held_out=0.0, **options)


def check_path(checkpoint: Checkpoint, layout: Layout, path: Path, windows: int = 8, held_out: float = 0.0) -> None:
    reference = Reference(checkpoint, layout, path.layer, calibration(windows))
    errors = reference.errors(path.steps, held_out)
    scale = max(errors)
    found = torch.tensor([step.price for step in path.steps]).cumsum(0).tolist()
    assert found == pytest.approx(errors, abs=CLOSE * scale)


def paths_of(prices: Prices, kind: Kind, layer: int) -> list[Path]:
    return [path for path in prices.paths if (path.kind, path.layer) == (kind, layer)]


def path_of(prices: Prices, kind: Kind, layer: int) -> Path:
    (path,) = paths_of(prices, kind, layer)
    return path


def forms_of(path: Path) -> set[Form]:
    return {step.form for step in path.steps}


KEPT = ("mpnet", "falcon-mha", "falcon-mqa", "llama-mqa")  # families whose attention units cannot be removed


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_attention_prices_add_up_to_the_error_of_a_stock_model_with_those_rows(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [Form.QK, Form.QKV, Form.REMOVE])
    ties, *removals = paths_of(prices, Kind.ATTENTION, LAST)
    assert forms_of(ties) <= {Form.QK, Form.QKV}
    assert [forms_of(path) for path in removals] == ([] if name in KEPT else [{Form.REMOVE}])
    for path in (ties, *removals):
        check_path(checkpoint, prices.layouts[Kind.ATTENTION], path)


@pytest.mark.parametrize("name", ["llama-mha", "llama-biased", "gpt2", "mpnet"])
def test_prices_of_scaled_ties_add_up_with_columns_and_scales_solved_for_together(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(4), [Form.QKVO, Form.QKV], protect=[1])
    paths = paths_of(prices, Kind.ATTENTION, 2)
    if name in KEPT:
        (mixed,) = paths
        assert {Form.QKVO} <= forms_of(mixed) <= set(TIES)
    else:
        assert [forms_of(path) for path in paths] == [{Form.QKV}, {Form.REMOVE}, {Form.QKVO}]
    for path in paths:
        shorter = replace(path, steps=path.steps[:2])  # the reference's one system of equations grows fast
        check_path(checkpoint, prices.layouts[Kind.ATTENTION], shorter, windows=4)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-biased", "phi3", "gpt2", "falcon-gqa", "gemma2", "opt"])
def test_prices_of_tied_neuron_groups_add_up_to_the_error_of_a_stock_model(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [Form.GATEUP], ffn_groups=4)
    path = path_of(prices, Kind.FFN, LAST)
    assert [step.form for step in path.steps] == [Form.GATEUP] * 4
    check_path(checkpoint, prices.layouts[Kind.FFN], path)


@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "gpt2", "falcon-gqa", "bert", "mpnet"])
def test_neurons_cost_what_their_columns_are_worth_and_a_quarter_stays(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [Form.REMOVE])
    path = path_of(prices, Kind.FFN, 0)
    assert prices.neurons is not None
    assert path.is_of_neurons
    assert sum(len(step.groups) for step in path.steps) == prices.neurons.groups * 3 // 4
    check_path(checkpoint, prices.neurons, replace(path, steps=path.steps[:12]))


def test_the_neurons_that_go_first_are_those_that_cost_least(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    prices = fitted(checkpoint, calibration(), [Form.REMOVE])
    assert prices.neurons is not None
    reference, gone = Reference(checkpoint, prices.neurons, 2), []
    for step in path_of(prices, Kind.FFN, 2).steps[:3]:
        left = sorted(set(range(prices.neurons.groups)) - set(gone))
        errors = [reference.errors([replace(step, groups=(*gone, neuron))])[0] for neuron in left]
        gone.append(left[errors.index(min(errors))])
        assert step.groups == (gone[-1],)


def test_both_halves_are_priced_as_if_the_other_had_not_been_looked_at(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    both = price_units(checkpoint, calibration(), [Form.QK, Form.GATEUP], ffn_groups=2)
    alone = [price_units(checkpoint, calibration(), [form], ffn_groups=2) for form in (Form.QK, Form.GATEUP)]
    assert set(both.paths) == {path for prices in alone for path in prices.paths}


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "falcon-mha", "mpnet", "gpt2"])
def test_every_donor_is_priced_in_the_recipients_own_place(name: str, tmp_path: Folder) -> None:
    """Biases, alibi and relative positions belong to the place, so a donor does something else in each."""
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [Form.QKV])
    layout, (first, *_) = prices.layouts[Kind.ATTENTION], path_of(prices, Kind.ATTENTION, 2).steps
    reference = Reference(checkpoint, layout, 2)
    assert len(first.donors) == 2 * layout.groups
    assert [price for _, price in first.donors] == sorted(price for _, price in first.donors)
    scale = first.donors[-1][1]
    for donor, price in first.donors:
        assert price == pytest.approx(isolated(reference, first.groups[0], donor, Form.QKV), abs=CLOSE * scale)


def test_donors_of_q_and_k_are_priced_with_the_recipients_own_v(tmp_path: Folder) -> None:
    checkpoint = opened("llama-mha", tmp_path)
    prices = fitted(checkpoint, calibration(), [Form.QK], donors=3)
    first = path_of(prices, Kind.ATTENTION, LAST).steps[0]
    reference = Reference(checkpoint, prices.layouts[Kind.ATTENTION], LAST)
    for donor, price in first.donors[:3]:
        assert price == pytest.approx(isolated(reference, first.groups[0], donor, Form.QK), rel=5e-3)
    assert len(first.donors) == LAST * 4
    assert len({donor for donor, _ in first.donors}) == LAST * 4
    assert first.donors[3][1] >= first.donors[2][1]


def isolated(reference: Reference, group: int, donor: HeadUnit, form: Form) -> float:
    (error,) = reference.errors([Step(form, (group,), 0.0, 1, ((donor, 0.0),))])
    return error


# ---- prices on held-out tokens


@pytest.mark.parametrize(
    ("name", "forms", "share"),
    [("llama-biased", OWN, 0.25), ("llama-mha", (Form.QK, Form.QKV), 0.25), ("phi3", (Form.FACTORED,), 0.5),
     ("bert", (Form.FACTORED,), 0.25), ("gpt2", (Form.FACTORED, Form.REMOVE), 0.25),
     ("falcon-gqa", (Form.REMOVE,), 0.5)],
)  # fmt: skip
def test_prices_add_up_to_the_error_on_tokens_that_nothing_was_fitted_to(
    name: str, forms: Sequence[Form], share: float, tmp_path: Folder
) -> None:
    checkpoint = opened(name, tmp_path)
    prices = price_units(checkpoint, calibration(), forms, held_out=share)
    paths = paths_of(prices, Kind.ATTENTION, LAST)
    assert {Form.FACTORED, Form.REMOVE} & set(forms) <= set().union(*map(forms_of, paths))
    for path in paths:
        assert path.steps
        check_path(checkpoint, prices.layouts[Kind.ATTENTION], path, held_out=share)


@pytest.mark.parametrize(("windows", "share"), [(2, 0.25), (5, 0.25), (6, 0.25), (7, 0.5)])
def test_tokens_are_held_out_by_whole_windows(windows: int, share: float, tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    prices = price_units(checkpoint, calibration(windows), [Form.QKV, Form.REMOVE], held_out=share)
    for path in paths_of(prices, Kind.ATTENTION, LAST):
        check_path(checkpoint, prices.layouts[Kind.ATTENTION], path, windows, share)
    (path,) = paths_of(prices, Kind.FFN, 1)
    assert prices.neurons is not None
    check_path(checkpoint, prices.neurons, replace(path, steps=path.steps[:12]), windows, share)


@pytest.mark.parametrize(
    ("windows", "tokens", "share", "looked", "first"),
    [(8, 8 * 16, 0.25, 8, 6), (8, 999, 0.25, 8, 6), (8, 5 * 16 + 15, 0.25, 5, 4), (8, 1, 0.0, 1, 1),
     (8, 999, 0.0, 8, 8), (8, 999, 0.5, 8, 4), (7, 999, 0.5, 7, 4), (8, 999, 0.99, 8, 1), (1, 999, 0.25, 1, 1),
     (2, 999, 0.25, 2, 1), (3, 999, 0.25, 3, 2), (3, 999, 0.0, 3, 3), (8, 2 * 16, 0.01, 2, 1)],
)  # fmt: skip
def test_at_least_one_window_is_fitted_to_and_of_two_or_more_one_held_out_but_otherwise_no_more_than_the_share(
    windows: int, tokens: int, share: float, looked: int, first: int
) -> None:
    assert looked_at(calibration(windows), tokens) == looked
    assert fitted_windows(calibration(windows), tokens, share) == first


@pytest.mark.parametrize("name", ["llama-mha", "gpt2"])
def test_scaled_ties_are_priced_on_held_out_tokens_too(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    prices = price_units(checkpoint, calibration(4), [Form.QKVO, Form.QKV], protect=[1])
    path = paths_of(prices, Kind.ATTENTION, 2)[-1]
    assert forms_of(path) == {Form.QKVO}
    shorter = replace(path, steps=path.steps[:2])
    check_path(checkpoint, prices.layouts[Kind.ATTENTION], shorter, windows=4, held_out=0.25)


@pytest.mark.parametrize("name", ["llama-gqa", "mpnet"])
def test_the_feed_forward_is_priced_on_held_out_tokens_too(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    tied = price_units(checkpoint, calibration(), [Form.GATEUP], ffn_groups=4)
    check_path(checkpoint, tied.layouts[Kind.FFN], path_of(tied, Kind.FFN, 2), held_out=0.25)
    removed = price_units(checkpoint, calibration(), [Form.REMOVE])
    assert removed.neurons is not None
    path = path_of(removed, Kind.FFN, 1)
    check_path(checkpoint, removed.neurons, replace(path, steps=path.steps[:12]), held_out=0.25)


@pytest.mark.parametrize("ranks", [(1,), (4,), (1, 2, 4, 8)])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt_neox", "mpnet"])
def test_factored_units_are_priced_with_the_best_products_of_their_ranks(
    name: str, ranks: tuple[int, ...], tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later products go with those that are there; donors' prices are those of the first unit given up alone."""
    monkeypatch.setattr(layerprices, "RANKS", ranks)
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [Form.FACTORED])
    layout = prices.layouts[Kind.ATTENTION]
    paths = [path for path in paths_of(prices, Kind.ATTENTION, LAST) if forms_of(path) == {Form.FACTORED}]
    assert {step.rank for path in paths for step in path.steps} <= set(ranks)
    for path in paths:
        check_path(checkpoint, layout, path)
        reference, first = Reference(checkpoint, layout, LAST), path.steps[0]
        scale = first.donors[-1][1]
        listed = first.donors[: pricing.DONORS]
        assert len(first.donors) == len({donor for donor, _ in first.donors}) == LAST * layout.groups
        assert [price for _, price in listed] == sorted(price for _, price in listed)
        for donor, price in listed:
            direct, step = reference.direct(), replace(first, donors=((donor, 0.0),))
            reference.give_up(direct, step)
            assert price == pytest.approx(direct.error() + pull_of(direct, reference, step), abs=CLOSE * scale)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "opt"])
def test_units_with_little_left_are_those_that_would_be_removed_in_that_order_a_path_for_each_form_and_rank(
    name: str, tmp_path: Folder
) -> None:
    """And are priced with removals beside them, whether those were asked for or not."""
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [Form.FACTORED, Form.QKVO])
    channels = Reference(checkpoint, prices.layouts[Kind.ATTENTION], LAST).readout.rows
    (start,) = paths_of(prices, Kind.ATTENTION, 0)
    assert forms_of(start) == {Form.REMOVE}
    for layer in range(1, LAST + 1):
        removal, *ties = paths_of(prices, Kind.ATTENTION, layer)
        assert forms_of(removal) == {Form.REMOVE}
        assert [(forms_of(path), {step.rank for step in path.steps}) for path in ties] == [
            ({Form.QKVO}, {0}),
            *(({Form.FACTORED}, {rank}) for rank in layerprices.RANKS if rank < channels),
        ]
        order = [step.groups for step in removal.steps]
        saved = [removal.steps[0].saved_bytes]
        assert ties[0].steps[0].saved_bytes < saved[0]
        error = sum(step.price for step in removal.steps)
        for path in ties:
            assert [step.groups for step in path.steps] == order
            assert path.forms == {Form.QKVO} or path.steps[0].saved_bytes < saved[-1]
            assert sum(step.price for step in path.steps) <= error * (1 + 1e-6)
            saved.append(path.steps[0].saved_bytes)


def test_products_that_save_nothing_are_not_offered(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    bytes_of_rank = 4 * sum(rows_and_columns(checkpoint))
    monkeypatch.setattr(layerprices, "saved_bytes", lambda *what: 3 * bytes_of_rank)
    paths = paths_of(fitted(checkpoint, calibration(), [Form.FACTORED]), Kind.ATTENTION, LAST)
    assert [{step.rank for step in path.steps} for path in paths] == [{0}, {1}, {2}]


def rows_and_columns(checkpoint: Checkpoint) -> tuple[int, int]:
    """Of the columns that one unit has of W_o."""
    place = price_units(checkpoint, calibration(2), [Form.QK]).layouts[Kind.ATTENTION].parts[Part.O]
    return place.rows, place.numel // place.rows


def test_donors_prices_are_of_as_many_tokens_as_the_steps(tmp_path: Folder) -> None:
    """Donors are compared on the tokens that are fitted, and their prices are as if all were such."""
    checkpoint = opened("llama-gqa", tmp_path)
    doubled = unmixed(torch.cat([calibration(4).mixed().tokens] * 2))
    half = path_of(price_units(checkpoint, doubled, [Form.QKV], held_out=0.5), Kind.ATTENTION, 2).steps
    whole = path_of(fitted(checkpoint, calibration(4), [Form.QKV]), Kind.ATTENTION, 2).steps
    for one, other in zip(half, whole, strict=True):
        assert [donor for donor, _ in one.donors] == [donor for donor, _ in other.donors]
        expected = [price for _, price in other.donors]
        assert [price for _, price in one.donors] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
def test_a_share_of_tokens_that_leaves_none_to_fit_is_refused(share: float, tmp_path: Folder) -> None:
    with pytest.raises(OptionError, match="share held out"):
        price_units(opened("llama-gqa", tmp_path), calibration(), [Form.QKV], held_out=share)


# ---- the order of a path


@pytest.mark.parametrize("name", ["llama-mha", "gpt2", "bert"])
def test_only_the_top_of_the_queue_is_priced_again_and_the_order_is_that_of_pricing_all(
    name: str, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, priced = opened(name, tmp_path), []
    real = Remainder.price
    monkeypatch.setattr(Remainder, "price", lambda *args: priced.append(args) or real(*args))
    prices = fitted(checkpoint, calibration(), [Form.REMOVE])
    layout = prices.layouts[Kind.ATTENTION]
    for path in (path for path in prices.paths if path.kind is Kind.ATTENTION):
        reference = Reference(checkpoint, layout, path.layer)
        assert [step.groups[0] for step in path.steps] == cheapest_first(reference, layout.groups)
    everything = layout.layers * (4 + 3 + 2)
    assert layout.layers * 4 < len(priced) <= everything


def cheapest_first(reference: Reference, groups: int) -> list[int]:
    gone: list[int] = []
    while len(gone) < groups - 1:
        errors = {}
        for group in set(range(groups)) - set(gone):
            direct = Direct(reference.inputs, reference.weight)
            direct.give_up(reference.columns(*gone, group))
            errors[group] = direct.error()
        gone.append(min(errors, key=errors.__getitem__))
    return gone


@pytest.mark.parametrize("name", ["llama-gqa", "phi3"])
def test_of_all_units_and_forms_the_one_goes_first_that_is_cheapest_for_its_bytes(name: str, tmp_path: Folder) -> None:
    """Cheapest on the tokens that are fitted to, and what columns of their own lose on others: few tokens change it.
    Ties and removals have a path each, and are not compared with each other; no more are ties that follow removals."""
    checkpoint = opened(name, tmp_path)
    for text in (calibration(4, window=8), calibration()):
        prices = price_units(checkpoint, text, (*TIES, Form.REMOVE), donors=99)
        layout = prices.layouts[Kind.ATTENTION]
        for layer in (1, 2):
            reference, paths = Reference(checkpoint, layout, layer, text), paths_of(prices, Kind.ATTENTION, layer)
            assert [forms_of(path) for path in paths[1:]] == [{Form.REMOVE}, {Form.QKVO}]
            for path, forms in zip(paths, (TIES[:2], (Form.REMOVE,)), strict=False):
                offers = [best_offer(reference, checkpoint, group, form) for group in range(layout.groups)
                          for form in forms]  # fmt: skip
                check_first(path.steps[0], offers)


def check_first(first: Step, offers: list[tuple[float, float, Step]]) -> None:
    """The step is the best of these."""
    error, _, step = min(offers, key=lambda one: one[0] * one[1] / one[2].saved_bytes)
    assert (first.groups, first.form, first.rank) == (step.groups, step.form, step.rank)
    assert first.saved_bytes == step.saved_bytes
    assert [donor for donor, _ in first.donors[:1]] == [donor for donor, _ in step.donors]
    assert [price for _, price in first.donors[:1]] == pytest.approx([error / 0.75] * len(step.donors), rel=5e-3)


def best_offer(reference: Reference, checkpoint: Checkpoint, group: int, form: Form) -> tuple[float, float, Step]:
    """One unit in one form, from scratch: the error, by how much it is larger on other tokens, and the best step; of
    donors and ranks the best is the one of the least error for its bytes."""
    layout, channels = reference.layout, reference.readout.rows
    earlier = [HeadUnit(one, unit) for one in range(reference.layer) for unit in range(layout.groups)]
    offers = []
    for rank in (1, 2, 4, 8) if form is Form.FACTORED else (0,):
        for donor in [None] if form is Form.REMOVE else earlier:
            donors = () if donor is None else ((donor, 0.0),)
            step = Step(form, (group,), 0.0, saved_in(checkpoint, layout, form, rank), donors, rank)
            if rank < channels:
                offers.append((alone(reference, step), step))
    error, step = min(offers, key=lambda one: one[0] / one[1].saved_bytes)
    added = 0 if form in (Form.REMOVE, Form.QKVO) else channels
    return error, 1 + 2 * added / reference.direct(0.25).fitted, step


def alone(reference: Reference, step: Step) -> float:
    """What a step misses on the tokens it is fitted to, the ridge of a product included."""
    direct = reference.direct(0.25)
    reference.give_up(direct, step)
    if not step.rank:
        return direct.error()
    return direct.error() + pull_of(direct, reference, step)


def pull_of(direct: "Direct", reference: Reference, step: Step) -> float:
    features = reference.features(step.groups[0], step.donors[0][0], step.form)
    product = solved(features, reference.inputs @ reference.weight.T - direct.target)
    return direct.ridge_of(features) * float(product.square().sum())


def saved_in(checkpoint: Checkpoint, layout: Layout, form: Form, rank: int) -> int:
    """Bytes, counted number by number: all of a unit's rows, or those that it shares and what its product spares."""
    makers = [place for part, place in layout.parts.items() if part in (form.parts or layout.parts)]
    readout = layout.parts[Part.O]
    numbers = sum(place.numel for place in makers)
    if form is Form.REMOVE:
        biases = [(place.name(0).removesuffix("weight") + "bias", place) for place in makers if place is not readout]
        numbers += sum(place.rows for name, place in biases if name in checkpoint.tensors)
    if form is Form.QKVO:
        numbers -= readout.rows
    if rank:
        numbers += readout.numel - rank * (readout.rows + readout.numel // readout.rows)
    return 4 * numbers


def test_a_unit_given_up_once_is_not_given_up_in_another_form_and_one_is_never_removed(tmp_path: Folder) -> None:
    checkpoint = opened("llama-mha", tmp_path)
    prices = price_units(checkpoint, calibration(), [*OWN, Form.GATEUP])
    attention = [path for path in prices.paths if path.kind is Kind.ATTENTION]
    lengths = {
        form: [(path.layer, len(path.steps)) for path in attention if form in forms_of(path)]
        for form in (Form.QKV, Form.REMOVE, Form.FACTORED)
    }
    ranks = sum(
        rank < Reference(checkpoint, prices.layouts[Kind.ATTENTION], 1).readout.rows for rank in layerprices.RANKS
    )
    assert lengths[Form.QKV] == [(layer, 4) for layer in (1, 2, 3)]
    assert lengths[Form.REMOVE] == [(layer, 3) for layer in range(4)]
    assert lengths[Form.FACTORED] == [(layer, 3) for layer in (1, 2, 3) for _ in range(ranks)]
    for path in attention:
        assert len({step.groups for step in path.steps}) == len(path.steps)
        assert len(forms_of(path)) == 1 or forms_of(path) <= {Form.QK, Form.QKV}
    removed = price_units(checkpoint, calibration(), [Form.REMOVE]).paths
    assert [(path.layer, len(path.steps)) for path in removed if path.kind is Kind.ATTENTION] == [
        (layer, 3) for layer in range(4)
    ]


@pytest.mark.parametrize("name", ["llama-mha", "gpt2", "mpnet"])
def test_ties_and_removals_are_priced_as_if_the_others_had_not_been_asked_for(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    every = (Form.QK, Form.QKVO, Form.FACTORED, Form.REMOVE)
    together = price_units(checkpoint, calibration(), every)
    alone = every[:1] if name not in KEPT else every[:2]
    ties, removals, beside = (
        price_units(checkpoint, calibration(), forms) for forms in (alone, (Form.REMOVE,), every[len(alone) :])
    )
    for layer in range(4):
        assert paths_of(together, Kind.FFN, layer) == paths_of(removals, Kind.FFN, layer) != []
        apart = paths_of(ties, Kind.ATTENTION, layer) + paths_of(beside, Kind.ATTENTION, layer)
        assert paths_of(together, Kind.ATTENTION, layer) == apart
        removed = [path for path in apart if forms_of(path) == {Form.REMOVE}]
        assert removed == paths_of(removals, Kind.ATTENTION, layer)
        assert len(removed) == (name not in KEPT)


# ---- forms, layers and what is asked for


def kinds_and_forms(prices: Prices) -> set[tuple[Kind, Form]]:
    return {(path.kind, step.form) for path in prices.paths for step in path.steps}


def test_neurons_are_removed_where_groups_of_them_could_also_be_tied(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    both = kinds_and_forms(price_units(checkpoint, calibration(), [Form.GATEUP, Form.REMOVE], ffn_groups=2))
    assert both == {(Kind.FFN, Form.REMOVE), (Kind.ATTENTION, Form.REMOVE)}


def test_layer_0_ties_nothing_and_keeps_a_unit_that_ties_may_need(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    tied = price_units(checkpoint, calibration(), [Form.QKV, Form.REMOVE])
    path = path_of(tied, Kind.ATTENTION, 0)
    assert forms_of(path) == {Form.REMOVE}
    assert len(path.steps) == tied.layouts[Kind.ATTENTION].groups - 1
    assert (Kind.FFN, 0) in {(path.kind, path.layer) for path in tied.paths}
    for forms in ([Form.QKV], [Form.GATEUP]):
        assert {path.layer for path in price_units(checkpoint, calibration(), forms).paths} == {1, 2, 3}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mpnet", {(Kind.FFN, Form.REMOVE)}),
        ("falcon-mha", {(Kind.FFN, Form.REMOVE)}),
        ("falcon-mqa", {(Kind.FFN, Form.REMOVE)}),
        ("mixtral", {(Kind.ATTENTION, Form.REMOVE)}),
    ],
)
def test_forms_that_a_family_cannot_have_are_left_out(
    name: str, expected: set[tuple[Kind, Form]], tmp_path: Folder
) -> None:
    checkpoint = opened(name, tmp_path)
    assert kinds_and_forms(price_units(checkpoint, calibration(), [Form.REMOVE])) == expected


@pytest.mark.parametrize(
    ("name", "forms", "words"),
    [("mixtral", [Form.GATEUP], "gateup"), ("llama-gqa", [], "none"), ("qwen3-moe", [], "none")],
)
def test_a_model_that_can_have_none_of_the_forms_is_refused(
    name: str, forms: list[Form], words: str, tmp_path: Folder
) -> None:
    checkpoint = opened(name, tmp_path)
    with pytest.raises(PlanError, match=f"none of the forms asked for: {words}"):
        price_units(checkpoint, calibration(), forms)


def test_a_refusal_says_why_units_cannot_be_removed(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, ffn = tiny.FAMILIES["mixtral"]
    one = type(config)(**{**tiny.MOE, "num_key_value_heads": 1})
    monkeypatch.setitem(tiny.FAMILIES, "mixtral", (model, one, ffn))
    with pytest.raises(PlanError, match="one attention unit each"):
        price_units(opened("mixtral", tmp_path), calibration(), [Form.REMOVE])


def test_a_shared_checkpoint_is_not_priced(tmp_path: Folder) -> None:
    hs.share(opened("llama-gqa", tmp_path), hs.SharePlan()).save(tmp_path / "shared")
    with pytest.raises(CheckpointError, match="already shared"):
        price_units(open_checkpoint(tmp_path / "shared"), calibration(), [Form.QKV])


def test_at_least_one_donor_is_priced(tmp_path: Folder) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        price_units(opened("llama-gqa", tmp_path), calibration(), [Form.QKV], donors=0)


def test_protected_layers_give_nothing_up_and_lend(tmp_path: Folder) -> None:
    prices = price_units(opened("llama-gqa", tmp_path), calibration(), [Form.QKV], protect=[1, 2])
    (path,) = prices.paths
    assert path.layer == LAST
    assert {donor.layer for step in path.steps for donor, _ in step.donors} == {0, 1, 2}


def test_only_as_many_tokens_are_looked_at_as_are_asked_for(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    some = price_units(checkpoint, calibration(8), [Form.QKV], tokens=4 * 16 + 15)
    assert some == price_units(checkpoint, unmixed(calibration(8).mixed().tokens[:4]), [Form.QKV])


# ---- resuming, and JSON


def test_layers_that_are_done_are_walked_through_and_give_the_same_prices(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, done = opened("llama-gqa", tmp_path), {}
    whole = price_units(checkpoint, calibration(), [Form.QKV, Form.REMOVE], done=done)
    assert sorted(done) == [0, 1, 2, 3]
    kept = {layer: paths_from_json(paths_to_json(paths)) for layer, paths in done.items() if layer != 2}
    priced, real = [], pricing.unit_path
    monkeypatch.setattr(pricing, "unit_path", lambda *args, **kw: priced.append(args) or real(*args, **kw))
    assert price_units(checkpoint, calibration(), [Form.QKV, Form.REMOVE], done=kept) == whole
    assert [(half.dense.number, forms) for half, forms in priced] == [(2, (Form.QKV,)), (2, (Form.REMOVE,))]
    assert kept == done


def test_nothing_is_walked_where_all_is_done(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, done = opened("llama-gqa", tmp_path), {}
    whole = price_units(checkpoint, calibration(), [Form.QKV], done=done)
    monkeypatch.setattr(pricing, "Layers", lambda *_, **__: pytest.fail("walked"))
    assert price_units(checkpoint, calibration(), [Form.QKV], done=done) == whole


def test_what_was_done_for_another_model_is_refused(tmp_path: Folder) -> None:
    path = Path(Kind.ATTENTION, 1, (Step(Form.QKV, (7,), 0.1, 100, ((HeadUnit(0, 1), 0.1),)),))
    with pytest.raises(PlanError, match="not of this model"):
        price_units(opened("llama-gqa", tmp_path), calibration(), [Form.QKV], done={1: [path]})


TIE = Step(Form.QKV, (1,), 0.1, 100, ((HeadUnit(0, 1), 0.1), (HeadUnit(0, 0), 1 / 3)))
GONE = Step(Form.REMOVE, (0,), -1e-300, 100)


def test_paths_come_back_from_json_to_the_last_bit() -> None:
    factored = replace(TIE, form=Form.FACTORED, groups=(2,), rank=8)
    paths = [Path(Kind.ATTENTION, 1, (TIE, GONE, factored)), Path(Kind.FFN, 1, (replace(GONE, groups=(4, 7)),))]
    assert paths_from_json(paths_to_json(paths)) == paths
    assert paths_from_json(paths_to_json([])) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{", "", "Invalid JSON"),
        ('"qkv"', '"qqq"', "0.steps.0.form"),
        ('"steps"', '"stops"', "0.steps: Field required"),
        ('"layer":1', '"layer":"1"', "0.layer"),
        ("0.1", "null", "0.steps.0.price"),
        ("[0,1]", "[0,1,2]", "donors.0.0"),
        ("[0,1]", "[1,1]", "no earlier layer"),
        ("[1]", "[1,1]", "several different ones"),
        ("[1]", "[0]", "gives a unit up twice"),
        ("[1]", "[-1]", "several different ones"),
        ('"saved_bytes":100', '"saved_bytes":0', "saves bytes"),
        ('"price":0.1', '"price":1e999', "finite"),
        ('"kind":"attention"', '"kind":"ffn"', "other half"),
        ('"layer":1', '"layer":-1', "no layer -1"),
        ('"form":"qkv"', '"form":"remove"', "no donors"),
        ('"form":"remove"', '"form":"qk"', "at least one donor"),
        ('"form":"qkv"', '"form":"factored"', "has a rank if it is factored"),
        ('"rank":0', '"rank":1', "has a rank if it is factored"),
        ('"rank":0', '"rank":-1', "has a rank if it is factored"),
        ('"rank":0', '"rank":"1"', "0.steps.0.rank"),
    ],
)
def test_json_that_is_not_of_paths_is_refused(old: str, new: str, words: str) -> None:
    text = paths_to_json([Path(Kind.ATTENTION, 1, (TIE, GONE))])
    assert old in text
    with pytest.raises(PlanError, match=words):
        paths_from_json(text.replace(old, new, 1))


def test_prices_that_contradict_their_layouts_cannot_be_made(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    config = text_config(checkpoint.config)
    attention, groups = attention_layout(config, checkpoint.shapes), ffn_layout(config, checkpoint.shapes, 2)
    layouts = {Kind.ATTENTION: attention, Kind.FFN: groups}
    neurons = ffn_layout(config, checkpoint.shapes, 48)
    donors = ((HeadUnit(0, 0), 0.1),)

    def make(*paths: Path, neurons: Layout | None = neurons) -> Prices:
        return Prices("llama", layouts, paths, neurons)

    tied = Path(Kind.FFN, 1, (Step(Form.GATEUP, (1,), 0.1, 9, donors),))
    removed = Path(Kind.FFN, 2, (replace(GONE, groups=(40,)),))
    assert make(tied).layout_of(tied) == groups
    assert make(removed).layout_of(removed) == neurons
    several = (tied, replace(tied, steps=(replace(tied.steps[0], groups=(0,)),)))
    assert make(*several).paths == several
    for wrong, words in [
        ((tied, removed), "one or the other"),
        ((tied, replace(removed, layer=1)), "one or the other"),
        ((Path(Kind.ATTENTION, 1, (TIE,)), Path(Kind.ATTENTION, 1, (replace(TIE, groups=(7,)),))), "not of this model"),
        ((Path(Kind.ATTENTION, 4, (TIE,)),), "not of this model"),
        ((Path(Kind.ATTENTION, 1, (replace(GONE, groups=(0, 1)),)),), "keep one"),
    ]:
        with pytest.raises(PlanError, match=words):
            make(*wrong)
    with pytest.raises(PlanError, match="have no layout"):
        make(removed, neurons=None)
    with pytest.raises(PlanError, match="both removes neurons and ties"):
        Path(Kind.FFN, 1, (*tied.steps, *removed.steps))
