"""The table of the demo."""

from collections.abc import Sequence

from headshare.bench.tables import mib
from headshare.experiments.demo import DemoRow
from headshare.tables import Table

HEADERS = ("model", "saved", "on disk", "in memory", "perplexity", "over dense")


def demo_table(rows: Sequence[DemoRow]) -> Table:
    """Table of the demo, one line a model: measured bytes, and perplexity on text that nothing was fitted to."""
    return Table(HEADERS, [_cells(row, rows[0]) for row in rows])


def _cells(row: DemoRow, dense: DemoRow) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.saved(dense):.1%}",
        mib(row.disk_bytes),
        mib(row.memory_bytes),
        f"{row.perplexity:,.2f}",
        f"{row.over(dense):,.3f}",
    )
