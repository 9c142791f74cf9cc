"""CostCurves are what a stock model whose rows were really overwritten, and a plain least-squares solve, say they are.

The solve sees the first tokens; what is compared is its error on them, or on the others, which prices are of.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as Folder

import pytest
import torch

import headshare as hs
from headshare.calibration.costs import descent as layerprices
from headshare.calibration.costs import local as pricing
from headshare.calibration.costs.actions import GATEUP, LOW_RANK, QK, QKV, QKVO, REMOVE, Action
from headshare.calibration.costs.curves import CostCurve, CostCurves, CurveStep, curves_from_json, curves_to_json
from headshare.calibration.costs.local import fitted_windows, looked_at, price_units
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
from headshare.errors import CheckpointError, OptionError, PlanError
from headshare.plan.units import HeadUnit, Part, Sublayer
from headshare.text.tokens import Calibration
from support import tiny
from support.priced import (
    CLOSE,
    KEPT,
    OWN,
    TIES,
    Reference,
    calibration,
    check_path,
    fitted,
    forms_of,
    isolated,
    opened,
    path_of,
    paths_of,
    pull_of,
)

LAST = 3


def unmixed(tokens: torch.Tensor) -> Calibration:
    """The calibration that gives these windows in this order once it is mixed."""
    numbers = Calibration(torch.arange(len(tokens))[:, None], False, "numbers", 0)
    return replace(calibration(), tokens=tokens[numbers.mixed().tokens[:, 0].argsort()])


# ---- prices of models


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_attention_prices_add_up_to_the_error_of_a_stock_model_with_those_rows(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [QK, QKV, REMOVE])
    ties, *removals = paths_of(prices, Sublayer.ATTENTION, LAST)
    assert forms_of(ties) <= {QK, QKV}
    assert [forms_of(path) for path in removals] == ([] if name in KEPT else [{REMOVE}])
    for path in (ties, *removals):
        check_path(checkpoint, prices.layouts[Sublayer.ATTENTION], path)


@pytest.mark.parametrize("name", ["llama-mha", "llama-biased", "gpt2", "mpnet"])
def test_prices_of_scaled_ties_add_up_with_columns_and_scales_solved_for_together(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(4), [QKVO, QKV], protect=[1])
    paths = paths_of(prices, Sublayer.ATTENTION, 2)
    if name in KEPT:
        (mixed,) = paths
        assert {QKVO} <= forms_of(mixed) <= set(TIES)
    else:
        assert [forms_of(path) for path in paths] == [{QKV}, {REMOVE}, {QKVO}]
    for path in paths:
        shorter = replace(path, steps=path.steps[:2])  # the reference's one system of equations grows fast
        check_path(checkpoint, prices.layouts[Sublayer.ATTENTION], shorter, windows=4)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-biased", "phi3", "gpt2", "falcon-gqa", "gemma2", "opt"])
def test_prices_of_tied_neuron_groups_add_up_to_the_error_of_a_stock_model(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [GATEUP], ffn_groups=4)
    path = path_of(prices, Sublayer.FFN, LAST)
    assert [step.action for step in path.steps] == [GATEUP] * 4
    check_path(checkpoint, prices.layouts[Sublayer.FFN], path)


@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "gpt2", "falcon-gqa", "bert", "mpnet"])
def test_neurons_cost_what_their_columns_are_worth_and_a_quarter_stays(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [REMOVE])
    path = path_of(prices, Sublayer.FFN, 0)
    assert prices.neurons is not None
    assert path.is_of_neurons
    assert sum(len(step.groups) for step in path.steps) == prices.neurons.groups * 3 // 4
    check_path(checkpoint, prices.neurons, replace(path, steps=path.steps[:12]))


@pytest.mark.parametrize("multiple", [1, 6, 16])
def test_a_layer_keeps_a_multiple_of_neurons_after_each_step(multiple: int, tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    prices = price_units(checkpoint, calibration(), [REMOVE], multiple=multiple)
    path = path_of(prices, Sublayer.FFN, 2)
    assert prices.neurons is not None
    assert [len(step.groups) for step in path.steps] == [multiple] * (36 // multiple)
    check_path(checkpoint, prices.neurons, replace(path, steps=path.steps[:3]), held_out=0.25)


def test_the_neurons_that_go_first_are_those_that_cost_least(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    prices = fitted(checkpoint, calibration(), [REMOVE])
    assert prices.neurons is not None
    reference, gone = Reference(checkpoint, prices.neurons, 2), []
    for step in path_of(prices, Sublayer.FFN, 2).steps[:3]:
        left = sorted(set(range(prices.neurons.groups)) - set(gone))
        errors = [reference.errors([replace(step, groups=(*gone, neuron))])[0] for neuron in left]
        gone.append(left[errors.index(min(errors))])
        assert step.groups == (gone[-1],)


def test_both_halves_are_priced_as_if_the_other_had_not_been_looked_at(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    both = price_units(checkpoint, calibration(), [QK, GATEUP], ffn_groups=2)
    alone = [price_units(checkpoint, calibration(), [form], ffn_groups=2) for form in (QK, GATEUP)]
    assert set(both.curves) == {path for prices in alone for path in prices.curves}


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "falcon-mha", "mpnet", "gpt2"])
def test_every_donor_is_priced_in_the_recipients_own_place(name: str, tmp_path: Folder) -> None:
    """Biases, alibi and relative positions belong to the place, so a donor does something else in each."""
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [QKV])
    layout, (first, *_) = prices.layouts[Sublayer.ATTENTION], path_of(prices, Sublayer.ATTENTION, 2).steps
    reference = Reference(checkpoint, layout, 2)
    assert len(first.donors) == 2 * layout.groups
    assert [price for _, price in first.donors] == sorted(price for _, price in first.donors)
    scale = first.donors[-1][1]
    for donor, price in first.donors:
        assert price == pytest.approx(isolated(reference, first.groups[0], donor, QKV), abs=CLOSE * scale)


def test_donors_of_q_and_k_are_priced_with_the_recipients_own_v(tmp_path: Folder) -> None:
    checkpoint = opened("llama-mha", tmp_path)
    prices = fitted(checkpoint, calibration(), [QK], donors=3)
    first = path_of(prices, Sublayer.ATTENTION, LAST).steps[0]
    reference = Reference(checkpoint, prices.layouts[Sublayer.ATTENTION], LAST)
    for donor, price in first.donors[:3]:
        assert price == pytest.approx(isolated(reference, first.groups[0], donor, QK), rel=5e-3)
    assert len(first.donors) == LAST * 4
    assert len({donor for donor, _ in first.donors}) == LAST * 4
    assert first.donors[3][1] >= first.donors[2][1]


# ---- prices on held-out tokens


@pytest.mark.parametrize(
    ("name", "forms", "share"),
    [("llama-biased", OWN, 0.25), ("llama-mha", (QK, QKV), 0.25), ("phi3", (LOW_RANK,), 0.5),
     ("bert", (LOW_RANK,), 0.25), ("gpt2", (LOW_RANK, REMOVE), 0.25),
     ("falcon-gqa", (REMOVE,), 0.5)],
)  # fmt: skip
def test_prices_add_up_to_the_error_on_tokens_that_nothing_was_fitted_to(
    name: str, forms: Sequence[Action], share: float, tmp_path: Folder
) -> None:
    checkpoint = opened(name, tmp_path)
    prices = price_units(checkpoint, calibration(), forms, held_out=share)
    paths = paths_of(prices, Sublayer.ATTENTION, LAST)
    assert {LOW_RANK, REMOVE} & set(forms) <= set().union(*map(forms_of, paths))
    for path in paths:
        assert path.steps
        check_path(checkpoint, prices.layouts[Sublayer.ATTENTION], path, held_out=share)


@pytest.mark.parametrize(("windows", "share"), [(2, 0.25), (5, 0.25), (6, 0.25), (7, 0.5)])
def test_tokens_are_held_out_by_whole_windows(windows: int, share: float, tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    prices = price_units(checkpoint, calibration(windows), [QKV, REMOVE], held_out=share)
    for path in paths_of(prices, Sublayer.ATTENTION, LAST):
        check_path(checkpoint, prices.layouts[Sublayer.ATTENTION], path, windows, share)
    (path,) = paths_of(prices, Sublayer.FFN, 1)
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
    prices = price_units(checkpoint, calibration(4), [QKVO, QKV], protect=[1])
    path = paths_of(prices, Sublayer.ATTENTION, 2)[-1]
    assert forms_of(path) == {QKVO}
    shorter = replace(path, steps=path.steps[:2])
    check_path(checkpoint, prices.layouts[Sublayer.ATTENTION], shorter, windows=4, held_out=0.25)


@pytest.mark.parametrize("name", ["llama-gqa", "mpnet"])
def test_the_feed_forward_is_priced_on_held_out_tokens_too(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    tied = price_units(checkpoint, calibration(), [GATEUP], ffn_groups=4)
    check_path(checkpoint, tied.layouts[Sublayer.FFN], path_of(tied, Sublayer.FFN, 2), held_out=0.25)
    removed = price_units(checkpoint, calibration(), [REMOVE])
    assert removed.neurons is not None
    path = path_of(removed, Sublayer.FFN, 1)
    check_path(checkpoint, removed.neurons, replace(path, steps=path.steps[:12]), held_out=0.25)


@pytest.mark.parametrize("ranks", [(1,), (4,), (1, 2, 4, 8)])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt_neox", "mpnet"])
def test_factored_units_are_priced_with_the_best_products_of_their_ranks(
    name: str, ranks: tuple[int, ...], tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later products go with those that are there; donors' prices are those of the first unit given up alone."""
    monkeypatch.setattr(layerprices, "RANKS", ranks)
    checkpoint = opened(name, tmp_path)
    prices = fitted(checkpoint, calibration(), [LOW_RANK])
    layout = prices.layouts[Sublayer.ATTENTION]
    paths = [path for path in paths_of(prices, Sublayer.ATTENTION, LAST) if forms_of(path) == {LOW_RANK}]
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
    prices = fitted(checkpoint, calibration(), [LOW_RANK, QKVO])
    channels = Reference(checkpoint, prices.layouts[Sublayer.ATTENTION], LAST).readout.rows
    (start,) = paths_of(prices, Sublayer.ATTENTION, 0)
    assert forms_of(start) == {REMOVE}
    for layer in range(1, LAST + 1):
        removal, *ties = paths_of(prices, Sublayer.ATTENTION, layer)
        assert forms_of(removal) == {REMOVE}
        assert [(forms_of(path), {step.rank for step in path.steps}) for path in ties] == [
            ({QKVO}, {0}),
            *(({LOW_RANK}, {rank}) for rank in layerprices.RANKS if rank < channels),
        ]
        order = [step.groups for step in removal.steps]
        saved = [removal.steps[0].saved_bytes]
        assert ties[0].steps[0].saved_bytes < saved[0]
        error = sum(step.price for step in removal.steps)
        for path in ties:
            assert [step.groups for step in path.steps] == order
            assert path.actions == {QKVO} or path.steps[0].saved_bytes < saved[-1]
            assert sum(step.price for step in path.steps) <= error * (1 + 1e-6)
            saved.append(path.steps[0].saved_bytes)


