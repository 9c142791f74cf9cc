"""What is chosen keeps to its budget, costs no more than it must, and is a plan that shares what it says it saves."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise, product
from pathlib import Path as Folder
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headshare.calibration import allocate as budget
from headshare.calibration.allocate import plan_for_bytes, plan_for_units
from headshare.calibration.costs.actions import GATEUP, LOW_RANK, QK, QKV, QKVO, REMOVE, Action
from headshare.calibration.costs.curves import CostCurve, CostCurves, CurveStep
from headshare.calibration.costs.local import price_units
from headshare.calibration.costs.to_plan import Budgeted, plan_for_steps
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
from headshare.errors import PlanError
from headshare.plan.layout import Layout, Place
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.section import Choice
from headshare.plan.units import HeadUnit, Part, Sublayer
from headshare.sharing.size import estimate_plan
from headshare.text.tokens import Calibration
from support import tiny

LAYERS, GROUPS, NEURONS = 4, 3, 12
TIES = (QK, QKV, QKVO)
FEW = settings(max_examples=40, deadline=None)


def layout_of(kind: Sublayer, groups: int, rows: int) -> Layout:
    *features, readout = (
        (Part.Q, Part.K, Part.V, Part.O) if kind is Sublayer.ATTENTION else (Part.GATE, Part.UP, Part.DOWN)
    )
    size = groups * rows
    places = {
        part: Place(tensor=f"l.{{layer}}.{part}.weight", axis=0, shape=(size, 8), start=0, step=rows, rows=rows)
        for part in features
    }
    down = Place(tensor=f"l.{{layer}}.{readout}.weight", axis=1, shape=(8, size), start=0, step=rows, rows=rows)
    return Layout(kind=kind, layers=LAYERS, groups=groups, parts={**places, readout: down})


LAYOUTS = {
    Sublayer.ATTENTION: layout_of(Sublayer.ATTENTION, GROUPS, 4),
    Sublayer.FFN: layout_of(Sublayer.FFN, GROUPS, 4),
}
SINGLE = layout_of(Sublayer.FFN, NEURONS, 1)
SIZES = {QK: 64, QKV: 96, QKVO: 124, LOW_RANK: 116, GATEUP: 64, REMOVE: 128}


# ---- made-up prices

Steps = list[
    tuple[Any, ...]
]  # what a CurveStep is made of: strategies make no values that beartype checks, as it draws lots


@st.composite
def priced(draw: st.DrawFn, *, neurons: bool = True) -> list[tuple[Sublayer, int, Steps]]:
    """Paths of any forms and prices, dear steps before cheap ones too, and often several of one half; of layer 0's
    attention some is removed at most. A layer's units are factored or tied in all parts, not both."""
    of_neurons = neurons and draw(st.booleans())
    paths: list[tuple[Sublayer, int, Steps]] = []
    for layer in range(LAYERS):
        whole = draw(st.sampled_from((QKVO, LOW_RANK)))
        forms = (QK, QKV, whole, REMOVE) if layer else (REMOVE,)
        paths += [(Sublayer.ATTENTION, layer, steps) for steps in draw(alternatives(layer, forms))]
        if of_neurons:
            paths += [(Sublayer.FFN, layer, draw(chunks())) for _ in range(draw(st.integers(1, 2)))]
        elif layer:
            paths.append((Sublayer.FFN, layer, draw(units(layer, (GATEUP,)))))
    return paths


@st.composite
def alternatives(draw: st.DrawFn, layer: int, forms: Sequence[Action]) -> list[Steps]:
    """Paths of one half, each form in one of them: so a plan tells which was followed."""
    order = draw(st.permutations(forms))
    cuts = draw(st.sets(st.sampled_from(range(1, len(order))))) if len(order) > 1 else set()
    return [draw(units(layer, order[start:stop])) for start, stop in pairwise((0, *sorted(cuts), len(order)))]


