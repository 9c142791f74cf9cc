"""Figures of a comparison: quality by bytes saved, tasks by ratio, units given up by layer, losses by step."""

import statistics
from collections.abc import Callable, Iterator, Sequence

from headshare.evaluation.results import TaskResult
from headshare.experiments.case import REFIT, base_of
from headshare.experiments.cells import DENSE, Compared
from headshare.experiments.report.claims import PAPERS
from headshare.experiments.report.groups import compared_with, groups, in_panel, is_fixed
from headshare.experiments.report.retained import subject_of
from headshare.experiments.report.scores import ACCURACY, score
from headshare.pages.layers import bars_panel, shades_panel
from headshare.pages.lines import MOST, Axes, Level, Line, lines_panel
from headshare.pages.rows import Mark, Row, rows_panel
from headshare.pages.svg import Figure, Panel

Drawn = Callable[[Sequence[Compared]], list[Panel]]
GUESSING = "guessing"


def figures_of(cells: Sequence[Compared]) -> list[Figure]:
    """The figures for which these cells have data."""
    drawn = ((kind, title, note, draw(cells)) for kind, (title, note, draw) in FIGURES.items())
    return [Figure(kind, title, note, panels) for kind, title, note, panels in drawn if panels]


# ---- quality


def _quality(cells: Sequence[Compared]) -> list[Panel]:
    """Perplexity against bytes saved, a panel for each group of methods; rows where each was measured once."""
    dense = _dense(cells)
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        if dense is not None and cell.perplexity is not None and cell.method != DENSE and not cell.save:
            points.setdefault(cell.method, []).append((100 * cell.saved_fraction, cell.perplexity))
    if dense is None:
        return []
    levels = [Level(DENSE, dense)]
    axes = Axes("saved, % of the model's bytes", "perplexity", log=True)
    panels = []
    for title, names in groups(points).items():
        several = any(len(points[name]) > 1 for name in names)
        head = title or "All methods"
        if several:
            panels.append(lines_panel(head, list(_lines(points, names, title)), axes, levels))
        else:
            best = sorted(names, key=lambda name: points[name][0][1])
            rows = [_row(in_panel(name, title), *points[name][0]) for name in best]
            panels.append(rows_panel(head, rows, "perplexity", levels, log=True))
    return panels


def _row(name: str, saved: float, perplexity: float) -> Row:
    return Row(name, [Mark(perplexity)], f"{perplexity:,.4g}, {saved:.1f} % saved")


def _lines(points: dict[str, list[tuple[float, float]]], names: Sequence[str], title: str) -> Iterator[Line]:
    """Lines of the methods of one panel, and the paper's method among others."""
    for name in names:
        yield Line(in_panel(name, title), sorted(points[name]))
    other = compared_with(title, names)
    if other in points and other not in names:
        yield Line(in_panel(other, title), sorted(points[other]), plain=True)


def _shares(cells: Sequence[Compared]) -> list[Panel]:
    """Perplexity over the dense model's, a panel for each share of the bytes and a row for each method."""
    dense = _dense(cells)
    panels = []
    for asked in sorted({cell.asked for cell in cells if cell.save and cell.losses}):
        over = {
            cell.method: cell.perplexity / dense for cell in cells if cell.asked == asked and cell.perplexity and dense
        }
        if over:
            title = f"{asked} of the bytes saved"
            panels.append(rows_panel(title, _both_ways(over), "perplexity over the dense model's", log=True))
    return panels


def _both_ways(over: dict[str, float]) -> list[Row]:
    """Rows of methods as they are and refitted, the best first."""
    rows = []
    for name in dict.fromkeys(name.removesuffix(REFIT) for name in over):
        marks = [Mark(over[one], filled=one != name) for one in (name, name + REFIT) if one in over]
        numbers = " to ".join(dict.fromkeys(f"{mark.value:.2f}" for mark in sorted(marks, key=lambda one: one.value)))
        rows.append(Row(name, marks, numbers))
    return sorted(rows, key=lambda row: min(mark.value for mark in row.marks))


def _dense(cells: Sequence[Compared]) -> float | None:
    return next((cell.perplexity for cell in cells if cell.method == DENSE), None)


