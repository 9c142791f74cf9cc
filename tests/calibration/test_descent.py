"""A path gives up first, of all units and forms, what is cheapest for its bytes."""

from pathlib import Path as Folder

import pytest

from headshare.calibration.costs import descent as layerprices
from headshare.calibration.costs.actions import GATEUP, LOW_RANK, QK, QKV, QKVO, REMOVE, Action
from headshare.calibration.costs.curves import CurveStep
from headshare.calibration.costs.least_squares import Remainder
from headshare.calibration.costs.local import price_units
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit, Part, Sublayer
from support.least_squares import Direct
from support.priced import KEPT, OWN, TIES, Reference, calibration, fitted, forms_of, opened, paths_of, pull_of


@pytest.mark.parametrize("name", ["llama-mha", "gpt2", "bert"])
def test_only_the_top_of_the_queue_is_priced_again_and_the_order_is_that_of_pricing_all(
    name: str, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, priced = opened(name, tmp_path), []
    real = Remainder.price
    monkeypatch.setattr(Remainder, "price", lambda *args: priced.append(args) or real(*args))
    prices = fitted(checkpoint, calibration(), [REMOVE])
    layout = prices.layouts[Sublayer.ATTENTION]
    for path in (path for path in prices.curves if path.kind is Sublayer.ATTENTION):
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
        prices = price_units(checkpoint, text, (*TIES, REMOVE), donors=99)
        layout = prices.layouts[Sublayer.ATTENTION]
        for layer in (1, 2):
            reference, paths = Reference(checkpoint, layout, layer, text), paths_of(prices, Sublayer.ATTENTION, layer)
            assert [forms_of(path) for path in paths[1:]] == [{REMOVE}, {QKVO}]
            for path, forms in zip(paths, (TIES[:2], (REMOVE,)), strict=False):
                offers = [best_offer(reference, checkpoint, group, form) for group in range(layout.groups)
                          for form in forms]  # fmt: skip
                check_first(path.steps[0], offers)


def check_first(first: CurveStep, offers: list[tuple[float, float, CurveStep]]) -> None:
    """The step is the best of these."""
    error, _, step = min(offers, key=lambda one: one[0] * one[1] / one[2].saved_bytes)
    assert (first.groups, first.action, first.rank) == (step.groups, step.action, step.rank)
    assert first.saved_bytes == step.saved_bytes
    assert [donor for donor, _ in first.donors[:1]] == [donor for donor, _ in step.donors]
    assert [price for _, price in first.donors[:1]] == pytest.approx([error / 0.75] * len(step.donors), rel=5e-3)


def best_offer(
    reference: Reference, checkpoint: Checkpoint, group: int, form: Action
) -> tuple[float, float, CurveStep]:
    """One unit in one form, from scratch: the error, by how much it is larger on other tokens, and the best step; of
    donors and ranks the best is the one of the least error for its bytes."""
    layout, channels = reference.layout, reference.readout.rows
    earlier = [HeadUnit(one, unit) for one in range(reference.layer) for unit in range(layout.groups)]
    offers = []
    for rank in (1, 2, 4, 8) if form is LOW_RANK else (0,):
        for donor in [None] if form is REMOVE else earlier:
            donors = () if donor is None else ((donor, 0.0),)
            step = CurveStep(form, (group,), 0.0, saved_in(checkpoint, layout, form, rank), donors, rank)
            if rank < channels:
                offers.append((alone(reference, step), step))
    error, step = min(offers, key=lambda one: one[0] / one[1].saved_bytes)
    added = 0 if form in (REMOVE, QKVO) else channels
    return error, 1 + 2 * added / reference.direct(0.25).fitted, step


def alone(reference: Reference, step: CurveStep) -> float:
    """What a step misses on the tokens it is fitted to, the ridge of a product included."""
    direct = reference.direct(0.25)
    reference.give_up(direct, step)
    if not step.rank:
        return direct.error()
    return direct.error() + pull_of(direct, reference, step)


def saved_in(checkpoint: Checkpoint, layout: Layout, form: Action, rank: int) -> int:
    """Bytes, counted number by number: all of a unit's rows, or those that it shares and what its product spares."""
    makers = [place for part, place in layout.parts.items() if part in (form.shares or layout.parts)]
    readout = layout.parts[Part.O]
    numbers = sum(place.numel for place in makers)
    if form is REMOVE:
        biases = [(place.name(0).removesuffix("weight") + "bias", place) for place in makers if place is not readout]
        numbers += sum(place.rows for name, place in biases if name in checkpoint.tensors)
    if form is QKVO:
        numbers -= readout.rows
    if rank:
        numbers += readout.numel - rank * (readout.rows + readout.numel // readout.rows)
    return 4 * numbers


def test_a_unit_given_up_once_is_not_given_up_in_another_form_and_one_is_never_removed(tmp_path: Folder) -> None:
    checkpoint = opened("llama-mha", tmp_path)
    prices = price_units(checkpoint, calibration(), [*OWN, GATEUP])
    attention = [path for path in prices.curves if path.kind is Sublayer.ATTENTION]
    lengths = {
        form: [(path.layer, len(path.steps)) for path in attention if form in forms_of(path)]
        for form in (QKV, REMOVE, LOW_RANK)
    }
    ranks = sum(
        rank < Reference(checkpoint, prices.layouts[Sublayer.ATTENTION], 1).readout.rows for rank in layerprices.RANKS
    )
    assert lengths[QKV] == [(layer, 4) for layer in (1, 2, 3)]
    assert lengths[REMOVE] == [(layer, 3) for layer in range(4)]
    assert lengths[LOW_RANK] == [(layer, 3) for layer in (1, 2, 3) for _ in range(ranks)]
    for path in attention:
        assert len({step.groups for step in path.steps}) == len(path.steps)
        assert len(forms_of(path)) == 1 or forms_of(path) <= {QK, QKV}
    removed = price_units(checkpoint, calibration(), [REMOVE]).curves
    assert [(path.layer, len(path.steps)) for path in removed if path.kind is Sublayer.ATTENTION] == [
        (layer, 3) for layer in range(4)
    ]


@pytest.mark.parametrize("name", ["llama-mha", "gpt2", "mpnet"])
def test_ties_and_removals_are_priced_as_if_the_others_had_not_been_asked_for(name: str, tmp_path: Folder) -> None:
    checkpoint = opened(name, tmp_path)
    every = (QK, QKVO, LOW_RANK, REMOVE)
    together = price_units(checkpoint, calibration(), every)
    alone = every[:1] if name not in KEPT else every[:2]
    ties, removals, beside = (
        price_units(checkpoint, calibration(), forms) for forms in (alone, (REMOVE,), every[len(alone) :])
    )
    for layer in range(4):
        assert paths_of(together, Sublayer.FFN, layer) == paths_of(removals, Sublayer.FFN, layer) != []
        apart = paths_of(ties, Sublayer.ATTENTION, layer) + paths_of(beside, Sublayer.ATTENTION, layer)
        assert paths_of(together, Sublayer.ATTENTION, layer) == apart
        removed = [path for path in apart if forms_of(path) == {REMOVE}]
        assert removed == paths_of(removals, Sublayer.ATTENTION, layer)
        assert len(removed) == (name not in KEPT)
