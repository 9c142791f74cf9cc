"""Claims follow from numbers, and the page holds what was measured."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest

import headshare as hs
from headshare.attention.result import FILE
from headshare.errors import EvaluationError
from headshare.evaluation import EvalText, measure
from headshare.evaluation.results import Metric
from headshare.evaluation.results import TaskResult as Row
from headshare.evaluation.task_files import TASKS
from headshare.experiments import METHODS, Compared, Grid, compare
from headshare.experiments.about import About
from headshare.experiments.case import base_of
from headshare.experiments.report.claims import Checked, Says, checked
from headshare.experiments.report.content import report_of
from headshare.experiments.report.figures import figures_of
from headshare.experiments.report.groups import groups
from headshare.experiments.report.page import as_html, as_markdown
from headshare.experiments.report.sources import Comparison, Published, published
from headshare.pages.figures import save_figures
from headshare.plan.describe import given_up
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.training import TrainSettings
from support import tiny
from support.command_line import Run

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "recipes" / "published" / "2402.11819.yaml"


def cell(method: str, ratio: float, *losses: float, failed: str = "") -> Compared:
    saved = int(1000 * ratio)
    return Compared(f"{method}{ratio}", method, ratio, saved, losses=losses, divergences=losses, failed=failed)


def scored(method: str, ratio: float, share: float, error: float | None) -> Compared:
    row = Row(method, "piqa", "k", {"acc": Metric(share, error)}, 100, 0.5)
    return Compared(f"{method}{ratio}", method, ratio, int(1000 * ratio), results=(row,))


def translated(method: str, ratio: float, bleu: float, error: float | None) -> Compared:
    row = Row(method, "translation of en", "k", {"bleu": Metric(bleu, error), "meteor": Metric(1.0)}, 100)
    return Compared(f"{method}{ratio}", method, ratio, int(1000 * ratio), results=(row,))


def says(cells: list[Compared], words: str) -> list[tuple[str, Says]]:
    return [(one.where, one.says) for one in checked(cells) if words in one.claim]


def test_the_papers_match_holds_where_no_other_is_better_by_two_errors() -> None:
    worse, level, better = (2.0, 2.2, 2.1), (1.0, 1.3, 1.1), (0.5, 0.61, 0.6)
    paper = cell("directshare", 0.3, 1.0, 1.2, 1.1)
    for others, wanted in (([worse], Says.HOLDS), ([worse, level], Says.LEVEL), ([worse, better], Says.FAILS)):
        cells = [paper, *(cell(f"match-{name}", 0.3, *one) for name, one in zip("kv", others, strict=False))]
        assert says(cells, "to match by") == [("0.3", wanted)]
    refitted = cell("match-k+refit", 0.3, 0.1, 0.1, 0.1)
    assert says([paper, cell("match-v", 0.3, *worse), refitted], "to match by") == [("0.3", Says.HOLDS)]
    assert says([paper], "to match by") == says([cell("match-k", 0.3, 1.0, 2.0)], "to match by") == []


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [("match-separate", "directshare", "by itself is worse"), ("directshare", "postshare", "PostShare is above")],
)
def test_a_method_that_is_said_to_be_worse_must_be_so_by_two_errors(first: str, second: str, words: str) -> None:
    for losses, wanted in (((2.0, 2.1, 2.2), Says.HOLDS), ((0.1, 0.2, 0.2), Says.FAILS), ((1.2, 1.0, 1.1), Says.OPEN)):
        assert says([cell(first, 0.1, *losses), cell(second, 0.1, 1.0, 1.2, 1.1)], words) == [("0.1", wanted)]
    for share, wanted in ((0.4, Says.HOLDS), (0.6, Says.FAILS), (0.49, Says.OPEN)):
        assert says([scored(first, 0.1, share, 0.02), scored(second, 0.1, 0.5, 0.02)], words) == [("0.1", wanted)]
    assert says([scored(first, 0.1, 0.4, None), scored(second, 0.1, 0.5, 0.02)], words) == [("0.1", Says.OPEN)]
    for bleu, wanted in ((20.0, Says.HOLDS), (24.0, Says.FAILS), (21.9, Says.OPEN)):
        cells = [translated(first, 0.1, bleu, 0.3), translated(second, 0.1, 22.0, 0.3)]
        assert says(cells, words) == [("0.1", wanted)]
        assert f"{first} BLEU {bleu:.1f}, {second} BLEU 22.0" in [one.evidence for one in checked(cells)]
    assert says([cell(first, 0.1, 2.0), cell(second, 0.1, 1.0)], words) == [
        ("0.1", Says.OPEN)
    ]  # no error of one window


def test_decay_is_of_each_method_over_its_ratios_in_order() -> None:
    cells = [cell("auto", 0.3, 2.0, 2.1), cell("auto", 0.1, 1.0, 1.1), cell("int8", 0.1, 1.0, 1.1)]
    assert says(cells, "less quality") == [("auto", Says.HOLDS)]
    cells.append(cell("auto", 0.5, 1.5, 1.61))
    assert says(cells, "less quality") == [("auto", Says.FAILS)]
    assert [one.evidence for one in checked(cells)] == ["2.858 at 0.1, 7.768 at 0.3, 4.735 at 0.5"]
    assert says([cell("deletion", 0.1, 1.0, 1.1), cell("deletion", 0.3, 2.0, 2.1)], "less quality") == []
    failed = cell("auto", 0.5, failed="no")
    assert says([*cells[:2], failed], "less quality") == [("auto", Says.HOLDS)]


def test_four_bits_are_held_against_what_sharing_lost() -> None:
    dense, plain = cell("dense", 0.0, 1.0, 1.1, 1.3), cell("directshare", 0.1, 2.0, 2.2, 2.3)
    for lost, wanted in ((0.1, Says.HOLDS), (3.0, Says.FAILS), (1.0, Says.OPEN)):
        rounded = cell("directshare+gptq4", 0.1, 2.0 + lost, 2.2 + lost * 1.01, 2.3 + lost * 1.02)
        assert says([dense, plain, rounded], "4 bits") == [("0.1", wanted)]
    assert says([plain, rounded], "4 bits") == says([dense, plain], "4 bits") == []


def report(measured: list[Comparison], tables: Sequence[Published] = ()) -> str:
    return as_markdown(report_of(measured, tables))


def about(model: str = "Llama-2-7b-hf", *cells: Compared) -> About:
    return About("A title", model, "test.txt", "", "", 200, {"headshare": "1"}, tuple(one.key for one in cells))


def test_the_page_has_tables_claims_and_the_papers_figures_of_the_same_model() -> None:
    cells = [cell("dense", 0.0, 0.1, 0.1), scored("directshare", 0.1, 0.4, 0.02), scored("postshare", 0.1, 0.5, 0.02)]
    tables = [
        Published(table="3", model="llama-2-7B-hf", tasks=("piqa", "rte"), rows={"directshare 0.1": (61.25, 50.0)}),
        Published(table="10", model="another", tasks=("piqa",), rows={"directshare 0.1": (99.0,)}),
    ]
    page = report([Comparison(about("Llama-2-7b-hf", *cells), cells)], tables)
    assert "## A title, on Llama-2-7b-hf\n" in page
    assert "the first 200 questions" in page
    assert "| directshare 0.1 | 40.00 / 61.25 |" in page
    assert "rte" not in page
    assert "99.0" not in page
    assert "| PostShare is above DirectShare | Llama-2-7b-hf | holds: 1 |" in page
    assert "| PostShare is above DirectShare | 0.1 | holds | directshare 40.0 %, postshare 50.0 % |" in page
    assert "No claim" in report([Comparison(about(), cells[:1])])
    assert "\n\n\n" not in page + page_of(cells[1:])
    worse = [*cells[:2], scored("postshare", 0.1, 0.1, 0.02)]
    twice = report([Comparison(about("a", *these), these) for these in (cells, cells, worse)])
    assert "| PostShare is above DirectShare | a | does not hold: 1, holds: 1 |" in twice
    shot = [replace(one, results=tuple(replace(row, task=f"{row.task}:5") for row in one.results)) for one in cells]
    assert "| directshare 0.1 | 40.00 / 61.25 |" in report([Comparison(about("Llama-2-7b-hf", *shot), shot)], tables)


def page_of(*tables: list[Compared]) -> str:
    return report([Comparison(about("a", *cells), cells) for cells in tables])


def test_what_several_comparisons_measured_alike_counts_once() -> None:
    """A method over some of its ratios and over others is the same method; its rivals stand in any of them."""
    dense, *shared = (
        cell("directshare" if ratio else "dense", ratio, 1.0 + ratio, 1.1 + ratio)
        for ratio in (0.0, 0.1, 0.2, 0.3, 0.4)
    )
    rival = cell("match-k", 0.1, 2.0, 2.1)
    tables = (
        [dense, *shared[:2]],
        [dense, shared[0], *shared[2:]],
        [dense, *shared[1:3]],
        [dense, rival],
        [dense, rival],
    )
    page = page_of(*tables)
    assert "| more sharing, less quality | a | holds: 1 |" in page
    assert "| q and k together are the best to match by | a | holds: 1 |" in page


def test_what_is_told_alike_but_measured_otherwise_counts_apart() -> None:
    methods = (("dense", 0.0, 0.7), ("directshare", 0.1, 0.4), ("postshare", 0.1, 0.5))
    one = [scored(method, ratio, share, 0.02) for method, ratio, share in methods]
    other = [replace(cell, results=tuple(replace(row, task="rte") for row in cell.results)) for cell in one]
    assert "| PostShare is above DirectShare | a | holds: 2 |" in page_of(one, other, one)
    text = [cell(method, ratio, *losses) for method, ratio, losses in
            (("dense", 0.0, (1.0, 2.0)), ("directshare", 0.1, (3.0, 4.0)), ("postshare", 0.1, (2.0, 3.0)))]  # fmt: skip
    again = [*text[:2], cell("postshare", 0.1, 2.00001, 3.00001)]
    assert "| PostShare is above DirectShare | a | holds: 2 |" in page_of(text, again, again)
    deeper = cell("directshare", 0.3, 5.0, 6.0)
    failed = [*text[:2], deeper, cell("postshare", 0.1, failed="no")]
    assert "| more sharing, less quality | a | holds: 1 |" in page_of(failed, [*text, deeper])


def test_a_page_of_several_models_counts_each() -> None:
    cells = [cell("dense", 0.0, 1.0, 2.0), cell("directshare", 0.1, 3.0, 4.0), cell("postshare", 0.1, 2.0, 3.0)]
    page = report([Comparison(about(model, *cells), cells) for model in ("a", "b")])
    assert all(f"| PostShare is above DirectShare | {model} | holds: 1 |" in page for model in "ab")


def test_the_published_figures_are_of_methods_and_tasks_that_there_are() -> None:
    found = published(PUBLISHED)
    assert {one.table for one in found} == {"1", "2", "3", "4", "5", "7", "8", "9", "10", "12"}
    for one in found:
        assert set(one.tasks) <= set(TASKS)
        assert {base_of(name.partition(" ")[0]) for name in one.rows} <= {"dense", *METHODS}


def test_the_command_writes_the_page_of_finished_comparisons(command, place: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    grid = Grid(("directshare", "match-separate"), (0.25, 0.5), text=EvalText(place / "test", 32))
    compare(hs.open_checkpoint(place / "model"), grid, tmp_path / "done", title="Matches")
    status, out, _ = command("report", tmp_path / "done", "--out", tmp_path / "page.md", "--paper", PUBLISHED)
    assert status == 0
    assert (tmp_path / "page.md").read_text() == out
    assert (tmp_path / "done" / "table.md").read_text().split("\n\n")[0] in out
    assert "matching q, k and v each by itself is worse" in out
    assert str(tmp_path) not in out
    found = json.loads(command("report", tmp_path / "done", "--json")[1])["tables"]
    assert [one["title"] for one in found] == ["Matches"]
    assert {one["says"] for one in found[0]["claims"]} <= set(Says)


def test_results_of_eval_stand_on_the_page_too(place: Path, tmp_path: Path, command: Callable) -> None:
    text = EvalText(place / "test", 32)
    rows = measure([place / "model"], text=text, out=tmp_path / "evaluated")
    status, out, _ = command("report", tmp_path / "evaluated")
    assert status == 0
    assert "## evaluated" in out
    assert f"| model | {rows[0].in_cell} |" in out
    assert str(tmp_path) not in out
    grid = Grid(("directshare",), (0.5,), text=text)
    compare(hs.open_checkpoint(place / "model"), grid, tmp_path / "evaluated", title="Both")
    page = command("report", tmp_path / "evaluated")[1]
    assert page.index("## Both") < page.index("## evaluated")
    assert f"| model | {rows[0].in_cell} |" in page
    (tmp_path / "evaluated" / "about.json").unlink()
    (tmp_path / "evaluated/results.json").write_text("[1]")
    status, _, said = command("report", tmp_path / "evaluated")
    assert status == 1
    assert "holds no results" in said


def test_what_is_no_finished_comparison_is_one_error(command, place: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert command("report", tmp_path)[0] == 1
    grid = Grid(("directshare",), (0.5,), text=EvalText(place / "test", 32))
    compare(hs.open_checkpoint(place / "model"), grid, tmp_path / "done")
    (tmp_path / "bad.yaml").write_text("- table: 1\n")
    status, out, err = command("report", tmp_path / "done", "--paper", tmp_path / "bad.yaml")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "holds no tables" in err
    for bad in ("- 2001-99-99", "[" * 3000, '- {table: "1", model: m, tasks: [piqa], rows: {dense: [.nan]}}',
                '- {table: "1", model: "m\\e[31m", tasks: [piqa], rows: {dense: [1.0]}}'):  # fmt: skip
        (tmp_path / "bad.yaml").write_text(bad)
        status, out, err = command("report", tmp_path / "done", "--paper", tmp_path / "bad.yaml")
        assert (status, out, err.count("\n")) == (1, "", 1)
    (tmp_path / "short.yaml").write_text('- {table: "1", model: m, tasks: [piqa, rte], rows: {dense: [1.0]}}\n')
    assert "another number in dense" in command("report", tmp_path / "done", "--paper", tmp_path / "short.yaml")[2]
    about_ = (tmp_path / "done" / "about.json").read_text()
    (tmp_path / "done" / "about.json").write_text(about_.replace('"title": ""', '"title": "a\\u001b[31m"'))
    assert "cannot be shown" in command("report", tmp_path / "done")[2]
    (tmp_path / "done" / "about.json").write_text(about_)
    assert "could not be written" in command("report", tmp_path / "done", "--figures", tmp_path / "bad.yaml")[2]
    good = (tmp_path / "done" / "cells.json").read_text()
    for wrong, says in (({"method": "a\x1b[31m"}, "cannot be shown"), ({"note": "a | b"}, "cannot be shown"),
                        ({"curve": [{"step": 1.0}]}, "holds no cells"),
                        ({"results": [{"model": "m", "task": "t", "key": "k", "metrics": {}, "questions": 1}]},
                         "holds no cells")):  # fmt: skip
        first, *others = json.loads(good)
        (tmp_path / "done" / "cells.json").write_text(json.dumps([{**first, **wrong}, *others]))
        status, out, err = command("report", tmp_path / "done")
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert says in err
    (tmp_path / "done" / "cells.json").write_text(good)
    cells = json.loads((tmp_path / "done" / "cells.json").read_text())
    (tmp_path / "done" / "cells.json").write_text(json.dumps(cells[:1]))
    with pytest.raises(EvaluationError, match="lacks 1 cells"):
        Comparison.load(tmp_path / "done")


def test_a_page_is_written_over_a_page_and_over_nothing_else(place: Path, tmp_path: Path, command: Callable) -> None:
    measure([place / "model"], text=EvalText(place / "test", 32), out=tmp_path / "evaluated")
    page = tmp_path / "page.md"
    words = ["report", tmp_path / "evaluated", "--out", page]
    assert [command(*words)[0] for _ in range(2)] == [0, 0]
    page.write_text("my own notes")
    status, _, said = command(*words)
    assert status == 1
    assert "is no page that `report` wrote" in said
    assert page.read_text() == "my own notes"


def test_evidence_names_both_sides() -> None:
    found = checked([cell("directshare", 0.1, 1.0, 1.1), cell("match-k", 0.1, 2.0, 2.1)])
    assert found == [
        Checked(found[0].claim, "0.1", Says.HOLDS, "directshare 2.858, match-k 7.768", "2 windows of text")
    ]


# ---- figures


def test_figures_show_what_there_is(place: Path, tmp_path: Path, command: Callable) -> None:
    """Points of quality for every method, a row of layers for every plan, a curve for each training run."""
    run = TrainSettings.made(
        {"method": "postshare", "text": {"data": str(place / "calibration"), "context": 16, "held_out": 4},
         "learning": {"arguments": {"max_steps": 3, "use_cpu": True}}}
    )  # fmt: skip
    names = ("directshare", "deletion-same", "postshare", "int8")
    dense = hs.open_checkpoint(place / "model")
    grid = Grid(names, (0.25, 0.5), text=EvalText(place / "test", 32), training=run)
    cells = compare(dense, grid, tmp_path / "cells")
    plan = hs.make_plan(hs.score_units(dense), 0.5)
    by_name = {(cell.method, cell.ratio): cell for cell in cells}
    given = [sum(tie.recipient.layer == layer for tie in plan.selections[0].ties) / 2 for layer in range(4)]
    assert by_name["directshare", 0.5].by_layer == by_name["postshare", 0.5].by_layer == tuple(given)
    assert sum(by_name["deletion-same", 0.5].by_layer) > 0
    assert by_name["int8", 0.0].by_layer == ()
    assert [row["step"] for row in by_name["postshare", 0.5].curve] == [0, 1, 2, 3]
    page = tmp_path / "pages" / "page.md"
    page.parent.mkdir()
    words = ("report", str(tmp_path / "cells"), "--out", str(page), "--figures", str(tmp_path / "drawn"))
    assert command(*words)[0] == 0
    for kind, texts in (
        ("quality", ["directshare", "int8", "perplexity", "saved"]),
        ("layers", ["directshare, deletion-same, postshare 0.25", "deletion-same 0.5"]),
        ("curves", ["postshare 0.5", "steps"]),
    ):
        drawn = (tmp_path / "drawn" / f"1-{kind}.svg").read_text()
        assert all(text in drawn for text in texts)
        assert f"](../drawn/1-{kind}.svg)" in page.read_text()
    assert "int8" not in (tmp_path / "drawn/1-layers.svg").read_text()


def drawn(cells: Sequence[Compared], kind: str) -> list[Element]:
    """The panels of a figure of this kind; none where it is not drawn."""
    return [panel.root for figure in figures_of(cells) if figure.kind == kind for panel in figure.panels]


def words(panel: Element) -> list[str]:
    """All that is written in a panel, from its title on."""
    return [text.text or "" for text in panel.iter("text")]


def tips(panel: Element) -> list[str]:
    """All that is told where a mouse rests: each mark's line and numbers."""
    return [tip.text or "" for tip in panel.iter("title")]