# ---- tasks


def _tasks(cells: Sequence[Compared]) -> list[Panel]:
    """A panel for each task, or with many methods one of the mean over tasks for each group of them."""
    made = [cell for cell in cells if cell.results and cell.method != DENSE]
    varied = list(dict.fromkeys(cell.method for cell in made if not is_fixed(cell.method)))
    if len(varied) > MOST:
        return _means(cells, made)
    names = list(dict.fromkeys(row.task for cell in made for row in cell.results))
    by_ratio = len({cell.asked for cell in made if any(cell.asked)}) > 1
    return [panel for name in names if (panel := _task(name, cells, by_ratio)) is not None]


def _task(task: str, cells: Sequence[Compared], by_ratio: bool) -> Panel | None:
    """The panel of one task: lines over the ratios, or rows where there are not several."""
    rows = [(cell, row) for cell in cells for row in cell.results if row.task == task and _value(row) is not None]
    if not rows:
        return None
    metric = rows[0][1].main[0]
    title, unit = (task, "accuracy, %") if metric == ACCURACY else (task, metric.upper())
    levels = [level for cell, row in rows if cell.method == DENSE for level in _levels(row)]
    made = [(cell, row) for cell, row in rows if cell.method != DENSE]
    if not by_ratio:
        listed = [_scored(cell.method, _value(row), _error(row)) for cell, row in made]
        return rows_panel(title, listed, unit, levels) if listed else None
    levels += [Level(cell.method, _value(row) or 0.0) for cell, row in made if is_fixed(cell.method)]
    points: dict[str, list[tuple[float, float]]] = {}
    for cell, row in made:
        if not is_fixed(cell.method):
            points.setdefault(cell.method, []).append((max(cell.asked), _value(row) or 0.0))
    lines = [Line(name, sorted(some)) for name, some in points.items()]
    return lines_panel(title, lines, Axes("ratio", unit), levels) if lines else None


def _scored(name: str, value: float | None, error: float) -> Row:
    return Row(name, [Mark(value or 0.0, error)], f"{value:.1f}")


def _levels(row: TaskResult) -> list[Level]:
    """The dense model with a standard error to each side, and guessing."""
    levels = [Level(DENSE, _value(row) or 0.0, _error(row))]
    if row.main[0] == ACCURACY and row.guessed:
        levels.append(Level(GUESSING, 100 * max(row.guessed)))
    return levels


def _value(row: TaskResult) -> float | None:
    """The main metric of a result; an accuracy is in percent."""
    name, metric = row.main
    return None if metric.value is None else metric.value * (100 if name == ACCURACY else 1)


def _error(row: TaskResult) -> float:
    name, metric = row.main
    return (100 if name == ACCURACY else 1) * (metric.error or 0.0)


def _means(cells: Sequence[Compared], made: Sequence[Compared]) -> list[Panel]:
    """The mean over tasks against the ratio, a panel for each group of methods."""
    dense = next((cell for cell in cells if cell.method == DENSE and score(cell) is not None), None)
    levels = []
    if dense is not None and (found := score(dense)) is not None:
        factor = 100 if found.shown.endswith("%") else 1
        levels.append(Level(DENSE, factor * found.value, factor * found.error))
        guessed = [max(row.guessed) for row in dense.results if row.guessed]
        levels += [Level(GUESSING, 100 * statistics.mean(guessed))] if guessed else []
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in made:
        if (found := score(cell)) is not None and not is_fixed(cell.method):
            points.setdefault(cell.method, []).append(
                (max(cell.asked), found.value * (100 if "%" in found.shown else 1))
            )
    tasks = len({row.task for cell in made for row in cell.results})
    axes = Axes("ratio", f"mean accuracy of {tasks} tasks, %")
    return [
        lines_panel(title or "All methods", list(_lines(points, names, title)), axes, levels)
        for title, names in groups(points).items()
    ]