PRICE = st.one_of(st.integers(-2, 20).map(float), st.floats(0, 5))
SHARE = st.floats(0, 1)


@st.composite
def units(draw: st.DrawFn, layer: int, forms: Sequence[Action]) -> Steps:
    steps: Steps = []
    for group in draw(st.permutations(range(GROUPS)))[: draw(st.integers(0, GROUPS))]:
        form = draw(st.sampled_from(forms))
        if form is REMOVE and [one[0] for one in steps].count(form) == GROUPS - 1:
            break
        donors = () if form is REMOVE else draw(donors_of(layer))
        rank = draw(st.integers(1, 3)) if form is LOW_RANK else 0
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
    return [(REMOVE, tuple(order[at : at + 3]), draw(PRICE), 72) for at in ends]


def made(paths: list[tuple[Sublayer, int, Steps]], *, most: int | None = None) -> CostCurves:
    """CostCurves of these paths, or of those of the first few halves."""
    halves = list(dict.fromkeys((kind, layer) for kind, layer, _ in paths))[:most]
    found = [CostCurve(kind, layer, tuple(CurveStep(*one) for one in steps)) for kind, layer, steps in paths]
    return CostCurves("llama", LAYOUTS, tuple(path for path in found if (path.kind, path.layer) in halves), SINGLE)


Half = tuple[Sublayer, int]
Beginning = tuple[CurveStep, ...]


def beginnings(prices: CostCurves) -> dict[Half, list[Beginning]]:
    """All that each half could do: nothing, or so many steps along one of its paths."""
    found: dict[Half, list[Beginning]] = {}
    for path in prices.curves:
        ends = range(1, len(path.steps) + 1)
        found.setdefault((path.kind, path.layer), [()]).extend(path.steps[:end] for end in ends)
    return found


def choices(prices: CostCurves) -> Iterator[list[CurveStep]]:
    """The steps of every choice there is: of each half, so many along one of its paths."""
    return (list(chain(*chosen)) for chosen in product(*beginnings(prices).values()))


def price_of(steps: Sequence[CurveStep]) -> float:
    return sum(step.price for step in steps)


def saved_by(steps: Sequence[CurveStep]) -> int:
    return sum(step.saved_bytes for step in steps)


def most_units(prices: CostCurves) -> int:
    """As many as can be given up: of each half, as many as its longest path. Single neurons are none."""
    of_neurons = {(path.kind, path.layer) for path in prices.curves if path.is_of_neurons}
    return sum(max(map(len, some)) for half, some in beginnings(prices).items() if half not in of_neurons)


def most_bytes(prices: CostCurves) -> int:
    """As many as can be saved: of each half, those of the path that saves most."""
    return sum(max(map(saved_by, some)) for some in beginnings(prices).values())


# ---- what is chosen


@given(drawn=priced(neurons=False), share=SHARE)
@FEW
def test_exactly_as_many_units_are_given_up_as_asked_at_the_least_price_there_is(drawn: Any, share: float) -> None:
    few = made(drawn, most=4)
    units = round(share * most_units(few))
    found = plan_for_units(few, units)
    assert found.plan.ties + found.plan.removed(Sublayer.ATTENTION) >= units  # parts with other ties count again
    assert len(given_up(found.plan)) == units
    best = min(price_of(steps) for steps in choices(few) if len(steps) == units)
    assert found.price >= best - 1e-9
    assert price_of(taken_by(few, found)) == pytest.approx(best)


@given(drawn=priced(), share=SHARE)
@FEW
def test_single_neurons_are_no_units(drawn: Any, share: float) -> None:
    prices = made(drawn)
    units = round(share * most_units(prices))
    found = plan_for_units(prices, units)
    assert len(given_up(found.plan)) == units
    assert found.plan.removed(Sublayer.FFN) == 0