def test_accuracies_have_a_panel_of_their_own() -> None:
    curve = tuple({"step": float(step), "loss": 2.0 - step / 10, "piqa_acc": 0.5 + step / 20} for step in range(3))
    loss, accuracies = drawn([replace(cell("postshare", 0.3, 1.0, 2.0), curve=curve)], "curves")
    assert "postshare 0.3" in words(loss)
    assert {"postshare 0.3", "accuracy, %", "piqa", "steps"} <= set(words(accuracies))
    assert "piqa: 55 at 1" in tips(accuracies)
    assert not {"0.5", "1.5"} & set(words(accuracies))
    assert figures_of([cell("int8", 0.3, failed="no")]) == []


def test_shares_are_drawn_a_row_a_method_with_its_values_beside_it() -> None:
    cells = [cell("dense", 0.0, 1.0, 1.0)]
    for name, loss in (("svd-llm", 1.9), ("flap", 1.5), ("flap+refit", 1.2)):
        cells.append(replace(cell(name, 0.0, loss, loss), save=0.2))
    (panel,) = drawn(cells, "shares")
    low, high = (f"{math.exp(more):.2f}" for more in (0.2, 0.5))
    said = words(panel)
    assert said[0] == "20 % of the bytes saved"
    assert [said[said.index(name) + 1] for name in ("flap", "svd-llm")] == [f"{low} to {high}", "2.46"]
    assert said.index("flap") < said.index("svd-llm")
    assert drawn(cells[:1], "shares") == []


