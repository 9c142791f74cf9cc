"""Requests for a calibrated run, and the results that it reports."""

from dataclasses import dataclass
from typing import Any

from headshare.calibration.budget import Budget
from headshare.calibration.costs.to_plan import Budgeted
from headshare.calibration.measure import HeldOutPerplexity
from headshare.calibration.refit.refinement import Refinement
from headshare.plan.plan import SharePlan
from headshare.sharing.share import SharedCheckpoint
from headshare.short import short


@dataclass(frozen=True)
class Planned:
    """A plan with its savings and its predicted cost, and the measured perplexities if they were asked for."""

    chosen: Budgeted
    measured: HeldOutPerplexity | None = None

    def __repr__(self) -> str:
        return short(self, f"{self.chosen.saved_bytes:,} bytes saved", repr(self.chosen.plan))

    def to_dict(self) -> dict[str, Any]:
        """The savings, the predicted cost and the measurement under the names that `--json` prints."""
        measured = None if self.measured is None else self.measured.to_dict()
        return {"saved_bytes": self.chosen.saved_bytes, **_predicted(self.chosen), "measured": measured}

    def in_words(self) -> str:
        """Lines for the command line's report: the prediction, then the measurement."""
        lines = [f"{self.chosen.saved_bytes:,} bytes saved; {self.chosen.in_words()}"]
        return "\n".join(lines + ([self.measured.in_words()] if self.measured else []))


def _predicted(chosen: Budgeted | None) -> dict[str, Any]:
    """The predicted cost and its unit under the names that `--json` prints; null where nothing was predicted."""
    unit = None if chosen is None else "nats" if chosen.in_nats else "relative error"
    data: dict[str, Any] = {"price": None if chosen is None else chosen.price, "price_unit": unit}
    if chosen is not None and chosen.plan.bits is not None:
        data |= {"rounding_price": chosen.rounding, "bits": chosen.plan.bits.model_dump(mode="json")}
    return data


@dataclass(frozen=True)
class Outcome:
    """A shared checkpoint as it was written.

    `chosen` is its plan with the predicted cost, if the plan was chosen by output. `measured` are the perplexities, if
    they were asked for.
    """

    shared: SharedCheckpoint
    chosen: Budgeted | None = None
    measured: HeldOutPerplexity | None = None

    def __repr__(self) -> str:
        return short(self, repr(self.shared))

    def to_dict(self) -> dict[str, Any]:
        """The fields that `share --json` prints beside the bytes."""
        return {
            "plan_digest": self.shared.plan.digest,
            **_predicted(self.chosen),
            "refitted_tensors": len(self.shared.refit.tensors) if self.shared.refit else 0,
            "measured": None if self.measured is None else self.measured.to_dict(),
        }

    def in_words(self) -> list[str]:
        """Lines for the command line's report: the choice, the refit and the measurement, as far as they were made."""
        lines = [] if self.chosen is None else [self.chosen.in_words()]
        lines += [self.shared.refit.in_words()] if self.shared.refit else []
        return lines + ([self.measured.in_words()] if self.measured else [])


@dataclass(frozen=True)
class ShareRequest:
    """A request for a shared checkpoint: a plan, or a budget to choose a plan for, and the stages that follow.

    With `refit` the output projections are refitted, those of the feed-forward only with `ffn`. `refine` names the
    gradient steps that follow. With `measure` the perplexity is measured. `dtype` is the type of the weights that are
    written.
    """

    plan: SharePlan | Budget
    refit: bool = True
    ffn: bool = True
    refine: str | int | Refinement | None = None
    measure: bool = False
    dtype: str | None = None
