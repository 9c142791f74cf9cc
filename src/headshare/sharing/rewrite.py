"""Shared checkpoints written again: refitted or trained."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.contents import companions
from headshare.checkpoint.fingerprint import origin_of
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import OutputError
from headshare.files.folder import MANIFEST, check_output, clear_left
from headshare.files.model_files import CARD, CONFIG, INDEX
from headshare.sharing.assembly import copied
from headshare.sharing.fits import SharedFiles, open_shared
from headshare.sharing.share import as_stored
from headshare.sharing.size import dtype_code
from headshare.sharing.writer import dtype_key, write_checkpoint


def write_refitted(
    files: SharedFiles,
    refit: RefitRecord,
    tensors: Mapping[str, Tensor],
    out: Path,
    *,
    dense: Checkpoint | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a shared checkpoint again with refitted tensors in the place of its own, and a record of the refit.

    `tensors` are whole, in their dense shapes; what the plan keeps of them is stored. `out` may be the checkpoint's own
    folder, which is replaced in one step when the new one is whole. A checkpoint that names no dense model names
    `dense` from then on.

    Raises:
        OutputError: if it cannot be written, or files of the folder that is to be replaced would be lost.
    """
    shared = files.checkpoint
    check_written_again(shared, out, overwrite=overwrite)
    assemblies = [dataclasses.replace(copied(info), shared=name in files.tied) for name, info in shared.tensors.items()]
    entry = dataclasses.replace(files.entry, refit=refit)
    if entry.base_model is None and dense is not None:
        entry = dataclasses.replace(entry, base_model=dense.name, origin=entry.origin or origin_of(dense))
    config = {**shared.config, "quantization_config": entry.to_config()}
    replaced = as_stored(tensors, assemblies, files.tensors)
    in_place = is_own(shared, out)
    return write_checkpoint(shared, assemblies, config, out, overwrite or in_place, replaced, in_place=in_place)


def write_trained(
    trained: Checkpoint,
    out: Path,
    *,
    dtype: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a checkpoint, dense or shared and saved by any tool, in the form that `share` writes.

    So it has aligned pages and digests, and is checked. `dtype` converts all weights; `notes` are JSON files that go
    with it.

    Raises:
        OutputError: if it cannot be written.
        CheckpointError: if its numbers are not finite, or do not fit the type.
    """
    code = dtype_code(dtype)
    config = dict(trained.config)
    tied: frozenset[str] = frozenset()
    if trained.sharing is not None:
        tied = open_shared(trained).tied
        entry = dataclasses.replace(trained.sharing, base_model=base_model or trained.sharing.base_model)
        config["quantization_config"] = entry.to_config()
    assemblies = [
        dataclasses.replace(copied(info, code), shared=name in tied) for name, info in trained.tensors.items()
    ]
    if dtype is not None:
        config[dtype_key(config)] = dtype
    return write_checkpoint(trained, assemblies, config, out, overwrite, notes=notes)


def check_written_again(shared: Checkpoint, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that a shared checkpoint cannot be written to again.

    That is one in a wrong place, or the checkpoint's own folder where it holds files that would be lost.

    Raises:
        OutputError: saying which.
    """
    if not is_own(shared, out):
        check_output(out, shared.path, overwrite=overwrite)
        return
    clear_left(out)
    kept = {*companions(shared.path), *(info.file for info in shared.tensors.values()), CONFIG, INDEX, MANIFEST, CARD}
    found = sorted(path.relative_to(shared.path).as_posix() for path in shared.path.rglob("*") if path.is_file())
    lost = [name for name in found if name not in kept]
    if lost:
        raise OutputError(
            f"{shared.path} also holds {', '.join(lost[:3])}, which would be lost if it were replaced. "
            "Write elsewhere: --out NEW"
        )


def is_own(shared: Checkpoint, out: Path) -> bool:
    """True if an output is the checkpoint's own folder."""
    return os.path.realpath(out) == os.path.realpath(shared.path)
