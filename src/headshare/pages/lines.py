"""Panels of lines: numbers against numbers, each line named beside its end."""

from collections.abc import Sequence
from dataclasses import dataclass

from headshare.pages.scales import Scale, said
from headshare.pages.style import SERIES
from headshare.pages.svg import LINE, Element, Panel, add, new_panel, shortened, width_of, write, write_head

WIDTH = 380.0
HEIGHT = 264.0
TOP = 44.0  # room for the title and the name of the vertical axis
BOTTOM = 38.0
LABELS = 150.0  # the most room for names beside the ends of lines
MOST = 8  # lines in one panel
FAR = 80.0  # from the end of a line to the names of the others
MARK = 3.2  # half the size of a mark
# outlines of marks, so that lines can be told apart without colours
MARKS = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Line:
    """A line: its name, its points in order, and the standard error of each where there are some.

    A `plain` line is one that stands in several panels for comparison: it has no colour in any.
    """

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()
    plain: bool = False


@dataclass(frozen=True)
class Level:
    """A height that all lines are held against, drawn across the panel; `error` makes it a band."""

    name: str
    value: float
    error: float = 0.0


@dataclass(frozen=True)
class Axes:
    """The names of both axes, and whether they are logarithmic."""

    across: str
    up: str
    log: bool = False
    whole: bool = False


@dataclass
class Label:
    """A name beside the end of a line: the end, at x and y, and the height `at` which the name stands."""

    name: str
    role: str
    x: float
    y: float
    tip: str = ""
    at: float = 0.0


def lines_panel(title: str, lines: Sequence[Line], axes: Axes, levels: Sequence[Level] = ()) -> Panel:
    """A panel of at most eight lines."""
    assert len(lines) <= MOST, f"{len(lines)} lines cannot be told apart"
    panel = new_panel(WIDTH, HEIGHT, f"{title}: {axes.up} against {axes.across}")
    # scales; the marks' numbers decide how much room they need
    names = [line.name for line in lines] + [level.name for level in levels]
    room = min(LABELS, 18 + max(map(width_of, names)))
    heights = [y for line in lines for _, y in line.points] + [level.value for level in levels]
    heights += [level.value + sign * level.error for level in levels for sign in (-1, 1)]
    up = Scale.over(heights, HEIGHT - BOTTOM, TOP, log=axes.log)
    left = 10 + max(width_of(said(mark)) for mark in up.marks())
    across = Scale.over((x for line in lines for x, _ in line.points), left, WIDTH - room)
    write_head(panel, title, WIDTH)
    _draw_axes(panel.root, across, up, axes)
    labels = [_draw_level(panel.root, level, across, up) for level in levels]
    for number, line in enumerate(lines):
        labels.append(_draw_line(panel.root, line, number, across, up))
    _name(panel.root, labels, WIDTH - room + 12, room - 12)
    return panel


def _draw_axes(root: Element, across: Scale, up: Scale, axes: Axes) -> None:
    write(root, 0.0, 28.0, axes.up, "muted")
    grid = add(root, "g", class_="grid", stroke="currentColor")
    marks = [mark for mark in across.marks() if not axes.whole or mark == int(mark)]
    for mark in up.marks():
        add(grid, "line", x1=across.start, x2=across.stop, y1=up(mark), y2=up(mark))
        write(root, across.start - 6, up(mark), said(mark), "muted", "end")
    for mark in marks:
        add(grid, "line", x1=across(mark), x2=across(mark), y1=up.start, y2=up.start + 4)
        write(root, across(mark), up.start + 13, said(mark), "muted", "middle")
    add(grid, "line", x1=across.start, x2=across.stop, y1=up.start, y2=up.start)
    write(root, (across.start + across.stop) / 2, HEIGHT - 8, axes.across, "muted", "middle")


def _draw_level(root: Element, level: Level, across: Scale, up: Scale) -> Label:
    group = add(root, "g", class_="muted")
    y = up(level.value)
    if level.error:
        high, low = up(level.value + level.error), up(level.value - level.error)
        add(group, "rect", x=across.start, y=high, width=across.stop - across.start, height=low - high,
            fill="currentColor", opacity=0.14)  # fmt: skip
    add(group, "line", x1=across.start, x2=across.stop, y1=y, y2=y, stroke="currentColor", stroke_dasharray="4 3")
    return Label(level.name, "muted", across.stop, y, f"{level.name}: {said(level.value)}")


