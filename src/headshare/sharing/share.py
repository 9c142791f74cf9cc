"""Sharing: a dense checkpoint and a plan become a smaller checkpoint. This file defines the format.

On disk a shared checkpoint is a normal Hugging Face folder. Every tensor keeps its name and holds only its stored
indices, without borrowed, low-rank and removed ones. Scales of ties and factors of low-rank units stand beside the
output projection's weight. config.json carries the plan as `quantization_config`, so that transformers without
headshare stops at a shape mismatch. headshare.json holds the digests of the files as written.
"""

import dataclasses
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.entry import Origin, SharingEntry
from headshare.checkpoint.fingerprint import origin_of
from headshare.checkpoint.header import DTYPES
from headshare.checkpoint.opening import open_checkpoint
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CheckpointError
from headshare.files.folder import check_output
from headshare.files.scratch import scratch_folder
from headshare.plan.plan import SharePlan
from headshare.plan.section import AddedTensor
from headshare.plan.tensors import TensorPlan
from headshare.sharing.assembly import Assembly, copied, kept_only, output_dtype
from headshare.sharing.expanded import LazyTensors, rotated_tensors
from headshare.sharing.fits import SharedFiles, fit_plan
from headshare.sharing.makers import split
from headshare.sharing.rounded.matrices import estimate_planned
from headshare.sharing.rounded.write import round_as_planned
from headshare.sharing.size import Estimate, dtype_code
from headshare.sharing.writer import all_finite, dtype_key, given_assembly, write_checkpoint
from headshare.short import short, tail


