"""Draw docs/figures/loss-against-bytes.svg, the figure of the README, from loss_against_bytes.csv beside this script.

    python -m studies.loss_against_bytes

SmolLM2-135M, 16-bit numbers, embedding counted once. All methods are calibrated on 32,768 tokens of WikiText-2's
validation text and measured on its test text in windows of 512: headshare on 32 windows, the others on the first 32,
trials on the first 16.
The column `source` says where a figure stands. `trial` is a run of the methods' formulas outside the package, in
November 2026, each with its paper's own allocation; it has not been repeated with `headshare compare` yet.
"""

import csv
import io
from pathlib import Path
from xml.etree import ElementTree

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from headshare.pages.style import LIGHT

FIGURES = Path(__file__).with_suffix(".csv")
OUT = Path(__file__).parents[1] / "docs" / "figures" / "loss-against-bytes.svg"

# lines: colour, and where the name stands: at which point, how far from it in points, and how it is aligned
LINES = {
    "headshare": ("s0", 40, (8, -3), "left"),
    "headshare --refine best": ("s5", 30, (8, -3), "left"),
    "headshare --bits auto": ("s0", 70, (0, 27), "center"),
    "MoDeGPT": ("s2", 30, (8, -3), "left"),
    "FLAP": ("s1", 30, (8, -3), "left"),
    "SVD-LLM (pivoted)": ("s3", 30, (8, -2), "left"),
    "Basis Sharing": ("s4", 10, (0, 7), "center"),
    "whole layers (ShortGPT)": ("s7", 20, (-8, 0), "right"),
}
BITS = {"8 bits": (0, 9), "4 bits, to the nearest": (0, 9)}
REFITTED = " + our refit"
CLEAR = {"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.6}  # lines stop short of words


def rows() -> dict[str, list[tuple[float, float]]]:
    """The points of each method: percent saved, perplexity over the dense model's."""
    points: dict[str, list[tuple[float, float]]] = {}
    with FIGURES.open() as file:
        for row in csv.DictReader(file):
            point = float(row["saved_percent"]), float(row["perplexity_over_dense"])
            points.setdefault(row["method"], []).append(point)
    return points


def draw() -> str:
    """The figure as SVG."""
    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "headshare",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 11,
        }
    )
    figure, axes = pyplot.subplots(figsize=(8.4, 4.9))
    points = rows()
    for name, (colour, at, shift, side) in LINES.items():
        ours = colour == "s0"
        saved, ratio = zip(*points[name], strict=True)
        axes.plot(
            saved, ratio, "o-", color=LIGHT[colour], lw=3 if ours else 1.6, ms=7 if ours else 4.5, zorder=3 + ours
        )
        axes.annotate(
            name,
            (at, dict(points[name])[at]),
            shift,
            textcoords="offset points",
            ha=side,
            color=LIGHT[colour],
            weight="bold" if ours else "normal",
            bbox=CLEAR,
            zorder=6,
        )
    refitted = [point for name in points if name.endswith(REFITTED) for point in points[name]]
    axes.scatter(*zip(*refitted, strict=True), s=26, facecolors="white", edgecolors=LIGHT["ink"], zorder=5)
    axes.annotate(
        "three of them with our repair",
        (20, 1.36),
        (22, 1.075),
        color=LIGHT["ink"],
        arrowprops={"arrowstyle": "-", "color": LIGHT["muted"], "shrinkB": 6},
        bbox=CLEAR,
    )
    for name, shift in BITS.items():
        axes.scatter(*points[name][0], s=48, marker="D", color=LIGHT["s5"], zorder=5)
        axes.annotate(name, points[name][0], shift, textcoords="offset points", ha="center", color=LIGHT["s5"])
    axes.axhline(1, color=LIGHT["muted"], lw=1, ls=(0, (4, 3)))
    axes.annotate("dense model", (46, 1), (0, -13), textcoords="offset points", color=LIGHT["muted"], ha="right")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([1, 1.2, 1.5, 2, 3, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set(xlim=(0, 79), ylim=(0.87, 12))
    axes.set_xlabel("bytes saved, of the whole model")
    axes.set_title("Perplexity, as a multiple of the dense model's (lower is better)", loc="left", fontsize=11)
    axes.grid(axis="y", color=LIGHT["grid"])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    figure.tight_layout()
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    ElementTree.fromstring(written.getvalue())  # what is written can be read
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(draw())
