"""Rounded matrices among a checkpoint's tensors: each stands as one tensor, whatever it is stored as.

A matrix `x` of 8 bits is stored as `x_int8`, (rows, inputs), and one of 4 bits as `x_int4`, two numbers to a byte;
beside it are its scales, `x_scale`, (rows, groups). Rows are outputs, in the order that `x` has them, also where a
family stores (input, output). So bits are a matter of how a tensor is stored, and a plan knows nothing of them.

A guard stands beside them: a tensor of no numbers under the name `x`. Its shape says how many inputs there are, with 0
for the outputs, and where they stand. Without it, transformers without headshare would find no `x`, and go on with a
random one. With it, it stops at the shape.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headshare.checkpoint.header import WEIGHT_DTYPES, Parts, TensorInfo
from headshare.checkpoint.rounding.entry import Rounding
from headshare.checkpoint.rounding.numbers import Rounded, dense, from_halves, groups_of, halves, stored_width
from headshare.errors import CheckpointError

SUFFIXES = {8: "_int8", 4: "_int4"}
TYPES = {8: "I8", 4: "U8"}
SCALE = "_scale"
GUARD_TYPE = "I8"
# the type of scales of four bits, of which there are many, where matrices have a longer one
SHORT = {"F64": "F16", "F32": "F16"}
WHAT = "the checkpoint does not hold rounded matrices as its config.json says"


def scale_type(bits: int, dtype: str) -> str:
    """The type of the scales of a matrix of this type in so many bits, in safetensors' words."""
    return SHORT.get(dtype, dtype) if bits == 4 else dtype


def guard_shape(inputs: int, *, in_out: bool) -> tuple[int, int]:
    """The shape of a guard, which says how many inputs there are and where they stand."""
    return (inputs, 0) if in_out else (0, inputs)


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix rounded to so many bits, as it is to be stored: `group` inputs of a row have one scale (None: all)."""

    rounded: Rounded
    bits: int
    group: int | None
    in_out: bool = False

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors that it is stored as, by name."""
        numbers, scale = self.rounded
        inputs = numbers.shape[1]
        guard = torch.empty(guard_shape(inputs, in_out=self.in_out), dtype=torch.int8)
        stored = numbers if self.bits == 8 else halves(numbers)
        return {f"{name}{SUFFIXES[self.bits]}": stored, f"{name}{SCALE}": scale, name: guard}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix that its numbers mean, as the model stores it."""
        matrix = dense(*self.rounded, self.group, dtype)
        return matrix.T if self.in_out else matrix


def joined_parts(tensors: Mapping[str, TensorInfo], rounding: Rounding | None) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint by name, with one entry in the place of each rounded matrix's parts.

    Raises:
        CheckpointError: if parts do not fit each other, or one is missing.
    """
    if rounding is None:
        return dict(tensors)
    whole = dict(tensors)
    for bits, suffix in SUFFIXES.items():
        for name in [name for name in tensors if name.endswith(suffix)]:
            info = _joined(name.removesuffix(suffix), bits, tensors, rounding.group(bits))
            for part in info.parts.stored if info.parts else ():
                del whole[part.name]
            whole[info.name] = info
    return whole


def stored_parts(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """The entries of all tensors as files hold them: a rounded matrix's parts in its place."""
    return [part for info in tensors for part in (info.parts.stored if info.parts else (info,))]


def _joined(name: str, bits: int, tensors: Mapping[str, TensorInfo], group: int | None) -> TensorInfo:
    numbers = tensors[f"{name}{SUFFIXES[bits]}"]
    scale = tensors.get(f"{name}{SCALE}")
    guard = tensors.get(name)
    if scale is None or guard is None:
        raise CheckpointError(f"{WHAT}: {numbers.name} is there, but not {name if scale else f'{name}{SCALE}'}.")
    in_out = guard.shape[-1:] == (0,)
    inputs = max(guard.shape, default=0)
    rows = numbers.shape[0] if numbers.shape else 0
    wanted = (rows, stored_width(inputs, bits))
    fits = (numbers.dtype, numbers.shape) == (TYPES[bits], wanted)
    fits = fits and scale.dtype in WEIGHT_DTYPES and scale.shape == (rows, groups_of(inputs, group))
    fits = fits and inputs > 0 and (guard.dtype, guard.nbytes, len(guard.shape)) == (GUARD_TYPE, 0, 2)
    if not fits:
        found = ", ".join(f"{part.name} {part.dtype} {part.shape}" for part in (numbers, scale, guard))
        raise CheckpointError(f"{WHAT}: {found} do not fit each other, with a scale for {group or 'all'} inputs.")
    shape = (inputs, rows) if in_out else (rows, inputs)
    parts = Parts(numbers, scale, guard, bits, group, in_out)
    return TensorInfo(name, scale.dtype, shape, numbers.file, numbers.offset, numbers.nbytes + scale.nbytes, parts)


def whole_numbers(stored: Tensor, parts: Parts) -> Tensor:
    """The whole numbers, one to each place, that rows of a stored tensor of numbers hold."""
    return stored if parts.bits == 8 else from_halves(stored, max(parts.guard.shape))
