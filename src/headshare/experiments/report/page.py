"""The page of a report: the tables of comparisons, the paper's figures for the same models, and its claims checked."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from headshare.errors import OutputError
from headshare.evaluation.harness import named
from headshare.evaluation.results import table_of
from headshare.experiments.about import About
from headshare.experiments.cells import Asked, Compared
from headshare.experiments.report.claims import ACCURACY, Checked, checked
from headshare.experiments.report.sources import Comparison, Evaluated, Published
from headshare.experiments.report.tables import in_words
from headshare.files.failures import explain

# the first line of a page
TITLE = "# Results"


def check_page(out: Path) -> None:
    """Refuse to write a page over a file that is none.

    Raises:
        OutputError: if there is one.
    """
    try:
        heading = out.read_bytes().split(b"\n", 1)[0] if out.exists() else TITLE.encode()
    except OSError as error:
        raise OutputError(explain(error, out)) from None
    if heading != TITLE.encode():
        raise OutputError(f"{out} is no page that `report` wrote. Move it, or write elsewhere.")


def report(
    measured: Sequence[Comparison],
    tables: Sequence[Published] = (),
    figures: Sequence[Sequence[tuple[str, str]]] = (),
    evaluated: Sequence[Evaluated] = (),
) -> str:
    """The page of a report in Markdown.

    `figures` holds for each comparison the titles and addresses of its figures. Results of `headshare eval`,
    `evaluated`, come last.
    """
    lines = [TITLE, "", *_summary(measured)]
    for comparison, shown in zip_longest(measured, figures, fillvalue=()):
        assert isinstance(comparison, Comparison)
        heading = (
            f"{comparison.about.title}, on {comparison.about.model}"
            if comparison.about.title
            else comparison.about.model
        )
        lines += ["", f"## {heading}", "", _about(comparison.about), "", in_words(comparison.cells)]
        lines += [*_beside(comparison, tables), *_claims(checked(comparison.cells))]
        lines += [line for title, address in shown for line in ("", f"![{title}]({address})")]
    for results in evaluated:
        lines += ["", f"## {results.title}", "", table_of(results.rows)]
    return "\n".join(lines).rstrip() + "\n"


def _about(about: About) -> str:
    parts = [f"{about.model}"]
    parts += [f"measured on {about.text}"] if about.text else []
    parts += [f"the first {about.limit} questions of each task or subject"] if about.limit else []
    parts += [f"run in {about.dtype}"] if about.dtype else []
    parts += [f"{about.few_shot} examples before each"] if about.few_shot is not None else []
    parts += [f"calibrated on {about.calibration}"] if about.calibration else []
    parts += [f"trained on {about.training}"] if about.training else []
    return "; ".join([*parts, ", ".join(f"{name} {value}" for name, value in about.versions.items())]) + "."


# the rules by which claims are judged, as the page lists them
JUDGED = (
    "What decides is the mean difference of the losses on the same windows of the text, from two standard errors on; "
    "without a text, that of the mean accuracy or BLEU, as if each had been asked other questions. What differs by "
    "less is level, or cannot be told.",
    "The best of several rivals is chosen on those windows too, which favours it. Errors are of the text alone, not of "
    "the seed of a training run or of a draw.",
    "More sharing has less quality where that is so from each ratio to the next.",
    "What was trained has read text that neither the dense model nor what was not trained has.",
    "In tables, `~` is before an accuracy that is not two standard errors above guessing or, where that is more, above "
    "always the same answer: the row `guessing` has both.",
)


def _summary(measured: Sequence[Comparison]) -> list[str]:
    """Summary of the claims: how often each holds by model, and the rules. Comparisons of the same cells count once."""
    counted: dict[str, dict[str, Counter[str]]] = {}
    for model, cells in _pooled(measured):
        for claim in checked(cells):
            counted.setdefault(claim.claim, {}).setdefault(model, Counter())[claim.says.value] += 1
    if not counted:
        return ["No claim of the paper can be checked on these tables."]
    lines = [
        "What the paper says, and at how many ratios, or of how many methods, it holds here. Comparisons that agree in "
        "all that both measured are one; those on other windows are not.",
        "",
    ]
    lines += ["| claim | model | |", "|---|---|---|"]
    lines += [
        f"| {claim} | {model} | {', '.join(f'{says}: {count}' for says, count in sorted(counts.items()))} |"
        for claim, by_model in counted.items()
        for model, counts in by_model.items()
    ]
    return [*lines, "", *(f"* {rule}" for rule in JUDGED)]


def _pooled(measured: Sequence[Comparison]) -> list[tuple[str, list[Compared]]]:
    """Pairs of a model and the cells of its comparisons.

    Comparisons of a model are merged if they have cells in common and agree in all of them; others stay apart.
    """
    pools: list[tuple[str, dict[tuple[str, Asked], Compared]]] = []
    for comparison in measured:
        cells = {(cell.method, cell.asked): cell for cell in comparison.cells if not cell.failed}
        for model, pool in pools:
            both = pool.keys() & cells.keys()
            agree = bool(both) and all(_results_of(pool[key]) == _results_of(cells[key]) for key in both)
            if model == comparison.about.model and agree:
                pool |= cells
                break
        else:
            pools.append((comparison.about.model, cells))
    return [(model, list(pool.values())) for model, pool in pools]


def _results_of(cell: Compared) -> object:
    """The results that claims are judged by: losses, or without a text the metrics of tasks."""
    return cell.losses or [(row.task, row.metrics) for row in cell.results]


def _claims(claims: Sequence[Checked]) -> list[str]:
    if not claims:
        return []
    lines = ["", "| claim | at, or of | says | figures |", "|---|---|---|---|"]
    return lines + [f"| {claim.claim} | {claim.where} | {claim.says.value} | {claim.evidence} |" for claim in claims]


def _beside(comparison: Comparison, tables: Sequence[Published]) -> list[str]:
    """Tables of our accuracies beside the paper's, in percent, if the paper has this model."""
    lines: list[str] = []
    for table in (table for table in tables if table.model.casefold() == comparison.about.model.casefold()):
        ours = {cell.title: {named(row.task)[0]: row for row in cell.results} for cell in comparison.cells}
        common = [task for task in table.tasks if any(task in results for results in ours.values())]
        if not common:
            continue
        beside = f"Beside table {table.table} of the paper (ours / the paper's, percent, on the paper's own questions):"
        lines += ["", beside, ""]
        lines += ["| | " + " | ".join(common) + " |", "|---" + "|--:" * len(common) + "|"]
        for name, values in table.rows.items():
            paper = dict(zip(table.tasks, values, strict=True))
            cells = [f"{_percent(ours.get(name, {}), task)} / {paper[task]:.2f}" for task in common]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _percent(results: Mapping[str, Any], task: str) -> str:
    metric = results[task].metrics.get(ACCURACY) if task in results else None
    return "" if metric is None or metric.value is None else f"{100 * metric.value:.2f}"