def test_quality_is_drawn_against_bytes_and_what_rounds_apart() -> None:
    cells = [
        cell("dense", 0.0, 1.0),
        cell("directshare", 0.3, 2.0),
        cell("directshare", 0.1, 0.5),
        cell("int8", 0.0, 1.0),
    ]
    left, right = drawn([replace(one, saved_fraction=one.ratio / 10) for one in cells], "quality")
    assert words(left)[0] == "Not rounded"
    assert {"dense", "directshare"} <= set(words(left))
    assert [tip for tip in tips(left) if " at " in tip] == [
        f"directshare: {math.exp(loss):.6g} at {at}" for loss, at in ((0.5, 1), (2.0, 3))
    ]
    assert words(right)[0] == "Rounded"
    assert {"dense", "int8", "2.718, 0.0 % saved"} <= set(words(right))


def test_each_task_is_drawn_beside_the_dense_model_and_guessing() -> None:
    """Against the ratio; with one ratio, method below method."""
    cells = [
        scored("dense", 0.0, 0.7, 0.05),
        scored("directshare", 0.1, 0.6, 0.02),
        scored("directshare", 0.3, 0.4, 0.02),
    ]
    (panel,) = drawn([*cells, scored("int8", 0.0, 0.69, 0.05)], "tasks")
    assert {"piqa", "accuracy, %", "ratio", "dense", "guessing", "int8", "directshare"} <= set(words(panel))
    assert {"dense: 70", "guessing: 50", "int8: 69", "directshare: 60 at 0.1", "directshare: 40 at 0.3"} <= set(
        tips(panel)
    )
    (band,) = panel.iter("rect")
    heights = {tip: float(line.get("y1", "")) for line in panel.iter("line") for tip in [line.get("stroke-dasharray")]}
    assert float(band.get("height", "")) > 0
    assert heights
    (panel,) = drawn([cells[0], cells[1], scored("postshare", 0.1, 0.65, 0.02)], "tasks")
    assert words(panel)[0] == "piqa"
    assert {"directshare", "60.0", "postshare", "65.0", "dense", "guessing"} <= set(words(panel))
    assert "postshare: 65 ± 2" in tips(panel)


