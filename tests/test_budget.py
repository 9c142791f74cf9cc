"""What is chosen keeps to its budget, costs no more than it must, and is a plan that shares what it says it saves."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path as Folder
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from headshare.accounting import estimate_plan
from headshare.budget import Budgeted, plan_for_bytes, plan_for_units
from headshare.calibration import Calibration
from headshare.checkpoints import open_checkpoint
from headshare.errors import PlanError
from headshare.layout import Layout, Place
from headshare.paths import Form, Path, Prices, Step
from headshare.plans import Choice, SharePlan
from headshare.pricing import price_units
from headshare.units import HeadUnit, Kind, Part

LAYERS, GROUPS, NEURONS = 4, 3, 12
TIES = (Form.QK, Form.QKV, Form.QKVO)
FEW = settings(max_examples=40, deadline=None)


def layout_of(kind: Kind, groups: int, rows: int) -> Layout:
    *features, readout = (Part.Q, Part.K, Part.V, Part.O) if kind is Kind.ATTENTION else (Part.GATE, Part.UP, Part.DOWN)
    size = groups * rows
    places = {
        part: Place(tensor=f"l.{{layer}}.{part}.weight", axis=0, shape=(size, 8), start=0, step=rows, rows=rows)
        for part in features
    }
    down = Place(tensor=f"l.{{layer}}.{readout}.weight", axis=1, shape=(8, size), start=0, step=rows, rows=rows)
    return Layout(kind=kind, layers=LAYERS, groups=groups, parts={**places, readout: down})


LAYOUTS = {Kind.ATTENTION: layout_of(Kind.ATTENTION, GROUPS, 4), Kind.FFN: layout_of(Kind.FFN, GROUPS, 4)}
SINGLE = layout_of(Kind.FFN, NEURONS, 1)
SIZES = {Form.QK: 64, Form.QKV: 96, Form.QKVO: 124, Form.FACTORED: 116, Form.GATEUP: 64, Form.REMOVE: 128}


# ---- made-up prices

Steps = list[
    tuple[Any, ...]
]  # what a Step is made of: strategies make no values that beartype checks, as it draws lots


@st.composite
def priced(draw: st.DrawFn, *, neurons: bool = True) -> list[tuple[Kind, int, Steps]]:
    """Paths of any forms and prices, dear steps before cheap ones too; layer 0 keeps its attention. Units are factored
    or tied in all parts, not both."""
    of_neurons = neurons and draw(st.booleans())
    attention = (Form.QK, Form.QKV, draw(st.sampled_from((Form.QKVO, Form.FACTORED))), Form.REMOVE)
    paths: list[tuple[Kind, int, Steps]] = []
    for layer in range(LAYERS):
        if layer:
            paths.append((Kind.ATTENTION, layer, draw(units(layer, attention))))
        if of_neurons:
            paths.append((Kind.FFN, layer, draw(chunks())))
        elif layer:
            paths.append((Kind.FFN, layer, draw(units(layer, (Form.GATEUP,)))))
    return paths


PRICE = st.one_of(st.integers(-2, 20).map(float), st.floats(0, 5))
SHARE = st.floats(0, 1)


@st.composite
def units(draw: st.DrawFn, layer: int, forms: Sequence[Form]) -> Steps:
    steps: Steps = []
    for group in draw(st.permutations(range(GROUPS)))[: draw(st.integers(0, GROUPS))]:
        form = draw(st.sampled_from(forms))
        if [one[0] for one in steps].count(Form.REMOVE) == GROUPS - 1:
            form = forms[0]
        donors = () if form is Form.REMOVE else draw(donors_of(layer))
        rank = draw(st.integers(1, 3)) if form is Form.FACTORED else 0
        price = donors[0][1] if donors else draw(PRICE)
        steps.append((form, (group,), price, SIZES[form] - 5 * rank, donors, rank))
    return steps


@st.composite
def donors_of(draw: st.DrawFn, layer: int) -> tuple[tuple[HeadUnit, float], ...]:
    """Some units of earlier layers, best first; perhaps not all."""
    earlier = [HeadUnit(one, group) for one in range(layer) for group in range(GROUPS)]
    chosen = draw(st.permutations(earlier))[: draw(st.integers(1, len(earlier)))]
    return tuple(zip(chosen, sorted(draw(PRICE) for _ in chosen), strict=True))


@st.composite
def chunks(draw: st.DrawFn) -> Steps:
    order = draw(st.permutations(range(NEURONS)))
    ends = range(0, draw(st.integers(0, 9)), 3)
    return [(Form.REMOVE, tuple(order[at : at + 3]), draw(PRICE), 72) for at in ends]


def made(paths: list[tuple[Kind, int, Steps]], *, most: int | None = None) -> Prices:
    """Prices of these paths, or of the first few."""
    found = [Path(kind, layer, tuple(Step(*one) for one in steps)) for kind, layer, steps in paths[:most]]
    return Prices("llama", LAYOUTS, tuple(found), SINGLE)


def choices(prices: Prices) -> Iterator[list[Step]]:
    """The steps of every choice there is: so many along each path."""
    for ends in product(*(range(len(path.steps) + 1) for path in prices.paths)):
        yield [step for path, end in zip(prices.paths, ends, strict=True) for step in path.steps[:end]]


def price_of(steps: Sequence[Step]) -> float:
    return sum(step.price for step in steps)


def saved_by(steps: Sequence[Step]) -> int:
    return sum(step.saved_bytes for step in steps)


def units_of(path: Path) -> int:
    return 0 if path.is_of_neurons else len(path.steps)


# ---- what is chosen


@given(drawn=priced(neurons=False), share=SHARE)
@FEW
def test_exactly_as_many_units_are_given_up_as_asked_at_the_least_price_there_is(drawn: Any, share: float) -> None:
    few = made(drawn, most=4)
    units = round(share * sum(map(units_of, few.paths)))
    found = plan_for_units(few, units)
    assert found.plan.ties + found.plan.removed(Kind.ATTENTION) >= units  # parts with other ties count again
    assert len(given_up(found.plan)) == units
    best = min(price_of(steps) for steps in choices(few) if len(steps) == units)
    assert found.price >= best - 1e-9
    assert price_of(taken_by(few, found)) == pytest.approx(best)


@given(drawn=priced(), share=SHARE)
@FEW
def test_single_neurons_are_no_units(drawn: Any, share: float) -> None:
    prices = made(drawn)
    units = round(share * sum(map(units_of, prices.paths)))
    found = plan_for_units(prices, units)
    assert len(given_up(found.plan)) == units
    assert found.plan.removed(Kind.FFN) == 0


@given(drawn=priced(), share=SHARE)
@FEW
def test_enough_bytes_are_saved_no_step_is_idle_and_no_cheaper_than_the_best_nor_dearer_than_plain_greed(
    drawn: Any, share: float
) -> None:
    few = made(drawn, most=4)
    wanted = round(share * saved_by([step for path in few.paths for step in path.steps]))
    found = plan_for_bytes(few, wanted)
    steps = taken_by(few, found)
    best = min(price_of(steps) for steps in choices(few) if saved_by(steps) >= wanted)
    assert found.saved_bytes == saved_by(steps) >= wanted
    assert best - 1e-9 <= price_of(steps) <= plain_greed(few, wanted) + 1e-9
    for path in few.paths:
        mine = [step for step in steps if step in path.steps]
        for end in range(len(mine)):
            idle = mine[end:]
            assert found.saved_bytes - saved_by(idle) < wanted or price_of(idle) <= 1e-9


def plain_greed(prices: Prices, wanted: int) -> float:
    """Extend one path by one step or several, whichever is the cheapest for what it saves, until it is enough."""
    taken, total, price = [0] * len(prices.paths), 0, 0.0
    while total < wanted:
        _, number, end = min(
            (price_of(path.steps[at:end]) / min(saved_by(path.steps[at:end]), wanted - total), number, end)
            for number, (path, at) in enumerate(zip(prices.paths, taken, strict=True))
            for end in range(at + 1, len(path.steps) + 1)
        )
        more = prices.paths[number].steps[taken[number] : end]
        total, price, taken[number] = total + saved_by(more), price + price_of(more), end
    return price


def test_the_last_fill_is_the_cheapest_that_completes() -> None:
    """Plain greed goes on along the first path, and then needs the dear end of it."""
    cheap = Path(Kind.ATTENTION, 1, (gone(0, 1.0, 100), gone(1, 9.0, 100)))
    other = Path(Kind.ATTENTION, 2, (gone(0, 3.0, 150),))
    prices = Prices("llama", LAYOUTS, (cheap, other))
    assert plain_greed(prices, 150) == 4
    found = plan_for_bytes(prices, 150)
    assert (found.price, found.saved_bytes) == (3, 150)


def test_steps_that_turn_out_not_to_be_needed_are_not_taken() -> None:
    steps = [gone(0, 0.1, 10), gone(0, 1.5, 100), gone(0, 1.6, 100)]
    paths = tuple(Path(Kind.ATTENTION, layer, (step,)) for layer, step in enumerate(steps, 1))
    assert plain_greed(Prices("llama", LAYOUTS, paths), 200) == pytest.approx(3.2)
    assert plan_for_bytes(Prices("llama", LAYOUTS, paths), 200).price == pytest.approx(3.1)


def test_a_dear_step_does_not_hide_cheap_ones_behind_it() -> None:
    hidden = Path(Kind.ATTENTION, 1, (gone(0, 5.0, 100), gone(1, 0.0, 900)))
    other = Path(Kind.ATTENTION, 2, (gone(0, 1.0, 100), gone(1, 20.0, 900)))
    assert plan_for_bytes(Prices("llama", LAYOUTS, (hidden, other)), 1000).price == 5
    assert plan_for_units(Prices("llama", LAYOUTS, (hidden, other)), 2).price == 5
    again = Path(Kind.ATTENTION, 3, hidden.steps)
    assert plan_for_bytes(Prices("llama", LAYOUTS, (hidden, other, again)), 2000).price == 10


def gone(group: int, price: float, saved: int) -> Step:
    return Step(Form.REMOVE, (group,), price, saved)


def taken_by(prices: Prices, found: Budgeted) -> list[Step]:
    """The steps that are in the plan."""
    given, neurons = given_up(found.plan), removed(found.plan, Kind.FFN)
    return [
        step
        for path in prices.paths
        for step in path.steps
        for units in [[HeadUnit(path.layer, group) for group in step.groups]]
        if (set(units) <= neurons if path.is_of_neurons else (path.kind, units[0]) in given)
    ]


def given_up(plan: SharePlan) -> set[tuple[Kind, HeadUnit]]:
    """All units that are tied or removed; no single neurons."""
    tied = {(one.layout.kind, tie.recipient) for one in plan.selections for tie in one.ties}
    return tied | {(Kind.ATTENTION, unit) for unit in removed(plan, Kind.ATTENTION)}


def removed(plan: SharePlan, kind: Kind) -> set[HeadUnit]:
    found = [one for one in plan.removals if one.layout.kind is kind]
    return {HeadUnit(layer, group) for one in found for layer in one.removed for group in one.indices(layer)}


# ---- donors


@given(drawn=priced(), share=SHARE)
@FEW
def test_donors_keep_what_they_lend_and_are_the_best_that_do(drawn: Any, share: float) -> None:
    prices = made(drawn)
    found = plan_for_bytes(prices, round(share * saved_by([step for path in prices.paths for step in path.steps])))
    given = given_up(found.plan)
    steps = {(path.kind, path.layer, step.groups[0]): step for path in prices.paths for step in path.steps}
    dearer = 0.0
    donors: dict[tuple[Kind, HeadUnit], set[HeadUnit]] = {}
    for one in found.plan.selections:
        for recipient, donor in one.ties:
            assert (one.layout.kind, donor) not in given
            assert donor.layer < recipient.layer
            donors.setdefault((one.layout.kind, recipient), set()).add(donor)
    for (kind, recipient), (donor, *more) in donors.items():
        assert not more
        listed = steps[kind, *recipient].donors
        kept = [price for unit, price in listed if (kind, unit) not in given]
        mine = next((price for unit, price in listed if unit == donor), listed[-1][1])
        assert mine == min(kept, default=listed[-1][1])
        dearer += mine - listed[0][1]
    assert found.price == pytest.approx(price_of(taken_by(prices, found)) + dearer, abs=1e-9)


@given(drawn=priced())
@FEW
def test_layer_0_lends_when_all_other_units_are_given_up(drawn: Any) -> None:
    prices = made(drawn)
    found = plan_for_units(prices, sum(map(units_of, prices.paths)))
    assert not any(unit.layer == 0 for _, unit in given_up(found.plan))
    assert SharePlan.from_json(found.plan.to_json()) == found.plan


@given(drawn=priced(), share=SHARE)
@FEW
def test_parts_and_scales_are_those_of_each_units_form(drawn: Any, share: float) -> None:
    prices = made(drawn)
    found = plan_for_bytes(prices, round(share * saved_by([step for path in prices.paths for step in path.steps])))
    forms = {
        (path.kind, HeadUnit(path.layer, step.groups[0])): step.form
        for path in prices.paths
        for step in path.steps
        if step.form is not Form.REMOVE
    }
    shared: dict[tuple[Kind, HeadUnit], set[Part]] = {}
    for one in found.plan.selections:
        assert one.scale == (Part.O in one.parts)
        for tie in one.ties:
            shared.setdefault((one.layout.kind, tie.recipient), set()).update(one.parts)
    assert all(set(forms[unit].parts) == parts for unit, parts in shared.items())


@given(drawn=priced(), share=SHARE)
@FEW
def test_factored_units_have_the_ranks_of_their_steps_and_share_q_k_and_v(drawn: Any, share: float) -> None:
    prices = made(drawn)
    found = plan_for_bytes(prices, round(share * saved_by([step for path in prices.paths for step in path.steps])))
    steps = taken_by(prices, found)
    expected = {
        (path.layer, step.groups[0]): step.rank for path in prices.paths for step in path.steps
        if step.rank and step in steps and (path.kind, HeadUnit(path.layer, step.groups[0])) in given_up(found.plan)
    }  # fmt: skip
    ranked = {(layer, group): rank for one in found.plan.factored for layer in one.units
              for group, rank in one.ranked(layer)}  # fmt: skip
    assert ranked == expected
    assert len(found.plan.factored) == bool(expected)
    tied = {part: {tie.recipient for one in found.plan.selections if part in one.parts for tie in one.ties}
            for part in (Part.Q, Part.K, Part.V, Part.O)}  # fmt: skip
    for layer, group in expected:
        assert [HeadUnit(layer, group) in tied[part] for part in tied] == [True, True, True, False]
    assert SharePlan.from_json(found.plan.to_json()) == found.plan


def test_ranks_go_to_their_groups_whatever_order_these_are_given_up_in() -> None:
    donors = ((HeadUnit(0, 0), 0.1),)
    steps = tuple(Step(Form.FACTORED, (group,), 0.1, 9, donors, rank) for group, rank in ((2, 3), (0, 1)))
    paths = tuple(Path(Kind.ATTENTION, layer, steps) for layer in (3, 1))
    chosen = Choice(match="output", mode="mine", ratio=0.5)
    plan = plan_for_units(Prices("llama", LAYOUTS, paths), 4, choice=chosen).plan
    (factored,) = plan.factored
    assert factored.layout == LAYOUTS[Kind.ATTENTION].only((Part.O,))
    assert {layer: factored.ranked(layer) for layer in range(LAYERS)} == {
        0: [], 1: [(0, 1), (2, 3)], 2: [], 3: [(0, 1), (2, 3)]
    }  # fmt: skip
    assert factored.chosen == chosen


def test_a_rank_that_columns_cannot_have_is_refused() -> None:
    step = Step(Form.FACTORED, (0,), 0.1, 9, ((HeadUnit(0, 0), 0.1),), 4)
    with pytest.raises(PlanError, match=r"rank 4.*from 1 to 3"):
        plan_for_units(Prices("llama", LAYOUTS, (Path(Kind.ATTENTION, 1, (step,)),)), 1)


def test_a_tie_without_any_donor_left_is_refused() -> None:
    donors = ((HeadUnit(0, 0), 0.1),)
    emptied = Path(Kind.ATTENTION, 0, (gone(0, 0.1, 9), gone(1, 0.1, 9)))
    tied = Path(Kind.ATTENTION, 1, (Step(Form.QKV, (0,), 0.1, 9, donors),))
    found = plan_for_units(Prices("llama", LAYOUTS, (emptied, tied)), 3)
    assert found.plan.selections[0].ties[0].donor == HeadUnit(0, 2)
    one = {Kind.ATTENTION: layout_of(Kind.ATTENTION, 1, 4)}
    from_tied = Path(Kind.ATTENTION, 2, (Step(Form.QKV, (0,), 0.1, 9, ((HeadUnit(1, 0), 0.1),)),))
    assert plan_for_units(Prices("llama", one, (tied, from_tied)), 2).plan.selections[0].ties[1].donor == (0, 0)


# ---- limits and records


def test_nothing_asked_for_is_a_plan_of_nothing() -> None:
    prices = Prices("llama", LAYOUTS, (Path(Kind.ATTENTION, 1, (gone(0, 1.0, 9),)),))
    for found in (plan_for_units(prices, 0), plan_for_bytes(prices, 0)):
        assert found == Budgeted(SharePlan(model_type="llama"), 0, 0.0)


@pytest.mark.parametrize("asked", [-1, 2])
def test_more_units_than_were_priced_are_refused(asked: int) -> None:
    prices = Prices("llama", LAYOUTS, (Path(Kind.ATTENTION, 1, (gone(0, 1.0, 9),)),))
    with pytest.raises(PlanError, match=f"{asked} units cannot be given up.*1 can"):
        plan_for_units(prices, asked)


@pytest.mark.parametrize("asked", [-1, 10])
def test_more_bytes_than_were_priced_are_refused(asked: int) -> None:
    prices = Prices("llama", LAYOUTS, (Path(Kind.ATTENTION, 1, (gone(0, 1.0, 9),)),))
    with pytest.raises(PlanError, match=f"{asked} bytes cannot be saved.* 9"):
        plan_for_bytes(prices, asked)


def test_the_plan_says_how_it_was_chosen() -> None:
    steps = (gone(0, 1.0, 9), Step(Form.QKV, (1,), 1.0, 9, ((HeadUnit(0, 0), 1.0),)))
    prices = Prices("llama", LAYOUTS, (Path(Kind.ATTENTION, 1, steps),))
    chosen = Choice(match="output", mode="mine", ratio=0.5)
    plan = plan_for_units(prices, 2, choice=chosen).plan
    assert {one.chosen for one in (*plan.selections, *plan.removals)} == {chosen}
    assert plan.model_type == "llama"


# ---- bytes of real plans


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_what_a_plan_saves_is_what_the_accounting_says_of_it(name: str, tmp_path: Folder) -> None:
    checkpoint = open_checkpoint(tiny.make(name, tmp_path / name))
    text = Calibration(tiny.tokens(16, 2), False, "a text", 0)
    for forms in ([*TIES, Form.REMOVE], [Form.FACTORED, Form.GATEUP]):
        prices = price_units(checkpoint, text, forms, ffn_groups=2, donors=1, protect=[1, 3])
        most = saved_by([step for path in prices.paths for step in path.steps])
        for share in (0.3, 0.7, 1.0):
            found = plan_for_bytes(prices, round(share * most))
            estimate = estimate_plan(checkpoint, found.plan)
            assert found.saved_bytes == estimate.dense_bytes - estimate.shared_bytes
        assert bool(found.plan.factored) == (Form.FACTORED in forms)