@given(drawn=priced(), share=SHARE)
@FEW
def test_enough_bytes_are_saved_no_step_is_idle_and_no_cheaper_than_the_best_nor_dearer_than_plain_greed(
    drawn: Any, share: float
) -> None:
    """As all paths together are searched; a form alone is taken where it costs less, donors included."""
    few = made(drawn, most=4)
    wanted = round(share * most_bytes(few))
    with mock.patch.object(budget, "_alternatives", lambda paths: [paths]):
        found = plan_for_bytes(few, wanted)
    steps = taken_by(few, found)
    best = min(price_of(steps) for steps in choices(few) if saved_by(steps) >= wanted)
    assert found.saved_bytes == saved_by(steps) >= wanted
    assert best - 1e-9 <= price_of(steps) <= plain_greed(few, wanted) + 1e-9
    for half, mine in followed(few, found.plan).items():
        for shorter in beginnings(few)[half]:
            spared = saved_by(mine) - saved_by(shorter)
            assert spared <= 0 or found.saved_bytes - spared < wanted or price_of(mine) <= price_of(shorter) + 1e-9


@given(drawn=priced(), share=SHARE)
@settings(max_examples=100, deadline=None)
def test_a_mix_costs_no_more_than_each_form_of_each_half_alone(drawn: Any, share: float) -> None:
    prices = made(drawn)
    wanted = int(share * most_bytes(prices))
    found = plan_for_bytes(prices, wanted)
    assert found.saved_bytes == saved_by(taken_by(prices, found)) >= wanted
    for kind, forms in {(path.kind, path.actions) for path in prices.curves}:
        same = tuple(path for path in prices.curves if path.kind is kind and path.actions == forms)
        alone = replace(prices, curves=same)
        if most_bytes(alone) >= wanted:
            assert found.price <= plan_for_bytes(alone, wanted).price


def plain_greed(prices: CostCurves, wanted: int) -> float:
    """Go on in one half, to whatever beginning of a path is the cheapest for what it saves, until it is enough."""
    halves = [[(saved_by(steps), price_of(steps)) for steps in some] for some in beginnings(prices).values()]
    taken, total, price = [(0, 0.0)] * len(halves), 0, 0.0
    while total < wanted:
        _, number, saved, cost = min(
            ((cost - taken[number][1]) / min(saved - taken[number][0], wanted - total), number, saved, cost)
            for number, half in enumerate(halves)
            for saved, cost in half
            if saved > taken[number][0]
        )
        total, price = total + saved - taken[number][0], price + cost - taken[number][1]
        taken[number] = saved, cost
    return price


def test_the_last_fill_is_the_cheapest_that_completes() -> None:
    """Plain greed goes on along the first path, and then needs the dear end of it."""
    cheap = CostCurve(Sublayer.ATTENTION, 1, (gone(0, 1.0, 100), gone(1, 9.0, 100)))
    other = CostCurve(Sublayer.ATTENTION, 2, (gone(0, 3.0, 150),))
    prices = CostCurves("llama", LAYOUTS, (cheap, other))
    assert plain_greed(prices, 150) == 4
    found = plan_for_bytes(prices, 150)
    assert (found.price, found.saved_bytes) == (3, 150)


def test_steps_that_turn_out_not_to_be_needed_are_not_taken() -> None:
    steps = [gone(0, 0.1, 10), gone(0, 1.5, 100), gone(0, 1.6, 100)]
    paths = tuple(CostCurve(Sublayer.ATTENTION, layer, (step,)) for layer, step in enumerate(steps, 1))
    assert plain_greed(CostCurves("llama", LAYOUTS, paths), 200) == pytest.approx(3.2)
    assert plan_for_bytes(CostCurves("llama", LAYOUTS, paths), 200).price == pytest.approx(3.1)


