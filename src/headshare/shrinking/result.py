"""The result of shrinking a model: bytes and perplexity before and after, and what was done."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headshare.calibration.amounts import in_units
from headshare.calibration.measure import HeldOutPerplexity
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.refit_record import RefitRecord
from headshare.evaluation.verify import Verification
from headshare.plan.describe import titles
from headshare.plan.plan import SharePlan
from headshare.sharing.size import parameter_bytes
from headshare.short import short, tail
from headshare.shrinking.prediction import Prediction
from headshare.tables import markdown
from headshare.text.windows import finite_or_null


@dataclass(frozen=True)
class Size:
    """The bytes of a model: of its files of weights, and of its parameters in memory."""

    disk: int
    memory: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Size":
        """The size of this checkpoint, as it is stored."""
        files = {info.file for info in checkpoint.tensors.values()}
        return cls(sum((checkpoint.path / file).stat().st_size for file in files), parameter_bytes(checkpoint))


@dataclass(frozen=True)
class TextPerplexity:
    """The perplexities of the dense model and of the smaller one on a text that was named."""

    text: str
    dense: float
    shrunk: float
    tokens: int
    window: int


@dataclass(frozen=True)
class Shrunk:
    """A smaller model as it was written, verified and measured.

    `before` and `after` are the sizes of the dense model and of what was written. `held_out` has the perplexities on
    windows of the calibration text that nothing was fitted to; `other` those on another text, if one was given.
    """

    out: Path
    before: Size
    after: Size
    predicted: Prediction
    plan: SharePlan
    refit: RefitRecord | None
    verified: Verification
    held_out: HeldOutPerplexity
    other: TextPerplexity | None
    model_class: str

    def __repr__(self) -> str:
        return short(self, tail(str(self.out)), f"{self.before.disk:,} bytes before, {self.after.disk:,} after")

    @property
    def done(self) -> str:
        """What was done, in one sentence."""
        # a title also says how the section was asked for, which is the same for all of them here
        steps = [title.partition("; asked")[0] + ")" for title in titles(self.plan)]
        steps += [self.refit.in_words()] if self.refit else []
        steps += [self.plan.bits.in_words()] if self.plan.bits else []
        return "; ".join(steps) + "."

    @property
    def how_to_load(self) -> tuple[str, str]:
        """Two lines of Python that load it."""
        return (
            f"import headshare; from transformers import {self.model_class}",
            f"model = {self.model_class}.from_pretrained({str(self.out)!r})",
        )

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The rows of the table: what, before, after, and the change."""
        rows = [("", "before", "after", "change")]
        for what, was, now in (
            ("on disk", self.before.disk, self.after.disk),
            ("in memory", self.before.memory, self.after.memory),
        ):
            rows.append((what, in_units(was), in_units(now), f"{now / was - 1:+.1%}"))
        for what, first, second in self._perplexities():
            rows.append((what, f"{first:,.2f}", f"{second:,.2f}", f"x{second / first:.3f}"))
        return rows

    def card(self) -> str:
        """What the model card says of it, as Markdown."""
        lines = ["## Measured", "", markdown(self.rows()), ""]
        if self.held_out.dense is None:
            return "\n".join([*lines, f"{self.held_out.in_words()}"])
        lines.append(
            f"Perplexity over {self.held_out.tokens:,} tokens in windows of {self.held_out.window} that no weight was "
            "fitted to, of the text that the model was calibrated on. On other kinds of text it loses more."
        )
        return "\n".join(lines)

    def _perplexities(self) -> Iterator[tuple[str, float, float]]:
        if self.held_out.dense is not None and self.held_out.shared is not None:
            yield "perplexity, held-out calibration text", self.held_out.dense, self.held_out.shared
        if self.other is not None:
            yield f"perplexity, {Path(self.other.text).name}", self.other.dense, self.other.shrunk

    def to_dict(self) -> dict[str, Any]:
        """The result under the names that `headshare shrink --json` prints."""
        other = None
        if self.other is not None:
            other = finite_or_null(asdict(self.other))
        return {
            "out": str(self.out),
            "bytes": {
                "disk": {"before": self.before.disk, "after": self.after.disk},
                "memory": {"before": self.before.memory, "after": self.after.memory},
            },
            "predicted": finite_or_null(self.predicted.to_dict()),
            "perplexity": {"held_out": self.held_out.to_dict(), "text": other},
            "done": self.done,
            "plan_digest": self.plan.digest,
            "refitted_tensors": len(self.refit.tensors) if self.refit else 0,
            "verified": self.verified.to_dict(),
            "load": list(self.how_to_load),
        }
