"""Whole numbers and scales in the place of a matrix. Knows no file and no module.

A matrix here has a row for each output. `group` inputs of a row have one scale, and the last group of a row may be
smaller; None is one scale for the whole row. A number of the matrix is its whole number times its scale.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from headshare.errors import CheckpointError

# count of numbers that are computed with together, so that they stay in a cache
AT_ONCE = 2**20
# of four bits are stored with this added, two to a byte, the first in the lower half
OFFSET = 8


class Rounded(NamedTuple):
    """A rounded matrix: whole numbers, and the scales of each row."""

    numbers: Int[Tensor, "rows inputs"]
    scale: Float[Tensor, "rows groups"]


def groups_of(inputs: int, group: int | None) -> int:
    """The count of scales of a row with so many inputs."""
    return 1 if group is None else math.ceil(inputs / group)


def stored_width(inputs: int, bits: int) -> int:
    """The bytes that the numbers of a row with so many inputs take."""
    return inputs if bits == 8 else -(-inputs // 2)


def to_nearest(matrix: Float[Tensor, "rows inputs"], bits: int, group: int | None, dtype: torch.dtype) -> Rounded:
    """The nearest numbers of so many bits, with scales of this type.

    A scale is as small as lets nothing be cut off, rounded up to its type: scales of less squared error, which cut the
    largest numbers, lose more. 8 bits are symmetric, -127 to 127. Of 4 bits all sixteen numbers count: a scale has the
    sign by which its group's largest number is on the side of -8.

    Raises:
        CheckpointError: if the matrix is not finite, or a scale does not fit its type.
    """
    rows, inputs = matrix.shape
    numbers = torch.empty((rows, inputs), dtype=torch.int8)
    scales = torch.empty((rows, groups_of(inputs, group)), dtype=dtype)
    step = max(1, AT_ONCE // max(1, inputs))
    for start in range(0, rows, step):
        grouped = _grouped(matrix[start : start + step].float(), group)
        if not bool(torch.isfinite(grouped).all()):
            raise CheckpointError("it has numbers that are not finite")
        scale = _scales(grouped, bits, dtype)
        if not bool(torch.isfinite(scale).all()):
            raise CheckpointError(f"it has numbers that are too large for scales of {dtype}")
        numbers[start : start + step] = _nearest(grouped, scale, bits).flatten(1)[:, :inputs].to(torch.int8)
        scales[start : start + step] = scale
    return Rounded(numbers, scales)


def nearest_for(
    matrix: Float[Tensor, "rows inputs"], scale: Float[Tensor, "rows groups"], bits: int, group: int | None
) -> Int[Tensor, "rows inputs"]:
    """The nearest numbers of so many bits to a matrix, for scales that are given."""
    nearest = _nearest(_grouped(matrix.float(), group), scale, bits)
    return nearest.flatten(1)[:, : matrix.shape[1]].to(torch.int8)


def _nearest(
    grouped: Float[Tensor, "rows groups size"], scale: Float[Tensor, "rows groups"], bits: int
) -> Float[Tensor, "rows groups size"]:
    top = 2 ** (bits - 1) - 1
    return (grouped / scale.float()[:, :, None]).round_().clamp_(-top - (bits < 8), top)


def _scales(grouped: Float[Tensor, "rows groups size"], bits: int, dtype: torch.dtype) -> Float[Tensor, "rows groups"]:
    """Scales in their type by which nothing is cut off, and one for a group of zeros."""
    if bits == 8:
        size = grouped.abs().amax(dim=2) / 127
        sign = torch.ones_like(size)
    else:
        # the side of the largest number has eight numbers, and the other seven
        sign = -torch.sign(grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True)).squeeze(2))
        signed = grouped * sign[:, :, None]
        size = torch.maximum(-signed.amin(dim=2) / OFFSET, signed.amax(dim=2).clamp_min_(0) / (OFFSET - 1))
    stored = size.to(dtype)
    # the bits of a positive number, taken as a whole number, are one less than those of the next
    whole = stored.view(torch.int16 if stored.itemsize == 2 else torch.int32 if stored.itemsize == 4 else torch.int64)
    stored = torch.where(stored.float() < size, (whole + 1).view(dtype), stored)
    return torch.where(size > 0, stored * sign.to(dtype), torch.ones_like(stored))


def dense(
    numbers: Int[Tensor, "rows inputs"], scale: Float[Tensor, "rows groups"], group: int | None, dtype: torch.dtype
) -> Float[Tensor, "rows inputs"]:
    """The matrix, each number times its scale: computed in float32, and rounded to this type."""
    rows, inputs = numbers.shape
    matrix = torch.empty((rows, inputs), dtype=dtype, device=numbers.device)
    # on a CPU a few rows at a time, so that intermediate numbers stay in its cache
    few = numbers.device.type == "cpu" and not torch.compiler.is_compiling()
    step = max(1, AT_ONCE // max(1, inputs)) if few else max(1, rows)
    for start in range(0, rows, step):
        scaled = _grouped(numbers[start : start + step].float(), group).mul_(
            scale[start : start + step, :, None].float()
        )
        matrix[start : start + step] = scaled.flatten(1)[:, :inputs]
    return matrix


def halves(numbers: Int[Tensor, "rows inputs"]) -> UInt8[Tensor, "rows pairs"]:
    """Numbers of four bits, -8 to 7, two to a byte. The last of an odd row stands alone."""
    shifted = (numbers + OFFSET).to(torch.uint8)
    if shifted.shape[1] % 2:
        shifted = torch.nn.functional.pad(shifted, (0, 1))
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def from_halves(pairs: UInt8[Tensor, "rows pairs"], inputs: int) -> Int[Tensor, "rows inputs"]:
    """The numbers that `halves` put together."""
    both = torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1)
    return both[:, :inputs].to(torch.int8) - OFFSET


def _grouped(matrix: Float[Tensor, "rows inputs"], group: int | None) -> Float[Tensor, "rows groups size"]:
    """The inputs of each group; zeros fill the last one up."""
    rows, inputs = matrix.shape
    count = groups_of(inputs, group)
    size = inputs if group is None else group
    if count * size > inputs:
        matrix = torch.nn.functional.pad(matrix, (0, count * size - inputs))
    return matrix.view(rows, count, size)
