"""Refinements: the text that a refit has besides the calibration text, and the gradient steps that follow it."""

from dataclasses import dataclass
from typing import Any

from headshare.errors import OptionError

MOST_STEPS = 100_000
NONE = "none"


@dataclass(frozen=True)
class Refinement:
    """What a refit does beyond the closed form on the calibration text.

    The model writes `written` times as much text as it is calibrated on, going on from that text, and the refit sees
    both. A layer then takes gradient `steps`, of so many `tokens` each, at rates up to `rate`. When all layers are
    done, they take `whole` steps together, of as many tokens, towards the dense model's predictions, at rates up to
    `whole_rate`; that needs the whole model in memory. Without one, the rate follows from how far the predictions are
    from the dense model's before the first step (`steps.whole_steps`).

    The rate is the one of those tried that left the least held-out error without a step back at first, in one layer of
    SmolLM2-135M (docs/experiments.md). One that is too high for a model costs time and no quality, as no step is kept
    that held-out text does not want.
    """

    steps: int
    tokens: int = 4096
    rate: float = 1e-3
    written: int = 0
    whole: int = 0
    whole_rate: float | None = None

    @classmethod
    def of(cls, wanted: "str | int | Refinement | None") -> "Refinement | None":
        """The refinement of this name or number of steps; None for `none` and for 0.

        Raises:
            OptionError: if there is no such refinement.
        """
        if wanted is None or isinstance(wanted, Refinement):
            return wanted
        word = str(wanted)
        if word in REFINEMENTS:
            return REFINEMENTS[word]
        if word.isascii() and word.isdecimal() and len(word) <= len(str(MOST_STEPS)) and int(word) <= MOST_STEPS:
            return cls(int(word)) if int(word) else None
        raise OptionError(
            f"{word!r:.40} is no refinement. Give {', '.join(REFINEMENTS)}, or a number of steps up to {MOST_STEPS:,}."
        )

    @property
    def takes_steps(self) -> bool:
        """True if there are gradient steps of either kind."""
        return self.steps > 0 or self.whole > 0

    def key(self) -> list[Any]:
        """All that a refined layer depends on, for the key of its state."""
        whole = [self.whole, self.whole_rate] if self.whole else []
        return [self.steps, self.tokens, self.rate, self.written, *whole]


FAST = Refinement(60, 2048, written=1)
BEST = Refinement(0, 2048, written=1, whole=64)
REFINEMENTS: dict[str, Refinement | None] = {
    NONE: None,
    "text": Refinement(0, written=1),
    "fast": FAST,
    "best": BEST,
}
