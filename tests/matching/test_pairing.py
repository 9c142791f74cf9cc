"""Every way to choose ties, over random scores: what it promises, and what a plain loop over the same words gives."""

import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import headshare as hs
from headshare.errors import OptionError, PlanError
from headshare.matching.pairing import MODES, best_pairs, published_count
from headshare.matching.scores import Scores, ScoreTable
from headshare.plan.layout import Layout, Place
from headshare.plan.units import Part, Parts, Sublayer

Pairs = dict[int, int]  # recipient: donor, as unit numbers
PAPER = os.environ.get("HEADSHARE_PAPER_DATA")
quick = settings(max_examples=150, deadline=None)


def grid(layers: int, groups: int, parts: str = "qkvo", kind: Sublayer = Sublayer.ATTENTION) -> Layout:
    chosen = Parts.parse(parts)
    places = {
        part: Place(tensor=f"{{layer}}.{part}", axis=0, shape=(groups, 1), start=0, step=1, rows=1)
        for part in (*chosen.attention, *chosen.ffn)
    }
    return Layout(kind=kind, layers=layers, groups=groups, parts=places)


def table(scores: np.ndarray, layers: int, groups: int) -> Scores:
    layout = grid(layers, groups)
    matrix = torch.from_numpy(np.ascontiguousarray(scores, dtype=np.float64))
    return Scores("llama", (ScoreTable(layout, "qk", tuple(layout.parts), matrix),))


def chosen(scores: Scores, ratio: float, mode: str, **more: Any) -> Pairs:
    (selection,) = hs.make_plan(scores, ratio, mode=mode, **more).selections
    return {selection.layout.index(recipient): selection.layout.index(donor) for recipient, donor in selection.ties}


