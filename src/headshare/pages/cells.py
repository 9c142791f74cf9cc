"""Panels of cells, layers by groups, with arcs between layers; and of bars, an amount of a whole for each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headshare.pages.svg import Panel, add, new_panel, width_of, write, write_head

TOP = 44.0
ROW = 20.0
LEFT = 58.0
ARCS = 96.0
WIDEST = 46.0
NARROWEST = 7.0
ALL = 620.0  # the width that many cells share
BARS = 380.0
TEXTS = 112.0


@dataclass(frozen=True)
class Cell:
    """A unit: the role that colours it, the word in it, and what is told where a mouse rests."""

    role: str = "kept"
    word: str = ""
    tip: str = ""


def cells_panel(title: str, rows: Sequence[Sequence[Cell]], lent: Mapping[tuple[int, int], int] | None = None) -> Panel:
    """Cells, a row for each layer. `lent` counts the units that one layer lends to another, and is drawn as arcs."""
    groups = max(map(len, rows))
    each = max(NARROWEST, min(WIDEST, ALL / groups))
    right = LEFT + each * groups
    width = max(right + (ARCS if lent else 12.0), 200.0)
    panel = new_panel(width, TOP + ROW * len(rows) + 8, title)
    write_head(panel, title, width)
    every = max(1, -(-26 // int(each)))
    for group in range(0, groups, every):
        write(panel.root, LEFT + each * (group + 0.5), 32.0, str(group), "muted", "middle")
    write(panel.root, LEFT - 8, 32.0, "group", "muted", "end")
    for layer, row in enumerate(rows):
        y = TOP + ROW * layer
        write(panel.root, LEFT - 8, y + ROW / 2, f"layer {layer}", "muted", "end")
        for group, cell in enumerate(row):
            x = LEFT + each * group
            drawn = add(panel.root, "g", class_=cell.role)
            add(drawn, "rect", x=x + 1, y=y + 1, width=each - 2, height=ROW - 2, rx=2.5, fill="currentColor",
                opacity=0.55 if cell.role == "kept" else 0.26, tip=cell.tip)  # fmt: skip
            if cell.word and width_of(cell.word) <= each:
                write(drawn, x + each / 2, y + ROW / 2, cell.word, cell.role, "middle", tip=cell.tip)
    for (donor, recipient), count in sorted((lent or {}).items()):
        _arc(panel, right + 4, donor, recipient, count, len(rows))
    return panel


def _arc(panel: Panel, x: float, donor: int, recipient: int, count: int, layers: int) -> None:
    """An arc from the layer that lends to the layer that borrows, the farther out the farther apart they are."""
    start, stop = (TOP + ROW * (layer + 0.5) for layer in (donor, recipient))
    out = x + 14 + (ARCS - 30) * 4 / 3 * (recipient - donor) / layers
    group = add(panel.root, "g", class_="s0", stroke="currentColor", fill="none", opacity=0.6)
    tip = f"layer {donor} lends {count} to layer {recipient}"
    path = f"M{x:.1f} {start:.1f}C{out:.1f} {start:.1f} {out:.1f} {stop:.1f} {x + 5:.1f} {stop:.1f}"
    add(group, "path", d=path, stroke_width=0.8 + 0.5 * min(count, 6), tip=tip)
    add(group, "path", d=f"M{x:.1f} {stop:.1f}l6 -3v6z", fill="currentColor", stroke="none")


def bars_of_layers(title: str, rows: Sequence[tuple[float, float, str]]) -> Panel:
    """Bars, one for each layer: what is kept of a whole, and the two in words."""
    panel = new_panel(BARS, 26 + ROW * 0.8 * len(rows) + 4, title)
    write_head(panel, title, BARS)
    most = max((whole for _, whole, _ in rows), default=0.0) or 1.0
    beside = min(TEXTS, 12 + max(width_of(words) for *_, words in rows))
    room = BARS - LEFT - beside
    for layer, (kept, whole, words) in enumerate(rows):
        y = 26 + ROW * 0.8 * layer
        tip = f"layer {layer}: {words}"
        write(panel.root, LEFT - 8, y + 8, f"layer {layer}", "muted", "end")
        for role, amount, opacity in (("kept", whole, 0.6), ("s0", kept, 1.0)):
            group = add(panel.root, "g", class_=role)
            add(group, "rect", x=LEFT, y=y + 2, width=room * amount / most, height=12.0, rx=1.5, fill="currentColor",
                opacity=opacity, tip=tip)  # fmt: skip
        write(panel.root, BARS - beside + 8, y + 8, words, "muted")
    return panel
