"""What all gradient steps have in common: Adam's settings, the rate over time, and the windows of each step."""

import math
from collections.abc import Iterator

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
