"""Panels of rows: a name, its marks on a common scale, and its numbers beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

from headshare.pages.lines import Level, draw_mark
from headshare.pages.scales import Scale, said
from headshare.pages.svg import SMALL, Element, Panel, add, new_panel, shortened, width_of, write, write_head

WIDTH = 380.0
ROW = 19.0
TOP = 34.0
BOTTOM = 38.0
NAMES = 158.0  # the most room for names


@dataclass(frozen=True)
class Mark:
    """A mark in a row: its value, its standard error, and whether it is filled."""

    value: float
    error: float = 0.0
    filled: bool = True


@dataclass(frozen=True)
class Row:
    """A row: its name, its marks, and what is written beside them."""

    name: str
    marks: Sequence[Mark]
    beside: str


def rows_panel(title: str, rows: Sequence[Row], axis: str, levels: Sequence[Level] = (), *, log: bool = False) -> Panel:
    """A panel of rows in this order; `levels` are lines from top to bottom, named above."""
    height = TOP + ROW * len(rows) + BOTTOM
    panel = new_panel(WIDTH, height, f"{title}: {axis}")
    names = min(NAMES, 10 + max(width_of(row.name) for row in rows))
    numbers = 12 + max(width_of(row.beside, SMALL) for row in rows)
    ends = [mark.value + sign * mark.error for row in rows for mark in row.marks for sign in (-1, 1)]
    ends += [level.value + sign * level.error for level in levels for sign in (-1, 1)]
    scale = Scale.over(ends, names + 4, WIDTH - numbers, log=log)
    write_head(panel, title, WIDTH)
    bottom = TOP + ROW * len(rows)
    _draw_axis(panel.root, scale, bottom, axis)
    _draw_levels(panel.root, levels, scale, bottom)
    for number, row in enumerate(rows):
        y = TOP + ROW * (number + 0.5)
        write(panel.root, names - 6, y, shortened(row.name, names - 8), "ink", "end", tip=row.name)
        _draw_marks(panel.root, row, scale, y)
        write(panel.root, WIDTH - numbers + 10, y, row.beside, "muted").set("class", "muted small")
    return panel


def _draw_axis(root: Element, scale: Scale, bottom: float, axis: str) -> None:
    grid = add(root, "g", class_="grid", stroke="currentColor")
    most = max(2, int((scale.stop - scale.start) / 42))
    for mark in scale.marks(most):
        add(grid, "line", x1=scale(mark), x2=scale(mark), y1=TOP, y2=bottom + 3)
        write(root, scale(mark), bottom + 12, said(mark), "muted", "middle")
    half = width_of(axis) / 2
    middle = max(half, min(WIDTH - half, (scale.start + scale.stop) / 2))
    write(root, middle, bottom + BOTTOM - 8, axis, "muted", "middle")


def _draw_levels(root: Element, levels: Sequence[Level], scale: Scale, bottom: float) -> None:
    """Lines from top to bottom. Names that would lie on one another begin and end at their lines."""
    in_order = sorted(levels, key=lambda level: level.value)
    places = [scale(level.value) for level in in_order]
    halves = [width_of(level.name, SMALL) / 2 for level in in_order]
    middles = list(places)
    if len(places) == 2 and places[1] - places[0] < sum(halves) + 8:
        between = sum(places) / 2
        middles = [min(places[0] + 3, between - 4) - halves[0], max(places[1] - 3, between + 4) + halves[1]]
    for level, x, half, wanted in zip(in_order, places, halves, middles, strict=True):
        group = add(root, "g", class_="muted")
        if level.error:
            low, high = scale(level.value - level.error), scale(level.value + level.error)
            add(group, "rect", x=low, y=TOP, width=high - low, height=bottom - TOP, fill="currentColor", opacity=0.14)
        add(group, "line", x1=x, x2=x, y1=TOP, y2=bottom, stroke="currentColor", stroke_dasharray="4 3")
        middle = max(half, min(WIDTH - half, wanted))
        write(group, middle, TOP - 7, level.name, "muted", "middle").set("class", "muted small")


def _draw_marks(root: Element, row: Row, scale: Scale, y: float) -> None:
    group = add(root, "g", class_="s0", stroke="currentColor")
    places = [scale(mark.value) for mark in row.marks]
    add(group, "line", x1=min(places), x2=max(places), y1=y, y2=y, opacity=0.5)
    for mark in row.marks:
        if mark.error:
            ends = [scale(mark.value + sign * mark.error) for sign in (-1, 1)]
            add(group, "line", x1=ends[0], x2=ends[1], y1=y, y2=y, stroke_width=1.2)
        tip = f"{row.name}: {said(mark.value)}" + (f" ± {said(mark.error)}" if mark.error else "")
        draw_mark(group, (scale(mark.value), y), "circle", tip, filled=mark.filled)
