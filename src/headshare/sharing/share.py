"""Share and expand: from a dense checkpoint and a plan to a smaller one, and back. This file is the format.

On disk a shared checkpoint is a normal Hugging Face folder. Every tensor keeps its name; one with gaps, or of which
units are removed, holds only the indices it keeps. Scales of ties, and the factors of factored readouts, stand beside
the readout's weight. config.json carries the plan as `quantization_config`, so that
transformers without headshare stops at a shape mismatch. headshare.json holds the digests of the files as written.
"""

import dataclasses
import json
import os
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headshare.architecture.config import text_config
from headshare.architecture.removable import check_removals
from headshare.checkpoint.checkpoint import (
    PICKLES,
    WEIGHT_DTYPES,
    WEIGHT_FILES,
    Checkpoint,
    open_checkpoint,
    quantization_entry,
    require_one_dtype,
)
from headshare.checkpoint.header import DTYPES, read_header
from headshare.checkpoint.int4 import (
    A_WORD,
    PACKED,
    PARTS,
    SCALE,
    SHAPE,
    TYPES,
    Packing,
    packed_tensors,
    part_of,
    unpack,
)
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CheckpointError, OutputError, PlanError
from headshare.plan.plan import FORMAT, SharePlan
from headshare.plan.tensors import (
    NOTHING,
    Extra,
    GappedTensor,
    extra_tensors,
    factor_names,
    gapped_biases,
    gapped_tensors,
    scale_name,
    scale_names,
    tied_names,
)
from headshare.progress import track
from headshare.sharing.assembly import Assembly, copied, filled, kept_only, output_dtype, overwritten, stream
from headshare.sharing.factors import join_columns, split_columns, widened
from headshare.sharing.safetensors_writer import (
    MANIFEST,
    canonical_order,
    check_output,
    copy_file,
    file_digest,
    flush_file,
    whole_folder,
    write_json,
    write_safetensors,
)
from headshare.sharing.size import Estimate, dtype_code, estimate_plan

_INDEX = "model.safetensors.index.json"


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
        config = {
            **self.dense.config,
            "quantization_config": quantization_entry(self.plan, self.refit, self.dense.name),
        }
        if self.dtype is not None:
            config[_dtype_key(config)] = self.dtype
        extras = _extras(self.dense, self.plan, code, self.refitted)
        assemblies += [_given_assembly(name, tensor, file) for name, (tensor, file) in extras.items()]
        replaced = Stored(self.refitted, {one.name: one for one in assemblies}, tensors)
        added = {name: tensor for name, (tensor, _) in extras.items()}
        given: Mapping[str, Tensor] = ChainMap(added, replaced)  # type: ignore[arg-type]
        return _write(self.dense, assemblies, config, Path(out), overwrite, given, notes=notes)

    def with_refit(self, refit: RefitRecord, tensors: Mapping[str, Tensor]) -> "SharedCheckpoint":
        """The same with these tensors, whole, in the place of the dense model's; scales and factors are among them by
        name. Factors that are not are split from the readout, its own or the one that is given."""
        return dataclasses.replace(self, refit=refit, refitted=tensors)


def share(dense: Checkpoint, plan: SharePlan, *, dtype: str | None = None) -> SharedCheckpoint:
    """Check that the plan fits the checkpoint. `dtype` (float32, float16, bfloat16) converts all weights.

    Raises:
        PlanError: if the plan is for a model of other names or shapes.
        CheckpointError: if the checkpoint is already shared or quantised, or its layers are of different types.
    """
    dense.require_dense("share")
    check_fits(plan, dense)
    dtype_code(dtype)
    return SharedCheckpoint(dense, plan, dtype)


def tensors_of(plan: SharePlan, checkpoint: Checkpoint) -> dict[str, GappedTensor]:
    """What the plan makes of this checkpoint's tensors: of weights, and of biases that are there and lose something."""
    biases = {name: bias for name, bias in gapped_biases(plan).items() if name in checkpoint.tensors}
    found = {**gapped_tensors(plan), **biases}
    return found if checkpoint.packing is None else packed_tensors(found, checkpoint.packing)


