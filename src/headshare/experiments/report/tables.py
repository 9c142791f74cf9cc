"""Tables of a comparison's cells: Markdown, a verdict in words, and CSV."""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple
from typing import Any

from headshare.evaluation.results import guesses_of
from headshare.experiments.case import REFIT
from headshare.experiments.cells import DENSE, Asked, Compared, blocked_error
from headshare.experiments.methods import DELETING, SHARING
from headshare.tables import Table


def cells_table(cells: Sequence[Compared]) -> Table:
    """Table of the cells, a row for each cell.

    Bytes are in MiB, divergences in nats a token, accuracies in percent; the last two have standard errors. A tilde
    marks an accuracy that is not two standard errors above guessing and above always the same answer.
    """
    # the heading: sizes, text, and a column for each task with its number of questions
    tasks = list(dict.fromkeys(row.task for cell in cells for row in cell.results))
    asked = {row.task: row.questions for cell in cells for row in cell.results if row.chance is not None}
    shown = [f"{task} ({asked[task]})" if task in asked else task for task in tasks]
    sizes = ["saved", "disk, MiB", "memory, MiB"]
    heads = ["ratio", "method", "plan", *sizes, "perplexity", "divergence", *shown, "seconds"]
    rows = []
    # a row for guessing, which accuracies are to be read against
    guessed = {row.task: guesses_of(row) for cell in cells for row in cell.results if row.chance is not None}
    if guessed:
        rows.append(["", "guessing", *[""] * 6, *(guessed.get(task, "") for task in tasks)])
    # a row for each cell; one that failed says why
    for cell in cells:
        ratio = str(cell.asked)
        if cell.failed:
            rows.append([ratio, cell.method, cell.failed])
            continue
        plan = "" if cell.given_up is None else cell.given_up.in_cell
        by_task = {row.task: row.in_cell for row in cell.results}
        values = [ratio, cell.method, plan, f"{cell.saved_fraction:.2%}"]
        values += map(_mib, (cell.disk_bytes, cell.memory_bytes))
        values += ["" if cell.perplexity is None else f"{cell.perplexity:,.3f}", _with_error(cell.divergences)]
        values += [by_task.get(task, "") for task in tasks]
        rows.append([*values, f"{cell.seconds:.0f}"])
    return Table(heads, rows, words=(1, 2))


def notes_of(cells: Sequence[Compared]) -> list[str]:
    """The notes of the cells as sentences; a method whose notes differ by ratio is named with its ratio."""
    several = Counter(method for method, _ in {(cell.method, cell.note) for cell in cells if not cell.failed})
    notes = (f"{cell.title if several[cell.method] > 1 else cell.method}: {cell.note}." for cell in cells if cell.note)
    return list(dict.fromkeys(notes))


def table(cells: Sequence[Compared]) -> str:
    """The table of the cells in Markdown, and their notes below it."""
    notes = notes_of(cells)
    return cells_table(cells).markdown() + ("\n\n" + "\n".join(notes) if notes else "")


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"


def _with_error(values: Sequence[float]) -> str:
    if not values:
        return ""
    error = f" ± {blocked_error(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{error}"


def in_words(cells: Sequence[Compared]) -> str:
    """The table of the cells, and below it the verdict if there is one."""
    return "\n\n".join(filter(None, (table(cells), verdict(cells))))


def verdict(cells: Sequence[Compared]) -> str:
    """The verdict for each ratio, in words that follow from the numbers.

    It names the methods by perplexity, best first. It compares the best method that shares with the best that only
    deletes, with the standard error of the difference over windows. A sharing method whose plan ties nothing counts as
    deleting. Methods that train or round do more, and count as neither.
    """
    lines = []
    for asked in dict.fromkeys(cell.asked for cell in cells if any(cell.asked)) or [Asked()]:
        ranked = [cell for cell in cells if cell.asked in (asked, Asked()) and cell.losses and cell.method != DENSE]
        ranked.sort(key=lambda cell: statistics.mean(cell.losses))
        if not ranked:
            continue
        words = ", ".join(f"{cell.method} ({cell.perplexity:,.4g})" for cell in ranked)
        by = f"At {asked}, by" if any(asked) else "By"
        lines.append(f"{by} perplexity, best first: {words}.")
        sharing = next(filter(_shares, ranked), None)
        deleting = next(filter(_deletes, ranked), None)
        if sharing and deleting:
            more, error = sharing.loses_more_than(deleting)
            if math.isnan(error):
                continue
            word = "ahead of" if more < -2 * error else "behind" if more > 2 * error else "level with"
            lines.append(
                f"The best that shares, {_named(sharing)}, is {word} the best that only deletes, {_named(deleting)}: "
                f"{more:+.4f} nats a token (standard error {error:.4f})."
            )
    return "\n".join(lines)


def _shares(cell: Compared) -> bool:
    return cell.method.removesuffix(REFIT) in SHARING and (cell.given_up is None or cell.given_up.tied > 0)


def _deletes(cell: Compared) -> bool:
    return cell.method.removesuffix(REFIT) in (*SHARING, *DELETING) and not _shares(cell)


def _named(cell: Compared) -> str:
    """The method and the units that its plan takes."""
    return cell.method + (f" ({cell.given_up.in_cell})" if cell.given_up else "")


def as_csv(cells: Sequence[Compared]) -> str:
    """The cells as CSV, a line for each metric of each cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = (
        "method",
        "ratio",
        "tied",
        "removed",
        "neurons",
        "saved_bytes",
        "disk_bytes",
        "memory_bytes",
        "seconds",
        "save",
    )
    writer.writerow([*names, "task", "metric", "value", "standard_error", "chance", "questions"])
    for row in _rows(cells):
        writer.writerow(row)
    return text.getvalue()


def _rows(cells: Sequence[Compared]) -> Iterator[list[Any]]:
    for cell in cells:
        given = ("", "", "") if cell.given_up is None else astuple(cell.given_up)
        start = [cell.method, cell.ratio, *given, cell.saved_bytes, cell.disk_bytes, cell.memory_bytes, cell.seconds]
        start.append(cell.save)
        if cell.losses:
            yield [*start, "text", "perplexity", cell.perplexity, "", "", len(cell.losses)]
            yield [*start, "text", "divergence", statistics.mean(cell.divergences), "", "", len(cell.divergences)]
        for row in cell.results:
            for name, metric in row.metrics.items():
                yield [*start, row.task, name, metric.value, metric.error, row.chance, row.questions]


def to_dict(cells: Sequence[Compared]) -> dict[str, Any]:
    """The cells and the verdict as `--json` prints them."""
    return {"cells": [asdict(cell) for cell in cells], "verdict": verdict(cells)}