def test_translations_are_drawn_by_their_own_metric() -> None:
    (panel,) = drawn([translated("dense", 0.0, 30.0, 1.0), translated("directshare", 0.1, 20.0, 1.0)], "tasks")
    assert {"translation of en", "BLEU", "20.0"} <= set(words(panel))
    assert "guessing" not in words(panel)


def test_no_panel_has_more_than_eight_lines_and_every_method_has_one() -> None:
    methods = [name + last for name in METHODS for last in ("", "+refit")]
    parts = groups(methods)
    assert sorted(name for part in parts.values() for name in part) == sorted(methods)
    assert max(map(len, parts.values())) <= 8
    assert groups(["directshare", "auto"]) == {"": ["directshare", "auto"]}
    cells = [cell("dense", 0.0, 1.0), *(cell(name, ratio, 1 + ratio) for name in methods for ratio in (0.1, 0.2))]
    panels = drawn(cells, "quality")
    assert [words(panel)[0] for panel in panels] == list(parts)
    assert max(sum(one.tag == "polyline" for one in panel.iter()) for panel in panels) <= 8


def test_methods_that_give_up_the_same_are_one_row_that_names_them_all() -> None:
    cells = [replace(cell(name, 0.1, 1.0), by_layer=(0.0, 0.5)) for name in METHODS]
    cells += [replace(one, method=f"{one.method}+refit") for one in cells]
    (panel,) = drawn(cells, "layers")
    assert words(panel)[0] in tips(panel) or "…" in words(panel)[0]
    assert f"{', '.join(METHODS)} 0.1" in tips(panel)
    assert "layer 1: 50%" in tips(panel)
    many = [replace(cell("auto", ratio / 10, 1.0), by_layer=(0.0, ratio / 10)) for ratio in range(1, 10)]
    assert [words(one)[0] for one in drawn(many, "layers")] == [f"At 0.{number}" for number in range(1, 10)]


