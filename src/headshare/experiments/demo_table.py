"""The table of the demo as Markdown, which reads well in a terminal and can be pasted anywhere."""

from collections.abc import Sequence

from headshare.bench.tables import mib
from headshare.experiments.demo import DemoRow
from headshare.tables import markdown

HEADERS = (
    "ratio",
    "units shared",
    "on disk",
    "parameters",
    "PSS",
    "shared",
    "deleted",
    "random donors",
    "dense",
    "refit",
)


def demo_table(rows: Sequence[DemoRow]) -> str:
    """Table of the demo, one line a ratio: measured bytes, then perplexities of the shared model and its controls."""
    return markdown([HEADERS, *(_cells(row) for row in rows)])


def _cells(row: DemoRow) -> tuple[str, ...]:
    perplexities = (row.shared, row.deleted, row.random_donors, row.dense, row.refit)
    return (
        f"{row.ratio:g}",
        str(row.recipients),
        mib(row.disk_bytes),
        mib(row.memory_bytes),
        "unknown" if row.pss_bytes is None else mib(row.pss_bytes),
        *(f"{value:,.1f}" for value in perplexities),
    )
