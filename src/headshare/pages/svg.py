"""Drawing by elements: the few shapes of which figures are made, and figures as files or as parts of a page.

Elements are those of the standard library's XML tree, which escapes every text. Characters that XML cannot hold are
shown as escapes first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from markupsafe import Markup

from headshare.files.printable import shown
from headshare.pages.style import LIGHT, figure_css

Element = ElementTree.Element
NARROW = frozenset("iljtfrI.,:;'|!()[] -")
BROAD = frozenset("mwMWQO@%&")
# sizes of letters in pixels, as the style has them
TEXT = 11.0
SMALL = 10.0
HEAD = 12.5
BOLD = 1.14  # how much wider bold letters are
GAP = 20.0  # between the panels of one file
LINE = 13.0  # from one line of text to the next
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Panel:
    """A panel of a figure, with its width and height in pixels at which its text is 11 pixels high."""

    root: Element
    width: float
    height: float


@dataclass(frozen=True)
class Figure:
    """A figure: a short name for its kind, what it shows, what its marks mean, and its panels."""

    kind: str
    title: str
    note: str
    panels: Sequence[Panel]

    @property
    def single(self) -> bool:
        """Whether it has one panel alone."""
        return len(self.panels) == 1


def new_panel(width: float, height: float, says: str) -> Panel:
    """An empty panel. `says` describes it to those who cannot see it."""
    box = f"0 0 {_number(width)} {_number(height)}"
    root = Element("svg", {"class": "fig", "viewBox": box, "role": "img", "aria-label": shown(says)})
    return Panel(root, width, height)


def add(parent: Element, tag: str, *, tip: str = "", **attributes: object) -> Element:
    """Add an element. A trailing underscore is no part of an attribute's name, others inside are hyphens.

    `tip` is shown where a mouse rests on the element.
    """
    named = {name.rstrip("_").replace("_", "-"): _number(value) for name, value in attributes.items()}
    element = ElementTree.SubElement(parent, tag, named)
    if tip:
        ElementTree.SubElement(element, "title").text = shown(tip)
    return element


def write(
    parent: Element, x: float, y: float, text: str, role: str = "ink", anchor: Anchor = "start", tip: str = ""
) -> Element:
    """Write a line of text; `y` is the middle of its small letters."""
    element = add(parent, "text", x=x, y=y + 4, class_=role, text_anchor=anchor)
    element.text = shown(text)
    if tip:
        ElementTree.SubElement(element, "title").text = shown(tip)
    return element


def write_head(panel: Panel, title: str, room: float) -> None:
    """Write the title of a panel, shortened to the room that there is, whole where a mouse rests."""
    write(panel.root, 0.0, 9.0, shortened(title, room, BOLD * HEAD), tip=title).set("class", "ink head")


def width_of(text: str, size: float = TEXT) -> float:
    """The width of a text in pixels, rather too large than too small: letters as wide as those of DejaVu Sans."""
    wide = {True: 0.36, False: 0.64}
    return size * sum(0.98 if letter in BROAD else wide[letter in NARROW] for letter in text)


def shortened(text: str, room: float, size: float = TEXT) -> str:
    """The text, with its middle left out if it needs more room than there is."""
    if width_of(text, size) <= room:
        return text
    left = len(text)
    while left > 2 and width_of(text[: -(-left // 2)] + "…" + text[len(text) - left // 2 :], size) > room:
        left -= 1
    return text[: -(-left // 2)] + "…" + text[len(text) - left // 2 :]


def inline(panel: Panel) -> Markup:
    """The panel as a part of a page, whose style has its colours."""
    return Markup(ElementTree.tostring(panel.root, encoding="unicode"))  # noqa: S704 - the tree escapes every text


def as_file(panels: Sequence[Panel], columns: int = 2) -> str:
    """One SVG file of all panels, side by side and below one another, with colours and background of its own."""
    across = min(columns, len(panels))
    rows = [panels[start : start + across] for start in range(0, len(panels), across)]
    width = max(sum(panel.width for panel in row) + GAP * (len(row) + 1) for row in rows)
    height = sum(max(panel.height for panel in row) for row in rows) + GAP * (len(rows) + 1)
    # the namespace is an attribute of the outermost element alone
    box = {"viewBox": f"0 0 {_number(width)} {_number(height)}", "width": _number(width), "height": _number(height)}
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **box})
    ElementTree.SubElement(root, "style").text = figure_css(LIGHT)
    add(root, "rect", width="100%", height="100%", fill=LIGHT["paper"])
    top = GAP
    for row in rows:
        left = GAP
        for panel in row:
            place = {"x": left, "y": top, "width": panel.width, "height": panel.height}
            nested = Element("svg", {**panel.root.attrib, **{name: _number(value) for name, value in place.items()}})
            nested.extend(panel.root)
            root.append(nested)
            left += panel.width + GAP
        top += max(panel.height for panel in row) + GAP
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
