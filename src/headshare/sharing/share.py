"""Share and expand: from a dense checkpoint and a plan to a smaller one, and back. This file is the format.

On disk a shared checkpoint is a normal Hugging Face folder. Every tensor keeps its name; one with gaps, or of which
units are removed, holds only the indices it keeps. Scales of ties, and the factors of factored readouts, stand beside
the readout's weight. config.json carries the plan as `quantization_config`, so that
transformers without headshare stops at a shape mismatch. headshare.json holds the digests of the files as written.
"""

import dataclasses
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.entry import SharingEntry
from headshare.checkpoint.header import DTYPES
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CheckpointError
from headshare.plan.added import extra_tensors, factor_names, scale_names
from headshare.plan.plan import SharePlan
from headshare.plan.tensors import GappedTensor, gapped_tensors, tied_names
from headshare.sharing.assembly import Assembly, copied, kept_only, output_dtype
from headshare.sharing.factors import split_columns
from headshare.sharing.fits import check_fits, tensors_of
from headshare.sharing.size import Estimate, dtype_code, estimate_plan
from headshare.sharing.writer import all_finite, dtype_key, given_assembly, write_checkpoint


@dataclass(frozen=True)
class SharedCheckpoint:
    """A dense checkpoint and a plan that fits it: what `save` will write. Nothing has been moved yet."""

    dense: Checkpoint
    plan: SharePlan
    dtype: str | None = None
    refit: RefitRecord | None = None
    refitted: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def estimate(self) -> Estimate:
        """The exact bytes of the result."""
        return estimate_plan(self.dense, self.plan, dtype=self.dtype)

    def save(
        self, out: str | Path, *, overwrite: bool = False, notes: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Path:
        """Write the shared checkpoint as a folder, whole or not at all, and check what was written. `notes` are JSON
        files that go with it, by name.

        Raises:
            OutputError: if the folder exists or cannot be written.
            CheckpointError: if the source cannot be read, or what was written is not what was meant.
        """
        tensors, code = tensors_of(self.plan, self.dense), dtype_code(self.dtype)
        tied = set(tied_names(tensors))
        assemblies = [
            kept_only(info, tensors[name], code, shared=name in tied) if name in tensors else copied(info, code)
            for name, info in self.dense.tensors.items()
        ]
        entry = SharingEntry(self.plan, self.refit, self.dense.name)
        config = {**self.dense.config, "quantization_config": entry.to_config()}
        if self.dtype is not None:
            config[dtype_key(config)] = self.dtype
        extras = _extras(self.dense, self.plan, code, self.refitted)
        assemblies += [given_assembly(name, tensor, file) for name, (tensor, file) in extras.items()]
        replaced = Stored(self.refitted, {one.name: one for one in assemblies}, tensors)
        added = {name: tensor for name, (tensor, _) in extras.items()}
        given: Mapping[str, Tensor] = ChainMap(added, replaced)  # type: ignore[arg-type]
        return write_checkpoint(self.dense, assemblies, config, Path(out), overwrite, given, notes=notes)

    def with_refit(self, refit: RefitRecord, tensors: Mapping[str, Tensor]) -> "SharedCheckpoint":
        """The same with these tensors, whole, in the place of the dense model's; scales and factors are among them by
        name. Factors that are not are split from the readout, its own or the one that is given."""
        return dataclasses.replace(self, refit=refit, refitted=tensors)


def share(dense: Checkpoint, plan: SharePlan, *, dtype: str | None = None) -> SharedCheckpoint:
    """Check that the plan fits the checkpoint. `dtype` (float32, float16, bfloat16) converts all weights.

    Raises:
        PlanError: if the plan is for a model of other names or shapes.
        OptionError: if there is no such type.
        CheckpointError: if the checkpoint is already shared or quantised, or its layers are of different types.
    """
    dense.require_dense("share")
    check_fits(plan, dense)
    dtype_code(dtype)
    return SharedCheckpoint(dense, plan, dtype)


class Stored(Mapping[str, Tensor]):
    """Whole tensors as a shared checkpoint stores them: what the plan keeps of each, in the output's type.

    Made when asked for, so that the whole ones may lie on disk.
    """

    def __init__(
        self, whole: Mapping[str, Tensor], meant: Mapping[str, Assembly], tensors: Mapping[str, GappedTensor]
    ) -> None:
        self._whole, self._meant, self._tensors = whole, meant, tensors

    def __getitem__(self, name: str) -> Tensor:
        assembly, tensor = self._meant[name], self._whole[name]
        if name in self._tensors:
            gapped = self._tensors[name]
            kept = [tensor.narrow(gapped.axis, start, stop - start) for start, stop in gapped.kept()]
            tensor = torch.cat([tensor.narrow(gapped.axis, 0, 0), *kept], dim=gapped.axis)
        stored = tensor.to(DTYPES[assembly.dtype]).contiguous()
        if not all_finite(stored):
            raise CheckpointError(
                f"the refitted {name} has numbers that {stored.dtype} cannot hold. Choose a wider --dtype."
            )
        return stored

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._whole if name in self._meant)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _extras(
    dense: Checkpoint, plan: SharePlan, dtype: str | None, fitted: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, str]]:
    """The tensors that a plan adds, in the file and the type of the readout they belong to: those that were fitted,
    else scales of one, and the nearest factors of the readout's columns."""
    extras: dict[str, tuple[Tensor, str]] = {}
    values: dict[str, Tensor] = {name: torch.ones(count) for name, count in scale_names(plan).items()}
    for name, tensor in gapped_tensors(plan).items():
        given = [one for one in factor_names(name) if one in fitted]
        if tensor.factored and len(given) == 1:
            raise CheckpointError(f"{given[0]} was fitted, but not the other factor of {name}. Give both or none.")
        if tensor.factored and not given:
            values |= _factors(tensor, fitted[name] if name in fitted else dense.read(name))
    for name, extra in extra_tensors(plan).items():
        info = dense.tensors[extra.weight]
        meant = fitted[name] if name in fitted else values[name]
        stored = meant.to(DTYPES[output_dtype(info, dtype)]).contiguous()
        if tuple(stored.shape) != extra.shape or not all_finite(stored):
            raise CheckpointError(
                f"{name} should be {extra.shape} and finite; found {tuple(meant.shape)} of {meant.dtype}, to be stored "
                f"as {stored.dtype}."
            )
        extras[name] = (stored, info.file)
    return extras


def _factors(tensor: GappedTensor, whole: Tensor) -> dict[str, Tensor]:
    """Both factors of a readout, each unit's nearest of its rank."""
    if not all_finite(whole):
        raise CheckpointError(f"{tensor.name} holds NaN or infinite numbers. The file is damaged or training diverged.")
    pairs = []
    for start, stop, rank in tensor.factored:
        columns = whole.narrow(tensor.axis, start, stop - start)
        pairs.append(split_columns(columns.T if tensor.axis == 0 else columns, rank))
    name_in, name_out = factor_names(tensor.name)
    return {name_in: torch.cat([one for one, _ in pairs]), name_out: torch.cat([one for _, one in pairs], dim=1)}
