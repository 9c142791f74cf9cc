"""Expansion: a shared checkpoint back to a stock one."""

import dataclasses
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import DTYPES, WEIGHT_DTYPES
from headshare.checkpoint.int4 import A_WORD, PACKED, PARTS, SCALE, guards, part_of, unpack
from headshare.errors import CheckpointError
from headshare.sharing.assembly import Assembly, copied, filled, overwritten, stream
from headshare.sharing.expanded import ExpandedTensors, LazyTensors
from headshare.sharing.fits import SharedFiles, open_shared
from headshare.sharing.rounded.stock import StockMatrices
from headshare.sharing.writer import write_checkpoint


def expand(
    shared: Checkpoint, out: str | Path, *, overwrite: bool = False, rounded: bool = True, unpacked: bool = False
) -> Path:
    """Write a shared checkpoint back as a stock folder that any tool loads and that computes the same.

    Borrowed indices are filled from their donors, and removed ones with zeros. Scales are multiplied into the columns
    of W_o that they belong to, and low-rank factors with each other. Such a W_o is `rounded` to the checkpoint's type,
    or else written as float32 at least. Rounded matrices stay so, in compressed-tensors' format, or are
    `unpacked` to the type that most of the other numbers have.

    Raises:
        CheckpointError: if the checkpoint is not shared, its tensors are not what its plan says, or no stock model
            computes the same.
        OutputError: if the folder exists or cannot be written.
    """
    return expand_files(open_shared(shared), out, overwrite=overwrite, rounded=rounded, unpacked=unpacked)


def expand_files(
    files: SharedFiles, out: str | Path, *, overwrite: bool = False, rounded: bool = True, unpacked: bool = False
) -> Path:
    """Write the files of a shared checkpoint, which were checked, back as `expand` does.

    Raises:
        CheckpointError: if no stock model computes the same.
        OutputError: if the folder exists or cannot be written.
    """
    shared = files.checkpoint
    why = files.plan.no_stock_equivalent
    if why is not None:
        raise CheckpointError(f"{shared.name} has no stock equivalent: {why}. Load it with headshare.")
    if not rounded:  # then a rounded matrix is written as what it means exactly
        files = dataclasses.replace(files, checkpoint=shared.widened())
        shared = files.checkpoint
    # every tensor in its dense shape; those that the plan added are gone, and so are the guards of packed matrices, and
    # matrices that stock tools load rounded
    stock = None if unpacked or files.entry.rounding is None else StockMatrices(files)
    gone = {*files.added, *guards(shared.tensors), *(stock.names if stock else ())}
    assemblies = [
        filled(info, files.tensors[name], files.tensors) if name in files.tensors else copied(info)
        for name, info in shared.tensors.items()
        if name not in gone
    ]
    # those that scales or factors belong to are more than copies
    computed = ExpandedTensors(files).computed(rounded=rounded)
    if not rounded:
        assemblies = [_widened(each) if each.name in computed else each for each in assemblies]
    config = {key: value for key, value in shared.config.items() if key != "quantization_config"}
    if stock is not None and stock.names:
        config["quantization_config"] = stock.config()
        given: Mapping[str, Tensor] = ChainMap(stock.tensors(), computed)  # type: ignore[arg-type]
        return write_checkpoint(shared, [*assemblies, *stock.assemblies()], config, Path(out), overwrite, given)
    # packed matrices can share rows only, so that none of them is computed
    packing = files.entry.packing
    if packing is None or files.entry.rounding is not None:
        return write_checkpoint(shared, assemblies, config, Path(out), overwrite, computed)
    if not unpacked:
        config["quantization_config"] = packing.to_dict()
        return write_checkpoint(shared, assemblies, config, Path(out), overwrite)
    assemblies, matrices = _unpacked(shared, assemblies)
    return write_checkpoint(shared, assemblies, config, Path(out), overwrite, matrices)


def _unpacked(shared: Checkpoint, assemblies: Sequence[Assembly]) -> tuple[list[Assembly], LazyTensors]:
    """The assemblies with each packed matrix as one tensor, and those matrices unpacked, by name.

    Their type is the one that most of the other numbers have.
    """
    packed = {each.name: each for each in assemblies if each.name.endswith(PARTS)}
    others = [each for each in assemblies if each.name not in packed]
    # the type that most bytes of weights have
    weights = [each for each in others if each.dtype in WEIGHT_DTYPES]
    dtypes = {weight.dtype: sum(each.nbytes for each in weights if each.dtype == weight.dtype) for weight in weights}
    code = max(dtypes, key=dtypes.__getitem__, default="F32")
    meant: dict[str, Assembly] = {}
    for name, words in packed.items():
        if name.endswith(PACKED):
            shape = (words.shape[0], words.shape[1] * A_WORD)
            matrix = part_of(name.removesuffix(f".{PACKED}"), "weight")
            meant[matrix] = Assembly(matrix, code, shape, words.file, 0, ())

    def unpack_matrix(name: str) -> Tensor:
        numbers = torch.cat(list(stream(packed[part_of(name, PACKED)], shared)))
        scale = torch.cat(list(stream(packed[part_of(name, SCALE)], shared)))
        return unpack(numbers, scale, DTYPES[code])

    return [*others, *meant.values()], LazyTensors(meant, unpack_matrix)


def write_overwritten(files: SharedFiles, out: str | Path) -> Path:
    """Write a dense checkpoint that a plan was fitted to, with that plan's changes to its numbers.

    Recipients' indices are overwritten by their donors', and removed ones by zeros. A shared checkpoint should equal
    it, but for low-rank columns, which stay here as they are in the dense one.
    """
    dense = files.checkpoint
    tensors = files.tensors
    assemblies = [
        overwritten(info, tensors[name]) if name in tensors else copied(info) for name, info in dense.tensors.items()
    ]
    return write_checkpoint(dense, assemblies, dict(dense.config), Path(out), False)


def _widened(assembly: Assembly) -> Assembly:
    return dataclasses.replace(assembly, dtype="F64" if assembly.dtype == "F64" else "F32")
