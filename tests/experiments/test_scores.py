"""Errors of weighted sums: windows by blocks, questions and lines by a paired bootstrap."""

import math
from dataclasses import replace

import numpy as np
import pytest
from sacrebleu import BLEU

from headshare.evaluation.results import Metric, TaskResult
from headshare.evaluation.translation import counts_of_line
from headshare.experiments.cells import Compared, blocked_error
from headshare.experiments.report.claims import Says, checked
from headshare.experiments.report.figures import figures_of
from headshare.experiments.report.retained import left_out, retained, subjects
from headshare.experiments.report.scores import together

SAID = ("the cat sat on the mat", "a dog ran in the park today", "he has a red hat", "we go home now my friend")
MEANT = ("the cat sat on a mat", "the dog ran in a park today", "he has a very red hat", "we go home now my friends")


def of_right(method: str, ratio: float, right: str, *, chance: float = 0.25, task: str = "piqa") -> Compared:
    share = right.count("1") / len(right)
    error = math.sqrt(share * (1 - share) / (len(right) - 1))
    row = TaskResult(method, task, "k", {"acc": Metric(share, error)}, len(right), chance, right=right)
    return Compared(f"{method}{ratio}", method, ratio, int(1000 * ratio), results=(row,))


def translated(method: str, ratio: float, said: tuple[str, ...]) -> Compared:
    lines = tuple(counts_of_line(*pair) for pair in zip(said, MEANT, strict=True))
    bleu = BLEU().corpus_score(list(said), [list(MEANT)]).score
    row = TaskResult(method, "translation of x", "k", {"bleu": Metric(bleu, 5.0)}, len(said), lines=lines)
    return Compared(f"{method}{ratio}", method, ratio, int(1000 * ratio), results=(row,))


def test_the_error_of_independent_windows_is_the_plain_one_and_that_of_like_neighbours_is_larger() -> None:
    random = np.random.default_rng(0)
    plain = random.normal(size=(400, 64))
    blocked = [blocked_error(row.tolist()) for row in plain]
    assert np.mean(np.square(blocked)) == pytest.approx(1 / 64, rel=0.1)
    smooth = plain[:, 1:] + plain[:, :-1]  # neighbours correlate by a half
    truth = smooth.mean(axis=1).std()
    assert np.mean([blocked_error(row.tolist()) for row in smooth]) == pytest.approx(truth, rel=0.15)
    assert np.mean(smooth.std(axis=1, ddof=1)) / math.sqrt(63) < 0.8 * truth


def test_the_error_by_blocks_is_that_of_a_bootstrap_of_blocks() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=32).cumsum()
    starts = random.integers(32, size=(20_000, 8))
    means = values[(starts[..., None] + np.arange(4)) % 32].mean(axis=(1, 2))
    assert blocked_error(values.tolist()) == pytest.approx(means.std() * math.sqrt(32 / 28), rel=0.02)
    few = random.normal(size=5)
    assert blocked_error(few.tolist()) == pytest.approx(few.std(ddof=1) / math.sqrt(5))
    assert math.isnan(blocked_error([1.0]))


def test_questions_are_compared_one_by_one_where_their_outcomes_were_kept() -> None:
    one, other = "1" * 60 + "0" * 40, "1" * 50 + "0" * 50  # ten questions lost, none won
    cells = [of_right("directshare", 0.1, other), of_right("postshare", 0.1, one)]
    measured = together(cells)
    assert measured is not None
    more, error = measured.sum([1.0, -1.0])
    assert more == pytest.approx(0.1)
    assert error == pytest.approx(math.sqrt(0.1 * 0.9 / 100), rel=0.1)
    assert "100 questions, paired" in measured.rests
    (claim,) = [each for each in checked(cells) if "PostShare is above" in each.claim]
    assert claim.says is Says.HOLDS
    without = [replace(cell, results=tuple(replace(row, right="") for row in cell.results)) for cell in cells]
    (claim,) = [each for each in checked(without) if "PostShare is above" in each.claim]
    assert (claim.says, "not paired" in claim.rests) == (Says.OPEN, True)


def test_bleu_of_drawn_lines_is_sacrebleus() -> None:
    cells = [translated("directshare", 0.1, SAID), translated("postshare", 0.1, MEANT)]
    measured = together(cells)
    assert measured is not None
    more, error = measured.sum([1.0, -1.0])
    assert more == pytest.approx(100 - BLEU().corpus_score(list(SAID), [list(MEANT)]).score)
    random = np.random.default_rng(0)
    drawn = random.integers(4, size=(1000, 4))
    found = [
        100 - BLEU().corpus_score([SAID[at] for at in some], [[MEANT[at] for at in some]]).score for some in drawn[:300]
    ]
    assert error == pytest.approx(np.std(found), rel=0.15)
    assert measured.shown[1] == "BLEU 100.0"