def check_fits(plan: SharePlan, checkpoint: Checkpoint) -> None:
    """Raise PlanError unless every tensor of the plan's layouts is in this dense checkpoint, in its shape, and the
    units that the plan removes can be removed from such a model."""
    for layout in plan.layouts:
        for place in layout.parts.values():
            for layer in range(layout.layers):
                _check_tensor(checkpoint, place.name(layer), place.shape, "the plan is for another model")
    for selection in plan.selections:
        require_one_dtype(selection.layout, checkpoint)
    if plan.removals:
        check_removals(plan, text_config(checkpoint.config), checkpoint.shapes)
        for name, bias in gapped_biases(plan).items():
            if name in checkpoint.tensors:
                _check_tensor(checkpoint, name, bias.shape, "the plan is for another model")
    for one in plan.factored:
        require_one_dtype(one.layout, checkpoint)
    taken = sorted(set(extra_tensors(plan)) & set(checkpoint.tensors))
    if taken:
        raise PlanError(f"the plan adds {taken[0]}, which is a tensor of {checkpoint.name} already.")


def check_shared(checkpoint: Checkpoint) -> SharePlan:
    """The plan of a shared checkpoint whose tensors are what the plan says.

    Raises:
        CheckpointError: if the checkpoint is not shared.
        PlanError: if a tensor is missing or has another shape, or a factor is of another type than its readout.
    """
    plan = checkpoint.plan
    if plan is None:
        raise CheckpointError(f"{checkpoint.name} is not a shared checkpoint; its config.json names no headshare plan.")
    tensors = tensors_of(plan, checkpoint)
    if checkpoint.packing is not None:
        _check_packed(checkpoint, tensors, checkpoint.packing)
    expected: dict[str, tuple[int, ...]] = {
        place.name(layer): place.shape
        for layout in plan.layouts
        for place in layout.parts.values()
        for layer in range(layout.layers)
    }
    if checkpoint.packing is not None:
        parts = [checkpoint.packing.parts(name, shape) for name, shape in expected.items()]
        expected = {name: shape for one in parts for name, shape in one.items()}
    expected |= {name: tensor.stored_shape for name, tensor in tensors.items()}
    for name, shape in expected.items():
        _check_tensor(checkpoint, name, shape, "the checkpoint does not hold what its plan says")
    if plan.removals:
        dense = {name: tensor.shape for name, tensor in tensors.items()}
        check_removals(plan, text_config(checkpoint.config), {**checkpoint.shapes, **dense})
    for name, extra in extra_tensors(plan).items():
        _check_tensor(checkpoint, name, extra.shape, "the checkpoint does not hold what its plan says")
        found, meant = checkpoint.tensors[name].dtype, checkpoint.tensors[extra.weight].dtype
        if tensors[extra.weight].factored and found != meant:
            raise PlanError(f"{name} in {checkpoint.name} is {found}; it should be {meant} as {extra.weight} is.")
    return plan