def test_figures_are_files_with_a_background_of_their_own(tmp_path: Path) -> None:
    figures = figures_of([cell("dense", 0.0, 1.0), cell("directshare", 0.3, 2.0)])
    ((title, path),) = save_figures(figures, tmp_path, "x")
    assert (path.name, title.split(".")[0]) == ("x-quality.svg", "Perplexity against the bytes that are saved")
    root = fromstring(path.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert [one.get("fill") for one in root][1] == "#ffffff"


# ---- the page in HTML


def test_the_html_page_needs_no_other_file_and_escapes_what_strangers_wrote() -> None:
    hostile = "<script>alert(1)</script>"
    also = '"><img src=x onerror=alert(1)>&amp;'
    cells = [cell("dense", 0.0, 0.1, 0.1), scored("directshare", 0.1, 0.4, 0.02), scored("postshare", 0.1, 0.5, 0.02)]
    cells = [replace(one, note=hostile, results=tuple(replace(row, task=also) for row in one.results)) for one in cells]
    cells.append(replace(cell("int8", 0.0, 1.0, 1.0), method=hostile))
    described = replace(about(hostile, *cells), title=also, versions={hostile: also})
    table = Published(table=hostile, model=hostile, tasks=(also,), rows={"directshare 0.1": (61.25,)})
    page = as_html(report_of([Comparison(described, cells)], [table]))
    assert page.count("<script>") == 1  # that which sorts tables
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)
    assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)


