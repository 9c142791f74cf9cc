"""Tables: Markdown when piped, drawn on a terminal, and in parts where a terminal is too narrow for them."""

import io
import sys

import pytest

from headshare.cli.options import print_result
from headshare.tables import Table, drawn, markdown

WIDE = """Before.

| ratio | method | plan | saved | perplexity | seconds |
|--:|---|---|--:|--:|--:|
| 0.1 | directshare | 27 of 90 units share q, k and v, and 3 layers | 3.70% | 202.123 | 123 |
| 0.3 | svd-llm | failed: a\\|b | | | |

After: a | b."""


def test_a_table_is_drawn_and_all_else_is_left_as_it_is() -> None:
    lines = drawn(WIDE, 120).split("\n")
    assert (lines[0], lines[-1]) == ("Before.", "After: a | b.")
    assert "│ ratio │ method      │ plan " in lines[3]
    assert "│   0.1 │ directshare │ 27 of 90 units share q, k and v, and 3 layers │ 3.70% │    202.123 │" in "\n".join(
        lines
    )
    assert "│ failed: a|b " in "\n".join(lines)
    assert len({len(line) for line in lines[2:-2]}) == 1


@pytest.mark.parametrize("width", [48, 60, 80])
def test_a_table_that_is_too_wide_is_drawn_in_parts_whose_rows_say_what_they_are(width: int) -> None:
    text = drawn(WIDE, width)
    lines = text.split("\n")
    assert max(map(len, lines)) <= width
    parts = text.count("╭")
    assert parts > 1
    assert sum("│   0.1 │ directshare │" in line for line in lines) == parts
    for figure in ("3.70%", "202.123", " 123 "):  # no number is broken
        assert sum(figure in line for line in lines) == 1


def test_a_table_of_numbers_has_its_first_column_to_the_left_and_is_ascii_where_letters_are_few() -> None:
    text = drawn(markdown([("", "before", "after"), ("on disk", "10", "9"), ("in memory", "2", "1")]), 80, plain=True)
    assert text.isascii()
    assert "| on disk   |     10 |     9 |" in text


def test_words_begin_at_the_left_and_numbers_end_at_the_right_however_a_table_is_written() -> None:
    table = Table(["", "before", "after"], [["on disk", "10", "9"], ["in memory", "2"]])
    assert table.markdown().splitlines() == [
        "|  | before | after |",
        "|---|--:|--:|",
        "| on disk | 10 | 9 |",
        "| in memory | 2 |  |",
    ]
    even = [
        "|           | before | after |",
        "|-----------|-------:|------:|",
        "| on disk   |     10 |     9 |",
        "| in memory |      2 |       |",
    ]
    assert table.markdown(even=True).splitlines() == even
    assert markdown([("", "before", "after"), ("on disk", "10", "9"), ("in memory", "2", "")]).splitlines() == even


def test_a_cell_holds_any_text() -> None:
    text = Table(["model", "writes"], [["a|b", "one\ntwo | three"]], words=(0, 1)).markdown()
    assert text.splitlines()[2] == "| a\\|b | one<br>two \\| three |"
    lines = drawn(text, 80).splitlines()
    assert lines[3:5] == ["│ a|b   │ one         │", "│       │ two | three │"]


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_commands_print_markdown_into_a_pipe_and_draw_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for stream, expected in ((io.StringIO(), WIDE), (_Terminal(), drawn(WIDE, 60))):
        monkeypatch.setattr(sys, "stdout", stream)
        print_result({}, WIDE, as_json=False)
        assert stream.getvalue() == f"{expected}\n"