def _check_packed(checkpoint: Checkpoint, tensors: Mapping[str, GappedTensor], packing: Packing) -> None:
    """Every packed matrix has its parts, in their types, and in shapes that fit each other.

    Raises:
        PlanError: naming the first that has not.
    """
    what = "the checkpoint does not hold packed matrices as its config.json says"
    stems = {name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith(PARTS)}
    for stem in sorted(stems):
        found = [checkpoint.tensors.get(part_of(stem, part)) for part in PARTS]
        wanted_types = [(TYPES[PACKED], 2), (TYPES[SCALE], 2), (TYPES[SHAPE], 1)]
        if [one and (one.dtype, len(one.shape)) for one in found] != wanted_types:
            raise PlanError(f"{what}: {stem} should have {', '.join(PARTS)}, of {', '.join(TYPES.values())}.")
        packed, scale, shape = (one for one in found if one is not None)
        rows, words = packed.shape
        for name, wanted in ((scale.name, (rows, words * A_WORD // packing.group)), (shape.name, (2,))):
            _check_tensor(checkpoint, name, wanted, what)
        dense = tensors[packed.name].shape[0] if packed.name in tensors else rows
        if words * A_WORD % packing.group or checkpoint.read(shape.name).tolist() != [dense, words * A_WORD]:
            raise PlanError(f"{what}: {shape.name} should say {[dense, words * A_WORD]}, in groups of {packing.group}.")


def _check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], what: str) -> None:
    info = checkpoint.tensors.get(name)
    if info is None or info.shape != shape:
        found = "no such tensor" if info is None else f"shape {info.shape}"
        raise PlanError(f"{what}: {name} should have shape {shape}; {checkpoint.name} has {found}.")


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
    if shared.packing is None:
        return _write(shared, assemblies, config, Path(out), overwrite, folded)
    if not unpacked:
        config["quantization_config"] = shared.packing.to_dict()
        return _write(shared, assemblies, config, Path(out), overwrite)
    made = _Unpacked(shared, assemblies)
    return _write(shared, made.assemblies, config, Path(out), overwrite, made)


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
    return _write(dense, assemblies, dict(dense.config), Path(out), False)


def write_refitted(
    shared: Checkpoint,
    refit: RefitRecord,
    tensors: Mapping[str, Tensor],
    out: Path,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a shared checkpoint again with these tensors, whole, in the place of its own, and a record of the refit.

    `out` may be the checkpoint's own folder, which is replaced in one step when the new one is whole.

    Raises:
        OutputError: if it cannot be written, or files of the folder that is to be replaced would be lost.
    """
    check_written_again(shared, out, overwrite=overwrite)
    plan = check_shared(shared)
    gapped = tensors_of(plan, shared)
    assemblies = [copied(info) for name, info in shared.tensors.items()]
    config = {**shared.config, "quantization_config": quantization_entry(plan, refit, base_model)}
    replaced = Stored(tensors, {one.name: one for one in assemblies}, gapped)
    tied = set(tied_names(gapped))
    assemblies = [dataclasses.replace(one, shared=one.name in tied) for one in assemblies]
    in_place = _is_own(shared, out)
    return _write(shared, assemblies, config, out, overwrite or in_place, replaced, in_place=in_place)


def write_trained(
    trained: Checkpoint,
    out: Path,
    *,
    dtype: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a checkpoint, dense or shared, whoever wrote it last, as `share` writes one: pages, digests, checks.
    `dtype` converts all weights; `notes` are JSON files that go with it.

    Raises:
        OutputError: if it cannot be written.
        CheckpointError: if its numbers are not finite, or do not fit the type.
    """
    code, config, tied = dtype_code(dtype), dict(trained.config), set[str]()
    if trained.plan is not None:
        plan = check_shared(trained)
        tied = set(tied_names(tensors_of(plan, trained)))
        config["quantization_config"] = quantization_entry(plan, trained.refit, base_model or trained.base_model)
    assemblies = [
        dataclasses.replace(copied(info, code), shared=name in tied) for name, info in trained.tensors.items()
    ]
    if dtype is not None:
        config[_dtype_key(config)] = dtype
    return _write(trained, assemblies, config, out, overwrite, notes=notes)


@dataclass(frozen=True)
class Grouped:
    """A matrix of four-bit numbers, packed, and a scale for each group of a row's inputs."""

    packed: Int[Tensor, "rows words"]
    scale: Float[Tensor, "rows groups"]


def write_packed(
    source: Checkpoint,
    matrices: Mapping[str, Grouped],
    packing: Packing,
    out: Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a shared checkpoint, or a dense one as one that shares nothing, with these matrices packed in the place of
    its own. They are whole; stored of them is what the plan keeps.

    Raises:
        PlanError: if the plan does more than share rows.
        CheckpointError: if a scale is not finite, or the source cannot be read.
        OutputError: if it cannot be written.
    """
    kind = text_config(source.config).get("model_type")
    plan = SharePlan(model_type=kind) if source.plan is None else check_shared(source)
    tensors = packed_tensors(tensors_of(plan, source), packing)
    assemblies = [copied(info) for name, info in source.tensors.items() if name not in matrices]
    given: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        if not _all_finite(matrix.scale):
            raise CheckpointError(f"the scales of {name} are not finite: its weights or their inputs are too large.")
        parts = {part_of(name, PACKED): matrix.packed, part_of(name, SCALE): matrix.scale}
        for one, whole in parts.items():
            rows = [whole[start:stop] for start, stop in tensors[one].kept()] if one in tensors else [whole]
            given[one] = rows[0] if len(rows) == 1 else torch.cat([whole[:0], *rows])
        given[part_of(name, SHAPE)] = torch.tensor([len(matrix.packed), matrix.packed.shape[1] * A_WORD])
        file = source.tensors[name].file
        assemblies += [_given_assembly(one, given[one], file) for one in (*parts, part_of(name, SHAPE))]
    base = source.name if source.plan is None else source.base_model
    config = {**source.config, "quantization_config": quantization_entry(plan, source.refit, base, packing)}
    return _write(source, assemblies, config, out, overwrite, given)


def check_written_again(shared: Checkpoint, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that a shared checkpoint cannot be written to again: one in a wrong place, or its own folder
    where that holds files that would not come along.

    Raises:
        OutputError: saying which.
    """
    if not _is_own(shared, out):
        check_output(out, shared.path, overwrite=overwrite)
        return
    kept = {*_other_files(shared.path), *(shared.path / info.file for info in shared.tensors.values())}
    kept |= {shared.path / name for name in ("config.json", _INDEX, MANIFEST)}
    lost = sorted(str(path.relative_to(shared.path)) for path in shared.path.rglob("*") if path.is_file())
    lost = [name for name in lost if shared.path / name not in kept]
    if lost:
        raise OutputError(
            f"{shared.path} also holds {', '.join(lost[:3])}, which would be lost if it were replaced. "
            "Write elsewhere: --out NEW"
        )


def _is_own(shared: Checkpoint, out: Path) -> bool:
    return os.path.realpath(out) == os.path.realpath(shared.path)


class Folded(Mapping[str, Tensor]):
    """Readouts that have scales or factors, whole, with these multiplied out. Made when asked for."""

    def __init__(
        self,
        shared: Checkpoint,
        tensors: Mapping[str, GappedTensor],
        extras: Mapping[str, Extra],
        *,
        rounded: bool,
    ) -> None:
        self._shared, self._tensors, self._rounded = shared, tensors, rounded
        self._names = list(dict.fromkeys(extra.weight for extra in extras.values()))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor, info = self._tensors[name], self._shared.tensors[name]
        weight = torch.cat(list(stream(filled(info, tensor, self._tensors), self._shared)))
        if not self._rounded:
            weight = weight.to(widened(weight.dtype))
        if tensor.scaled:
            scale_columns(weight, tensor, self._shared.read(scale_name(name)))
        if tensor.factored:
            multiply_out(weight, tensor, *map(self._shared.read, factor_names(name)))
        return weight

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def scale_columns(weight: Tensor, tensor: GappedTensor, scale: Tensor) -> None:
    """Multiply the scaled channels of a whole readout by their scales, in place."""
    used = 0
    for start, stop in tensor.scaled:
        values = scale[used : used + stop - start]
        weight.narrow(tensor.axis, start, stop - start).mul_(values[:, None] if tensor.axis == 0 else values)
        used += stop - start


def multiply_out(weight: Tensor, tensor: GappedTensor, factor_in: Tensor, factor_out: Tensor) -> None:
    """Put the products of the factors into the factored columns of a whole readout, in place."""
    used = 0
    for start, stop, rank in tensor.factored:
        columns = join_columns(factor_in[used : used + rank], factor_out[:, used : used + rank])
        weight.narrow(tensor.axis, start, stop - start).copy_(columns.T if tensor.axis == 0 else columns)
        used += rank


def _widened(assembly: Assembly) -> Assembly:
    return dataclasses.replace(assembly, dtype="F64" if assembly.dtype == "F64" else "F32")


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
        if not _all_finite(stored):
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
        if tuple(stored.shape) != extra.shape or not _all_finite(stored):
            raise CheckpointError(
                f"{name} should be {extra.shape} and finite; found {tuple(meant.shape)} of {meant.dtype}, to be stored "
                f"as {stored.dtype}."
            )
        extras[name] = (stored, info.file)
    return extras


def _factors(tensor: GappedTensor, whole: Tensor) -> dict[str, Tensor]:
    """Both factors of a readout, each unit's nearest of its rank."""
    if not _all_finite(whole):
        raise CheckpointError(f"{tensor.name} holds NaN or infinite numbers. The file is damaged or training diverged.")
    pairs = []
    for start, stop, rank in tensor.factored:
        columns = whole.narrow(tensor.axis, start, stop - start)
        pairs.append(split_columns(columns.T if tensor.axis == 0 else columns, rank))
    name_in, name_out = factor_names(tensor.name)
    return {name_in: torch.cat([one for one, _ in pairs]), name_out: torch.cat([one for _, one in pairs], dim=1)}


def _dtype_key(config: Mapping[str, Any]) -> str:
    return "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"


def _write(
    source: Checkpoint,
    assemblies: Iterable[Assembly],
    config: dict[str, Any],
    out: Path,
    overwrite: bool,
    given: Mapping[str, Tensor] | None = None,
    *,
    in_place: bool = False,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    given, by_file = given or {}, _by_file(assemblies)
    expected = sum(one.nbytes for many in by_file.values() for one in many)
    if not in_place:
        check_output(out, source.path, overwrite=overwrite)
    with whole_folder(out, overwrite=overwrite, expected_bytes=expected) as folder, source:
        copy_other_files(source.path, folder)
        digests = _write_files(folder, source, by_file, given)
        if (source.path / _INDEX).is_file():
            write_json(folder / _INDEX, _index(by_file, expected))
        for name, note in (notes or {}).items():
            write_json(folder / name, note)
        write_json(folder / "config.json", config)
        _write_manifest(folder, digests)
        with open_checkpoint(folder) as written:
            if written.plan is not None:
                check_shared(written)
    return out


def _write_files(
    folder: Path, source: Checkpoint, by_file: Mapping[str, list[Assembly]], given: Mapping[str, Tensor]
) -> dict[str, str]:
    """Write each file, and check it while the next is written. Returns their digests."""
    digests: dict[str, str] = {}
    checks: list[Future[None]] = []
    with ThreadPoolExecutor(1) as checker:
        for file, many in track(by_file.items(), "writing", len(by_file)):
            slices = ([given[one.name]] if one.name in given else _finite(one, source) for one in many)
            digests[file] = write_safetensors(folder / file, many, slices)
            checks.append(checker.submit(_check_file, folder / file, source, many, given))
            for check in checks:
                if check.done():
                    check.result()
        for check in track(checks, "checking", len(checks)):
            check.result()
    return digests


def _finite(assembly: Assembly, source: Checkpoint) -> Iterator[Tensor]:
    """The tensor's slices, as long as they are finite.

    Raises:
        CheckpointError: if the source is not, or if its numbers do not fit the output's type.
    """
    read = {run.source for run in assembly.runs} - {NOTHING}
    converted = any(source.tensors[name].dtype != assembly.dtype for name in read)
    for piece in stream(assembly, source):
        if assembly.dtype in WEIGHT_DTYPES and not _all_finite(piece):
            cause = (
                f"holds numbers that {DTYPES[assembly.dtype]} cannot (or NaN). Choose a wider --dtype."
                if converted
                else "holds NaN or infinite numbers. The file is damaged or the training diverged."
            )
            raise CheckpointError(f"{assembly.name} in {source.name} {cause}")
        yield piece


def _all_finite(numbers: Tensor) -> bool:
    """Whether none is NaN or infinite: the least and the largest tell, many times faster than asking each."""
    return not numbers.numel() or bool(torch.isfinite(torch.stack(numbers.aminmax())).all())


def _given_assembly(name: str, tensor: Tensor, file: str) -> Assembly:
    code = next(code for code, dtype in DTYPES.items() if dtype == tensor.dtype)
    return Assembly(name, code, tuple(tensor.shape), file, 0, ())


def _by_file(assemblies: Iterable[Assembly]) -> dict[str, list[Assembly]]:
    files: dict[str, list[Assembly]] = {}
    for assembly in assemblies:
        files.setdefault(assembly.file, []).append(assembly)
    return {file: canonical_order(files[file]) for file in sorted(files)}


def _index(by_file: Mapping[str, list[Assembly]], size: int) -> dict[str, Any]:
    weight_map = {one.name: file for file, many in by_file.items() for one in many}
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


def copy_other_files(source: Path, folder: Path) -> None:
    """Everything beside the weights: tokenizer, generation settings, a model card."""
    for path in _other_files(source):
        copy_file(path, folder / path.relative_to(source))


def _other_files(source: Path) -> Iterator[Path]:
    """What comes along beside the weights. Hidden files and pickles stay."""
    modules = _module_folders(source)
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(step.startswith(".") for step in relative.parts)
        written = relative.name in ("config.json", _INDEX, MANIFEST) and len(relative.parts) == 1
        weights = path.suffix in (*WEIGHT_FILES, *PICKLES) or path.name.endswith(".index.json")
        own_module = path.suffix == ".safetensors" and str(relative.parent) in modules
        if path.is_file() and not (hidden or written or (weights and not own_module)):
            yield path


def _module_folders(source: Path) -> set[str]:
    """Subfolders that a sentence embedder's modules.json names: their weights belong to the model."""
    listed = source / "modules.json"
    try:
        modules = json.loads(listed.read_bytes()) if listed.is_file() else []
    except ValueError:
        return set()
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return {path for path in paths if isinstance(path, str) and path}


def _write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    files = {file: {"bytes": (folder / file).stat().st_size, "sha256": digest} for file, digest in digests.items()}
    config = {
        "config.json": {"bytes": (folder / "config.json").stat().st_size, "sha256": file_digest(folder / "config.json")}
    }
    write_json(folder / MANIFEST, {"format": FORMAT, "headshare": version("headshare"), "files": {**files, **config}})


def _check_file(path: Path, source: Checkpoint, meant: list[Assembly], given: Mapping[str, Tensor]) -> None:
    """Flush a file to disk, open it, and compare every number in it with what was meant.

    Raises:
        CheckpointError: if the header or a number differs.
    """
    flush_file(path)
    infos = {info.name: info for info in read_header(path)}
    if {info.name: (info.dtype, info.shape) for info in infos.values()} != {o.name: (o.dtype, o.shape) for o in meant}:
        raise CheckpointError(f"{path.name} did not reach the disk as it was written. Check the disk and run again.")
    with Checkpoint(name=path.name, config={}, tensors=infos, folder=path.parent) as written:
        for assembly in meant:
            pieces = [given[assembly.name]] if assembly.name in given else stream(assembly, source)
            if not _holds(written, assembly.name, pieces):
                raise CheckpointError(
                    f"{assembly.name} was not written as it was read. Check the disk and memory, and run again."
                )


def _holds(written: Checkpoint, name: str, pieces: Iterable[Tensor]) -> bool:
    """Whether a tensor's bytes are those of these pieces, laid end to end."""
    info, offset = written.tensors[name], 0
    for piece in pieces:
        found = torch.empty_like(piece, memory_format=torch.contiguous_format)
        if found.numel():
            written.read_into(found.flatten().view(torch.uint8).numpy().data, info, offset)
        if not torch.equal(_bits(found), _bits(piece)):
            return False
        offset += piece.nbytes
    return offset == info.nbytes


def same_numbers(shared: Checkpoint, dense: Checkpoint, name: str, tensor: GappedTensor | None) -> bool:
    """Whether a stored tensor holds just what the dense one holds outside its gaps, bit for bit, after conversion."""
    info, dtype = dense.tensors[name], shared.tensors[name].dtype
    meant = copied(info, dtype) if tensor is None else kept_only(info, tensor, dtype)
    return meant.shape == shared.tensors[name].shape and _holds(shared, name, stream(meant, dense))


def _bits(tensor: Tensor) -> Tensor:
    """The numbers as their bits, so that NaN equals NaN and -0 is not 0; eight bytes at a time where that goes."""
    raw = tensor.contiguous().flatten().view(torch.uint8)
    return raw if raw.numel() % 8 else raw.view(torch.int64)