def test_a_dear_step_does_not_hide_cheap_ones_behind_it() -> None:
    hidden = CostCurve(Sublayer.ATTENTION, 1, (gone(0, 5.0, 100), gone(1, 0.0, 900)))
    other = CostCurve(Sublayer.ATTENTION, 2, (gone(0, 1.0, 100), gone(1, 20.0, 900)))
    assert plan_for_bytes(CostCurves("llama", LAYOUTS, (hidden, other)), 1000).price == 5
    assert plan_for_units(CostCurves("llama", LAYOUTS, (hidden, other)), 2).price == 5
    again = CostCurve(Sublayer.ATTENTION, 3, hidden.steps)
    assert plan_for_bytes(CostCurves("llama", LAYOUTS, (hidden, other, again)), 2000).price == 10


def test_what_costs_less_than_nothing_is_no_reason_to_leave_more_of_it() -> None:
    """A beginning that saves more at the same price does not stand for one that leaves room for the other half's."""
    free = CostCurve(Sublayer.ATTENTION, 1, (gone(0, -2.0, 10), gone(1, 0.0, 30)))
    other = CostCurve(Sublayer.ATTENTION, 2, (gone(0, -1.0, 70),))
    prices = CostCurves("llama", LAYOUTS, (free, other))
    assert plain_greed(prices, 29) == -3
    assert plan_for_bytes(prices, 29).price == -3


# ---- one of several paths


def alternative_paths(layer: int, *prices_and_bytes: Sequence[tuple[float, int]]) -> list[CostCurve]:
    """Paths of one half that remove units, the second of them in the other order."""
    orders = ((0, 1), (1, 0))
    return [
        CostCurve(Sublayer.ATTENTION, layer, tuple(gone(group, *one) for group, one in zip(order, steps, strict=False)))
        for order, steps in zip(orders, prices_and_bytes, strict=True)
    ]


def test_which_path_is_followed_depends_on_how_far() -> None:
    first, second = alternative_paths(1, [(1.0, 100), (9.0, 100)], [(5.0, 100), (0.0, 100)])
    prices = CostCurves("llama", LAYOUTS, (first, second))
    for asked, taken in ((1, first.steps[:1]), (2, second.steps)):
        for found in (plan_for_units(prices, asked), plan_for_bytes(prices, 100 * asked)):
            assert removed(found.plan, Sublayer.ATTENTION) == {HeadUnit(1, step.groups[0]) for step in taken}
            assert (found.price, found.saved_bytes) == (price_of(taken), saved_by(taken))


def test_a_path_is_left_for_another_where_that_saves_more_for_its_price() -> None:
    """The first turn goes along the first path, the second along another half; the third leaves the first path."""
    first, second = alternative_paths(1, [(1.0, 100), (30.0, 150)], [(4.0, 250)])
    other = CostCurve(Sublayer.ATTENTION, 2, (gone(0, 1.5, 100),))
    prices = CostCurves("llama", LAYOUTS, (first, second, other))
    for wanted, price, units in ((100, 1, {(1, 0)}), (200, 2.5, {(1, 0), (2, 0)}), (350, 5.5, {(1, 1), (2, 0)})):
        found = plan_for_bytes(prices, wanted)
        assert (found.price, removed(found.plan, Sublayer.ATTENTION)) == (price, units)
        alone = [plan_for_bytes(replace(prices, curves=(kept, other)), wanted).price for kept in (first, second)]
        assert found.price == min(alone) < max(alone)


def test_a_longer_path_is_followed_where_others_have_too_few_units() -> None:
    first, second = alternative_paths(1, [(0.1, 500)], [(7.0, 10), (7.0, 10)])
    prices = CostCurves("llama", LAYOUTS, (first, second))
    assert plan_for_units(prices, 1).price == 0.1
    assert plan_for_units(prices, 2).price == 14
    with pytest.raises(PlanError, match=r"3 units cannot be given up.*2 can"):
        plan_for_units(prices, 3)
    assert plan_for_bytes(prices, 500).price == 0.1
    with pytest.raises(PlanError, match=r"501 bytes cannot be saved.* 500"):
        plan_for_bytes(prices, 501)


