"""Checkpoints with rounded matrices, to the nearest numbers or as somebody found them, and their writing."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from headshare.architecture.config import text_config
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.entry import SharingEntry
from headshare.checkpoint.fingerprint import origin_of
from headshare.checkpoint.header import DTYPES
from headshare.checkpoint.rounding.entry import NEAREST, Rounding, Scheme
from headshare.checkpoint.rounding.numbers import Rounded, groups_of, stored_width, to_nearest
from headshare.checkpoint.rounding.tensors import (
    GUARD_TYPE,
    SCALE,
    SUFFIXES,
    TYPES,
    RoundedMatrix,
    guard_shape,
    scale_type,
)
from headshare.errors import CheckpointError, PlanError
from headshare.plan.plan import SharePlan
from headshare.plan.section import AddedTensor
from headshare.sharing.assembly import Assembly, copied
from headshare.sharing.expanded import LazyTensors
from headshare.sharing.fits import open_shared
from headshare.sharing.rounded.matrices import (
    Bits,
    Roundable,
    bits_for,
    bits_of,
    once,
    repeated_outputs,
    roundable,
)
from headshare.sharing.writer import write_checkpoint


@dataclass(frozen=True)
class RoundedCheckpoint:
    """A checkpoint and the bits that each of its stored matrices gets, as `save` writes them.

    `how` says for each count of bits how numbers are found, and `make` gives those of a matrix when they are asked for.
    `planned` says that the bits are those of the checkpoint's plan, which otherwise goes on without bits of its own.
    """

    checkpoint: Checkpoint
    matrices: Mapping[str, Roundable]
    bits: Bits
    how: Mapping[int, str]
    make: Callable[[str], Rounded]
    planned: bool = False

    @property
    def rounding(self) -> Rounding:
        """The record of it in config.json."""
        used = set(self.bits.of.values())
        schemes = {bits: Scheme(group=self.bits.groups[bits], how=self.how.get(bits, NEAREST)) for bits in used}
        return Rounding(int8=schemes.get(8), int4=schemes.get(4))

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the rounded checkpoint as a folder, whole or not at all, and check what was written.

        A dense checkpoint is written as a shared one that shares nothing: only headshare's entry can hold the record.

        Raises:
            CheckpointError: if a matrix is not finite or the source cannot be read.
            OutputError: if it cannot be written.
        """
        source = self.checkpoint
        entry = source.sharing
        if entry is None:
            kind = text_config(source.config).get("model_type")
            entry = SharingEntry(SharePlan(model_type=kind), base_model=source.name, origin=origin_of(source))
        if not self.planned:
            entry = dataclasses.replace(entry, plan=entry.plan.model_copy(update={"bits": None}))
        repeated = repeated_outputs(source)
        assemblies: list[Assembly] = []
        part_of: dict[str, str] = {}
        for name, info in source.tensors.items():
            if name in self.bits.of:
                parts = self._parts(name, info.file)
                assemblies += parts
                part_of |= {part.name: name for part in parts}
            elif name not in repeated:
                assemblies.append(copied(info))
        config = {
            **source.config,
            "quantization_config": dataclasses.replace(entry, packing=self.rounding).to_config(),
        }
        given = _Given(self, part_of)
        return write_checkpoint(source, assemblies, config, Path(out), overwrite, given.tensors)

    def _parts(self, name: str, file: str) -> list[Assembly]:
        """The assemblies of a matrix's parts."""
        matrix = self.matrices[name]
        bits = self.bits.of[name]
        rows = matrix.outputs
        width = stored_width(matrix.inputs, bits)
        groups = groups_of(matrix.inputs, self.bits.group(name))
        guard = guard_shape(matrix.inputs, in_out=matrix.in_out)
        scales = scale_type(bits, self.checkpoint.tensors[name].dtype)
        return [
            Assembly(f"{name}{SUFFIXES[bits]}", TYPES[bits], (rows, width), file, 0, ()),
            Assembly(f"{name}{SCALE}", scales, (rows, groups), file, 0, ()),
            Assembly(name, GUARD_TYPE, guard, file, 0, ()),
        ]


