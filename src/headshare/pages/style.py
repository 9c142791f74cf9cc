"""The one style of all figures: eight colours that people of any colour vision can tell apart, on light and on dark.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), darkened for light backgrounds until text in them
can be read. No figure tells two things apart by colour alone.
"""

from collections.abc import Mapping

# roles: ink, muted text, lines of the grid, background, bars and cells that stay, and the eight series
LIGHT = {
    "ink": "#1f2328",
    "muted": "#5c6570",
    "grid": "#e3e6ea",
    "paper": "#ffffff",
    "kept": "#c9d1da",
    "s0": "#0067a5",
    "s1": "#c24a00",
    "s2": "#00795a",
    "s3": "#99458f",
    "s4": "#8f6a00",
    "s5": "#8c2f39",
    "s6": "#2b86c2",
    "s7": "#555c66",
}
DARK = {
    "ink": "#e6e9ed",
    "muted": "#9aa4b0",
    "grid": "#2d333b",
    "paper": "#161a1f",
    "kept": "#414a55",
    "s0": "#5db4ea",
    "s1": "#f08a45",
    "s2": "#3fc49a",
    "s3": "#d98fcf",
    "s4": "#dfb43a",
    "s5": "#ee8484",
    "s6": "#a5dcfa",
    "s7": "#b3bcc7",
}
SERIES = tuple(name for name in LIGHT if name.startswith("s"))
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def figure_css(colours: Mapping[str, str]) -> str:
    """The rules of a figure in these colours: a class for each role, which sets `currentColor`."""
    rules = [f".fig .{role}{{color:{colour}}}" for role, colour in colours.items() if role != "paper"]
    text = f".fig text{{font:11px {FONT};fill:currentColor}}.fig .head{{font-size:12.5px;font-weight:600}}"
    return "".join([text, ".fig .small{font-size:10px}", *rules])
