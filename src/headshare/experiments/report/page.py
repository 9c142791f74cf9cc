"""One page from the folders that `headshare compare` wrote: each table, what the paper has for the same model, and what
becomes of the paper's claims."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from headshare.evaluation.harness import named
from headshare.evaluation.results import table_of
from headshare.experiments.about import About
from headshare.experiments.cells import Compared
from headshare.experiments.report.claims import ACCURACY, Checked, checked
from headshare.experiments.report.sources import Comparison, Evaluated, Published
from headshare.experiments.report.tables import in_words


def report(
    measured: Sequence[Comparison],
    tables: Sequence[Published] = (),
    figures: Sequence[Sequence[tuple[str, str]]] = (),
    evaluated: Sequence[Evaluated] = (),
) -> str:
    """The page, in Markdown. `figures` are what to show with each comparison: what a figure shows, and its address;
    `evaluated`, what `headshare eval` measured, come last."""
    lines = ["# Results", "", *_summary(measured)]
    for one, shown in zip_longest(measured, figures, fillvalue=()):
        assert isinstance(one, Comparison)
        heading = f"{one.about.title}, on {one.about.model}" if one.about.title else one.about.model
        lines += ["", f"## {heading}", "", _about(one.about), "", in_words(one.cells)]
        lines += [*_beside(one, tables), *_claims(checked(one.cells))]
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
    """How often each claim holds, model by model, and by what rule. Comparisons of the same cells count once."""
    counted: dict[str, dict[str, Counter[str]]] = {}
    for model, cells in _pooled(measured):
        for found in checked(cells):
            counted.setdefault(found.claim, {}).setdefault(model, Counter())[found.says.value] += 1
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
    """Models, and the cells of all their comparisons: those on other texts, or where one method gave other numbers,
    apart."""
    pools: list[tuple[str, dict[tuple[str, float], Compared]]] = []
    for one in measured:
        cells = {(cell.method, cell.ratio): cell for cell in one.cells if not cell.failed}
        for model, pool in pools:
            both = pool.keys() & cells.keys()
            if model == one.about.model and both and all(_found(pool[key]) == _found(cells[key]) for key in both):
                pool |= cells
                break
        else:
            pools.append((one.about.model, cells))
    return [(model, list(pool.values())) for model, pool in pools]


def _found(cell: Compared) -> object:
    """What claims go by: losses, or without a text what tasks gave."""
    return cell.losses or [(row.task, row.metrics) for row in cell.results]


def _claims(claims: Sequence[Checked]) -> list[str]:
    if not claims:
        return []
    lines = ["", "| claim | at, or of | says | figures |", "|---|---|---|---|"]
    return lines + [f"| {one.claim} | {one.where} | {one.says.value} | {one.evidence} |" for one in claims]


def _beside(one: Comparison, tables: Sequence[Published]) -> list[str]:
    """Our accuracies beside the paper's, in percent, where it has this model."""
    lines: list[str] = []
    for found in (found for found in tables if found.model.casefold() == one.about.model.casefold()):
        ours = {cell.title: {named(row.task)[0]: row for row in cell.results} for cell in one.cells}
        common = [task for task in found.tasks if any(task in results for results in ours.values())]
        if not common:
            continue
        beside = f"Beside table {found.table} of the paper (ours / the paper's, percent, on the paper's own questions):"
        lines += ["", beside, ""]
        lines += ["| | " + " | ".join(common) + " |", "|---" + "|--:" * len(common) + "|"]
        for name, values in found.rows.items():
            paper = dict(zip(found.tasks, values, strict=True))
            cells = [f"{_percent(ours.get(name, {}), task)} / {paper[task]:.2f}" for task in common]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _percent(results: Mapping[str, Any], task: str) -> str:
    metric = results[task].metrics.get(ACCURACY) if task in results else None
    return "" if metric is None or metric.value is None else f"{100 * metric.value:.2f}"