@given(drawn=priced(), layer=st.integers(0, LAYERS - 1), kind=st.sampled_from(Sublayer), share=SHARE)
@FEW
def test_a_half_alone_gives_up_what_is_cheapest_of_all_its_paths(
    drawn: Any, layer: int, kind: Sublayer, share: float
) -> None:
    prices = made([one for one in drawn if one[:2] == (kind, layer)])
    wanted = round(share * most_bytes(prices))
    found = plan_for_bytes(prices, wanted)
    enough = [price_of(steps) for steps in choices(prices) if saved_by(steps) >= wanted]
    assert price_of(taken_by(prices, found)) == pytest.approx(min(enough) if wanted else 0)


@given(drawn=priced(), dearer=st.floats(0.1, 5), share=SHARE)
@FEW
def test_paths_that_others_beat_at_every_step_change_nothing(drawn: Any, dearer: float, share: float) -> None:
    prices, beaten = made(drawn), [(kind, layer, [raised(*one, by=dearer) for one in steps])
                                   for kind, layer, steps in drawn]  # fmt: skip
    wanted, units = round(share * most_bytes(prices)), round(share * most_units(prices))
    for both in (made([*drawn, *beaten]), made([*beaten, *drawn])):
        assert plan_for_bytes(both, wanted).price == plan_for_bytes(prices, wanted).price
        assert plan_for_units(both, units).price == pytest.approx(plan_for_units(prices, units).price)


def raised(form: Action, groups: tuple[int, ...], price: float, *rest: Any, by: float) -> tuple[Any, ...]:
    return form, groups, price + by, *rest


# ---- the first steps of one path


@given(drawn=priced(), number=st.integers(0, 99), share=SHARE)
@FEW
def test_the_plan_of_some_steps_takes_those_and_nothing_else(drawn: Any, number: int, share: float) -> None:
    """Nothing else is given up, so every donor is there, and the best is taken."""
    prices = made(drawn)
    path = prices.curves[number % len(prices.curves)]
    steps = path.steps[: round(share * len(path.steps))]
    plan = plan_for_steps(prices, path, len(steps))
    taken = {one for step in steps for one in deeds_of(step)}
    assert deeds(plan) == ({(path.kind, path.layer): taken} if taken else {})
    best = {HeadUnit(path.layer, step.groups[0]): step.donors[0][0] for step in steps if step.donors}
    assert {tie for one in plan.selections for tie in one.ties} == set(best.items())
    assert plan.model_type == "llama"
    assert SharePlan.from_json(plan.to_json()) == plan
    alone = replace(prices, curves=(replace(path, steps=steps),))
    assert plan == plan_for_bytes(alone, saved_by(steps)).plan


def test_the_plan_of_no_steps_is_a_plan_of_nothing() -> None:
    path = CostCurve(Sublayer.ATTENTION, 1, (gone(0, 1.0, 9),))
    assert plan_for_steps(CostCurves("llama", LAYOUTS, (path,)), path, 0) == SharePlan(model_type="llama")


# ---- what is in a plan


def gone(group: int, price: float, saved: int) -> CurveStep:
    return CurveStep(REMOVE, (group,), price, saved)


def taken_by(prices: CostCurves, found: Budgeted) -> list[CurveStep]:
    """The steps that are in the plan."""
    return list(chain(*followed(prices, found.plan).values()))


def followed(prices: CostCurves, plan: SharePlan) -> dict[Half, Beginning]:
    """What each half does in the plan, which is the beginning of one of its paths: the cheapest that says the same."""
    done, found = deeds(plan), {}
    for half, some in beginnings(prices).items():
        mine = done.pop(half, set())
        same = [steps for steps in some if {one for step in steps for one in deeds_of(step)} == mine]
        assert same, f"{half} follows no path, or several: {mine}"
        found[half] = min(same, key=price_of)
    assert not done
    return found


Deed = tuple[int, Action, int]  # a unit of a half, what is done to it, and its rank


