"""Requests for a calibrated run, and what it reports."""

from dataclasses import dataclass
from typing import Any

from headshare.calibration.budget import Budget
from headshare.calibration.costs.to_plan import Budgeted
from headshare.calibration.measure import HeldOutPerplexity
from headshare.plan.plan import SharePlan
from headshare.sharing.share import SharedCheckpoint


@dataclass(frozen=True)
class Planned:
    """A plan with what it saves and what was predicted for it, and what was measured of it, if that was asked for."""

    chosen: Budgeted
    measured: HeldOutPerplexity | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same under the names that `--json` prints, without the plan."""
        measured = None if self.measured is None else self.measured.to_dict()
        return {"saved_bytes": self.chosen.saved_bytes, **_predicted(self.chosen), "measured": measured}

    def in_words(self) -> str:
        """Predicted beside measured."""
        lines = [f"{self.chosen.saved_bytes:,} bytes saved; {self.chosen.in_words()}"]
        return "\n".join(lines + ([self.measured.in_words()] if self.measured else []))


def _predicted(chosen: Budgeted | None) -> dict[str, Any]:
    """The names under which `--json` prints what was predicted; null where nothing was."""
    unit = None if chosen is None else "nats" if chosen.in_nats else "relative error"
    return {"price": None if chosen is None else chosen.price, "price_unit": unit}


@dataclass(frozen=True)
class Outcome:
    """A shared checkpoint as it was written, its plan with what was predicted for it if it was chosen by output, and
    what was measured if that was asked for."""

    shared: SharedCheckpoint
    chosen: Budgeted | None = None
    measured: HeldOutPerplexity | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `share --json` prints beside the bytes."""
        return {
            "plan_digest": self.shared.plan.digest,
            **_predicted(self.chosen),
            "refitted_tensors": len(self.shared.refit.tensors) if self.shared.refit else 0,
            "measured": None if self.measured is None else self.measured.to_dict(),
        }

    def in_words(self) -> list[str]:
        """A line for each thing that was done."""
        lines = [] if self.chosen is None else [self.chosen.in_words()]
        lines += [self.shared.refit.in_words()] if self.shared.refit else []
        return lines + ([self.measured.in_words()] if self.measured else [])


@dataclass(frozen=True)
class ShareRequest:
    """What is to be done with calibration: a plan, or a budget to choose one under; a refit of it, with gradient
    `steps` a layer after it; a measurement."""

    plan: SharePlan | Budget
    refit: bool = True
    ffn: bool = True
    steps: int = 0
    measure: bool = False
    dtype: str | None = None
