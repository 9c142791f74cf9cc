"""Figures of a comparison: quality against what is saved, what each layer gives up, and losses against steps."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from headshare.comparing.cells import DENSE, Compared
from headshare.errors import EvaluationError

STYLE = {"svg.hashsalt": "headshare", "svg.fonttype": "none", "font.size": 9}
WIDE = 8.0
Drawn = Callable[[Any, list[Compared]], bool]


def draw(cells: list[Compared], folder: Path, name: str) -> list[tuple[str, Path]]:
    """Draw what there is to be drawn of these cells, as SVG files whose names begin with this one. Returns what each
    shows, and where it is.

    Raises:
        EvaluationError: if matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise EvaluationError("figures are drawn by matplotlib. Run: pip install 'headshare[report]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with matplotlib.rc_context(STYLE):
        for kind, (title, drawn) in FIGURES.items():
            figure = Figure(figsize=(WIDE, 4.5), layout="constrained")
            if drawn(figure, cells):
                path = folder / f"{name}-{kind}.svg"
                figure.savefig(path, metadata={"Date": None})
                found.append((title, path))
    return found


def _quality(figure: Any, cells: list[Compared]) -> bool:
    """A line for each method that was measured at several ratios, a point for others."""
    dense = next((cell.perplexity for cell in cells if cell.method == DENSE), None)
    measured = [cell for cell in cells if cell.perplexity is not None and cell.method != DENSE]
    if dense is None or not measured:
        return False
    axes = figure.subplots()
    for method in dict.fromkeys(cell.method for cell in measured):
        points = sorted((cell.saved_fraction, cell.perplexity) for cell in measured if cell.method == method)
        saved, values = [100 * one for one, _ in points], [one for _, one in points]
        axes.plot(saved, values, marker="o", markersize=4, label=method)
    axes.axhline(dense, color="gray", linewidth=0.8, label=DENSE)
    axes.set(xlabel="saved, % of the model's bytes", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize="small", ncols=2)
    return True


def _layers(figure: Any, cells: list[Compared]) -> bool:
    """A row for each cell that gives up units: the darker, the more of a layer's."""
    rows = {cell.title: cell.by_layer for cell in cells if cell.by_layer}
    if not rows:
        return False
    figure.set_figheight(1.2 + 0.22 * len(rows))
    axes = figure.subplots()
    image = axes.imshow([[100 * one for one in row] for row in rows.values()], aspect="auto", cmap="Greys", vmin=0)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("layer")
    figure.colorbar(image, label="units given up, %")
    return True


def _curves(figure: Any, cells: list[Compared]) -> bool:
    """Loss on what is held out, as sharing then gives it; and beside it accuracies, where tasks were measured."""
    trained = [cell for cell in cells if cell.curve]
    if not trained:
        return False
    scored = list(_accuracies(trained))
    panels = figure.subplots(2 if scored else 1, sharex=True, squeeze=False)[:, 0]
    figure.set_figheight(4.5 * len(panels))
    for cell in trained:
        points = [(row["step"], row["loss"]) for row in cell.curve]
        panels[0].plot(*zip(*points, strict=True), marker=".", label=cell.title)
    for name, points in scored:
        panels[1].plot(*zip(*points, strict=True), marker=".", label=name)
    for panel, label in zip(panels, ("loss on windows held out, nats a token", "accuracy, %"), strict=False):
        panel.set_ylabel(label)
        panel.legend(fontsize="small")
    panels[-1].set_xlabel("steps")
    return True


def _accuracies(cells: list[Compared]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    for cell in cells:
        for key in [key for key in cell.curve[0] if key.endswith("_acc")]:
            points = [(row["step"], 100 * row[key]) for row in cell.curve if key in row]
            yield f"{cell.title}, {key.removesuffix('_acc')}", points


FIGURES: dict[str, tuple[str, Drawn]] = {
    "quality": ("perplexity against the bytes that are saved", _quality),
    "layers": ("the share of its units that each layer gives up", _layers),
    "curves": ("the loss against steps", _curves),
}
