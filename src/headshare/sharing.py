"""Share and expand: from a dense checkpoint and a plan to a smaller one, and back. This file is the format.

On disk a shared checkpoint is a normal Hugging Face folder. Every tensor keeps its name; one with gaps, or of which
units are removed, holds only the indices it keeps. config.json carries the plan as `quantization_config`, so that
transformers without headshare stops at a shape mismatch. headshare.json holds the digests of the files as written.
"""

import dataclasses
import json
import os
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headshare.accounting import Estimate, dtype_code, estimate_plan
from headshare.assembly import Assembly, copied, filled, kept_only, overwritten, stream
from headshare.checkpoints import (
    PICKLES,
    WEIGHT_DTYPES,
    WEIGHT_FILES,
    Checkpoint,
    open_checkpoint,
    quantization_entry,
    require_one_dtype,
)
from headshare.configuration import text_config
from headshare.errors import CheckpointError, PlanError
from headshare.gaps import (
    NOTHING,
    GappedTensor,
    gapped_biases,
    gapped_tensors,
    scale_names,
    scaled_weight_name,
    tied_names,
)
from headshare.headers import DTYPES, read_header
from headshare.plans import FORMAT, SharePlan
from headshare.progress import track
from headshare.refits import RefitRecord
from headshare.removing import check_removals
from headshare.writing import (
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

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the shared checkpoint as a folder, whole or not at all, and check what was written.

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
        scales = _scales(self.dense, self.plan, code, self.refitted)
        replaced = Stored(self.refitted, {one.name: one for one in assemblies}, tensors)
        return _write(self.dense, assemblies, config, Path(out), overwrite, scales, replaced)

    def with_refit(self, refit: RefitRecord, tensors: Mapping[str, Tensor]) -> "SharedCheckpoint":
        """The same with these tensors, whole, in the place of the dense model's."""
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
    return {**gapped_tensors(plan), **biases}


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


def check_shared(checkpoint: Checkpoint) -> SharePlan:
    """The plan of a shared checkpoint whose tensors are what the plan says.

    Raises:
        CheckpointError: if the checkpoint is not shared, or a tensor is missing or has another shape.
    """
    plan = checkpoint.plan
    if plan is None:
        raise CheckpointError(f"{checkpoint.name} is not a shared checkpoint; its config.json names no headshare plan.")
    tensors = tensors_of(plan, checkpoint)
    expected = {
        place.name(layer): place.shape
        for layout in plan.layouts
        for place in layout.parts.values()
        for layer in range(layout.layers)
    } | {name: tensor.stored_shape for name, tensor in tensors.items()}
    for name, shape in expected.items():
        _check_tensor(checkpoint, name, shape, "the checkpoint does not hold what its plan says")
    if plan.removals:
        dense = {name: tensor.shape for name, tensor in tensors.items()}
        check_removals(plan, text_config(checkpoint.config), {**checkpoint.shapes, **dense})
    for name, count in scale_names(plan).items():
        _check_tensor(checkpoint, name, (count,), "the checkpoint does not hold what its plan says")
    return plan


def _check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], what: str) -> None:
    info = checkpoint.tensors.get(name)
    if info is None or info.shape != shape:
        found = "no such tensor" if info is None else f"shape {info.shape}"
        raise PlanError(f"{what}: {name} should have shape {shape}; {checkpoint.name} has {found}.")


