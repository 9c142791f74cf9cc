"""Rounding of numbers to the types of a GGUF file."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headshare.errors import CheckpointError
from headshare.integrations.gguf.number_types import BLOCK, NumberType

# rows that are rounded at once, so that a large matrix needs no second copy in float32
_ROWS = 4096


def in_blocks(numbers: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Whole numbers of 8 bits with one scale for each row, in blocks of q8_0: the same numbers, each with its scale.

    A scale has 16 bits there, of which bfloat16 needs no more.
    """
    blocks = numbers.reshape(len(numbers), -1, BLOCK)
    scales = np.broadcast_to(scale.astype(np.float16)[:, :, None], (*blocks.shape[:2], 1))
    both = [np.ascontiguousarray(scales).view(np.uint8), np.ascontiguousarray(blocks).view(np.uint8)]
    return np.concatenate(both, axis=2).reshape(len(numbers), -1)


def rounded(numbers: NDArray[np.float32], kind: NumberType, name: str) -> NDArray[Any]:
    """The numbers in this type, as GGUF stores them.

    Raises:
        CheckpointError: if they are not finite there. `name` is the tensor's.
    """
    if not np.isfinite(numbers).all():
        raise CheckpointError(f"{name} holds NaN or infinite numbers. The file is damaged or training diverged.")
    if kind.name == "f32":
        return np.ascontiguousarray(numbers)
    if kind.name == "f16":
        with np.errstate(over="ignore"):
            short = numbers.astype(np.float16)
        if not np.isfinite(short).all():
            raise CheckpointError(
                f"{name} holds {np.abs(numbers).max():.3g}, and f16 ends at 65504. Export it as bf16 or f32."
            )
        return short
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    wanted = GGMLQuantizationType[kind.name.upper()]
    parts = [quantize(numbers[start : start + _ROWS], wanted) for start in range(0, len(numbers), _ROWS)]
    return np.concatenate(parts)