def test_the_html_page_says_what_the_markdown_says(place: Path, tmp_path: Path, command: Callable) -> None:
    grid = Grid(("directshare", "match-separate"), (0.25, 0.5), text=EvalText(place / "test", 32))
    compare(hs.open_checkpoint(place / "model"), grid, tmp_path / "done", title="Matches")
    page = tmp_path / "page.html"
    for _ in range(2):  # over a page too
        assert command("report", tmp_path / "done", "--html", page)[0] == 0
    html = page.read_text()
    assert html.startswith("<!doctype html>")
    assert "matching q, k and v each by itself is worse" in html
    cells = json.loads((tmp_path / "done" / "cells.json").read_text())
    assert all(f"{one['saved_fraction']:.2%}" in html for one in cells)
    assert str(tmp_path) not in html
    page.write_text("<p>my own notes</p>")
    status, _, said = command("report", tmp_path / "done", "--html", page)
    assert status == 1
    assert "is no page that headshare wrote" in said
    assert page.read_text() == "<p>my own notes</p>"


def test_what_a_layer_gives_up_is_tied_removed_or_factored(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "model"))
    layout = dense.layouts.attention
    removal = Removal(layout=layout, removed={2: [0]})
    (selection,) = hs.make_plan(hs.score_units(dense), 0.2).selections
    plan = SharePlan(model_type="llama", selections=(selection,), removals=(removal,))
    (tie,) = selection.ties
    wanted = [0.0, 0.0, 0.0, 0.0]
    wanted[2] += 0.5
    wanted[tie.recipient.layer] += 0.5 if tie.recipient != (2, 0) else 0.0
    assert given_up(plan) == wanted
    assert given_up(SharePlan()) == []