def deeds_of(step: CurveStep) -> list[Deed]:
    return [(group, step.action, step.rank) for group in step.groups]


def deeds(plan: SharePlan) -> dict[Half, set[Deed]]:
    """What the plan does to each half."""
    shared: dict[tuple[Sublayer, HeadUnit], set[Part]] = {}
    for one in plan.selections:
        for tie in one.ties:
            shared.setdefault((one.layout.kind, tie.recipient), set()).update(one.parts)
    ranks = {HeadUnit(layer, group): rank for one in plan.factored for layer in one.units
             for group, rank in one.ranked(layer)}  # fmt: skip
    found: dict[Half, set[Deed]] = {}
    for (kind, unit), parts in shared.items():
        rank = ranks.pop(unit, 0) if kind is Sublayer.ATTENTION else 0
        (form,) = [form for form in SIZES if set(form.shares) == parts and (form is LOW_RANK) == (rank > 0)]
        found.setdefault((kind, unit.layer), set()).add((unit.group, form, rank))
    for kind in Sublayer:
        for layer, group in removed(plan, kind):
            found.setdefault((kind, layer), set()).add((group, REMOVE, 0))
    assert not ranks
    return found


def given_up(plan: SharePlan) -> set[tuple[Sublayer, HeadUnit]]:
    """All units that are tied or removed; no single neurons."""
    tied = {(one.layout.kind, tie.recipient) for one in plan.selections for tie in one.ties}
    return tied | {(Sublayer.ATTENTION, unit) for unit in removed(plan, Sublayer.ATTENTION)}


def removed(plan: SharePlan, kind: Sublayer) -> set[HeadUnit]:
    found = [one for one in plan.removals if one.layout.kind is kind]
    return {HeadUnit(layer, group) for one in found for layer in one.removed for group in one.indices(layer)}


# ---- donors


@given(drawn=priced(), share=SHARE)
@FEW
def test_donors_keep_what_they_lend_and_are_the_best_that_do(drawn: Any, share: float) -> None:
    prices = made(drawn)
    found = plan_for_bytes(prices, round(share * most_bytes(prices)))
    given = given_up(found.plan)
    taken = followed(prices, found.plan)
    steps = {(*half, step.groups[0]): step for half, some in taken.items() for step in some}
    dearer = 0.0
    factored = {layer for one in found.plan.factored for layer in one.units}
    donors: dict[tuple[Sublayer, HeadUnit], set[HeadUnit]] = {}
    for one in found.plan.selections:
        for recipient, donor in one.ties:
            assert (one.layout.kind, donor) not in given
            assert donor.layer < recipient.layer
            donors.setdefault((one.layout.kind, recipient), set()).add(donor)
    for (kind, recipient), (donor, *more) in donors.items():
        assert not more
        listed = steps[kind, *recipient].donors
        never = factored if steps[kind, *recipient].action is QKVO else set()
        kept = [price for unit, price in listed if (kind, unit) not in given and unit.layer not in never]
        mine = next((price for unit, price in listed if unit == donor), listed[-1][1])
        assert mine == min(kept, default=listed[-1][1])
        dearer += mine - listed[0][1]
    assert found.price == pytest.approx(price_of(taken_by(prices, found)) + dearer, abs=1e-9)


@given(drawn=priced())
@FEW
def test_layer_0_lends_when_all_other_units_are_given_up(drawn: Any) -> None:
    """It ties none, and keeps at least one of those that it removes."""
    prices = made(drawn)
    found = plan_for_units(prices, most_units(prices))
    given = given_up(found.plan)
    assert {unit for _, unit in given if unit.layer == 0} <= removed(found.plan, Sublayer.ATTENTION)
    assert all((one.layout.kind, tie.donor) not in given for one in found.plan.selections for tie in one.ties)
    assert SharePlan.from_json(found.plan.to_json()) == found.plan


