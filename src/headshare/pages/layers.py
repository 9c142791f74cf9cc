"""Panels of layers: a share for each layer, as bars of one row or as shades of many."""

from collections.abc import Mapping, Sequence

from headshare.pages.svg import Element, Panel, add, new_panel, shortened, width_of, write, write_head

WIDTH = 380.0
TOP = 26.0
BOTTOM = 34.0
BARS = 84.0  # the height of bars that give up everything
CELL = 15.0
TEXT = 12.0  # from one line of a row's name to the next
NAMES = 158.0
MARKS = 5  # layers between two that are numbered


def bars_panel(title: str, shares: Sequence[float]) -> Panel:
    """Bars, one for each layer, as high as the share of it from 0 to 1."""
    panel = new_panel(WIDTH, TOP + BARS + BOTTOM, f"{title}: share by layer")
    write_head(panel, title, WIDTH)
    left = 40.0
    bottom = TOP + BARS
    grid = add(panel.root, "g", class_="grid", stroke="currentColor")
    for percent in (0, 50, 100):
        y = bottom - BARS * percent / 100
        add(grid, "line", x1=left, x2=WIDTH, y1=y, y2=y)
        write(panel.root, left - 6, y, f"{percent} %", "muted", "end")
    each = (WIDTH - left) / len(shares)
    group = add(panel.root, "g", class_="s0")
    for layer, share in enumerate(shares):
        if share > 0:
            add(group, "rect", x=left + each * layer + each * 0.12, y=bottom - BARS * share, width=each * 0.76,
                height=BARS * share, fill="currentColor", tip=f"layer {layer}: {share:.0%}")  # fmt: skip
    number_layers(panel.root, len(shares), left, each, bottom)
    return panel


def shades_panel(title: str, rows: Mapping[str, Sequence[float]]) -> Panel:
    """Cells, a row for each name and a column for each layer, the darker the larger the share from 0 to 1."""
    names = {name: _wrapped(name) for name in rows}
    heights = [max(CELL, TEXT * len(lines) + 3) for lines in names.values()]
    panel = new_panel(WIDTH, TOP + sum(heights) + BOTTOM, f"{title}: share by layer, from light to dark")
    write_head(panel, title, WIDTH - 120)
    _scale(panel.root)
    left = min(NAMES, 10 + max(width_of(line) for lines in names.values() for line in lines))
    layers = max(map(len, rows.values()))
    each = (WIDTH - left) / layers
    top = TOP
    for (name, shares), height in zip(rows.items(), heights, strict=True):
        lines = names[name]
        for number, line in enumerate(lines):
            y = top + height / 2 + (number - (len(lines) - 1) / 2) * TEXT
            write(panel.root, left - 6, y, shortened(line, left - 6), "ink", "end", tip=name)
        group = add(panel.root, "g", class_="s0")
        for layer, share in enumerate(shares):
            add(group, "rect", x=left + each * layer, y=top + 1, width=each - 0.8, height=height - 2,
                fill="currentColor", opacity=_shade(share), tip=f"{name}, layer {layer}: {share:.0%}")  # fmt: skip
        top += height
    number_layers(panel.root, layers, left, each, top)
    return panel


def _wrapped(name: str) -> list[str]:
    """The name in lines that have room beside a row, broken after commas."""
    lines = [""]
    for word in name.replace(", ", ",\n").split("\n"):
        joined = f"{lines[-1]} {word}".strip()
        if lines[-1] and width_of(joined) > NAMES - 10:
            lines.append(word)
        else:
            lines[-1] = joined
    return lines


def _shade(share: float) -> float:
    return 0.07 + 0.93 * share


def _scale(root: Element) -> None:
    """The shades of none, a half and all, named."""
    group = add(root, "g", class_="s0")
    for number in range(9):
        add(group, "rect", x=WIDTH - 82 + 5 * number, y=5, width=5, height=8, fill="currentColor",
            opacity=_shade(number / 8))  # fmt: skip
    write(root, WIDTH - 86, 9.0, "0", "muted", "end").set("class", "muted small")
    write(root, WIDTH, 9.0, "100 %", "muted", "end").set("class", "muted small")


def number_layers(root: Element, layers: int, left: float, each: float, bottom: float) -> None:
    """Write every fifth layer's number below its place, or fewer where that is too many."""
    every = max(1, MARKS if layers > 2 * MARKS else 1)
    while every * each < 24:
        every *= 2
    for layer in range(0, layers, every):
        write(root, left + each * (layer + 0.5), bottom + 10, str(layer), "muted", "middle")
    write(root, left + each * layers / 2, bottom + 25, "layer", "muted", "middle")
