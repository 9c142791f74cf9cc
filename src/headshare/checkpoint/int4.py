"""Matrices rounded to 4 bits: their packing, and the entry of config.json that says so.

The format is compressed-tensors' `pack-quantized` (symmetric, in groups of inputs), which other tools load once a model
is expanded. A matrix (rows, inputs) is stored as three tensors: `weight_packed` (rows, inputs / 8), `weight_scale`
(rows, inputs / group) and `weight_shape`. An int32 of `weight_packed` holds eight numbers, each plus eight, from the
lowest bits up. Rows lie along the first axis, so what a plan does to the rows of a matrix it does to those of both.

A guard stands beside them: a tensor of no numbers under the name `weight`. Without it, transformers without headshare
would find no `weight`, and go on with a random one. With it, it stops at the shape.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
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
PACKED = "weight_packed"
SCALE = "weight_scale"
SHAPE = "weight_shape"
PARTS = (PACKED, SCALE, SHAPE)
# in safetensors' words
TYPES = {PACKED: "I32", SCALE: "F16", SHAPE: "I64"}
SCALE_DTYPE = torch.float16
GUARD = "weight"
GUARD_TYPE = "I32"
GUARD_DTYPE = torch.int32
GROUPS = (128, 64, 32, 16, 8)
# count of numbers that are unpacked together
AT_ONCE = 2**19


class Packing(BaseModel):
    """The packing of a model's matrices: all linear modules are rounded to 4 bits, but for those in `ignore`.

    `group` is the count of inputs that share a scale. `ignore` has the paths of modules in the model.
    """

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
            packing = cls(group=_group_of(entry), ignore=tuple(entry["ignore"]))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            packing = None
        if packing is None or packing.to_dict() != entry:
            raise CheckpointError(
                "the checkpoint's matrices are rounded in a way that this headshare does not read: its nested "
                "quantization_config is not that of symmetric groups of 4 bits, packed. Upgrade headshare."
            )
        return packing

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json, in compressed-tensors' words."""
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
        """The packing in words, as a clause of a checkpoint's description."""
        return f"matrices of {BITS} bits, a scale for every {self.group} inputs of a row"

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
        """Shapes of the packed numbers and the scales of a matrix, by the tensors' names.

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
    """The name of a stored part of the matrix of this name."""
    return f"{name.removesuffix('.weight')}.{part}"


def guards(names: Collection[str]) -> frozenset[str]:
    """The names of the guards of packed matrices among these names of tensors."""
    stems = (name.rpartition(".")[0] for name in names if name.endswith(f".{PACKED}"))
    return frozenset(guard for stem in stems if (guard := f"{stem}.{GUARD}") in names)


def check_types(stored: Iterable[tuple[str, str]]) -> None:
    """Refuse tensors, given by name and type, if a part of a packed matrix is of a wrong type.

    Loading would convert such a part: its numbers, and not the bits that are packed in them.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, dtype in stored:
        wanted = TYPES.get(name.rpartition(".")[2], dtype)
        if dtype != wanted:
            raise CheckpointError(f"{name} is of type {dtype}; it should be {wanted}. Download the checkpoint again.")


def packed_tensors(tensors: Mapping[str, TensorPlan], packing: Packing) -> dict[str, TensorPlan]:
    """Tensor plans of the parts of packed matrices, by name. Those of biases are unchanged.

    Raises:
        PlanError: if it does more than share rows.
    """
    plans: dict[str, TensorPlan] = {}
    for name, tensor in tensors.items():
        if tensor.axis or not tensor.only_borrows:
            raise PlanError(f"only shared rows can be packed in 4 bits, and this plan does more to {name}.")
        if len(tensor.shape) == 1:
            plans[name] = tensor
            continue
        for part, (stored, shape) in zip((PACKED, SCALE), packing.parts(name, tensor.shape).items(), strict=True):
            gaps = tuple(gap._replace(donor=part_of(gap.donor, part)) for gap in tensor.gaps)
            plans[stored] = TensorPlan(stored, shape, 0, gaps)
    return plans


def _group_of(entry: Mapping[str, Any]) -> int:
    (found,) = (scheme["weights"]["group_size"] for scheme in entry["config_groups"].values())
    group: int = found
    return group


# compressed-tensors has this too, and tests hold ours against it. It is not used: a model is unpacked in every pass, so
# that loading would need the package; and its numbers come as a whole matrix of 8 bits before they are scaled, where
# ours are scaled while they are in the processor's cache.


def unpack(
    packed: Int[Tensor, "rows words"], scale: Float[Tensor, "rows groups"], dtype: torch.dtype
) -> Float[Tensor, "rows inputs"]:
    """The unpacked matrix, in this type: each number times its group's scale, computed in float32."""
    inputs = packed.shape[1] * A_WORD
    rows, groups = scale.shape
    matrix = torch.empty((rows, inputs), dtype=dtype, device=packed.device)
    pairs = packed.contiguous().view(torch.uint8)
    scales = scale.to(torch.float32).unsqueeze(2)
    # on a CPU a few rows at a time, so that intermediate numbers stay in its cache; elsewhere a kernel costs more than
    # memory
    few = packed.device.type == "cpu" and not torch.compiler.is_compiling()
    step = max(1, AT_ONCE // max(inputs, 1)) if few else max(1, rows)
    for start in range(0, rows, step):
        rows_here = pairs[start : start + step]
        numbers = torch.stack([rows_here & (2**BITS - 1), rows_here >> BITS], dim=2).to(torch.float32).sub_(OFFSET)
        grouped = numbers.view(len(rows_here), groups, inputs // groups).mul_(scales[start : start + step])
        matrix[start : start + step] = grouped.view(len(rows_here), inputs)
    return matrix
