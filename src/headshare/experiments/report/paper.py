"""The paper's figures beside ours: the same cells where the model is the same, otherwise the order of methods."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headshare.evaluation.harness import named
from headshare.experiments.cells import DENSE, Compared
from headshare.experiments.report.scores import ACCURACY, at_chance, score
from headshare.experiments.report.sources import Comparison, Published
from headshare.tables import Table

ORDERS = (
    "The paper's order of methods beside ours, best first. The paper's is by mean accuracy in percent, on its models; "
    "ours is by perplexity, and by mean accuracy on tasks where the dense model is above guessing."
)


def beside(comparison: Comparison, tables: Sequence[Published]) -> Iterator[tuple[str, Table]]:
    """Tables of our accuracies beside the paper's where the paper has this model; otherwise the orders of methods."""
    same = [table for table in tables if table.model.casefold() == comparison.about.model.casefold()]
    for table in same:
        ours = {cell.title: {named(row.task)[0]: row for row in cell.results} for cell in comparison.cells}
        common = [task for task in table.tasks if any(task in results for results in ours.values())]
        if not common:
            continue
        words = f"Beside table {table.table} of the paper (ours / the paper's, percent, on the paper's own questions):"
        rows = []
        for name, values in table.rows.items():
            paper = dict(zip(table.tasks, values, strict=True))
            rows.append([name, *(f"{_percent(ours.get(name, {}), task)} / {paper[task]:.2f}" for task in common)])
        yield words, Table(["", *common], rows)
    orders = [] if same else _orders(comparison.cells, tables)
    if orders:
        yield ORDERS, Table(["ratio", "table", "model", "order"], orders, words=(2, 3))


def _orders(cells: Sequence[Compared], tables: Sequence[Published]) -> list[list[str]]:
    """Rows for each ratio: the paper's orders of the methods that both have, then ours."""
    tasks = {named(row.task)[0] for cell in cells for row in cell.results}
    left_out = at_chance(next((cell for cell in cells if cell.method == DENSE), None))
    rows = []
    for ratio in sorted({cell.ratio for cell in cells if cell.ratio}):
        here = {cell.method: cell for cell in cells if cell.ratio == ratio and not cell.failed}
        theirs = []
        for table in tables:
            means = _means(table, ratio)
            both = {name: mean for name, mean in means.items() if name in here}
            if len(both) > 1 and tasks & set(table.tasks):
                theirs.append([f"{ratio:g}", table.table, table.model, _order(both, 1.0)])
        if not theirs:
            continue
        told = [method for method in here if any(f"{method} " in row[3] for row in theirs)]
        losses = {name: -statistics.mean(here[name].losses) for name in told if here[name].losses}
        scores = {name: found.value for name in told if (found := score(here[name], left_out)) is not None}
        rows += theirs
        if losses:
            by_loss = " > ".join(
                f"{name} {here[name].perplexity:,.4g}" for name in sorted(losses, key=lambda name: -losses[name])
            )
            rows.append([f"{ratio:g}", "", "here, by perplexity", by_loss])
        if scores:
            rows.append([f"{ratio:g}", "", "here, by accuracy", _order(scores, 100.0)])
    return rows


def _means(table: Published, ratio: float) -> dict[str, float]:
    """The paper's mean accuracy of each method at this ratio."""
    asked = (name.rpartition(" ") for name in table.rows)
    return {method: statistics.mean(table.rows[f"{method} {at}"]) for method, _, at in asked if at == f"{ratio:g}"}


def _order(values: Mapping[str, float], factor: float) -> str:
    best = sorted(values, key=lambda name: -values[name])
    return " > ".join(f"{name} {factor * values[name]:.1f}" for name in best)


def _percent(results: Mapping[str, Any], task: str) -> str:
    metric = results[task].metrics.get(ACCURACY) if task in results else None
    return "" if metric is None or metric.value is None else f"{100 * metric.value:.2f}"
