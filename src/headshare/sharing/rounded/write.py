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
from headshare.checkpoint.rounding.entry import Rounding, Scheme
from headshare.checkpoint.rounding.numbers import Rounded, groups_of, to_nearest
from headshare.checkpoint.rounding.tensors import GUARD_TYPE, SCALE, SUFFIXES, TYPES, RoundedMatrix
from headshare.errors import CheckpointError, OptionError
from headshare.plan.plan import SharePlan
from headshare.plan.section import AddedTensor
from headshare.sharing.assembly import Assembly, copied
from headshare.sharing.expanded import LazyTensors
from headshare.sharing.fits import open_shared
from headshare.sharing.rounded.matrices import Roundable, repeated_outputs, roundable
from headshare.sharing.writer import write_checkpoint


@dataclass(frozen=True)
class RoundedCheckpoint:
    """A checkpoint and the bits that each of its stored matrices gets, as `save` writes them.

    `matrices` are rounded with `bits`, by name. `make` gives the numbers of one when it is asked for.
    """

    checkpoint: Checkpoint
    rounding: Rounding
    matrices: Mapping[str, Roundable]
    bits: Mapping[str, int]
    make: Callable[[str], Rounded]

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
        assemblies: list[Assembly] = []
        part_of: dict[str, str] = {}
        for name, info in source.tensors.items():
            if name in self.bits:
                parts = self._parts(name, info.file)
                assemblies += parts
                part_of |= {part.name: name for part in parts}
            elif name not in repeated_outputs(source):
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
        bits = self.bits[name]
        rows = matrix.outputs
        width = matrix.inputs if bits == 8 else -(-matrix.inputs // 2)
        groups = groups_of(matrix.inputs, self.rounding.group(bits))
        guard = (matrix.inputs, 0) if matrix.in_out else (0, matrix.inputs)
        scale_type = self.checkpoint.tensors[name].dtype
        return [
            Assembly(f"{name}{SUFFIXES[bits]}", TYPES[bits], (rows, width), file, 0, ()),
            Assembly(f"{name}{SCALE}", scale_type, (rows, groups), file, 0, ()),
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
            bits = self._of.bits[matrix]
            in_out = self._of.matrices[matrix].in_out
            rounded = RoundedMatrix(self._of.make(matrix), bits, self._of.rounding.group(bits), in_out)
            self._last = rounded.parts(matrix)
        return self._last[name]


def round_to_nearest(
    checkpoint: Checkpoint, *, bits: int = 8, group: int | None = None, embeddings: bool = True
) -> RoundedCheckpoint:
    """A dense or shared checkpoint with its matrices rounded to the nearest numbers. No text is needed.

    Each stored row is rounded once, whoever uses it, with a scale for every `group` of its inputs (None: for the row),
    in the type that the matrix had. `embeddings` rounds the input and output embeddings too, one that is both once.
    Norms, biases, scales of ties, experts and their routers stay.

    Raises:
        CheckpointError: if it is rounded already, or quantised by another tool.
        ArchitectureError: if the model's layout is not known.
        OptionError: if there is no such rounding.
    """
    if bits not in SUFFIXES:
        raise OptionError(f"there is no rounding to {bits} bits. There are: {', '.join(map(str, sorted(SUFFIXES)))}.")
    check_group(group)
    added = check_roundable(checkpoint)
    matrices = roundable(checkpoint, added)
    repeated = repeated_outputs(checkpoint)
    taken = {
        name: bits for name, matrix in matrices.items() if name not in repeated and (embeddings or not matrix.embedding)
    }

    def make(name: str) -> Rounded:
        whole = checkpoint.read(name)
        scale_type = DTYPES[checkpoint.tensors[name].dtype]
        try:
            return to_nearest(whole.T if matrices[name].in_out else whole, bits, group, scale_type)
        except CheckpointError as error:
            raise CheckpointError(f"{name} cannot be rounded: {error}.") from None

    scheme = Scheme(group=group)
    rounding = Rounding(int8=scheme) if bits == 8 else Rounding(int4=scheme)
    return RoundedCheckpoint(checkpoint, rounding, matrices, taken, make)


def check_group(group: int | None) -> None:
    """Refuse a count of inputs for one scale that is none.

    Raises:
        OptionError: saying what can be given.
    """
    if group is not None and not 1 <= group <= 2**16:
        raise OptionError(f"a group of {group} inputs cannot have a scale. Give a number from 1 to {2**16}.")


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
