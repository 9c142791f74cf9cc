"""Expansion: a shared checkpoint back to a stock one."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from headshare.checkpoint.checkpoint import WEIGHT_DTYPES, Checkpoint
from headshare.checkpoint.header import DTYPES
from headshare.checkpoint.int4 import A_WORD, PACKED, PARTS, SCALE, part_of, unpack
from headshare.plan.added import extra_tensors
from headshare.plan.plan import SharePlan
from headshare.sharing.assembly import Assembly, copied, filled, overwritten, stream
from headshare.sharing.expanded import Folded
from headshare.sharing.fits import check_fits, check_shared, tensors_of
from headshare.sharing.writer import write_checkpoint


def expand(
    shared: Checkpoint, out: str | Path, *, overwrite: bool = False, rounded: bool = True, unpacked: bool = False
) -> Path:
    """Write a shared checkpoint back as a stock folder that any tool loads: every gap filled from its donor, and zeros
    where units were removed, so that it computes the same.

    Scales are multiplied into the columns of W_o that they belong to, and factors with each other. Such a W_o is
    `rounded` to the checkpoint's type, or else written as float32 at least. Matrices of four bits stay that, in
    compressed-tensors' format, or are `unpacked`: to the type that most of the other numbers have.

    Raises:
        CheckpointError: if the checkpoint is not shared or its tensors are not what its plan says.
        OutputError: if the folder exists or cannot be written.
    """
    plan = check_shared(shared)
    tensors = tensors_of(plan, shared)
    extras = extra_tensors(plan)
    assemblies = [
        filled(info, tensors[name], tensors) if name in tensors else copied(info)
        for name, info in shared.tensors.items()
        if name not in extras
    ]
    folded = Folded(shared, tensors, extras, rounded=rounded)
    if not rounded:
        assemblies = [_widened(one) if one.name in folded else one for one in assemblies]
    config = {key: value for key, value in shared.config.items() if key != "quantization_config"}
    packing = shared.require_sharing().packing
    if packing is None:
        return write_checkpoint(shared, assemblies, config, Path(out), overwrite, folded)
    if not unpacked:
        config["quantization_config"] = packing.to_dict()
        return write_checkpoint(shared, assemblies, config, Path(out), overwrite)
    made = _Unpacked(shared, assemblies)
    return write_checkpoint(shared, made.assemblies, config, Path(out), overwrite, made)


class _Unpacked(Mapping[str, Tensor]):
    """Matrices of four bits in the type that most of the other numbers have, by name. Made when asked for."""

    def __init__(self, shared: Checkpoint, assemblies: Sequence[Assembly]) -> None:
        self._shared = shared
        self._packed = {one.name: one for one in assemblies if one.name.endswith(PARTS)}
        others = [one for one in assemblies if one.name not in self._packed]
        weights = [one for one in others if one.dtype in WEIGHT_DTYPES]
        dtypes = {one.dtype: sum(each.nbytes for each in weights if each.dtype == one.dtype) for one in weights}
        code = max(dtypes, key=dtypes.__getitem__, default="F32")
        self._made = {}
        for name, one in self._packed.items():
            if name.endswith(PACKED):
                shape = (one.shape[0], one.shape[1] * A_WORD)
                whole = part_of(name.removesuffix(f".{PACKED}"), "weight")
                self._made[whole] = Assembly(whole, code, shape, one.file, 0, ())
        self.assemblies = [*others, *self._made.values()]

    def __getitem__(self, name: str) -> Tensor:
        meant = self._made[name]
        packed, scale = (
            torch.cat(list(stream(self._packed[part_of(name, part)], self._shared))) for part in (PACKED, SCALE)
        )
        return unpack(packed, scale, DTYPES[meant.dtype])

    def __contains__(self, name: object) -> bool:
        return name in self._made

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def write_overwritten(dense: Checkpoint, plan: SharePlan, out: str | Path) -> Path:
    """Write the dense checkpoint with recipients' indices overwritten by their donors', and zeros in place of removed
    units: what sharing should equal, but for columns stored as a product, which stay as they are."""
    check_fits(plan, dense)
    tensors = tensors_of(plan, dense)
    assemblies = [
        overwritten(info, tensors[name]) if name in tensors else copied(info) for name, info in dense.tensors.items()
    ]
    return write_checkpoint(dense, assemblies, dict(dense.config), Path(out), False)


def _widened(assembly: Assembly) -> Assembly:
    return dataclasses.replace(assembly, dtype="F64" if assembly.dtype == "F64" else "F32")