def test_a_slope_tells_what_no_single_step_does() -> None:
    """BLEU 43.7, 41.9, 37.1, 18.1 and 1.4 is a fall."""
    values = zip((0.1, 0.2, 0.3, 0.4, 0.5), (43.7, 41.9, 37.1, 18.1, 1.4), strict=True)
    cells = []
    for ratio, bleu in values:
        row = TaskResult("m", "translation of x", "k", {"bleu": Metric(bleu, 1.4)}, 300)
        cells.append(Compared(f"{ratio}", "directshare", ratio, int(1000 * ratio), results=(row,)))
    (claim,) = [each for each in checked(cells) if "more sharing" in each.claim]
    assert claim.says is Says.HOLDS


def test_what_the_dense_model_guesses_decides_nothing_and_is_said() -> None:
    guessed = [
        of_right(name, ratio, "10" * 50, chance=0.5, task="rte")
        for name, ratio in (("dense", 0.0), ("directshare", 0.1))
    ]
    known = [
        of_right("dense", 0.0, "1" * 90 + "0" * 10, chance=0.5),
        of_right("directshare", 0.1, "1" * 70 + "0" * 30, chance=0.5),
    ]
    cells = [replace(one, results=one.results + other.results) for one, other in zip(guessed, known, strict=True)]
    cells.append(replace(cells[1], method="postshare", results=(guessed[1].results[0], known[0].results[0])))
    (claim,) = [each for each in checked(cells) if "PostShare is above" in each.claim]
    assert claim.rests.startswith("piqa:")
    assert left_out(cells) == (
        "Left out of verdicts, as the dense model is not two standard errors above guessing there: rte."
    )
    only = [replace(cell, results=cell.results[:1]) for cell in cells]
    assert checked(only) == []
    table = retained(cells)
    assert table is not None
    assert [row[1:] for row in table.rows] == [
        ["guessing", "", "71.4%", "0.0%"],
        ["directshare", "0.00%", "85.7%", "50.0%"],
        ["postshare", "0.00%", "100.0%", "100.0%"],
    ]


def test_the_papers_shares_are_those_of_sums() -> None:
    """Sections 5.2.1 and 5.2.2: 99.51 % of reasoning, and 87.53 % of the tasks of table 3 without the facts."""
    from headshare.experiments.reproduce import papers_tables

    first = papers_tables()[0]
    assert sum(first.rows["directshare 0.3"]) / sum(first.rows["dense"]) == pytest.approx(0.9951, abs=5e-5)
    (third,) = [table for table in papers_tables() if table.table == "3"]
    assert sum(third.rows["postshare 0.3"][:-1]) / sum(third.rows["dense"][:-1]) == pytest.approx(0.8753, abs=5e-5)


def test_subjects_of_an_exam_have_a_table() -> None:
    cells = [of_right("dense", 0.0, "1100", task="mmlu:5"), of_right("directshare", 0.3, "1000", task="mmlu:5")]
    parts = ({"mmlu_law": (0.5, 2), "mmlu_art": (0.5, 2)}, {"mmlu_law": (0.5, 2), "mmlu_art": (0.0, 2)})
    cells = [
        replace(cell, results=tuple(replace(row, parts=of) for row in cell.results))
        for cell, of in zip(cells, parts, strict=True)
    ]
    ((words, table),) = subjects(cells)
    assert "Of 2 subjects, as good as dense or better: directshare 0.3 1." in words
    assert table.rows == [["law", "2", "50", "50"], ["art", "2", "50", "0"]]
    (figure,) = [each for each in figures_of(cells) if each.kind == "subjects"]
    said = [text.text for text in figure.panels[0].root.iter("text")]
    assert [said[said.index(name) + 1] for name in ("law", "art")] == ["50 to 50", "50 to 0"]
    assert {"mmlu:5, directshare 0.3", "guessing"} <= set(said)


def test_four_bits_may_cost_five_points_and_no_more() -> None:
    dense = of_right("dense", 0.0, "1" * 380 + "0" * 20)
    plain = of_right("directshare", 0.3, "1" * 320 + "0" * 80)
    for lost, wanted in ((2, Says.HOLDS), (20, Says.OPEN), (80, Says.FAILS)):
        rounded = of_right("directshare+gptq4", 0.3, "1" * (320 - lost) + "0" * (80 + lost))
        (claim,) = [each for each in checked([dense, plain, rounded]) if "5 points" in each.claim]
        assert claim.says is wanted


def test_layers_that_give_up_alike_shares_correlate() -> None:
    shares = (0.0, 0.1, 0.5, 0.9, 0.3, 0.2, 0.6, 0.8)
    cells = [
        replace(
            Compared(f"{ratio}", "directshare", ratio, losses=(1.0, 1.0)), by_layer=tuple(ratio * x for x in shares)
        )
        for ratio in (0.1, 0.2)
    ]
    heads = replace(cells[0], method="headwise")
    layers = replace(cells[0], method="layerwise", by_layer=(0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    said = {(each.claim, each.says) for each in checked([*cells, layers, heads])}
    assert ("layers give up alike shares of their heads at all ratios", Says.HOLDS) in said
    assert ("heads are given up evenly over layers", Says.HOLDS) in said
    other = replace(cells[1], by_layer=tuple(reversed(cells[1].by_layer)))
    assert ("layers give up alike shares of their heads at all ratios", Says.OPEN) in {
        (each.claim, each.says) for each in checked([cells[0], other])
    }
