"""Cells of a comparison (one method at one ratio each), and the file that keeps the finished ones."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import AfterValidator, ConfigDict

from headshare.errors import EvaluationError
from headshare.evaluation.results import TaskResult
from headshare.files.kept_rows import KeptRows, Keyed, read_rows
from headshare.plan.plan import SharePlan
from headshare.plan.units import Sublayer
from headshare.short import short

CELLS = "cells.json"
CONTENT = "cells of `headshare compare`"
DENSE = "dense"
BLOCK = 4  # windows of the text that are drawn together


def _point(row: dict[str, float]) -> dict[str, float]:
    """A point of a curve, if it is complete."""
    if not {"step", "loss"} <= set(row):
        raise ValueError("a point of a curve needs a step and a loss")
    return row


@dataclass(frozen=True)
class TakenUnits:
    """Counts of units that a plan takes: units with a donor's weights, removed attention units, removed neurons."""

    tied: int
    removed: int
    neurons: int

    @classmethod
    def of(cls, plan: SharePlan) -> "TakenUnits":
        """The numbers over all layers; a unit whose parts are tied to several donors counts once."""
        tied = {(selection.layout.kind, tie.recipient) for selection in plan.selections for tie in selection.ties}
        return cls(len(tied), plan.removed(Sublayer.ATTENTION), plan.removed(Sublayer.FFN))

    @property
    def in_cell(self) -> str:
        """The numbers as a table shows them."""
        counts = {"tied": self.tied, "removed": self.removed, "neurons": self.neurons}
        return ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)


class Asked(NamedTuple):
    """What a cell asks of a method: a ratio of the units, or a share of the model's bytes to save.

    Both are 0 for the dense model and for methods that save the same whatever is asked.
    """

    ratio: float = 0.0
    save: float = 0.0

    def __str__(self) -> str:
        """The amount as tables show it: 0.3 of the units, or 20 % of the bytes."""
        return f"{100 * self.save:g} %" if self.save else f"{self.ratio:g}" if self.ratio else ""


@dataclass(frozen=True)
class Compared(Keyed):
    """The result of one method at one ratio, or for one share of the model's bytes, `save`.

    Both are 0 for the dense model and for methods that save the same whatever is asked.

    Attributes:
        saved_bytes: bytes saved, by counting; for an edit, the bytes that it would save.
        disk_bytes: size of the weights' files as they were written.
        memory_bytes: size of the loaded model's parameters, each counted once.
        seconds: time to make the model, with the cost curves that no earlier cell of the run had measured.
        failed: the reason why there is no result.
        losses: loss on each window of the text, in nats a token.
        divergences: divergence from the dense model's predictions on each window, in nats a token.
        by_layer: fraction of each layer's attention units that gave up weights.
        curve: a row for each measurement during training: `step`, `loss` on the held-out text (as shared then), and
            accuracies.
        given_up: units that the plan takes, if the method makes a plan.
    """

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
    save: float = 0.0

    def __repr__(self) -> str:
        figure = self.failed or ("" if self.perplexity is None else f"perplexity {self.perplexity:,.3f}")
        return short(self, self.method, str(self.asked), f"{self.saved_fraction:.2%} saved", figure)

    @property
    def asked(self) -> Asked:
        """What was asked of the method."""
        return Asked(self.ratio, self.save)

    @property
    def title(self) -> str:
        """The method, and what was asked of it."""
        return f"{self.method} {self.asked}" if any(self.asked) else self.method

    @property
    def perplexity(self) -> float | None:
        """The perplexity of the text, if there is one."""
        return math.exp(min(statistics.mean(self.losses), 700)) if self.losses else None

    def loses_more_than(self, other: "Compared") -> tuple[float, float]:
        """The extra loss in nats a token on the same windows, and its standard error by blocks of windows."""
        more = [mine - others for mine, others in zip(self.losses, other.losses, strict=True)]
        return statistics.mean(more), blocked_error(more)


def blocked_error(values: Sequence[float]) -> float:
    """The standard error of the mean of values in the order of the text, whose neighbours may be alike.

    It is that of the circular block bootstrap (Politis and Romano, 1992), in closed form and made unbiased for values
    that are independent. Blocks are of four windows, or of a quarter of them where they are fewer than sixteen. NaN for
    a single value.
    """
    count = len(values)
    if count < 2:
        return math.nan
    length = max(1, min(BLOCK, count // 4))
    around = np.concatenate([values, values[: length - 1]])
    means = np.convolve(around, np.full(length, 1 / length), mode="valid")
    return float(math.sqrt(length * means.var() / (count - length)))


def kept_cells(folder: Path) -> KeptRows[Compared]:
    """The cells that `headshare compare --out` keeps in this folder."""
    return KeptRows(folder / CELLS, Compared, CONTENT, refused=EvaluationError)


def read_cells(file: Path) -> list[Compared]:
    """The cells of a file.

    Raises:
        EvaluationError: if it is not there, or holds something else.
    """
    return read_rows(file, Compared, CONTENT, refused=EvaluationError)