def test_products_that_save_nothing_are_not_offered(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    bytes_of_rank = 4 * sum(rows_and_columns(checkpoint))
    monkeypatch.setattr(Action, "saved_bytes", lambda self, sizes, rank=0: (3 - rank) * bytes_of_rank)
    paths = paths_of(fitted(checkpoint, calibration(), [LOW_RANK]), Sublayer.ATTENTION, LAST)
    assert [{step.rank for step in path.steps} for path in paths] == [{0}, {1}, {2}]


def rows_and_columns(checkpoint: Checkpoint) -> tuple[int, int]:
    """Of the columns that one unit has of W_o."""
    place = price_units(checkpoint, calibration(2), [QK]).layouts[Sublayer.ATTENTION].parts[Part.O]
    return place.rows, place.numel // place.rows


def test_donors_prices_are_of_as_many_tokens_as_the_steps(tmp_path: Folder) -> None:
    """Donors are compared on the tokens that are fitted, and their prices are as if all were such."""
    checkpoint = opened("llama-gqa", tmp_path)
    doubled = unmixed(torch.cat([calibration(4).mixed().tokens] * 2))
    half = path_of(price_units(checkpoint, doubled, [QKV], held_out=0.5), Sublayer.ATTENTION, 2).steps
    whole = path_of(fitted(checkpoint, calibration(4), [QKV]), Sublayer.ATTENTION, 2).steps
    for one, other in zip(half, whole, strict=True):
        assert [donor for donor, _ in one.donors] == [donor for donor, _ in other.donors]
        expected = [price for _, price in other.donors]
        assert [price for _, price in one.donors] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
def test_a_share_of_tokens_that_leaves_none_to_fit_is_refused(share: float, tmp_path: Folder) -> None:
    with pytest.raises(OptionError, match="share held out"):
        price_units(opened("llama-gqa", tmp_path), calibration(), [QKV], held_out=share)


# ---- forms, layers and what is asked for


def kinds_and_forms(prices: CostCurves) -> set[tuple[Sublayer, Action]]:
    return {(path.kind, step.action) for path in prices.curves for step in path.steps}


def test_neurons_are_removed_where_groups_of_them_could_also_be_tied(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    both = kinds_and_forms(price_units(checkpoint, calibration(), [GATEUP, REMOVE], ffn_groups=2))
    assert both == {(Sublayer.FFN, REMOVE), (Sublayer.ATTENTION, REMOVE)}


def test_layer_0_ties_nothing_and_keeps_a_unit_that_ties_may_need(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    tied = price_units(checkpoint, calibration(), [QKV, REMOVE])
    path = path_of(tied, Sublayer.ATTENTION, 0)
    assert forms_of(path) == {REMOVE}
    assert len(path.steps) == tied.layouts[Sublayer.ATTENTION].groups - 1
    assert (Sublayer.FFN, 0) in {(path.kind, path.layer) for path in tied.curves}
    for forms in ([QKV], [GATEUP]):
        assert {path.layer for path in price_units(checkpoint, calibration(), forms).curves} == {1, 2, 3}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mpnet", {(Sublayer.FFN, REMOVE)}),
        ("falcon-mha", {(Sublayer.FFN, REMOVE)}),
        ("falcon-mqa", {(Sublayer.FFN, REMOVE)}),
        ("mixtral", {(Sublayer.ATTENTION, REMOVE)}),
    ],
)
def test_forms_that_a_family_cannot_have_are_left_out(
    name: str, expected: set[tuple[Sublayer, Action]], tmp_path: Folder
) -> None:
    checkpoint = opened(name, tmp_path)
    assert kinds_and_forms(price_units(checkpoint, calibration(), [REMOVE])) == expected


@pytest.mark.parametrize(
    ("name", "forms", "words"),
    [("mixtral", [GATEUP], "gateup"), ("llama-gqa", [], "none"), ("qwen3-moe", [], "none")],
)
def test_a_model_that_can_have_none_of_the_forms_is_refused(
    name: str, forms: list[Action], words: str, tmp_path: Folder
) -> None:
    checkpoint = opened(name, tmp_path)
    with pytest.raises(PlanError, match=f"none of the forms asked for: {words}"):
        price_units(checkpoint, calibration(), forms)


def test_a_refusal_says_why_units_cannot_be_removed(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config, ffn = tiny.FAMILIES["mixtral"]
    one = type(config)(**{**tiny.MOE, "num_key_value_heads": 1})
    monkeypatch.setitem(tiny.FAMILIES, "mixtral", (model, one, ffn))
    with pytest.raises(PlanError, match="one attention unit each"):
        price_units(opened("mixtral", tmp_path), calibration(), [REMOVE])


def test_a_shared_checkpoint_is_not_priced(tmp_path: Folder) -> None:
    hs.share(opened("llama-gqa", tmp_path), hs.SharePlan()).save(tmp_path / "shared")
    with pytest.raises(CheckpointError, match="already shared"):
        price_units(open_checkpoint(tmp_path / "shared"), calibration(), [QKV])


def test_at_least_one_donor_is_priced(tmp_path: Folder) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        price_units(opened("llama-gqa", tmp_path), calibration(), [QKV], donors=0)


def test_protected_layers_give_nothing_up_and_lend(tmp_path: Folder) -> None:
    prices = price_units(opened("llama-gqa", tmp_path), calibration(), [QKV], protect=[1, 2])
    (path,) = prices.curves
    assert path.layer == LAST
    assert {donor.layer for step in path.steps for donor, _ in step.donors} == {0, 1, 2}


def test_only_as_many_tokens_are_looked_at_as_are_asked_for(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    some = price_units(checkpoint, calibration(8), [QKV], tokens=4 * 16 + 15)
    assert some == price_units(checkpoint, unmixed(calibration(8).mixed().tokens[:4]), [QKV])


# ---- resuming


def test_layers_that_are_done_are_walked_through_and_give_the_same_prices(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, done = opened("llama-gqa", tmp_path), {}
    whole = price_units(checkpoint, calibration(), [QKV, REMOVE], done=done)
    assert sorted(done) == [0, 1, 2, 3]
    kept = {layer: curves_from_json(curves_to_json(paths)) for layer, paths in done.items() if layer != 2}
    priced, real = [], pricing.unit_path
    monkeypatch.setattr(pricing, "unit_path", lambda *args, **kw: priced.append(args) or real(*args, **kw))
    assert price_units(checkpoint, calibration(), [QKV, REMOVE], done=kept) == whole
    assert [(half.dense.number, forms) for half, forms in priced] == [(2, (QKV,)), (2, (REMOVE,))]
    assert kept == done


def test_nothing_is_walked_where_all_is_done(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, done = opened("llama-gqa", tmp_path), {}
    whole = price_units(checkpoint, calibration(), [QKV], done=done)
    monkeypatch.setattr(pricing, "Layers", lambda *_, **__: pytest.fail("walked"))
    assert price_units(checkpoint, calibration(), [QKV], done=done) == whole


def test_what_was_done_for_another_model_is_refused(tmp_path: Folder) -> None:
    path = CostCurve(Sublayer.ATTENTION, 1, (CurveStep(QKV, (7,), 0.1, 100, ((HeadUnit(0, 1), 0.1),)),))
    with pytest.raises(PlanError, match="not of this model"):
        price_units(opened("llama-gqa", tmp_path), calibration(), [QKV], done={1: [path]})