@quick
@given(st.data())
@pytest.mark.parametrize("mode", MODES)
def test_donors_stay_on_the_rank_of_their_recipients(mode: str, data: st.DataObject) -> None:
    layers, ranks, each = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    groups = ranks * each
    units = layers * groups
    scores = table(data.draw(arrays(np.float64, (units, units), elements=st.floats(-1, 1, width=32))), layers, groups)
    ratio = data.draw(st.integers(0, 100 * (layers - 1) // layers)) / 100
    pairs = chosen(scores, ratio, mode, ranks=ranks)
    assert all(recipient % groups // each == donor % groups // each for recipient, donor in pairs.items())
    if mode != "published":
        assert len(pairs) == int(Decimal(str(ratio)) * units)
    if ranks == 1:
        assert pairs == chosen(scores, ratio, mode)
    with pytest.raises(OptionError, match="cannot share"):
        hs.make_plan(scores, ratio, ranks=groups + 1)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int, int, float, frozenset[int]]:
    """Scores (with many ties, or with none to speak of), the grid, a ratio that can be met, and protected layers."""
    layers, groups = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    units = layers * groups
    numbers = draw(st.sampled_from([st.integers(-1, 1).map(float), st.floats(-1, 1, width=32)]))
    scores = draw(arrays(np.float64, (units, units), elements=numbers))
    protected = draw(st.frozensets(st.integers(0, layers - 1), max_size=2))
    most = sum(layer not in protected for layer in range(1, layers)) * groups
    hundredths = draw(st.integers(0, 100 * most // units))
    return scores, layers, groups, hundredths / 100, protected


def algorithm_1(
    scores: np.ndarray, layers: int, groups: int, count: int, protected: frozenset[int] = frozenset()
) -> Pairs:
    """Each unit's best earlier donor, and the best of these pairs, by comparing one pair after another."""
    best = {}
    for unit in range(groups, layers * groups):
        if unit // groups in protected:
            continue
        donor = 0
        for other in range(unit // groups * groups):
            if scores[unit, other] > scores[unit, donor]:
                donor = other
        best[unit] = donor
    order = sorted(best, key=lambda unit: (-scores[unit, best[unit]], unit))
    return {unit: best[unit] for unit in order[:count]}


def released(pairs: Pairs, units: int, groups: int) -> tuple[list[int], int]:
    """The authors' release, acted out: whose original weights each unit ends with, and how many copies are stored.

    A shared entry is made for every pair, holding what the donor held at first; both units then point at it.
    """
    entries: list[int] = []
    points_at: dict[int, int] = {}
    for recipient in sorted(pairs, key=lambda unit: unit // groups):
        entries.append(pairs[recipient])
        points_at[recipient] = points_at[pairs[recipient]] = len(entries) - 1
    weights = [entries[points_at[unit]] if unit in points_at else unit for unit in range(units)]
    return weights, len(entries) + units - len(points_at)


@pytest.mark.parametrize("mode", ["star", "root"])
def test_star_and_root_save_as_many_units_as_the_ratio_says_and_stay_flat(mode: str) -> None:
    @quick
    @given(problems())
    def check(problem: tuple[np.ndarray, int, int, float, frozenset[int]]) -> None:
        scores, layers, groups, ratio, protected = problem
        ties = chosen(table(scores, layers, groups), ratio, mode, protect=protected)
        assert len(ties) == int(Decimal(str(ratio)) * layers * groups)
        for recipient, donor in ties.items():
            assert donor // groups < recipient // groups
            assert donor not in ties
            assert recipient // groups not in protected
            assert recipient >= groups

    check()


@quick
@given(problems())
def test_star_ties_each_recipient_to_the_best_unit_that_is_kept(
    problem: tuple[np.ndarray, int, int, float, frozenset[int]],
) -> None:
    scores, layers, groups, ratio, protected = problem
    ties = chosen(table(scores, layers, groups), ratio, "star", protect=protected)
    for recipient, donor in ties.items():
        kept = [unit for unit in range(recipient // groups * groups) if unit not in ties]
        assert donor == max(kept, key=lambda unit: (scores[recipient, unit], -unit))


@quick
@given(problems())
def test_star_never_passes_over_a_pair_that_could_be_tied(
    problem: tuple[np.ndarray, int, int, float, frozenset[int]],
) -> None:
    """Going down the pairs by score, the first that differs from the plan would have made the plan impossible."""
    scores, layers, groups, ratio, protected = problem
    count = int(Decimal(str(ratio)) * layers * groups)
    candidates = [unit for unit in range(groups, layers * groups) if unit // groups not in protected]
    pairs = [(r, d) for r in candidates for d in range(r // groups * groups)]
    ties: Pairs = {}
    for recipient, donor in sorted(pairs, key=lambda pair: (-scores[pair], pair)):
        lends = set(ties.values()) | {donor}
        left = [unit for unit in candidates if unit not in lends and unit not in ties]
        possible = recipient not in ties and recipient not in lends and donor not in ties
        if len(ties) < count and possible and len(ties) + len(left) >= count:
            ties[recipient] = donor
    assert chosen(table(scores, layers, groups), ratio, "star", protect=protected) == ties


@quick
@given(problems())
def test_best_pairs_are_those_of_a_loop_over_all_pairs(
    problem: tuple[np.ndarray, int, int, float, frozenset[int]],
) -> None:
    scores, layers, groups, ratio, protected = problem
    count = int(Decimal(str(ratio)) * layers * groups)
    found = best_pairs(grid(layers, groups), torch.from_numpy(scores), count, protected)
    assert found == algorithm_1(scores, layers, groups, count, protected)


@quick
@given(problems())
def test_root_follows_every_chain_of_the_papers_pairs_to_its_end(
    problem: tuple[np.ndarray, int, int, float, frozenset[int]],
) -> None:
    scores, layers, groups, ratio, protected = problem
    pairs = algorithm_1(scores, layers, groups, int(Decimal(str(ratio)) * layers * groups), protected)
    ends = dict(pairs)
    for _ in range(layers):
        ends = {recipient: pairs.get(donor, donor) for recipient, donor in ends.items()}
    assert chosen(table(scores, layers, groups), ratio, "root", protect=protected) == ends


@quick
@given(problems())
def test_published_leaves_the_weights_that_the_authors_release_leaves(
    problem: tuple[np.ndarray, int, int, float, frozenset[int]],
) -> None:
    scores, layers, groups, ratio, protected = problem
    units = layers * groups
    pairs = algorithm_1(scores, layers, groups, int(Decimal(str(ratio)) * units), protected)
    weights, stored = released(pairs, units, groups)
    ties = chosen(table(scores, layers, groups), ratio, "published", protect=protected)
    assert [ties.get(unit, unit) for unit in range(units)] == weights
    count = published_count(list(pairs.items()))
    assert count.pairs == len(pairs)
    assert count.changed == sum(weights[unit] != unit for unit in range(units)) == len(ties)
    assert count.saved == units - stored


def test_a_chain_is_passed_over_followed_or_undone_by_the_three_modes() -> None:
    """Units 0, 1, 2 in three layers: 1 likes 0 a little, 2 likes 1 a lot; two of three are to go."""
    scores = table(np.array([[0, 0, 0], [0.2, 0, 0], [0.1, 0.9, 0]]), layers=3, groups=1)
    assert chosen(scores, 0.4, "star") == {2: 1}
    assert chosen(scores, 0.67, "star") == {1: 0, 2: 0}
    assert chosen(scores, 0.67, "root") == {1: 0, 2: 0}
    assert chosen(scores, 0.67, "published") == {2: 1}
    assert published_count([(1, 0), (2, 1)]) == hs.matching.pairing.PublishedCount(pairs=2, changed=1, saved=1)


def test_a_donor_that_two_recipients_want_serves_both() -> None:
    scores = np.zeros((6, 6))
    scores[2, 1], scores[4, 1], scores[5, 3] = 0.9, 0.8, 0.7
    for mode in MODES:
        assert chosen(table(scores, layers=3, groups=2), 0.5, mode) == {2: 1, 4: 1, 5: 3}
    assert published_count([(2, 1), (4, 1), (5, 3)]).saved == 2  # one copy for each of the pairs (2, 1) and (4, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("score", [0.0, -0.0, 1.0, -0.5])
def test_equal_scores_go_to_the_lowest_layer_and_then_the_lowest_unit(mode: str, score: float) -> None:
    scores = table(np.full((12, 12), score), layers=4, groups=3)
    assert chosen(scores, 0.34, mode) == {3: 0, 4: 0, 5: 0, 6: 0}
    assert chosen(scores, 0.75, mode) == dict.fromkeys(range(3, 12), 0)
    assert chosen(scores, 0.34, mode, protect=[1]) == {6: 0, 7: 0, 8: 0, 9: 0}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", [0.0, -0.0, 0.01])
def test_a_ratio_of_no_units_ties_nothing(mode: str, ratio: float) -> None:
    scores = table(np.random.default_rng(0).normal(size=(12, 12)), layers=4, groups=3)
    assert chosen(scores, ratio, mode) == {}


@pytest.mark.parametrize("ratio", [0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58])
def test_a_ratio_counts_as_the_decimal_it_is_written_as(ratio: float) -> None:
    """In binary, 0.29 x 100 is 28.999999999999996."""
    scores = table(np.zeros((100, 100)), layers=10, groups=10)
    assert len(chosen(scores, ratio, "star")) == round(ratio * 100)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_the_greatest_ratio_is_met_and_any_greater_one_is_refused_with_it(
    layers: int, groups: int, data: st.DataObject
) -> None:
    protected = data.draw(st.frozensets(st.integers(0, layers - 1), max_size=3))
    most = sum(layer not in protected for layer in range(1, layers)) * groups
    units = layers * groups
    layout = grid(layers, groups)
    assert hs.matching.pairing.checked_recipients(layout, most / units + 1e-9, protected) == most
    with pytest.raises(PlanError, match=rf"cannot be met.*\({most} units\)"):
        hs.matching.pairing.checked_recipients(layout, (most + 1) / units + 1e-9, protected)


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_greatest_ratio_that_an_error_names_gives_the_units_that_it_names(layers: int, groups: int) -> None:
    layout = grid(layers, groups)
    with pytest.raises(PlanError) as caught:
        hs.matching.pairing.checked_recipients(layout, 1.0)
    found = re.search(r"from 0 to ([\d.]+) \((\d+) units\)", str(caught.value))
    assert found is not None
    assert hs.matching.pairing.checked_recipients(layout, float(found[1])) == int(found[2]) == layout.units - groups


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), float("inf"), 1.0, 0.76, 1e300])
def test_a_ratio_that_cannot_be_met_is_refused_with_the_greatest_that_can(mode: str, ratio: float) -> None:
    scores = table(np.zeros((100, 100)), layers=4, groups=25)
    with pytest.raises(PlanError, match=r"the ratio is from 0 to 0\.7500 \(75 units\)"):
        chosen(scores, ratio, mode)


@pytest.mark.parametrize("mode", ["star", "root"])
def test_the_greatest_ratio_empties_all_layers_but_the_first_and_the_protected(mode: str) -> None:
    scores = table(np.random.default_rng(1).normal(size=(20, 20)), layers=5, groups=4)
    assert set(chosen(scores, 0.8, mode)) == set(range(4, 20))
    assert set(chosen(scores, 0.6, mode, protect=[2])) == {*range(4, 8), *range(12, 20)}
    with pytest.raises(PlanError, match=r"0\.6000 \(12 units\)"):
        chosen(scores, 0.8, mode, protect=[2])


def test_protecting_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlanError, match="layer 9"):
        chosen(table(np.zeros((6, 6)), layers=3, groups=2), 0.3, "star", protect=[9])


def test_an_unknown_mode_and_parts_without_scores_are_refused() -> None:
    scores = table(np.zeros((6, 6)), layers=3, groups=2)
    with pytest.raises(OptionError, match=r"no mode 'stars'\. There are: star, root, published"):
        hs.make_plan(scores, mode="stars")
    with pytest.raises(PlanError, match=r"no ffn units.*gate\+up\+down"):
        hs.make_plan(scores, parts="qkv+ffn")
    with pytest.raises(OptionError, match="'qx' does not name parts"):
        hs.make_plan(scores, parts="qx")


@pytest.mark.parametrize(("model_type", "match"), [("m" * 201, "qk"), ("llama", "q" * 201)])
def test_scores_whose_names_are_too_long_for_a_plan_are_refused(model_type: str, match: str) -> None:
    (one,) = table(np.zeros((6, 6)), layers=3, groups=2).tables
    with pytest.raises(PlanError):
        hs.make_plan(Scores(model_type, (ScoreTable(one.layout, match, one.parts, one.scores),)), 0.3)


def test_attention_and_feed_forward_have_a_ratio_each() -> None:
    ffn = ScoreTable(layout := grid(4, 2, "ffn", Sublayer.FFN), "ffn", tuple(layout.parts), torch.zeros(8, 8).double())
    scores = Scores("llama", (*table(np.zeros((12, 12)), layers=4, groups=3).tables, ffn))
    heads, neurons = hs.make_plan(scores, 0.5, parts="qkv+ffn", ffn_ratio=0.25).selections
    assert (len(heads.ties), len(neurons.ties)) == (6, 2)
    assert (heads.chosen.ratio, neurons.chosen.ratio) == (0.5, 0.25)
    assert heads.chosen.scores_digest == neurons.chosen.scores_digest == scores.digest
    assert heads.parts == (Part.Q, Part.K, Part.V)


def test_the_same_scores_give_the_same_plan_and_other_scores_another_digest() -> None:
    matrix = np.random.default_rng(2).normal(size=(20, 20))
    first, again = (hs.make_plan(table(matrix, layers=5, groups=4), 0.4) for _ in range(2))
    other = hs.make_plan(table(matrix + 1e-9, layers=5, groups=4), 0.4)
    assert first == again
    assert first.digest == again.digest != other.digest


@pytest.mark.skipif(PAPER is None, reason="HEADSHARE_PAPER_DATA names no folder with the authors' match file")
@pytest.mark.parametrize(
    ("ratio", "pairs", "changed", "percent"),
    [
        (0.1, 102, 67, 3.91),
        (0.2, 204, 132, 7.71),
        (0.3, 307, 192, 11.04),
        (0.4, 409, 229, 11.13),
        (0.5, 512, 270, 10.55),
    ],
)
def test_the_authors_own_match_file_gives_what_their_release_saves(
    ratio: float, pairs: int, changed: int, percent: float
) -> None:
    index = np.load(Path(str(PAPER)) / "llama2_7b_qk_match_index.npy")  # [head, layer] of the donor
    score = np.load(Path(str(PAPER)) / "llama2_7b_qk_match_score.npy")
    scores = np.full((1024, 1024), -1.0)
    for row in range(31):
        for head in range(32):
            donor_head, donor_layer = index[row, head]
            scores[(31 - row) * 32 + head, donor_layer * 32 + donor_head] = score[row, head]
    found = best_pairs(grid(32, 32), torch.from_numpy(scores), int(Decimal(str(ratio)) * 1024))
    count = published_count(list(found.items()))
    assert (count.pairs, count.changed) == (pairs, changed)
    assert round(100 * count.saved / 1024, 2) == percent
    weights, stored = released(found, 1024, 32)
    ties = chosen(table(scores, layers=32, groups=32), ratio, "published", parts="qkvo")
    assert len(ties) == changed
    assert [ties.get(unit, unit) for unit in range(1024)] == weights
    assert 1024 - stored == count.saved
    assert len(chosen(table(scores, layers=32, groups=32), ratio, "star", parts="qkvo")) == pairs
