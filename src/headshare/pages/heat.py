"""Panels of a matrix of numbers: cells by shade, and pairs of numbers by how many lie in each place."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headshare.pages.lines import Axes
from headshare.pages.scales import Scale, said
from headshare.pages.svg import SMALL, Element, Panel, add, new_panel, width_of, write, write_head

WIDTH = 380.0
TOP = 44.0
LEFT = 34.0
BOTTOM = 38.0
TALLEST = 300.0  # the height that many rows share
HIGHEST = 16.0  # of one row
SHADES = 9
BINS = 44
HEIGHT = 264.0


@dataclass(frozen=True)
class Sides:
    """The words for what the rows and the columns of a matrix are."""

    rows: str
    columns: str


def heat_panel(
    title: str,
    values: Sequence[Sequence[float | None]],
    sides: Sides,
    marks: Mapping[tuple[int, int], str] | None = None,
) -> Panel:
    """A matrix of numbers, the darker the larger; None leaves a cell empty.

    `marks` draw a `tick`, a `ring`, or both (`both`) into cells.
    """
    columns = max(map(len, values))
    height = min(HIGHEST, TALLEST / len(values))
    each = (WIDTH - LEFT) / columns
    panel = new_panel(WIDTH, TOP + height * len(values) + BOTTOM, f"{title}: {sides.rows} by {sides.columns}")
    write_head(panel, title, WIDTH)
    known = [value for row in values for value in row if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    _draw_scale(panel.root, low, high)
    group = add(panel.root, "g", class_="s0")
    for number, row in enumerate(values):
        for column, value in enumerate(row):
            if value is not None:
                add(group, "rect", x=LEFT + each * column, y=TOP + height * number, width=each - 0.6,
                    height=height - 0.6, fill="currentColor", opacity=_shade(value, low, high),
                    tip=f"{sides.rows} {number}, {sides.columns} {column}: {said(round(value, 4))}")  # fmt: skip
    for (number, column), mark in (marks or {}).items():
        _draw_marks(panel.root, LEFT + each * (column + 0.5), TOP + height * (number + 0.5), min(each, height), mark)
    _number(panel.root, len(values), TOP, height, across=False)
    _number(panel.root, columns, LEFT, each, across=True, bottom=TOP + height * len(values))
    write(panel.root, LEFT - 6, TOP - 9, sides.rows, "muted", "end")
    write(panel.root, (LEFT + WIDTH) / 2, TOP + height * len(values) + 25, sides.columns, "muted", "middle")
    return panel


def density_panel(title: str, points: Iterable[tuple[float, float]], axes: Axes, note: str = "") -> Panel:
    """Where many pairs of numbers lie: places of equal size, the darker the more pairs are in them."""
    pairs = list(points)
    panel = new_panel(WIDTH, HEIGHT, f"{title}: {axes.up} against {axes.across}")
    write_head(panel, title, WIDTH)
    up = Scale.over((y for _, y in pairs), HEIGHT - BOTTOM, TOP, margin=0.02)
    left = 10 + max(width_of(said(mark)) for mark in up.marks())
    across = Scale.over((x for x, _ in pairs), left, WIDTH - 4, margin=0.02)
    write(panel.root, 0.0, 28.0, axes.up, "muted")
    write(panel.root, WIDTH, 28.0, note, "muted", "end")
    grid = add(panel.root, "g", class_="grid", stroke="currentColor")
    for mark in up.marks():
        add(grid, "line", x1=across.start, x2=across.stop, y1=up(mark), y2=up(mark))
        write(panel.root, across.start - 6, up(mark), said(mark), "muted", "end")
    for mark in across.marks():
        add(grid, "line", x1=across(mark), x2=across(mark), y1=up.start, y2=up.start + 4)
        write(panel.root, across(mark), up.start + 13, said(mark), "muted", "middle")
    write(panel.root, (across.start + across.stop) / 2, HEIGHT - 8, axes.across, "muted", "middle")
    _draw_counts(panel.root, pairs, across, up)
    return panel


def _draw_counts(root: Element, pairs: Sequence[tuple[float, float]], across: Scale, up: Scale) -> None:
    """A square for each place that has pairs; its shade is by the logarithm of how many."""
    wide, high = (across.stop - across.start) / BINS, (up.start - up.stop) / BINS
    counts: dict[tuple[int, int], int] = {}
    for x, y in pairs:
        place = tuple(min(BINS - 1, int(at)) for at in ((across(x) - across.start) / wide, (up(y) - up.stop) / high))
        counts[place[0], place[1]] = counts.get((place[0], place[1]), 0) + 1
    most = math.log1p(max(counts.values(), default=1))
    group = add(root, "g", class_="s0")
    for (column, row), count in counts.items():
        add(group, "rect", x=across.start + wide * column, y=up.stop + high * row, width=wide - 0.4, height=high - 0.4,
            fill="currentColor", opacity=0.12 + 0.88 * math.log1p(count) / most,
            tip=f"{count:,} pair{'s' if count > 1 else ''}")  # fmt: skip


def _shade(value: float, low: float, high: float) -> float:
    return 0.05 + 0.95 * (value - low) / (high - low) if high > low else 0.5


def _draw_scale(root: Element, low: float, high: float) -> None:
    """The shades of the least and the greatest number, and of those between, with the two numbers."""
    words = [said(round(end, 3)) for end in (low, high)]
    right = WIDTH - width_of(words[1], SMALL) - 4
    group = add(root, "g", class_="s0")
    for number in range(SHADES):
        add(group, "rect", x=right - 6.0 * (SHADES - number), y=24, width=6, height=8, fill="currentColor",
            opacity=0.05 + 0.95 * number / (SHADES - 1))  # fmt: skip
    write(root, right - 6.0 * SHADES - 4, 28.0, words[0], "muted", "end").set("class", "muted small")
    write(root, WIDTH, 28.0, words[1], "muted", "end").set("class", "muted small")


def _draw_marks(root: Element, x: float, y: float, size: float, mark: str) -> None:
    group = add(root, "g", class_="s1", stroke="currentColor", fill="none", stroke_width=1.6)
    half = max(2.4, size * 0.3)
    if mark in ("tick", "both"):
        add(
            group,
            "path",
            d=f"M{x - half:.1f} {y:.1f}l{half * 0.7:.1f} {half * 0.8:.1f}l{half * 1.2:.1f} {-half * 1.7:.1f}",
        )
    if mark in ("ring", "both"):
        add(group, "circle", cx=x, cy=y, r=half * 1.45)


def _number(root: Element, count: int, start: float, each: float, *, across: bool, bottom: float = 0.0) -> None:
    """Write the numbers of rows or of columns, as many as there is room for."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * each >= (18 if across else 12))
    for number in range(0, count, every):
        middle = start + each * (number + 0.5)
        if across:
            write(root, middle, bottom + 10, str(number), "muted", "middle")
        else:
            write(root, start - 10 if across else LEFT - 6, middle, str(number), "muted", "end")
