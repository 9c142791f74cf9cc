"""Figures of a comparison: quality by bytes saved, tasks by ratio, units given up by layer, losses by step."""

import io
import textwrap
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from headshare.errors import EvaluationError, OutputError
from headshare.evaluation.results import TaskResult
from headshare.experiments.case import METHODS, REFIT, ROUNDED
from headshare.experiments.cells import DENSE, Compared
from headshare.files.atomic import write_whole
from headshare.files.failures import explain
from headshare.installing import install

STYLE = {"svg.hashsalt": "headshare", "svg.fonttype": "none", "font.size": 9}
WIDE = 8.0
MARKERS = "osv"
LABEL = 50  # letters in a line of a row's label
TICKS = 5  # ratios that have room for their numbers
ACROSS = 4  # panels beside one another
Drawn = Callable[[Any, list[Compared]], bool]


def draw(cells: list[Compared], folder: Path, name: str) -> list[tuple[str, Path]]:
    """Draw the figures for which these cells have data, as SVG files whose names begin with `name`.

    Returns the title and the path of each figure.

    Raises:
        EvaluationError: if matplotlib is not installed.
        OutputError: if they cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise EvaluationError(f"figures are drawn by matplotlib. Run: {install('report')}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(explain(error, folder)) from None
    figures = []
    with matplotlib.rc_context(STYLE):
        for kind, (title, drawn) in FIGURES.items():
            figure = Figure(figsize=(WIDE, 4.5), layout="constrained")
            if drawn(figure, cells):
                path = folder / f"{name}-{kind}.svg"
                picture = io.BytesIO()
                figure.savefig(picture, format="svg", metadata={"Date": None})
                write_whole(path, picture.getvalue())
                figures.append((title, path))
    return figures


def _quality(figure: Any, cells: list[Compared]) -> bool:
    """Draw perplexity above the dense model's against bytes saved: a line for each method, a point if it has one ratio.

    The scale is logarithmic, and linear near the dense model. Methods that round have a panel of their own: they save
    many times as much. Returns False if there is nothing to draw.
    """
    dense = next((cell.perplexity for cell in cells if cell.method == DENSE), None)
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        if dense is not None and cell.perplexity is not None and cell.method != DENSE:
            points.setdefault(cell.method, []).append((100 * cell.saved_fraction, cell.perplexity - dense))
    if dense is None or not points:
        return False
    # one panel for methods that share or remove, one for methods that round
    sets = [names for rounds in (False, True) if (names := [name for name in points if _rounds(name) == rounds])]
    panels = figure.subplots(1, len(sets), sharey=True, squeeze=False, width_ratios=[3, 1][: len(sets)])[0]
    for number, (method, above) in enumerate(points.items()):
        axes = next(axes for axes, names in zip(panels, sets, strict=True) if method in names)
        axes.plot(*zip(*sorted(above), strict=True), **_mark(number), label=method)
    # linear up to the smallest difference that was measured, so that all points can be told apart
    values = [value for above in points.values() for _, value in above]
    near = max(dense / 100, min(map(abs, values)))
    for axes in panels:
        axes.axhline(0, color="gray", linewidth=0.8, label=f"{DENSE}, {dense:,.4g}" if axes is panels[0] else None)
        axes.set_yscale("symlog", linthresh=near, subs=range(2, 10))
        axes.yaxis.set_major_formatter("{x:+g}")
        axes.grid(visible=True, which="both", alpha=0.2)
    panels[0].set(
        ylabel="perplexity above dense", ylim=(1.5 * min(0, *values) - near / 2, 1.5 * max(0, *values) + near / 2)
    )
    figure.supxlabel("saved, % of the model's bytes", fontsize="medium")
    figure.legend(fontsize="small", ncols=4, loc="outside upper center")
    return True


def _shares(figure: Any, cells: list[Compared]) -> bool:
    """Draw perplexity over the dense model's at shares of the bytes: a row for each method, named beside it.

    An open point is the method as it is, a filled one the method with our refit. Each share has a panel.
    Returns False if no share was asked for.
    """
    dense = next((cell.perplexity for cell in cells if cell.method == DENSE), None)
    asked = sorted({cell.asked for cell in cells if cell.save and cell.losses})
    if dense is None or not asked:
        return False
    panels = figure.subplots(1, len(asked), squeeze=False)[0]
    over = {
        one: {cell.method: cell.perplexity / dense for cell in cells if cell.asked == one and cell.perplexity}
        for one in asked
    }
    figure.set_figheight(
        1.0 + 0.32 * max(len({name.removesuffix(REFIT) for name in points}) for points in over.values())
    )
    for axes, (one, points) in zip(panels, over.items(), strict=True):
        _rows(axes, points)
        axes.set_title(f"{one} of the bytes saved", fontsize="medium")
    figure.supxlabel(
        f"perplexity over the dense model's ({dense:,.4g}); open: as it is, filled: refitted", fontsize="medium"
    )
    return True


def _rows(axes: Any, points: dict[str, float]) -> None:
    """Draw the rows of one panel, the best method on top; its name and its values stand beside its points."""
    names = list(dict.fromkeys(name.removesuffix(REFIT) for name in points))
    best = {name: min(points[one] for one in (name, name + REFIT) if one in points) for name in names}
    names.sort(key=best.__getitem__, reverse=True)
    for row, name in enumerate(names):
        both = [(points[one], filled) for one, filled in ((name, False), (name + REFIT, True)) if one in points]
        axes.plot([value for value, _ in both], [row] * len(both), color="gray", linewidth=1)
        for value, filled in both:
            axes.plot(value, row, marker="o", markersize=5, color="C0", markerfacecolor="C0" if filled else "white")
        low, high = min(value for value, _ in both), max(value for value, _ in both)
        numbers = " to ".join(f"{value:.2f}" for value in dict.fromkeys((low, high)))
        axes.annotate(f"{name}, {numbers}", (high, row), (6, -3), textcoords="offset points", fontsize="small")
    axes.set_xscale("log")
    axes.set_yticks([])
    axes.set_xlim(min(points.values()) / 1.03, max(points.values()) * 1.8)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize="small")
    axes.grid(visible=True, axis="x", which="both", alpha=0.2)


def _mark(number: int) -> dict[str, Any]:
    """Marker, line and colour of the method of this number."""
    return {"marker": MARKERS[number // 10 % 3], "markersize": 4, "linewidth": 1.2, "color": f"C{number}"}


def _tasks(figure: Any, cells: list[Compared]) -> bool:
    """Draw a panel for each task: its metric against the ratio, or the methods side by side if there is one ratio.

    The gray band is the dense model with a standard error to each side. The dotted line is guessing, or always the same
    answer. Returns False if no task was measured.
    """
    methods = list(dict.fromkeys(cell.method for cell in cells if cell.results and cell.method != DENSE))
    names = list(dict.fromkeys(row.task for cell in cells for row in cell.results))
    if not methods:
        return False
    places = sorted({max(cell.asked) for cell in cells if cell.results and cell.method != DENSE})
    ratios = [ratio for ratio in places if ratio]
    beside = len(ratios) < 2
    # panels in rows of ACROSS; those that no task is left for are removed
    rows = -(-len(names) // ACROSS)
    figure.set_figheight(1.2 + 2.1 * rows)
    panels = figure.subplots(rows, min(ACROSS, len(names)), squeeze=False).flat
    lines: dict[str, Any] = {}
    for axes, name in zip_longest(list(panels), names):
        if name is None:
            axes.remove()
            continue
        results = {(cell.method, max(cell.asked)): row for cell in cells for row in cell.results if row.task == name}
        metric = next(iter(results.values())).main[0]
        for number, method in enumerate(methods):
            points = sorted(
                (number if beside else ratio, value)
                for (of, ratio), row in results.items()
                if of == method and (value := _shown(row)) is not None
            )
            if points:
                (lines[method],) = axes.plot(*zip(*points, strict=True), **_mark(number))
        _beside(axes, results.get((DENSE, 0.0)))
        axes.locator_params(axis="y", nbins=5)  # as many at any size: the layout is made before it is known
        axes.set_title(f"{name}, %" if metric == "acc" else f"{name}, {metric}", fontsize="medium")
        if beside:
            axes.set(xticks=[], xlim=(-0.5, len(methods) - 0.5))
        elif len(ratios) <= TICKS:
            axes.set_xticks(places)
    if beside:
        where = "".join(f"ratio {ratio:g}" for ratio in ratios)
    else:
        where = "ratio" if all(places) else "ratio; 0 is what has none"
    figure.supxlabel(where, fontsize="medium")
    figure.legend(lines.values(), lines, fontsize="small", ncols=4, loc="outside upper center")
    return True


def _beside(axes: Any, dense: TaskResult | None) -> None:
    """Draw the dense model and guessing into a panel."""
    if dense is None or (value := _shown(dense)) is None:
        return
    name, metric = dense.main
    error = (100 if name == "acc" else 1) * (metric.error or 0.0)
    axes.axhspan(value - error, value + error, color="gray", alpha=0.25, linewidth=0)
    axes.axhline(value, color="gray", linewidth=0.8)
    if name == "acc" and dense.guessed:
        axes.axhline(100 * max(dense.guessed), color="black", linewidth=0.8, linestyle=":")


def _shown(row: TaskResult) -> float | None:
    """The main metric of a result; an accuracy is in percent."""
    name, metric = row.main
    return None if metric.value is None else metric.value * (100 if name == "acc" else 1)


def _rounds(method: str) -> bool:
    return method.endswith(ROUNDED) or (method in METHODS and METHODS[method].fixed)


def _layers(figure: Any, cells: list[Compared]) -> bool:
    """Draw the units that each layer gives up, the darker the more, in one row for all cells of a ratio that agree.

    Returns False if no cell gives units up.
    """
    same: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for cell in (cell for cell in cells if cell.by_layer):
        same.setdefault((str(cell.asked), cell.by_layer), []).append(cell.method)
    rows = {
        textwrap.fill(f"{', '.join(names)} {ratio}", LABEL, break_on_hyphens=False): by_layer
        for (ratio, by_layer), names in same.items()
    }
    if not rows:
        return False
    figure.set_figheight(1.2 + (0.08 + 0.14 * max(label.count("\n") + 1 for label in rows)) * len(rows))
    axes = figure.subplots()
    image = axes.imshow(
        [[100 * fraction for fraction in row] for row in rows.values()], aspect="auto", cmap="Greys", vmin=0
    )
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("layer")
    figure.colorbar(image, label="units given up, %")
    return True


def _curves(figure: Any, cells: list[Compared]) -> bool:
    """Draw the loss on held-out text (as shared then) against steps, and below it accuracies with standard errors.

    Returns False if no method was trained.
    """
    trained = [cell for cell in cells if cell.curve]
    if not trained:
        return False
    scored = list(_accuracies(trained))
    panels = figure.subplots(2 if scored else 1, sharex=True, squeeze=False)[:, 0]
    figure.set_figheight(4.5 * len(panels))
    for cell in trained:
        points = [(row["step"], row["loss"]) for row in cell.curve]
        panels[0].plot(*zip(*points, strict=True), marker=".", label=cell.title)
    for name, measured in scored:
        steps, values, errors = zip(*measured, strict=True)
        panels[1].errorbar(steps, values, errors, marker=".", capsize=2, linewidth=1, label=name)
    for panel, label in zip(panels, ("loss on windows held out, nats a token", "accuracy, %"), strict=False):
        panel.set_ylabel(label)
        panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    panels[-1].set_xlabel("steps")
    panels[-1].locator_params(axis="x", integer=True)
    return True


def _accuracies(cells: list[Compared]) -> Iterator[tuple[str, list[tuple[float, float, float]]]]:
    for cell in cells:
        for key in [key for key in cell.curve[0] if key.endswith("_acc")]:
            error = f"{key}_error"
            points = [(row["step"], 100 * row[key], 100 * row.get(error, 0.0)) for row in cell.curve if key in row]
            yield f"{cell.title}, {key.removesuffix('_acc')}", points


FIGURES: dict[str, tuple[str, Drawn]] = {
    "quality": ("perplexity above the dense model's, against the bytes that are saved", _quality),
    "shares": ("perplexity over the dense model's at shares of the bytes, as methods are and with our refit", _shares),
    "tasks": (
        "each task: the gray band is the dense model and a standard error to each side, the dotted line guessing, or "
        "always the same answer where that is better",
        _tasks,
    ),
    "layers": ("the share of its units that each layer gives up", _layers),
    "curves": ("the loss against steps", _curves),
}