def _subjects(cells: Sequence[Compared]) -> list[Panel]:
    """Accuracies by subject of each exam: the dense model, and the paper's method at its largest ratio."""
    dense = next((cell for cell in cells if cell.method == DENSE), None)
    shared = max((cell for cell in cells if cell.method == PAPERS), key=lambda cell: cell.ratio, default=None)
    if dense is None or shared is None:
        return []
    after = {row.task: row.parts for row in shared.results if row.parts}
    panels = []
    for row in (row for row in dense.results if row.parts and row.task in after):
        rows = []
        for subject, (before, count) in row.parts.items():
            left, _ = after[row.task].get(subject, (before, count))
            marks = [Mark(100 * before, filled=False), Mark(100 * left)]
            rows.append(Row(subject_of(row.task, subject), marks, f"{100 * before:.0f} to {100 * left:.0f}"))
        level = [] if row.chance is None else [Level(GUESSING, 100 * row.chance)]
        panels.append(rows_panel(f"{row.task}, {shared.title}", rows, "accuracy, %", level))
    return panels


# ---- layers and steps


def _layers(cells: Sequence[Compared]) -> list[Panel]:
    """The share of its units that each layer gives up: bars where there are few rows, else shades.

    Methods that give up the same units at a ratio are one row; refits and rounding change no unit.
    """
    same: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for cell in (cell for cell in cells if any(cell.by_layer)):
        same.setdefault((str(cell.asked), cell.by_layer), []).append(base_of(cell.method))
    rows: dict[str, dict[str, tuple[float, ...]]] = {}
    for (asked, shares), names in same.items():
        rows.setdefault(asked, {})[", ".join(dict.fromkeys(names))] = shares
    if sum(map(len, rows.values())) <= MOST:
        return [
            bars_panel(f"{name} {asked}", shares) for asked, by_name in rows.items() for name, shares in by_name.items()
        ]
    return [shades_panel(f"At {asked}" if asked else "", by_name) for asked, by_name in rows.items()]


def _curves(cells: Sequence[Compared]) -> list[Panel]:
    """The loss on held-out text, as shared then, against steps; accuracies in panels of their own."""
    trained = [cell for cell in cells if cell.curve]
    axes = Axes("steps", "loss on held-out text, nats a token", whole=True)
    together = (
        [("Loss", trained)]
        if len(trained) <= MOST
        else [
            (method, [cell for cell in trained if cell.method == method])
            for method in dict.fromkeys(cell.method for cell in trained)
        ]
    )
    panels = []
    for title, some in together:
        lines = [Line(cell.title, [(row["step"], row["loss"]) for row in cell.curve]) for cell in some]
        panels += [lines_panel(title, lines[start : start + MOST], axes) for start in range(0, len(lines), MOST)]
    for cell in trained:
        lines = list(_accuracies(cell))
        starts = range(0, len(lines), MOST)
        up = Axes("steps", "accuracy, %", whole=True)
        panels += [lines_panel(cell.title, lines[start : start + MOST], up) for start in starts]
    return panels


def _accuracies(cell: Compared) -> Iterator[Line]:
    for key in [key for key in cell.curve[0] if key.endswith("_acc")]:
        rows = [row for row in cell.curve if key in row]
        points = [(row["step"], 100 * row[key]) for row in rows]
        yield Line(key.removesuffix("_acc"), points, [100 * row.get(f"{key}_error", 0.0) for row in rows])


FIGURES: dict[str, tuple[str, str, Drawn]] = {
    "quality": (
        "Perplexity against the bytes that are saved",
        "Lower is better; the dashed line is the dense model. Each panel has a scale of its own.",
        _quality,
    ),
    "shares": (
        "Perplexity at the same bytes",
        "Over the dense model's, so that 1 is as good. Open: the method as it is; filled: with a refit.",
        _shares,
    ),
    "tasks": (
        "Tasks",
        "The gray band is the dense model and a standard error to each side. Guessing is the better of guessing and "
        "of always the same answer.",
        _tasks,
    ),
    "subjects": (
        "Subjects of an exam (figure 4 of the paper)",
        "Open: the dense model; filled: DirectShare. Each subject has few questions, so single ones tell little.",
        _subjects,
    ),
    "layers": ("The share of its units that each layer gives up", "", _layers),
    "curves": ("Training", "The loss is of the model as it would be shared at that step.", _curves),
}