class _Given:
    """The parts of matrices, by name, each made when it is asked for; those of the last matrix are kept."""

    def __init__(self, of: RoundedCheckpoint, part_of: Mapping[str, str]) -> None:
        self._of = of
        self._part_of = part_of
        self._last: dict[str, Tensor] = {}
        self.tensors = LazyTensors(part_of, self._part)

    def _part(self, name: str) -> Tensor:
        if name not in self._last:
            matrix = self._part_of[name]
            bits = self._of.bits.of[matrix]
            in_out = self._of.matrices[matrix].in_out
            rounded = RoundedMatrix(self._of.make(matrix), bits, self._of.bits.group(matrix), in_out)
            self._last = rounded.parts(matrix)
        return self._last[name]


def round_to_nearest(
    checkpoint: Checkpoint, *, bits: int = 8, group: int | None = None, embeddings: bool = True
) -> RoundedCheckpoint:
    """A dense or shared checkpoint with its matrices rounded to the nearest numbers. No text is needed.

    Each stored row is rounded once, whoever uses it. `bits_for` says which matrix gets how many bits, and what `group`
    means. `embeddings` rounds the input and output embeddings too, to 8 bits, one that is both once. Norms, biases,
    scales of ties, experts and their routers stay.

    Raises:
        CheckpointError: if it is rounded already, quantised by another tool, or a group does not fit.
        ArchitectureError: if the model's layout is not known.
        OptionError: if there is no such rounding.
    """
    matrices = roundable(checkpoint, check_roundable(checkpoint))
    rounded = bits_for(checkpoint.layouts, once(checkpoint, matrices), bits, group, embeddings=embeddings)

    return _to_nearest(checkpoint, matrices, rounded)


def round_as_planned(checkpoint: Checkpoint) -> RoundedCheckpoint:
    """A shared checkpoint with the matrices that its plan names rounded to the nearest numbers of the plan's bits.

    Raises:
        CheckpointError: if it is rounded already.
        PlanError: if its plan names no bits, or another model's matrices.
    """
    added = check_roundable(checkpoint)
    planned = None if checkpoint.plan is None else checkpoint.plan.bits
    if planned is None:
        raise PlanError(f"{checkpoint.name} has no plan that says how to round it. Say so: --bits 8")
    matrices = roundable(checkpoint, added)
    of = bits_of(planned, checkpoint.layouts, once(checkpoint, matrices), added)
    return dataclasses.replace(_to_nearest(checkpoint, matrices, of), planned=True)


def _to_nearest(checkpoint: Checkpoint, matrices: Mapping[str, Roundable], rounded: Bits) -> RoundedCheckpoint:

    def make(name: str) -> Rounded:
        return nearest_of(checkpoint, matrices[name], rounded.of[name], rounded.group(name))

    return RoundedCheckpoint(checkpoint, matrices, rounded, {}, make)


def nearest_of(checkpoint: Checkpoint, matrix: Roundable, bits: int, group: int | None) -> Rounded:
    """The nearest numbers to those of a stored matrix.

    Raises:
        CheckpointError: naming it, if it has numbers that are not finite.
    """
    whole = checkpoint.read(matrix.name)
    scales = DTYPES[scale_type(bits, checkpoint.tensors[matrix.name].dtype)]
    try:
        return to_nearest(whole.T if matrix.in_out else whole, bits, group, scales)
    except CheckpointError as error:
        raise CheckpointError(f"{matrix.name} cannot be rounded: {error}.") from None


def check_roundable(checkpoint: Checkpoint) -> Mapping[str, AddedTensor]:
    """Refuse a checkpoint that is rounded or quantised already, and return the tensors that its plan adds.

    Raises:
        CheckpointError: saying which.
    """
    if checkpoint.sharing is None:
        checkpoint.require_dense("round it")
        return {}
    if checkpoint.sharing.packing is not None:
        raise CheckpointError(
            f"the matrices of {checkpoint.name} are rounded already. Round the checkpoint that it was made from."
        )
    return open_shared(checkpoint).added
