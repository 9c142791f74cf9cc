"""The writer of checkpoint folders from assemblies, which checks every number that it wrote."""

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.contents import FILE_KEYS, check_inside, companions, without_weights
from headshare.checkpoint.entry import SharingEntry
from headshare.checkpoint.header import DTYPES, WEIGHT_DTYPES, read_header
from headshare.checkpoint.opening import open_checkpoint
from headshare.checkpoint.seal import seal_of
from headshare.errors import CheckpointError
from headshare.files.folder import check_output, copy_file, flush_file, narrow, whole_folder, write_json
from headshare.files.model_files import CONFIG, INDEX, WEIGHTS
from headshare.plan.tensors import NOTHING, TensorPlan
from headshare.progress import say, track
from headshare.sharing.assembly import Assembly, copied, kept_only, stream
from headshare.sharing.card import write_card
from headshare.sharing.fits import open_shared
from headshare.sharing.manifest import write_manifest
from headshare.sharing.safetensors_writer import canonical_order, same_bytes, write_safetensors


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
    """Write a checkpoint's folder from assemblies, whole or not at all, and check what was written.

    `given` holds tensors that are in memory or made here, and not read from the source. With `in_place` the source
    itself is replaced.
    """
    given = given or {}
    config = {key: value for key, value in config.items() if key not in FILE_KEYS}
    by_file = _by_file(assemblies, sharded=source.sharded)
    expected = sum(each.nbytes for many in by_file.values() for each in many)
    entry = SharingEntry.from_config(config.get("quantization_config"))
    if not in_place:
        check_output(out, source.path, overwrite=overwrite)
    beside = companions(source.path)
    with whole_folder(out, overwrite=overwrite, expected_bytes=expected, in_place=in_place) as folder, source:
        copy_named(source.path, folder, beside)
        digests = _write_files(folder, source, by_file, given, entry)
        if source.sharded:
            write_json(folder / INDEX, _index(by_file, expected))
        for name, note in (notes or {}).items():
            write_json(folder / name, note)
        write_card(folder, source, config, in_place=in_place)
        write_json(folder / CONFIG, config)
        narrow(folder / CONFIG, source.path / CONFIG)
        source.check_unchanged()  # what was copied beside the weights is of the same checkpoint
        # the manifest comes last: it holds the digests of all others, and the plan's
        write_manifest(folder, digests, entry)
        # the result must pass the checks that are made on loading
        with open_checkpoint(folder) as written:
            if written.plan is not None:
                open_shared(written)
    return out


def _write_files(
    folder: Path,
    source: Checkpoint,
    by_file: Mapping[str, list[Assembly]],
    given: Mapping[str, Tensor],
    entry: SharingEntry | None,
) -> dict[str, str]:
    """Write each file, flush it while the next is written, and return the digests by file."""
    seal = {} if entry is None else seal_of(entry.plan)
    digests: dict[str, str] = {}
    checks: list[Future[None]] = []
    with ThreadPoolExecutor(1) as checker:
        for file, many in track(by_file.items(), "writing", len(by_file)):
            slices = ([given[each.name]] if each.name in given else _finite(each, source) for each in many)
            digests[file] = write_safetensors(folder / file, many, slices, seal)
            checks.append(checker.submit(_check_file, folder / file, many))
            # a failed check ends the run now and not after the last file
            for check in checks:
                if check.done():
                    check.result()
        for check in track(checks, "flushing", len(checks)):
            check.result()
    return digests


def _is_mask(piece: Tensor) -> bool:
    """True for numbers that are zero or minus infinity: masks, which some models store beside their weights."""
    return bool(((piece == 0) | (piece == -math.inf)).all())


def _finite(assembly: Assembly, source: Checkpoint) -> Iterator[Tensor]:
    """The slices of a tensor, each checked to be finite.

    Raises:
        CheckpointError: if the source is not finite, or its numbers do not fit the output's type.
    """
    read = {run.source for run in assembly.runs} - {NOTHING}
    converted = any(source.tensors[name].dtype != assembly.dtype for name in read)
    for piece in stream(assembly, source):
        if assembly.dtype in WEIGHT_DTYPES and not all_finite(piece) and not _is_mask(piece):
            cause = (
                f"holds numbers that {DTYPES[assembly.dtype]} cannot (or NaN). Choose a wider --dtype."
                if converted
                else "holds NaN or infinite numbers. The file is damaged or the training diverged."
            )
            raise CheckpointError(f"{assembly.name} in {source.name} {cause}")
        yield piece