def _draw_line(root: Element, line: Line, number: int, across: Scale, up: Scale) -> Label:
    role = "ink" if line.plain else SERIES[number]
    group = add(root, "g", class_=role, stroke="currentColor", fill="none", stroke_width=1.6)
    places = [(across(x), up(y)) for x, y in line.points]
    if len(places) > 1:
        add(group, "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), stroke_linejoin="round")
    for (x, y), error in zip(line.points, line.errors, strict=False):
        if error:
            add(group, "line", x1=across(x), x2=across(x), y1=up(y - error), y2=up(y + error), stroke_width=1.0)
    for (x, y), place in zip(line.points, places, strict=True):
        draw_mark(group, place, MARKS[number % len(MARKS)], f"{line.name}: {said(y)} at {said(x)}")
    return Label(line.name, role, *places[-1])


def draw_mark(group: Element, place: tuple[float, float], shape: str, tip: str, *, filled: bool = True) -> None:
    """Draw a mark at this place, in the colour of its group."""
    x, y = place
    if shape == "circle":
        path = f"M{x - MARK:.1f} {y:.1f}a{MARK} {MARK} 0 1 0 {2 * MARK} 0a{MARK} {MARK} 0 1 0 {-2 * MARK} 0z"
    else:
        half = MARK * 1.2 if shape == "diamond" else MARK * 0.95
        corners = {
            "square": ((-half, -half), (half, -half), (half, half), (-half, half)),
            "diamond": ((0, -half), (half, 0), (0, half), (-half, 0)),
            "triangle": ((0, -half * 1.2), (half * 1.15, half), (-half * 1.15, half)),
        }[shape]
        path = "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners) + "z"
    add(group, "path", d=path, fill="currentColor" if filled else "none", stroke_width=1.4, tip=tip)


def _name(root: Element, labels: list[Label], x: float, room: float) -> None:
    """Write the names beside the ends, moved apart where they would lie on one another."""
    beside = [label for label in labels if label.x >= x - FAR]
    for label in labels:
        if label not in beside:  # its line ends far from the others: the name stands at its own end
            write(root, label.x + 7, label.y - 10, label.name, label.role)
    spread(beside, TOP - 6, HEIGHT - BOTTOM + 6)
    for label in beside:
        if abs(label.at - label.y) > 3 or label.x < x - 16:
            leader = add(root, "g", class_=label.role, stroke="currentColor", stroke_width=0.8, opacity=0.55)
            add(leader, "path", d=f"M{label.x + 4:.1f} {label.y:.1f}L{x - 3:.1f} {label.at:.1f}", fill="none")
        write(root, x, label.at, shortened(label.name, room), label.role, tip=label.tip or label.name)


def spread(labels: list[Label], top: float, bottom: float) -> None:
    """Give each label a height of its own, near the one that it wants and a line away from the others."""
    labels.sort(key=lambda label: label.y)
    clusters: list[tuple[float, list[Label]]] = []  # the middle of each, and its labels from top to bottom
    for label in labels:
        clusters.append((label.y, [label]))
        # neighbours that would overlap share one cluster around the middle of their wishes
        while True:
            clusters[-1] = (_within(clusters[-1], top, bottom), clusters[-1][1])
            if len(clusters) < 2 or not _overlap(clusters[-2], clusters[-1]):
                break
            _, later = clusters.pop()
            _, before = clusters.pop()
            both = before + later
            clusters.append((sum(one.y for one in both) / len(both), both))
    for middle, together in clusters:
        for number, label in enumerate(together):
            label.at = middle + (number - (len(together) - 1) / 2) * LINE


def _within(cluster: tuple[float, list[Label]], top: float, bottom: float) -> float:
    middle, together = cluster
    half = (len(together) - 1) / 2 * LINE
    return max(top + half, min(bottom - half, middle))


def _overlap(before: tuple[float, list[Label]], after: tuple[float, list[Label]]) -> bool:
    return after[0] - before[0] < (len(before[1]) + len(after[1])) / 2 * LINE
