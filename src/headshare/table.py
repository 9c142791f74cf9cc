"""The demo's table as Markdown, which reads well in a terminal and can be pasted anywhere."""

from collections.abc import Sequence

from headshare.demo import Row

HEADERS = ("ratio", "units shared", "on disk", "in memory", "shared", "deleted", "random donors", "dense")


def demo_table(rows: Sequence[Row]) -> str:
    """One line a ratio: measured bytes, then perplexities of the shared model and its controls."""
    cells = [HEADERS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADERS))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    perplexities = (row.shared, row.deleted, row.random_donors, row.dense)
    return (
        f"{row.ratio:g}",
        str(row.recipients),
        _mib(row.disk_bytes),
        _mib(row.memory_bytes),
        *(f"{value:,.1f}" for value in perplexities),
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
