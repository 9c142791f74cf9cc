"""Tables of results: drawn with lines on a terminal, in Markdown elsewhere."""

import io
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from headshare.tables import markdown

# columns of a terminal of unknown width
WIDTH = 100


def drawn(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table for standard output; the first is the heading, and the first column's words lie left."""
    if sys.stdout is None or not sys.stdout.isatty():
        return markdown(rows)
    encoding = (sys.stdout.encoding or "").lower()
    table = Table(box=box.ROUNDED if encoding.startswith("utf") else box.ASCII, show_header=True)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    paper = io.StringIO()
    Console(file=paper, width=Console().width or WIDTH, markup=False, highlight=False, emoji=False).print(table)
    return paper.getvalue().rstrip("\n")
