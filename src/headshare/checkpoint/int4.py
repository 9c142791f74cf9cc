"""Matrices of four-bit numbers: how they are packed, and the entry of config.json that says so.

The format is compressed-tensors' `pack-quantized` (symmetric, in groups of inputs), which other tools load once a model
is expanded. A matrix (rows, inputs) is stored as `weight_packed` (rows, inputs / 8), int32, eight numbers each, from
the lowest bits up, plus eight; `weight_scale` (rows, inputs / group); and `weight_shape`. Rows lie along the first
axis, so what a plan does to the rows of a matrix it does to those of both.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from headshare.checkpoint.refit_record import MAX_TENSORS
from headshare.errors import CheckpointError, PlanError
from headshare.files.untrusted import Text
from headshare.plan.tensors import TensorPlan

NESTED = "quantization_config"
BITS = 4
A_WORD = 32 // BITS
OFFSET = 1 << (BITS - 1)
PARTS = PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
TYPES = {PACKED: "I32", SCALE: "F16", SHAPE: "I64"}  # as safetensors calls them
SCALE_DTYPE = torch.float16
GROUPS = (128, 64, 32, 16, 8)
AT_ONCE = 2**19  # numbers that are unpacked together


class Packing(BaseModel):
    """Every linear module is rounded to four bits in groups of so many inputs, but for those in `ignore`, named by
    their paths in the model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    group: int = Field(ge=A_WORD, le=2**16, multiple_of=A_WORD)
    ignore: tuple[Text, ...] = Field(max_length=MAX_TENSORS)

    @classmethod
    def from_dict(cls, entry: Any) -> "Packing":
        """Check an entry that somebody else wrote.

        Raises:
            CheckpointError: if it is not valid, or of numbers that are packed in another way.
        """
        try:
            found = cls(group=_group_of(entry), ignore=tuple(entry["ignore"]))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            found = None
        if found is None or found.to_dict() != entry:
            raise CheckpointError(
                "the checkpoint's matrices are rounded in a way that this headshare does not read: its nested "
                "quantization_config is not that of symmetric groups of 4 bits, packed. Upgrade headshare."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds, in compressed-tensors' words."""
        weights = {
            "num_bits": BITS,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": list(self.ignore),
        }

    def in_words(self) -> str:
        """One clause for the person who reads what a checkpoint is."""
        return f"matrices of {BITS} bits, a scale for every {self.group} inputs of a row"

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
        """What is stored of a matrix, by name, and its shape; but for the matrix's own shape, which stands beside.

        Raises:
            CheckpointError: if it is no matrix whose inputs fill whole groups.
        """
        if len(shape) != 2 or shape[1] % self.group:
            raise CheckpointError(f"{name} has shape {shape}, which groups of {self.group} inputs do not fill.")
        return {
            part_of(name, PACKED): (shape[0], shape[1] // A_WORD),
            part_of(name, SCALE): (shape[0], shape[1] // self.group),
        }


def part_of(name: str, part: str) -> str:
    """What a part of a matrix is called, beside the matrix's own name."""
    return f"{name.removesuffix('.weight')}.{part}"


def check_types(stored: Iterable[tuple[str, str]]) -> None:
    """Raise CheckpointError if of these tensors, by name and type, a part of a packed matrix is of another type than
    such parts are. Loading would convert it: the numbers, and not the bits that are packed in them."""
    for name, dtype in stored:
        wanted = TYPES.get(name.rpartition(".")[2], dtype)
        if dtype != wanted:
            raise CheckpointError(f"{name} is of type {dtype}; it should be {wanted}. Download the checkpoint again.")


def packed_tensors(tensors: Mapping[str, TensorPlan], packing: Packing) -> dict[str, TensorPlan]:
    """What a plan makes of the parts of packed matrices; biases are as they were.

    Raises:
        PlanError: if it does more than share rows.
    """
    found: dict[str, TensorPlan] = {}
    for name, tensor in tensors.items():
        if tensor.axis or not tensor.only_borrows:
            raise PlanError(f"only shared rows can be packed in 4 bits, and this plan does more to {name}.")
        if len(tensor.shape) == 1:
            found[name] = tensor
            continue
        for part, (one, shape) in zip((PACKED, SCALE), packing.parts(name, tensor.shape).items(), strict=True):
            gaps = tuple(gap._replace(donor=part_of(gap.donor, part)) for gap in tensor.gaps)
            found[one] = TensorPlan(one, shape, 0, gaps)
    return found


def _group_of(entry: Mapping[str, Any]) -> int:
    (group,) = (one["weights"]["group_size"] for one in entry["config_groups"].values())
    found: int = group
    return found


def pack(numbers: Shaped[Tensor, "rows inputs"]) -> Int[Tensor, "rows words"]:
    """Whole numbers from -8 to 7, of any type, eight to a word."""
    shifted = (numbers.to(torch.int64) + OFFSET).reshape(len(numbers), numbers.shape[1] // A_WORD, A_WORD)
    words: Tensor = (shifted << torch.arange(0, 32, BITS)).sum(dim=2)
    return words.to(torch.int32)  # the highest number's top bit is the sign


def unpack(
    packed: Int[Tensor, "rows words"], scale: Float[Tensor, "rows groups"], dtype: torch.dtype
) -> Float[Tensor, "rows inputs"]:
    """The matrix: each number times its group's scale, in float32, then in this type. On a CPU some rows at a time, so
    that what is in between stays in its cache."""
    inputs, (rows, groups) = packed.shape[1] * A_WORD, scale.shape
    whole = torch.empty((rows, inputs), dtype=dtype, device=packed.device)
    pairs, scales = packed.contiguous().view(torch.uint8), scale.to(torch.float32).unsqueeze(2)
    few = packed.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a kernel costs more than memory
    step = max(1, AT_ONCE // max(inputs, 1)) if few else max(1, rows)
    for start in range(0, rows, step):
        some = pairs[start : start + step]
        numbers = torch.stack([some & (2**BITS - 1), some >> BITS], dim=2).to(torch.float32).sub_(OFFSET)
        grouped = numbers.view(len(some), groups, inputs // groups).mul_(scales[start : start + step])
        whole[start : start + step] = grouped.view(len(some), inputs)
    return whole
