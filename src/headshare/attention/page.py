"""The page of an analysis: what was looked at, its figures, and its tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from headshare.attention.figures import figures_of
from headshare.attention.result import AttentionResult
from headshare.pages.page import render
from headshare.pages.svg import Figure
from headshare.tables import Table


@dataclass(frozen=True)
class Attended:
    """An analysis as a page shows it: a title, facts of what was looked at, figures, and tables with their words."""

    title: str
    facts: Sequence[tuple[str, str]]
    figures: Sequence[Figure]
    tables: Sequence[tuple[str, Table]]

    @classmethod
    def of(cls, result: AttentionResult) -> "Attended":
        """The analysis with this result."""
        title = f"Who attends alike, in {result.model}"
        return cls(title, facts(result), figures_of(result), list(result.tables()))


def attention_page(result: AttentionResult) -> str:
    """The page of an analysis as one HTML file that needs no other."""
    return render("attention.html", model=result.model, one=Attended.of(result))


def facts(result: AttentionResult) -> list[tuple[str, str]]:
    """What was looked at, as pairs of a name and what it is here."""
    return [
        ("model type", result.model_type),
        ("heads", f"{result.layers} layers of {result.heads}"),
        *(("text", f"{text.text}: {text.tokens:,} tokens in windows of {text.window}") for text in result.texts),
    ]