@given(drawn=priced(), share=SHARE)
@FEW
def test_parts_and_scales_are_those_of_each_units_form(drawn: Any, share: float) -> None:
    prices = made(drawn)
    found = plan_for_bytes(prices, round(share * most_bytes(prices)))
    forms = {
        (kind, HeadUnit(layer, step.groups[0])): step.action
        for (kind, layer), steps in followed(prices, found.plan).items()
        for step in steps
        if step.action is not REMOVE
    }
    shared: dict[tuple[Sublayer, HeadUnit], set[Part]] = {}
    for one in found.plan.selections:
        assert one.scale == (Part.O in one.parts)
        for tie in one.ties:
            shared.setdefault((one.layout.kind, tie.recipient), set()).update(one.parts)
    assert shared == {unit: set(form.shares) for unit, form in forms.items()}


@given(drawn=priced(), share=SHARE)
@FEW
def test_factored_units_have_the_ranks_of_their_steps_and_share_q_k_and_v(drawn: Any, share: float) -> None:
    prices = made(drawn)
    found = plan_for_bytes(prices, round(share * most_bytes(prices)))
    expected = {
        (layer, step.groups[0]): step.rank
        for (_, layer), steps in followed(prices, found.plan).items()
        for step in steps
        if step.rank
    }
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
    steps = tuple(CurveStep(LOW_RANK, (group,), 0.1, 9, donors, rank) for group, rank in ((2, 3), (0, 1)))
    paths = tuple(CostCurve(Sublayer.ATTENTION, layer, steps) for layer in (3, 1))
    chosen = Choice(match="output", mode="mine", ratio=0.5)
    plan = plan_for_units(CostCurves("llama", LAYOUTS, paths), 4, choice=chosen).plan
    (factored,) = plan.factored
    assert factored.layout == LAYOUTS[Sublayer.ATTENTION].only((Part.O,))
    assert {layer: factored.ranked(layer) for layer in range(LAYERS)} == {
        0: [], 1: [(0, 1), (2, 3)], 2: [], 3: [(0, 1), (2, 3)]
    }  # fmt: skip
    assert factored.chosen == chosen


def test_a_rank_that_columns_cannot_have_is_refused() -> None:
    step = CurveStep(LOW_RANK, (0,), 0.1, 9, ((HeadUnit(0, 0), 0.1),), 4)
    with pytest.raises(PlanError, match=r"rank 4.*from 1 to 3"):
        plan_for_units(CostCurves("llama", LAYOUTS, (CostCurve(Sublayer.ATTENTION, 1, (step,)),)), 1)


def test_a_tie_without_any_donor_left_is_refused() -> None:
    donors = ((HeadUnit(0, 0), 0.1),)
    emptied = CostCurve(Sublayer.ATTENTION, 0, (gone(0, 0.1, 9), gone(1, 0.1, 9)))
    tied = CostCurve(Sublayer.ATTENTION, 1, (CurveStep(QKV, (0,), 0.1, 9, donors),))
    found = plan_for_units(CostCurves("llama", LAYOUTS, (emptied, tied)), 3)
    assert found.plan.selections[0].ties[0].donor == HeadUnit(0, 2)
    one = {Sublayer.ATTENTION: layout_of(Sublayer.ATTENTION, 1, 4)}
    from_tied = CostCurve(Sublayer.ATTENTION, 2, (CurveStep(QKV, (0,), 0.1, 9, ((HeadUnit(1, 0), 0.1),)),))
    assert plan_for_units(CostCurves("llama", one, (tied, from_tied)), 2).plan.selections[0].ties[1].donor == (0, 0)


# ---- limits and records


def test_nothing_asked_for_is_a_plan_of_nothing() -> None:
    prices = CostCurves("llama", LAYOUTS, (CostCurve(Sublayer.ATTENTION, 1, (gone(0, 1.0, 9),)),))
    for found in (plan_for_units(prices, 0), plan_for_bytes(prices, 0)):
        assert found == Budgeted(SharePlan(model_type="llama"), 0, 0.0)


