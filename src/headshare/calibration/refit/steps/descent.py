"""What all gradient steps have in common: Adam's settings, the rate, the windows of each step, the best weights."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from headshare.calibration import processes

BETAS = (0.9, 0.99)
LOOKS = 5  # so many times the held-out text is looked at, and the best of them is kept
WARM_UP = 0.1  # of all steps


def share_of_rate(step: int, steps: int) -> float:
    """The share of the highest rate at a step, from 0: a short rise, then half a cosine towards zero."""
    rise = (step + 1) / max(1, round(WARM_UP * steps))
    return min(rise, 0.5 * (1 + math.cos(math.pi * step / steps)))


def is_look(step: int, steps: int) -> bool:
    """True if the held-out text is looked at after this step, from 1."""
    return step % max(steps // LOOKS, 1) == 0 or step == steps


@dataclass
class Best:
    """The best weights of a descent so far, by name, and the number of the step that they follow.

    The steps may fit their text and nothing else, so held-out text chooses: among the looks at it, and the weights
    before the first step, which are number 0. `error_before` is the error of those on that text, `error_after` that of
    the best.
    """

    weights: Mapping[str, Tensor]
    error_before: float
    error_after: float
    step: int = 0

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], error: float) -> "Best":
        """The weights before the first step, with their error."""
        return cls(_copied(weights), error, error)

    def look(self, step: int, weights: Mapping[str, Tensor], error: float) -> None:
        """Keep the weights after this step, if their error is less."""
        if error < self.error_after:
            self.weights = _copied(weights)
            self.error_after = error
            self.step = step

    def in_words(self) -> str:
        """What was chosen, as a clause."""
        return f"best after {self.step}" if self.step else "none was better"


def _copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def drawn(
    fitted: int, size: int, steps: int, generator: torch.Generator
) -> Iterator[tuple[Int[Tensor, " drawn"], int]]:
    """The windows of each step, `size` of them in all processes, as numbers among this process's own; and their count.

    All that are fitted to, `fitted` in this process, come in random order before any comes again.
    """
    everywhere = processes.total(fitted)
    rounds = math.ceil(steps * size / everywhere)
    order = torch.cat([torch.randperm(everywhere, generator=generator) for _ in range(rounds)])
    return ((processes.mine_of(step), len(step)) for step in torch.split(order, size)[:steps])
