"""Weights without memory: they have no numbers to draw, and torch takes a millisecond each to draw none."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import TORCH_INIT_FUNCTIONS


def draw_nothing_without_memory() -> None:
    """Let the functions by which modules fill their weights leave alone those on the device `meta`."""
    for name, fill in list(TORCH_INIT_FUNCTIONS.items()):
        TORCH_INIT_FUNCTIONS[name] = _only_with_memory(fill)
        setattr(torch.nn.init, name, TORCH_INIT_FUNCTIONS[name])


def _only_with_memory(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(fill)
    def filled(tensor: Tensor, *options: Any, **more: Any) -> Tensor:
        return tensor if tensor.is_meta else fill(tensor, *options, **more)

    return filled
