"""Folders written whole or not at all: a locked temporary sibling, then a rename."""

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from headshare.errors import OutputError
from headshare.files.atomic import explain, flush_folder, umask
from headshare.files.lock import locked
from headshare.files.resume import discard_committed

MANIFEST = "headshare.json"
PREFIX_BYTES = 100
# constants of Linux's renameat2
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_output(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists (unless it may be overwritten) or overlaps the input.

    Raises:
        OutputError: saying which, and what to do.
    """
    target = Path(os.path.realpath(out))
    origin = Path(os.path.realpath(source))
    if target == origin or origin in target.parents:
        raise OutputError(f"the output {out} is inside the input {source}. Choose a folder outside it.")
    if target in origin.parents:
        raise OutputError(f"the input {source} is inside the output {out}. Choose another output.")
    check_vacant(out, overwrite=overwrite)


def check_vacant(out: Path, *, overwrite: bool) -> None:
    """Refuse an output without a folder to go in, or that exists and is no checkpoint that may be overwritten."""
    if is_taken(out, overwrite=overwrite) and not _is_checkpoint(out):
        raise OutputError(f"{out} is not a checkpoint folder, so --overwrite does not replace it.")


def is_taken(out: Path, *, overwrite: bool) -> bool:
    """True if something that may be overwritten lies where an output is to go.

    Raises:
        OutputError: if something is there that may not be overwritten, or there is no folder to write in. Where the run
            that wrote it was stopped at its end, the rest of that run's state is removed.
    """
    if not os.path.isdir(out.absolute().parent):  # noqa: PTH112 - unlike Path's, it takes any name for an answer
        raise OutputError(f"there is no folder {out.absolute().parent} to write {out.name} in. Make it first.")
    if not os.path.lexists(out):
        return False
    if not overwrite:
        stopped = "; it was whole when the run that wrote it was stopped" if discard_committed(out) else ""
        raise OutputError(f"{out} exists{stopped}. Choose another name, or pass --overwrite to replace it.")
    return True


def _is_checkpoint(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    weights = {"model.safetensors", "model.safetensors.index.json", MANIFEST}
    return not names or ("config.json" in names and bool(names & weights))


@contextmanager
def whole_folder(out: Path, *, overwrite: bool, expected_bytes: int) -> Iterator[Path]:
    """A temporary folder to write in. It becomes `out` when the block ends, and is removed if the block fails.

    Killed at any moment, this leaves no output or a whole one. The next run removes what a killed run left behind.

    Raises:
        OutputError: if the disk is too full, before writing or on the way, or the output cannot be made.
    """
    # what killed runs left behind takes room, so it goes before room is measured
    check_vacant(out, overwrite=overwrite)
    parent = out.absolute().parent
    _remove_stale(parent, out.name)
    discard_committed(out)
    free = shutil.disk_usage(parent).free
    if free < expected_bytes:
        raise OutputError(
            f"{parent} has {free:,} bytes free; the output needs {expected_bytes:,}. Free some, or write elsewhere."
        )
    with ExitStack() as cleanup:
        try:
            partial = Path(tempfile.mkdtemp(prefix=_partial_prefix(out.name), dir=parent))
            cleanup.callback(shutil.rmtree, partial, ignore_errors=True)
            # the lock tells other runs that this folder is in use and not left behind
            cleanup.enter_context(locked(partial))
            yield partial
            # all entries reach the disk before the rename, so that an output in its place survives a power cut
            partial.chmod(0o777 & ~umask())
            for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
                flush_folder(folder)
            _put_in_place(partial, out, overwrite=overwrite)
            flush_folder(parent)
        except OSError as error:
            raise OutputError(explain(error, out)) from error


def _partial_prefix(name: str) -> str:
    short = os.fsdecode(os.fsencode(name)[:PREFIX_BYTES])
    return f".{short}.headshare-partial-"


def _remove_stale(parent: Path, name: str) -> None:
    """Remove the partial folders that killed runs left: those whose lock nobody holds."""
    for stale in parent.iterdir():
        if stale.name.startswith(_partial_prefix(name)):
            with suppress(OSError), locked(stale, wait=False):
                shutil.rmtree(stale, ignore_errors=True)


def _put_in_place(partial: Path, out: Path, *, overwrite: bool) -> None:
    """Rename a folder to `out`, or, where overwriting is allowed, swap it with the checkpoint that is there."""
    if not (overwrite and os.path.lexists(out)):
        try:
            partial.rename(out)
        except OSError as error:
            if os.path.lexists(out):
                raise OutputError(
                    f"{out} exists: it appeared while this run was writing. It was left alone."
                ) from error
            raise
        return
    check_vacant(out, overwrite=True)
    if not _exchange(partial, out):
        old = Path(tempfile.mkdtemp(prefix=_partial_prefix(out.name), dir=partial.parent))
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system can (Linux). Return False where it cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def flush_file(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON as Hugging Face does, and flush it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file, following links, and flush it to disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    flush_file(target)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
