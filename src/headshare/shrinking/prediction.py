"""What shrinking a model is going to cost it, said before the long part of the work."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from headshare.calibration.amounts import in_units
from headshare.calibration.costs.to_plan import Budgeted
from headshare.sharing.size import Estimate

# Nats a token from which a loss is called large. It is about what SmolLM2-135M loses with a fifth of its bytes, and
# from there on the loss grows fast (docs/experiments.md). Rounding to 4 bits costs 0.34 and saves 58 %, to 8 bits 0.005
# and about half (docs/fourbits.md): whoever would lose so much has a better way.
LARGE = 0.25


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a plan, before its repair.

    `nats` is the divergence of the model's predictions from the dense model's, a token; None for a model that predicts
    none, whose `error` is the sum of the squared relative errors of its layers instead. `less` is the same for a plan
    that saves half as much. `float32` says that the weights are written as 32-bit numbers. `bits` says in words how
    matrices are rounded, where they are.
    """

    estimate: Estimate
    nats: float | None
    error: float | None
    less: float | None = None
    float32: bool = False
    refined: bool = False
    bits: str | None = None

    @classmethod
    def of(cls, chosen: Budgeted, estimate: Estimate, **more: Any) -> "Prediction":
        """The prediction for a plan that was chosen on cost curves."""
        nats, error = (chosen.price, None) if chosen.in_nats else (None, chosen.price)
        bits = chosen.bits_in_words() or None
        return cls(estimate, nats, error, bits=bits, **more)

    @property
    def factor(self) -> float | None:
        """The predicted perplexity over the dense model's, on text such as the dense model itself writes.

        On such text the mean loss grows by just the divergence: that is the divergence's definition.
        """
        return None if self.nats is None else math.exp(min(self.nats, 700))

    @property
    def is_large(self) -> bool:
        """True if the predicted loss is so large that it should be agreed to."""
        return self.nats is not None and self.nats > LARGE

    def to_dict(self) -> dict[str, Any]:
        """The prediction under the names that `--json` prints."""
        return {
            "saved_bytes": self.estimate.saved_bytes,
            "saved_fraction": self.estimate.saved_fraction,
            "nats": self.nats,
            "perplexity_factor": self.factor,
            "relative_error": self.error,
            "large": self.is_large,
            "cheaper": list(self.cheaper()) if self.is_large else [],
        }

    def in_words(self) -> str:
        """The prediction in one sentence, and what is rounded in another."""
        return self._size_and_loss() + (f"\n{self.bits}" if self.bits else "")

    def _size_and_loss(self) -> str:
        size = (
            f"{in_units(self.estimate.dense_bytes)} becomes {in_units(self.estimate.shared_bytes)} "
            f"(-{self.estimate.saved_fraction:.1%})"
        )
        if self.factor is None:
            return f"predicted: {size}; relative error {self.error:.4g}, summed over layers, before the repair"
        return (
            f"predicted: {size}; perplexity about x{self.factor:.2f} (predictions diverge by {self.nats:.3g} nats a "
            "token before the repair)"
        )

    def warning(self) -> str:
        """What is said of a large loss, in one line: how large it is, and what would cost less."""
        return f"that is a large loss. What costs less: {'; '.join(self.cheaper())}."

    def cheaper(self) -> Iterator[str]:
        """Ways to a smaller model that cost less, each in a few words; the cheapest comes first."""
        if self.float32 and self.bits is None:
            yield "--dtype bfloat16 halves 32-bit weights at next to no loss"
        if self.bits is None:
            yield "rounding to 8 bits, which saves half of 16-bit weights (0.005 nats where we measured it: --bits 8)"
        if self.less is not None:
            half = 100 * self.estimate.saved_fraction / 2
            yield f"a smaller saving: --save {half:.2g}% is predicted at x{math.exp(self.less):.2f}"
        if not self.refined:
            yield "--refine text, fast or best, which repair more"
        yield "more calibration text, like that which the model is for"
