"""Tables: in Markdown, which can be pasted anywhere, and drawn with lines where a terminal shows them.

Whatever prints a table makes Markdown of it. `drawn` then draws every table of a text, so that all look the same.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

_RULE = re.compile(r"\|(?: *:?-+:? *\|)+")
_STROKE = re.compile(r"(?<!\\)\|")
# words that may be broken into lines take at least, and where there is no room at most, so many columns of a terminal
_LEAST, _MOST = 12, 40

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """A table: its heads, and rows of as many texts; a row may be shorter.

    `words` has the columns that hold words and begin at the left; numbers end at the right.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[int] = (0,)

    def markdown(self, *, even: bool = False) -> str:
        """The table in Markdown. Its columns are `even` for a reader who sees it as it is, or as short as can be."""
        columns = range(len(self.heads))
        filled = [
            [in_one_line(cell) for cell in (*row, *[""] * (len(columns) - len(row)))]
            for row in (self.heads, *self.rows)
        ]
        widths = [max(len(row[column]) for row in filled) if even else 0 for column in columns]
        rule = "|".join(
            "-" * max(widths[column] + 2, 3) if column in self.words else "-" * max(widths[column] + 1, 2) + ":"
            for column in columns
        )
        heads, *rows = ("| " + " | ".join(self._filled_up(row, widths)) + " |" for row in filled)
        return "\n".join([heads, f"|{rule}|", *rows])

    def _filled_up(self, row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            yield cell.ljust(width) if column in self.words else cell.rjust(width)


def markdown(cells: Rows) -> str:
    """A Markdown table, in even columns, of lines of cells: the first line is the heading, the first column words."""
    return Table(cells[0], cells[1:]).markdown(even=True)


def in_one_line(text: str) -> str:
    """A text so that Markdown shows it as it is, in one line of its source and in a cell of a table."""
    return text.strip().replace("|", "\\|").replace("\n", "<br>")


def drawn(text: str, width: int, *, plain: bool = False) -> str:
    """The text with each of its Markdown tables drawn, for a terminal of this width.

    A table that is wider is drawn in parts, one below the other. Each has some of the columns, and the first columns
    again, which say what a row is. With `plain` the lines are those of ASCII.
    """
    lines = text.split("\n")
    done: list[str] = []
    at = 0
    while at < len(lines):
        if lines[at].startswith("|") and at + 1 < len(lines) and _RULE.fullmatch(lines[at + 1]):
            table = list(takewhile(lambda line: line.startswith("|"), lines[at:]))
            done += _draw(table, width, plain=plain)
            at += len(table)
        else:
            done.append(lines[at])
            at += 1
    return "\n".join(done)


def _draw(table: Sequence[str], width: int, *, plain: bool) -> Iterator[str]:
    """The lines of a drawn Markdown table, with an empty line between its parts."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heads = _cells(table[0])
    rows = [(_cells(line) + [""] * len(heads))[: len(heads)] for line in table[2:]]
    words = [not rule.strip().endswith(":") for rule in _cells(table[1])]
    # the first column of words, and what stands before it, tells what a row is
    words[0] = words[0] or not any(words)
    keys = words.index(True) + 1
    wide = [
        _width_of(head, column, words=text)
        for head, column, text in zip(heads, _turned(rows, heads), words, strict=True)
    ]
    for number, part in enumerate(_parts(wide, words, keys, width)):
        if number:
            yield ""
        drawing = Table(box=box.ASCII if plain else box.ROUNDED, show_header=any(heads))
        for column, columns in part.items():
            drawing.add_column(
                heads[column], justify="left" if words[column] else "right", width=columns, overflow="fold"
            )
        for row in rows:
            drawing.add_row(*(Text(row[column]) for column in part))
        paper = Console(
            width=max(width, sum(part.values()) + 3 * len(part) + 1),
            color_system=None,
            markup=False,
            highlight=False,
            emoji=False,
        )
        with paper.capture() as captured:
            paper.print(drawing)
        yield from captured.get().rstrip("\n").split("\n")


def _cells(line: str) -> list[str]:
    cells = _STROKE.split(line.strip())[1:-1]
    return [cell.strip().replace("\\|", "|").replace("<br>", "\n") for cell in cells]


def _turned(rows: Rows, heads: Sequence[str]) -> list[list[str]]:
    return [[row[column] for row in rows] for column in range(len(heads))]


def _width_of(head: str, column: Sequence[str], *, words: bool) -> tuple[int, int]:
    """The least and the most columns of a terminal that a column of the table can use.

    Its heading may be broken between words, and so may its cells where they are `words`.
    """
    from rich.cells import cell_len

    lines = [cell_len(line) for cell in column for line in cell.split("\n")] or [0]
    longest_word = max(map(cell_len, head.split()), default=1)
    most = max(*lines, cell_len(head), 1)
    least = max(longest_word, min(max(lines), _LEAST) if words else max(lines))
    return min(least, most), most


def _parts(wide: Sequence[tuple[int, int]], words: Sequence[bool], keys: int, width: int) -> Iterator[dict[int, int]]:
    """The parts of a table that is drawn within a width: its columns, each with its own width."""

    def needed(columns: Sequence[int]) -> int:
        return (
            sum(min(wide[column][1], _MOST) if words[column] else wide[column][0] for column in columns)
            + 3 * len(columns)
            + 1
        )

    everything = range(len(wide))
    key = list(everything[:keys])
    rest = list(everything[keys:])
    if sum(most for _, most in wide) + 3 * len(wide) + 1 <= width:
        yield {column: wide[column][1] for column in everything}
        return
    while True:
        part = [*key, *rest[:1]]
        rest = rest[1:]
        while rest and needed([*part, rest[0]]) <= width:
            part.append(rest.pop(0))
        yield _fitted(part, wide, words, width)
        if not rest:
            return


def _fitted(part: Sequence[int], wide: Sequence[tuple[int, int]], words: Sequence[bool], width: int) -> dict[int, int]:
    """The widths of a part's columns: the least for all, and what is left over for those that can use it, in order."""
    fitted = {column: wide[column][0] for column in part}
    left = width - sum(fitted.values()) - 3 * len(part) - 1
    for column in sorted(part, key=lambda column: not words[column]):
        more = max(0, min(wide[column][1] - fitted[column], left))
        fitted[column] += more
        left -= more
    return fitted
