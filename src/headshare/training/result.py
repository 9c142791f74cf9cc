"""The result of a training run as one value: printed, compared, kept beside the weights."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headshare.plan.units import Tie
from headshare.short import short
from headshare.training.choices import TrainingMethod
from headshare.training.settings import TrainSettings


@dataclass(frozen=True)
class Closed:
    """The distance between the two ends of a tie before training and after, summed over parts."""

    tie: Tie
    before: float
    after: float


@dataclass(frozen=True)
class Trained:
    """The result of a training run. Losses are in nats per token on the text held out.

    `loss_before` and `loss_after` are those of the trained model before the first step and at the best step. For
    PostShare, `shared_before` and `shared_after` are the losses at these steps once the plan's recipients hold their
    donors' numbers, which is what sharing gives without training and with it. `best_step` is 0 where no step was better
    than none. `curve` has all that was logged.
    """

    method: TrainingMethod
    steps: int
    best_step: int
    seconds: float
    loss_before: float
    loss_after: float
    shared_before: float | None
    shared_after: float | None
    ties: tuple[Closed, ...]
    curve: tuple[Mapping[str, int | float], ...]
    settings: TrainSettings

    def __repr__(self) -> str:
        losses = f"loss {self.loss_before:.4f} before, {self.loss_after:.4f} after"
        return short(self, self.method, f"{self.steps} steps", f"best at {self.best_step}", losses)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        return {**asdict(self), "settings": self.settings.model_dump(mode="json")}

    def in_words(self) -> str:
        """The result in lines of text, for the person at the keyboard."""
        lines = [f"{self.steps} steps; the best on the text held out is {self.best_step}"]
        lines.append(f"perplexity before training {_exp(self.loss_before)}, at that step {_exp(self.loss_after)}")
        if self.shared_before is not None and self.shared_after is not None:
            lines.append(
                f"shared without training {_exp(self.shared_before)}, shared after it {_exp(self.shared_after)}"
            )
        lines.extend(self._on_tasks())
        if self.ties:
            left = sorted(tie.after / tie.before if tie.before else 1.0 for tie in self.ties)
            lines.append(
                f"{len(left)} ties: left of their distance {left[len(left) // 2]:.1%} in the middle, "
                f"{left[0]:.1%} to {left[-1]:.1%}"
            )
        if self.best_step == 0:
            lines.append("no step was better than none, so the weights are those from before training")
        return "\n".join(lines)

    def _on_tasks(self) -> Iterator[str]:
        rows = [row for row in self.curve if "eval_loss" in row]
        first = rows[0]
        best = next(row for row in rows if row["step"] == self.best_step)
        for name in (key for key in best if f"{key}_error" in best and not key.endswith("_acc_norm")):
            after = f"{best[name]:.3f} ({best[f'{name}_error']:.3f}) at that step"
            yield f"{name.removeprefix('eval_')} {first[name]:.3f} before training, {after}"


def _exp(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):,.3f}"
