"""The writer: any output folder from any assemblies, checked against what was meant."""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headshare.checkpoint.checkpoint import PICKLES, WEIGHT_DTYPES, WEIGHT_FILES, Checkpoint
from headshare.checkpoint.header import DTYPES, read_header
from headshare.checkpoint.opening import open_checkpoint
from headshare.errors import CheckpointError
from headshare.files.folder import MANIFEST, check_output, copy_file, file_digest, flush_file, whole_folder, write_json
from headshare.plan.plan import FORMAT
from headshare.plan.tensors import NOTHING, TensorPlan
from headshare.progress import track
from headshare.sharing.assembly import Assembly, copied, kept_only, stream
from headshare.sharing.fits import open_shared
from headshare.sharing.safetensors_writer import canonical_order, write_safetensors

INDEX = "model.safetensors.index.json"


def dtype_key(config: Mapping[str, Any]) -> str:
    """The key under which this configuration states its type of number."""
    return "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"


def write_checkpoint(
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
    """Write a folder from assemblies, whole or not at all, and check what was written.

    `given` holds tensors that are at hand and not read from the source. With `in_place` the source itself is replaced.
    """
    given, by_file = given or {}, _by_file(assemblies)
    expected = sum(one.nbytes for many in by_file.values() for one in many)
    if not in_place:
        check_output(out, source.path, overwrite=overwrite)
    with whole_folder(out, overwrite=overwrite, expected_bytes=expected) as folder, source:
        copy_other_files(source.path, folder)
        digests = _write_files(folder, source, by_file, given)
        if (source.path / INDEX).is_file():
            write_json(folder / INDEX, _index(by_file, expected))
        for name, note in (notes or {}).items():
            write_json(folder / name, note)
        write_json(folder / "config.json", config)
        _write_manifest(folder, digests)
        with open_checkpoint(folder) as written:
            if written.plan is not None:
                open_shared(written)
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
        if assembly.dtype in WEIGHT_DTYPES and not all_finite(piece):
            cause = (
                f"holds numbers that {DTYPES[assembly.dtype]} cannot (or NaN). Choose a wider --dtype."
                if converted
                else "holds NaN or infinite numbers. The file is damaged or the training diverged."
            )
            raise CheckpointError(f"{assembly.name} in {source.name} {cause}")
        yield piece


def all_finite(numbers: Tensor) -> bool:
    """Whether none is NaN or infinite: the least and the largest tell, many times faster than asking each."""
    return not numbers.numel() or bool(torch.isfinite(torch.stack(numbers.aminmax())).all())


def given_assembly(name: str, tensor: Tensor, file: str) -> Assembly:
    """The assembly of a tensor that is at hand, to be written into this file."""
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
    for path in other_files(source):
        copy_file(path, folder / path.relative_to(source))


def other_files(source: Path) -> Iterator[Path]:
    """What comes along beside the weights. Hidden files and pickles stay."""
    modules = _module_folders(source)
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(step.startswith(".") for step in relative.parts)
        written = relative.name in ("config.json", INDEX, MANIFEST) and len(relative.parts) == 1
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


def same_numbers(shared: Checkpoint, dense: Checkpoint, name: str, tensor: TensorPlan | None) -> bool:
    """Whether a stored tensor holds just what the dense one holds outside its gaps, bit for bit, after conversion."""
    info, dtype = dense.tensors[name], shared.tensors[name].dtype
    meant = copied(info, dtype) if tensor is None else kept_only(info, tensor, dtype)
    return meant.shape == shared.tensors[name].shape and _holds(shared, name, stream(meant, dense))


def _bits(tensor: Tensor) -> Tensor:
    """The numbers as their bits, so that NaN equals NaN and -0 is not 0; eight bytes at a time where that goes."""
    raw = tensor.contiguous().flatten().view(torch.uint8)
    return raw if raw.numel() % 8 else raw.view(torch.int64)
