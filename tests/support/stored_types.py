"""Types of numbers that the installed safetensors writes. Older releases write fewer than headshare reads."""

import torch
from safetensors.torch import save

from headshare.checkpoint.header import DTYPES


def is_written(dtype: torch.dtype) -> bool:
    """Whether safetensors writes a tensor of this type."""
    try:
        return bool(save({"a": torch.empty(8, dtype=torch.uint8).view(dtype)}))
    except (KeyError, ValueError):
        return False


STORED = {code: dtype for code, dtype in DTYPES.items() if dtype is torch.bool or is_written(dtype)}