@dataclass(frozen=True)
class SharedCheckpoint:
    """A dense checkpoint and a plan that fits it, from which `save` writes. No weight is read before.

    `origin` is what the model of that name held before training; by default it is what the dense checkpoint holds.
    `base_model` is that name: "" stands for the dense checkpoint's, None for a model that lies nowhere.
    """

    files: SharedFiles
    dtype: str | None = None
    refit: RefitRecord | None = None
    refitted: Mapping[str, Tensor] = field(default_factory=dict)
    origin: Origin | None = None
    base_model: str | None = ""

    def __repr__(self) -> str:
        refitted = f"{len(self.refit.tensors)} tensors refitted" if self.refit else ""
        return short(self, tail(self.dense.name), repr(self.plan), refitted)

    @property
    def dense(self) -> Checkpoint:
        """The dense checkpoint."""
        return self.files.checkpoint

    @property
    def plan(self) -> SharePlan:
        """The plan by which it is shared."""
        return self.files.plan

    @property
    def estimate(self) -> Estimate:
        """The exact bytes of the result."""
        return estimate_planned(self.dense, self.plan, dtype=self.dtype)

    def save(
        self, out: str | Path, *, overwrite: bool = False, notes: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Path:
        """Write the shared checkpoint as a folder, whole or not at all, and check what was written.

        Where the plan names bits, it is written beside the output first, for the time, and rounded from there.
        `notes` are JSON files that go with it, by name.

        Raises:
            OutputError: if the folder exists or cannot be written.
            CheckpointError: if the source cannot be read, or what was written is not what was meant.
        """
        if self.plan.bits is not None:
            return self._save_rounded(Path(out), overwrite=overwrite)
        return self._save_whole(Path(out), overwrite=overwrite, notes=notes)

    def _save_rounded(self, out: Path, *, overwrite: bool) -> Path:
        check_output(out, self.dense.path, overwrite=overwrite)
        with (
            scratch_folder(out.absolute().parent) as scratch,
            open_checkpoint(self._save_whole(scratch / "whole", overwrite=False)) as whole,
        ):
            return round_as_planned(whole).save(out, overwrite=overwrite)

    def _save_whole(self, out: Path, *, overwrite: bool, notes: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
        """Write the shared checkpoint with numbers that are not rounded."""
        tensors = self.files.tensors
        tied = self.files.tied
        code = dtype_code(self.dtype)
        # the indices that the plan keeps of dense tensors
        assemblies = [
            kept_only(info, tensors[name], code, shared=name in tied) if name in tensors else copied(info, code)
            for name, info in self.dense.tensors.items()
        ]
        base = self.dense.name if self.base_model == "" else self.base_model
        # the plan travels in config.json, so that the folder alone can be loaded
        entry = SharingEntry(self.plan, self.refit, base, origin=self.origin or origin_of(self.dense))
        config = {**self.dense.config, "quantization_config": entry.to_config()}
        if self.dtype is not None:
            config[dtype_key(config)] = self.dtype
        # tensors that the plan adds, and refitted ones in the place of dense tensors
        added = self._added(code)
        assemblies += [
            given_assembly(name, tensor, self.dense.tensors[self.files.added[name].weight].file)
            for name, tensor in added.items()
        ]
        rotated = rotated_tensors(self.dense, self.plan)
        self._check_refitted_together(rotated)
        numbers: Mapping[str, Tensor] = ChainMap(self.refitted, rotated)  # type: ignore[arg-type]
        replaced = as_stored(numbers, assemblies, tensors)
        given: Mapping[str, Tensor] = ChainMap(added, replaced)  # type: ignore[arg-type]
        return write_checkpoint(self.dense, assemblies, config, out, overwrite, given, notes=notes)

    def with_refit(self, refit: RefitRecord, tensors: Mapping[str, Tensor]) -> "SharedCheckpoint":
        """The shared checkpoint with these whole tensors in the place of the dense model's.

        Added tensors may be among them, by name. Factors that are not are split from the output projection: the given
        one if there is one, or the dense model's.
        """
        return dataclasses.replace(self, refit=refit, refitted=tensors)

    def _check_refitted_together(self, rotated: Mapping[str, Tensor]) -> None:
        """Refuse a refit of only some of the tensors of narrow values, which would be in other directions."""
        given = [name for name in rotated if name in self.refitted]
        lacking = [name for name in rotated if name not in self.refitted]
        if given and lacking:
            raise CheckpointError(f"{given[0]} was fitted, but {lacking[0]} was not. Give both or none.")

    def _added(self, code: str | None) -> dict[str, Tensor]:
        """The tensors that the plan adds, each in the type of the weight that it belongs to.

        They are the fitted ones, or else filled with their number, or split from the weight by their maker.
        """
        values: dict[str, Tensor] = {}
        stored: dict[str, Tensor] = {}
        for name, meant in self.files.added.items():
            if name not in self.refitted and name not in values:
                values |= self._not_fitted(name, meant)
            value = self.refitted[name] if name in self.refitted else values[name]
            stored[name] = value.to(DTYPES[output_dtype(self.dense.tensors[meant.weight], code)]).contiguous()
            if tuple(stored[name].shape) != meant.shape or not all_finite(stored[name]):
                raise CheckpointError(
                    f"{name} should be {meant.shape} and finite; found {tuple(value.shape)} of {value.dtype}, to be "
                    f"stored as {stored[name].dtype}."
                )
        return stored

    def _not_fitted(self, name: str, meant: AddedTensor) -> dict[str, Tensor]:
        """The values of an added tensor that was not fitted, and of those that its maker makes with it, by name."""
        if meant.fill is not None:
            return {name: torch.full(meant.shape, meant.fill)}
        added = self.files.added.items()
        beside = [each for each, other in added if other.weight == meant.weight and other.fill is None]
        given = [each for each in beside if each in self.refitted]
        if given:
            raise CheckpointError(f"{given[0]} was fitted, but {name} beside it was not. Give both or none.")
        weight = meant.weight
        whole = self.refitted[weight] if weight in self.refitted else self.dense.read(weight)
        if not all_finite(whole):
            raise CheckpointError(f"{weight} holds NaN or infinite numbers. The file is damaged or training diverged.")
        return split(self.files.tensors[weight], whole)


def share(
    dense: Checkpoint, plan: SharePlan, *, dtype: str | None = None, origin: Origin | None = None
) -> SharedCheckpoint:
    """The shared checkpoint of a dense one and a plan that fits it, checked and not yet written.

    `dtype` (float32, float16, bfloat16) converts all weights. `origin` is what the model of that name held before it
    was trained; by default it is what `dense` holds.

    Raises:
        PlanError: if the plan is for a model of other names or shapes.
        OptionError: if there is no such type.
        CheckpointError: if the checkpoint is already shared or quantised, or its layers are of different types.
    """
    dense.require_dense("share")
    files = fit_plan(plan, dense)
    dtype_code(dtype)
    return SharedCheckpoint(files, dtype, origin=origin)


def as_stored(
    whole: Mapping[str, Tensor], assemblies: Iterable[Assembly], tensors: Mapping[str, TensorPlan]
) -> LazyTensors:
    """Tensors as a shared checkpoint stores them: the indices that the plan keeps of each, in the output's type.

    Each is computed when it is asked for, so that the whole ones may lie on disk.
    """
    meant = {assembly.name: assembly for assembly in assemblies}

    def kept(name: str) -> Tensor:
        tensor = whole[name]
        if name in tensors:
            plan = tensors[name]
            pieces = [tensor.narrow(plan.axis, start, stop - start) for start, stop in plan.kept()]
            tensor = torch.cat([tensor.narrow(plan.axis, 0, 0), *pieces], dim=plan.axis)
        stored = tensor.to(DTYPES[meant[name].dtype]).contiguous()
        if not all_finite(stored):
            raise CheckpointError(
                f"the refitted {name} has numbers that {stored.dtype} cannot hold. Choose a wider --dtype."
            )
        return stored

    return LazyTensors([name for name in whole if name in meant], kept)
