"""A cell of a comparison: one method at one ratio, and the file that keeps those that are done."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict

from headshare.evaluation.results import Kept, Keyed, TaskResult, read_rows
from headshare.plan.plan import SharePlan
from headshare.plan.units import Sublayer

CELLS, WHAT = "cells.json", "cells of `headshare compare`"
DENSE = "dense"


def _point(row: dict[str, float]) -> dict[str, float]:
    """A row of a curve."""
    if not {"step", "loss"} <= set(row):
        raise ValueError("a point of a curve needs a step and a loss")
    return row


@dataclass(frozen=True)
class TakenUnits:
    """What a plan takes from a model: units that use a donor's weights, and removed attention units and neurons."""

    tied: int
    removed: int
    neurons: int

    @classmethod
    def of(cls, plan: SharePlan) -> "TakenUnits":
        """Counted over all layers; a unit whose parts are tied to several donors counts once."""
        tied = {(one.layout.kind, tie.recipient) for one in plan.selections for tie in one.ties}
        return cls(len(tied), plan.removed(Sublayer.ATTENTION), plan.removed(Sublayer.FFN))

    @property
    def in_cell(self) -> str:
        """As a table shows it."""
        counts = {"tied": self.tied, "removed": self.removed, "neurons": self.neurons}
        return ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)


@dataclass(frozen=True)
class Compared(Keyed):
    """One method at one ratio; at 0 the dense model, and methods that save the same whatever the ratio.

    Bytes on disk are those of the weights' files as they were written, in memory those of the loaded model's
    parameters, each once; `saved_bytes` are counted, and of an edit what it would save. `losses` and `divergences` are
    those of the text's windows, nats a token: what predictions lose, and how far they are from the dense model's.
    `by_layer` is the share of each layer's attention units that gave up weights; `curve` has a row for each time that
    was measured while training: `step`, `loss` on what was held out (as shared then), and accuracies. `seconds` are
    those of making it, with the prices that no earlier cell of the run had measured. `given_up` is of methods that make
    a plan. `failed` says why there is nothing else."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    key: str
    method: str
    ratio: float
    saved_bytes: int = 0
    saved_fraction: float = 0.0
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    seconds: float = 0.0
    note: str = ""
    failed: str = ""
    results: tuple[TaskResult, ...] = ()
    losses: tuple[float, ...] = ()
    divergences: tuple[float, ...] = ()
    by_layer: tuple[float, ...] = ()
    curve: tuple[Annotated[dict[str, float], AfterValidator(_point)], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    given_up: TakenUnits | None = None

    @property
    def title(self) -> str:
        """The method, and its ratio where it has one."""
        return f"{self.method} {self.ratio:g}" if self.ratio else self.method

    @property
    def perplexity(self) -> float | None:
        """Of the text, if there is one."""
        return math.exp(min(statistics.mean(self.losses), 700)) if self.losses else None

    def loses_more_than(self, other: "Compared") -> tuple[float, float]:
        """By how many nats a token, and the standard error over windows, which are the same."""
        more = [one - two for one, two in zip(self.losses, other.losses, strict=True)]
        return statistics.mean(more), statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else math.nan


def kept_cells(folder: Path) -> Kept[Compared]:
    """What `headshare compare --out` keeps in this folder.

    Raises:
        EvaluationError: if its file is there and holds something else.
    """
    return Kept(folder / CELLS, Compared, WHAT)


def read_cells(file: Path) -> list[Compared]:
    """The cells of a file.

    Raises:
        EvaluationError: if it is not there, or holds something else.
    """
    return read_rows(file, Compared, WHAT)