@pytest.mark.parametrize("asked", [-1, 2])
def test_more_units_than_were_priced_are_refused(asked: int) -> None:
    prices = CostCurves("llama", LAYOUTS, (CostCurve(Sublayer.ATTENTION, 1, (gone(0, 1.0, 9),)),))
    with pytest.raises(PlanError, match=f"{asked} units cannot be given up.*1 can"):
        plan_for_units(prices, asked)


@pytest.mark.parametrize("asked", [-1, 10])
def test_more_bytes_than_were_priced_are_refused(asked: int) -> None:
    prices = CostCurves("llama", LAYOUTS, (CostCurve(Sublayer.ATTENTION, 1, (gone(0, 1.0, 9),)),))
    with pytest.raises(PlanError, match=f"{asked} bytes cannot be saved.* 9"):
        plan_for_bytes(prices, asked)


def test_the_plan_says_how_it_was_chosen() -> None:
    steps = (gone(0, 1.0, 9), CurveStep(QKV, (1,), 1.0, 9, ((HeadUnit(0, 0), 1.0),)))
    prices = CostCurves("llama", LAYOUTS, (CostCurve(Sublayer.ATTENTION, 1, steps),))
    chosen = Choice(match="output", mode="mine", ratio=0.5)
    plan = plan_for_units(prices, 2, choice=chosen).plan
    assert {one.chosen for one in (*plan.selections, *plan.removals)} == {chosen}
    assert plan.model_type == "llama"


# ---- bytes of real plans


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_what_a_plan_saves_is_what_the_accounting_says_of_it(name: str, tmp_path: Folder) -> None:
    checkpoint = open_checkpoint(tiny.make(name, tmp_path / name))
    text = Calibration(tiny.tokens(16, 2), False, "a text", 0)
    for forms in ([*TIES, REMOVE], [LOW_RANK, GATEUP]):
        prices = price_units(checkpoint, text, forms, ffn_groups=2, donors=1, protect=[1, 3])
        prices = prices.only(forms)
        for share in (0.3, 0.7, 1.0):
            found = plan_for_bytes(prices, round(share * most_bytes(prices)))
            assert found.saved_bytes == saved_in(found.plan, checkpoint)
        assert bool(found.plan.factored) == (LOW_RANK in forms)
        assert found.saved_bytes == most_bytes(prices)
        for path in prices.curves:
            for steps in {1, len(path.steps)}:
                plan = plan_for_steps(prices, path, steps)
                assert saved_in(plan, checkpoint) == saved_by(path.steps[:steps])


def saved_in(plan: SharePlan, checkpoint: Checkpoint) -> int:
    estimate = estimate_plan(checkpoint, plan)
    return estimate.dense_bytes - estimate.shared_bytes


def test_the_words_say_what_is_given_up_where() -> None:
    removals = (
        Removal(layout=LAYOUTS[Sublayer.ATTENTION], removed={0: [1]}),
        Removal(layout=SINGLE, removed={1: [0, 5], 2: [3]}),
    )
    both, one = SharePlan(model_type="llama", removals=removals), SharePlan(model_type="llama", removals=removals[:1])
    words = "; what costs least for its bytes is removing attention units in 1 layer"
    assert Budgeted(both, 1, 0.5).in_words().endswith(f"{words}, removing neurons in 2 layers")
    assert Budgeted(one, 1, 0.5, in_nats=True).in_words().endswith(words)
    assert "removing" not in Budgeted(SharePlan(), 1, 0.5).in_words()
    whole = Removal(layout=SINGLE, removed={1: range(SINGLE.groups), 2: [3]})
    found = Budgeted(SharePlan(model_type="llama", removals=(whole,)), 1, 0.5).in_words()
    assert found.endswith("removing neurons in 1 layer, removing the whole feed-forward in 1 layer")