def expand(shared: Checkpoint, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a shared checkpoint back as a stock folder that any tool loads: every gap filled from its donor, and zeros
    where units were removed, so that it computes the same.

    Scales are multiplied into the columns of W_o that they belong to.

    Raises:
        CheckpointError: if the checkpoint is not shared or its tensors are not what its plan says.
        OutputError: if the folder exists or cannot be written.
    """
    plan = check_shared(shared)
    tensors = tensors_of(plan, shared)
    scales = scale_names(plan)
    assemblies = [
        filled(info, tensors[name], tensors) if name in tensors else copied(info)
        for name, info in shared.tensors.items()
        if name not in scales
    ]
    config = {key: value for key, value in shared.config.items() if key != "quantization_config"}
    return _write(shared, assemblies, config, Path(out), overwrite, {}, _folded(shared, tensors, scales))


def write_overwritten(dense: Checkpoint, plan: SharePlan, out: str | Path) -> Path:
    """Write the dense checkpoint with recipients' indices overwritten by their donors', and zeros in place of removed
    units: what sharing should equal."""
    check_fits(plan, dense)
    tensors = tensors_of(plan, dense)
    assemblies = [
        overwritten(info, tensors[name]) if name in tensors else copied(info) for name, info in dense.tensors.items()
    ]
    return _write(dense, assemblies, dict(dense.config), Path(out), False, {})


def write_refitted(shared: Checkpoint, refit: RefitRecord, tensors: Mapping[str, Tensor], out: Path) -> Path:
    """Write a shared checkpoint again with these tensors, whole, in the place of its own, and a record of the refit.

    `out` may be the checkpoint's own folder, which is replaced in one step when the new one is whole.

    Raises:
        OutputError: if it cannot be written.
    """
    plan = check_shared(shared)
    gapped = tensors_of(plan, shared)
    assemblies = [copied(info) for name, info in shared.tensors.items()]
    config = {**shared.config, "quantization_config": quantization_entry(plan, refit, shared.base_model)}
    replaced = Stored(tensors, {one.name: one for one in assemblies}, gapped)
    tied = set(tied_names(gapped))
    assemblies = [dataclasses.replace(one, shared=one.name in tied) for one in assemblies]
    in_place = os.path.realpath(out) == os.path.realpath(shared.path)
    return _write(shared, assemblies, config, out, in_place, {}, replaced, in_place=in_place)


def _folded(shared: Checkpoint, tensors: Mapping[str, GappedTensor], scales: Mapping[str, int]) -> dict[str, Tensor]:
    """Scaled readouts, whole, with the scale multiplied into the columns it belongs to."""
    folded: dict[str, Tensor] = {}
    for scale in scales:
        name = scaled_weight_name(scale)
        tensor = tensors[name]
        weight = torch.cat(list(stream(filled(shared.tensors[name], tensor, tensors), shared)))
        values, used = shared.read(scale), 0
        for start, stop in tensor.scaled:
            part = weight.narrow(tensor.axis, start, stop - start)
            shape = (-1, 1) if tensor.axis == 0 else (1, -1)
            part.mul_(values[used : used + stop - start].view(shape))
            used += stop - start
        folded[name] = weight
    return folded


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


def _scales(
    dense: Checkpoint, plan: SharePlan, dtype: str | None, fitted: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, str]]:
    """The scales of a plan, ones where none were fitted, in the file and the type of the readout they belong to."""
    scales = {}
    for name, count in scale_names(plan).items():
        info = dense.tensors[scaled_weight_name(name)]
        assembly = copied(info, dtype)
        values = fitted[name] if name in fitted else torch.ones(count)
        scales[name] = (values.to(DTYPES[assembly.dtype]), info.file)
    return scales


def _dtype_key(config: Mapping[str, Any]) -> str:
    return "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"


def _write(
    source: Checkpoint,
    assemblies: Iterable[Assembly],
    config: dict[str, Any],
    out: Path,
    overwrite: bool,
    scales: Mapping[str, tuple[Tensor, str]],
    replaced: Mapping[str, Tensor] | None = None,
    *,
    in_place: bool = False,
) -> Path:
    given = ChainMap({name: tensor for name, (tensor, _) in scales.items()}, replaced or {})  # type: ignore[arg-type]
    extra = [_given_assembly(name, tensor, file) for name, (tensor, file) in scales.items()]
    by_file = _by_file([*assemblies, *extra])
    expected = sum(one.nbytes for many in by_file.values() for one in many)
    if not in_place:
        check_output(out, source.path, overwrite=overwrite)
    with whole_folder(out, overwrite=overwrite, expected_bytes=expected) as folder, source:
        _copy_other_files(source.path, folder)
        digests = _write_files(folder, source, by_file, given)
        if (source.path / _INDEX).is_file():
            write_json(folder / _INDEX, _index(by_file, expected))
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
        if piece.numel() and assembly.dtype in WEIGHT_DTYPES and not _all_finite(piece):
            cause = (
                f"holds numbers that {DTYPES[assembly.dtype]} cannot (or NaN). Choose a wider --dtype."
                if converted
                else "holds NaN or infinite numbers. The file is damaged or the training diverged."
            )
            raise CheckpointError(f"{assembly.name} in {source.name} {cause}")
        yield piece


def _all_finite(numbers: Tensor) -> bool:
    """Whether none is NaN or infinite: the least and the largest tell, many times faster than asking each."""
    return bool(torch.isfinite(torch.stack(numbers.aminmax())).all())


def _given_assembly(name: str, tensor: Tensor, file: str) -> Assembly:
    code = next(code for code in WEIGHT_DTYPES if DTYPES[code] == tensor.dtype)
    return Assembly(name, code, tuple(tensor.shape), file, 0, ())


def _by_file(assemblies: Iterable[Assembly]) -> dict[str, list[Assembly]]:
    files: dict[str, list[Assembly]] = {}
    for assembly in assemblies:
        files.setdefault(assembly.file, []).append(assembly)
    return {file: canonical_order(files[file]) for file in sorted(files)}


def _index(by_file: Mapping[str, list[Assembly]], size: int) -> dict[str, Any]:
    weight_map = {one.name: file for file, many in by_file.items() for one in many}
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


def _copy_other_files(source: Path, folder: Path) -> None:
    """Everything beside the weights: tokenizer, generation settings, a model card. Hidden files and pickles stay."""
    modules = _module_folders(source)
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(step.startswith(".") for step in relative.parts)
        written = relative.name in ("config.json", _INDEX, MANIFEST) and len(relative.parts) == 1
        weights = path.suffix in (*WEIGHT_FILES, *PICKLES) or path.name.endswith(".index.json")
        own_module = path.suffix == ".safetensors" and str(relative.parent) in modules
        if path.is_file() and not (hidden or written or (weights and not own_module)):
            copy_file(path, folder / relative)


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
