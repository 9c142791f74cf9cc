"""Checkpoints of 4 bits in the form that was written before there was a record of rounding, and that is still read."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from headshare.architecture.config import text_config
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.entry import SharingEntry
from headshare.checkpoint.fingerprint import origin_of
from headshare.checkpoint.int4 import (
    A_WORD,
    BITS,
    GUARD,
    GUARD_DTYPE,
    OFFSET,
    PACKED,
    SCALE,
    SHAPE,
    Packing,
    packed_tensors,
    part_of,
)
from headshare.errors import CheckpointError
from headshare.plan.plan import SharePlan
from headshare.plan.tensors import TensorPlan
from headshare.sharing.assembly import copied
from headshare.sharing.fits import open_shared
from headshare.sharing.writer import all_finite, given_assembly, write_checkpoint


def pack(numbers: Shaped[Tensor, "rows inputs"]) -> Int[Tensor, "rows words"]:
    """The words that hold these whole numbers from -8 to 7, eight to a word."""
    shifted = (numbers.to(torch.int64) + OFFSET).reshape(len(numbers), numbers.shape[1] // A_WORD, A_WORD)
    words: Tensor = (shifted << torch.arange(0, 32, BITS)).sum(dim=2)
    return words.to(torch.int32)  # the highest number's top bit is the sign


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix rounded to 4 bits: its packed numbers, and a scale for each group of a row's inputs."""

    packed: Int[Tensor, "rows words"]
    scale: Float[Tensor, "rows groups"]


def write_packed(
    source: Checkpoint,
    matrices: Mapping[str, PackedMatrix],
    packing: Packing,
    out: Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint with these packed matrices in the place of its own.

    A dense checkpoint is written as a shared one that shares nothing. The matrices are whole; what the plan keeps of
    them is stored.

    Raises:
        PlanError: if the plan does more than share rows.
        CheckpointError: if a scale is not finite, or the source cannot be read.
        OutputError: if it cannot be written.
    """
    # a dense source gets a plan that shares nothing, since only an entry of headshare can hold the packing
    tensors: Mapping[str, TensorPlan] = {}
    if source.sharing is None:
        kind = text_config(source.config).get("model_type")
        entry = SharingEntry(SharePlan(model_type=kind), base_model=source.name, origin=origin_of(source))
    else:
        entry = source.sharing
        tensors = packed_tensors(open_shared(source).tensors, packing)
    # each matrix becomes three tensors: of two the plan keeps some rows, and the third says the dense shape; a guard of
    # no numbers keeps those from loading it who would look for the matrix itself
    assemblies = [copied(info) for name, info in source.tensors.items() if name not in matrices]
    given: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        if not all_finite(matrix.scale):
            raise CheckpointError(f"the scales of {name} are not finite: its weights or their inputs are too large.")
        parts = {part_of(name, PACKED): matrix.packed, part_of(name, SCALE): matrix.scale}
        for part, whole in parts.items():
            rows = [whole[start:stop] for start, stop in tensors[part].kept()] if part in tensors else [whole]
            given[part] = rows[0] if len(rows) == 1 else torch.cat([whole[:0], *rows])
        given[part_of(name, SHAPE)] = torch.tensor([len(matrix.packed), matrix.packed.shape[1] * A_WORD])
        given[part_of(name, GUARD)] = torch.empty(0, dtype=GUARD_DTYPE)
        file = source.tensors[name].file
        stored = (*parts, part_of(name, SHAPE), part_of(name, GUARD))
        assemblies += [given_assembly(part, given[part], file) for part in stored]
    entry = dataclasses.replace(entry, packing=packing)
    config = {**source.config, "quantization_config": entry.to_config()}
    return write_checkpoint(source, assemblies, config, out, overwrite, given)
