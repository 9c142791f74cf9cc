"""Figures, tables and pages from names and numbers, whoever wrote them."""

import math
from itertools import pairwise
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headshare.errors import OutputError
from headshare.pages.lines import TOP, Axes, Label, Level, Line, lines_panel, spread
from headshare.pages.page import check_page, render, write_page
from headshare.pages.rows import Mark, Row, rows_panel
from headshare.pages.scales import Scale, said
from headshare.pages.style import DARK, LIGHT, SERIES
from headshare.pages.svg import LINE, as_file, inline, shortened, width_of
from headshare.tables import Table

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(NUMBERS, min_size=1, max_size=5), st.booleans())
@example([5e-324], False)
@example([0.0, 5e-324], False)
@example([1e9, 1e9 + 1e-6], False)
@example([1.0, 1.0 + 1e-15], True)
def test_a_scale_holds_its_numbers_and_marks_round_ones(values: list[float], log: bool) -> None:
    values = [abs(value) + 1e-3 for value in values] if log else values
    scale = Scale.over(values, 0.0, 100.0, log=log)
    assert all(0 <= scale(value) <= 100 for value in values)
    marks = scale.marks()
    assert len(marks) <= 7
    places = [scale(mark) for mark in marks]
    assert places == sorted(places)


def test_marks_of_a_logarithmic_scale_are_those_that_a_reader_expects() -> None:
    assert Scale(1.0, 1000.0, 0.0, 1.0, log=True).marks() == [1, 10, 100, 1000]
    assert Scale(24.0, 480.0, 0.0, 1.0, log=True).marks() == [30, 50, 70, 100, 200, 300]
    assert Scale(25.0, 33.0, 0.0, 1.0, log=True).marks() == [26, 28, 30, 32]
    assert [said(value) for value in (0.1, 1000.0, 25000.0, 3e9, 1e-7)] == ["0.1", "1000", "25,000", "3e9", "1e-7"]


@given(st.lists(st.floats(0, 300), max_size=12))
def test_names_beside_lines_keep_their_order_and_a_line_between_them(wishes: list[float]) -> None:
    labels = [Label(str(number), "ink", 0.0, wish) for number, wish in enumerate(wishes)]
    spread(labels, 0.0, 300.0)
    places = [label.at for label in labels]
    assert all(after - before >= LINE - 1e-6 for before, after in pairwise(places))
    assert all(-1e-6 <= place <= 300 + 1e-6 for place in places)
    if len(wishes) == 1:
        assert places == wishes


def test_names_are_shortened_in_their_middle_and_whole_where_a_mouse_rests() -> None:
    name = "a-method-of-a-very-long-name+refit+gptq4"
    short = shortened(name, 120.0)
    assert width_of(short) <= 120
    assert short.startswith("a-me")
    assert short.endswith("tq4")
    panel = lines_panel("T", [Line(name, [(1.0, 2.0), (2.0, 3.0)])], Axes("x", "y"))
    assert name in [tip.text for tip in panel.root.iter("title")]


def test_more_lines_than_can_be_told_apart_are_refused() -> None:
    assert len(SERIES) == 8
    lines = [Line(str(number), [(0.0, 1.0 * number), (1.0, 2.0)]) for number in range(9)]
    roles = {group.get("class") for group in lines_panel("T", lines[:8], Axes("x", "y")).root.iter("g")}
    assert roles >= set(SERIES)
    with pytest.raises(AssertionError, match="9 lines"):
        lines_panel("T", lines, Axes("x", "y"))


def test_every_colour_can_be_read_on_its_background() -> None:
    """WCAG's contrast: 4.5 for text, 3 for large marks; of yellows on white less is enough beside a name."""

    def light(colour: str) -> float:
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (LIGHT, DARK):
        for role in ("ink", "muted", *SERIES):
            low, high = sorted((light(theme[role]), light(theme["paper"])))
            assert (high + 0.05) / (low + 0.05) >= 3.9, role


@pytest.mark.parametrize("name", ["<script>", "a & b", '"><svg onload=x>', "a\u0000b", "ü ∞ 漢字"])
def test_what_strangers_wrote_is_text_in_a_figure(name: str) -> None:
    line = lines_panel(name, [Line(name, [(0.0, 1.0), (1.0, 2.0)])], Axes(name, name), [Level(name, 1.0)])
    row = rows_panel(name, [Row(name, [Mark(1.0)], name)], name)
    root = fromstring(as_file([line, row]))
    shown = name.replace("\u0000", "\\x00")
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert shown in texts
    assert all(fromstring(inline(panel)).tag == "svg" for panel in (line, row))


def test_one_number_alone_and_equal_ones_can_be_drawn() -> None:
    for points in ([(0.0, 0.0)], [(1.0, 5.0), (2.0, 5.0)]):
        panel = lines_panel("T", [Line("a", points)], Axes("x", "y"))
        assert all(math.isfinite(float(text.get("y", "nan"))) for text in panel.root.iter("text"))
        assert all(float(text.get("y", "nan")) <= panel.height for text in panel.root.iter("text"))
    assert panel.height > TOP


def test_a_table_in_markdown_fills_short_rows() -> None:
    table = Table(["a", "b"], [["1", "2"], ["3"]])
    assert table.markdown() == "| a | b |\n|---|--:|\n| 1 | 2 |\n| 3 |  |"


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    check_page(page)
    made = render("base.html")
    write_page(page, made)
    write_page(page, made)
    page.write_text("notes")
    with pytest.raises(OutputError, match="is no page that headshare wrote"):
        write_page(page, made)
    assert page.read_text() == "notes"
    with pytest.raises(OutputError):
        write_page(tmp_path, made)