def check_finite(checkpoint: Checkpoint) -> None:
    """Read all weights once.

    Raises:
        CheckpointError: naming a tensor with numbers that are not finite.
    """
    for info in checkpoint.tensors.values():
        for _ in _finite(copied(info), checkpoint):
            pass


def all_finite(numbers: Tensor) -> bool:
    """True if no number of a tensor, of one of WEIGHT_DTYPES, is NaN or infinite.

    Bits of these, taken as whole numbers, are those of infinity or more: with a sign and without. NumPy finds the
    largest in the calling thread and without the interpreter's lock, in half the time of torch's `aminmax`.
    """
    if not numbers.numel():
        return True
    signed = torch.int16 if numbers.itemsize == 2 else torch.int32 if numbers.itemsize == 4 else torch.int64
    infinite = torch.tensor([math.inf, -math.inf], dtype=numbers.dtype).view(signed).numpy()
    bits = numbers.contiguous().flatten().view(signed).numpy()
    unsigned = f"u{bits.dtype}"
    return bool(bits.max() < infinite[0] and bits.view(unsigned).max() < infinite.view(unsigned)[1])


def given_assembly(name: str, tensor: Tensor, file: str) -> Assembly:
    """The assembly of a given tensor, which is written into this file and not read from the source."""
    code = next(code for code, dtype in DTYPES.items() if dtype == tensor.dtype)
    return Assembly(name, code, tuple(tensor.shape), file, 0, ())


def _by_file(assemblies: Iterable[Assembly], *, sharded: bool) -> dict[str, list[Assembly]]:
    """The assemblies by the file that each goes into. A single file gets the name under which it is found."""
    files: dict[str, list[Assembly]] = {}
    for assembly in assemblies:
        files.setdefault(assembly.file if sharded else WEIGHTS, []).append(assembly)
    return {file: canonical_order(files[file]) for file in sorted(files)}


def _index(by_file: Mapping[str, list[Assembly]], size: int) -> dict[str, Any]:
    weight_map = {each.name: file for file, many in by_file.items() for each in many}
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


def copy_named(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy these files from one folder to another, and say which modules of a sentence embedder lose their weights.

    Raises:
        CheckpointError: if a file cannot be read, or is a link to a file elsewhere, which may be private.
    """
    for name in names:
        check_inside(source, name)
        copy_file(source / name, folder / name)
    for module in without_weights(source):
        say(
            f"{module}, a module of this sentence embedder, is left without its weights: no safetensors file has them, "
            "and a pickle, which can run code, is not copied. Save the embedder as safetensors first."
        )


def _check_file(path: Path, meant: Iterable[Assembly]) -> None:
    """Flush a file to disk, and open it.

    Raises:
        CheckpointError: if its header does not tell of these tensors.
    """
    flush_file(path)
    infos = read_header(path)
    if {info.name: (info.dtype, info.shape) for info in infos} != {o.name: (o.dtype, o.shape) for o in meant}:
        raise CheckpointError(f"{path.name} did not reach the disk as it was written. Check the disk and run again.")


def _holds(written: Checkpoint, name: str, pieces: Iterable[Tensor]) -> bool:
    """True if a tensor's bytes are those of these pieces, laid end to end."""
    info = written.tensors[name]
    offset = 0
    for piece in pieces:
        meant = piece.contiguous().flatten().view(torch.uint8)
        stored = torch.empty_like(meant)
        if len(stored):
            written.read_into(stored.numpy().data, info, offset)
        if not same_bytes(stored, meant):
            return False
        offset += piece.nbytes
    return offset == info.nbytes


def same_tensors(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """True if two stored tensors of a checkpoint, of one type and shape, are equal bit for bit."""
    infos = checkpoint.tensors[one], checkpoint.tensors[other]
    if (infos[0].file, infos[0].offset) == (infos[1].file, infos[1].offset):
        return True
    return _holds(checkpoint, one, stream(copied(infos[1]), checkpoint))


def same_numbers(shared: Checkpoint, dense: Checkpoint, name: str, tensor: TensorPlan | None) -> bool:
    """True if a stored tensor equals the kept indices of the dense one, bit for bit, after conversion."""
    info = dense.tensors[name]
    dtype = shared.tensors[name].dtype
    meant = copied(info, dtype) if tensor is None else kept_only(info, tensor, dtype)
    return meant.shape == shared.tensors[name].shape and _holds(shared, name, stream(meant, dense))