def test_the_page_of_results_is_what_the_measurements_say(run: Run, tmp_path: Path) -> None:
    """`make results` would change nothing."""
    measured = (ROOT / "results" / "measured").iterdir()
    folders = sorted(path for path in measured if (path / "cells.json").exists() or (path / FILE).exists())
    made = {"--figures": tmp_path / "figures", "--out": tmp_path / "README.md", "--html": tmp_path / "report.html"}
    options = [word for option in made.items() for word in option]
    assert run("report", *folders, "--paper", PUBLISHED, *options).status == 0
    results = ROOT / "results"
    assert made["--out"].read_text() == (results / "README.md").read_text()
    assert made["--html"].read_text() == (results / "report.html").read_text()
    figures, kept = (
        {path.name: path.read_text() for path in where.iterdir()} for where in (made["--figures"], results / "figures")
    )
    assert figures == kept


def test_the_page_of_what_holds_has_every_claim_that_was_judged() -> None:
    """And where a claim's verdicts are counted there, they are those of the results."""
    page = (ROOT / "docs" / "holds.md").read_text()
    results = (ROOT / "results" / "README.md").read_text().partition("\n* ")[0]
    found = re.findall(r"^\| (.+?) \| (smollm2-135m|stories15m) \| (.+?) \|$", results, re.M)
    assert len(found) > 10
    for claim, model, verdicts in found:
        if "not the paper's words" in claim:
            continue
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {claim} |")]
        said = line.split("|")[3 if model == "smollm2-135m" else 4]
        counts = dict(re.findall(r"(\w[\w ]*?): (\d+)", verdicts))
        for verdict, count, whole in re.findall(r"(\w[\w ]*?): (\d+) of (\d+)", said):
            word = {"better": "holds"}.get(verdict.strip(), verdict.strip())
            assert (counts[word], sum(map(int, counts.values()))) == (count, int(whole)), line
