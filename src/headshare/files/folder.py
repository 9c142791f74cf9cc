"""Folders written whole or not at all: a locked temporary sibling, then a rename. Only what we wrote is replaced."""

import ctypes
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from headshare.errors import CheckpointError, OutputError
from headshare.files.atomic import flush_folder
from headshare.files.digests import algorithm_of, file_digest
from headshare.files.failures import explain
from headshare.files.lock import inode_of, locked
from headshare.files.model_files import CONFIG, INDEX, WEIGHTS, WRITTEN
from headshare.files.printable import CONTROL
from headshare.files.resume import discard_committed, run_folder
from headshare.files.scratch import remove_dead, scratch_folder
from headshare.files.untrusted import read_json

MANIFEST = "headshare.json"
# constants of Linux's renameat2
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_output(out: Path, source: Path, *, overwrite: bool, in_place: bool = False) -> None:
    """Refuse an output that exists (unless it may be overwritten) or overlaps the input.

    With `in_place`, all that the output holds is also in what replaces it.

    Raises:
        OutputError: saying which, and what to do.
    """
    target = Path(os.path.realpath(out))
    origin = Path(os.path.realpath(source))
    if _lies_in(target, origin):
        raise OutputError(f"the output {out} is inside the input {source}. Choose a folder outside it.")
    if _lies_in(origin, target):
        raise OutputError(f"the input {source} is inside the output {out}. Choose another output.")
    for path in source.rglob("*"):
        if path.is_symlink() and _lies_in(Path(os.path.realpath(path)), target):
            raise OutputError(f"{path} of the input is a link into the output {out}. Choose another output.")
    check_vacant(out, overwrite=overwrite, in_place=in_place)


def _lies_in(inner: Path, outer: Path) -> bool:
    """True if a path is a folder or below it. Folders are told by their inodes, as one can be mounted in two places."""
    place = inode_of(outer)
    return bool(place) and any(inode_of(path) == place for path in (inner, *inner.parents))


def check_vacant(out: Path, *, overwrite: bool, in_place: bool = False) -> None:
    """Refuse an output without a folder to go in, or that exists and may not be overwritten.

    Only a checkpoint may, and only one whose folder holds nothing that somebody else put there. With `in_place`, all
    that it holds is also in what replaces it.
    """
    if not is_taken(out, overwrite=overwrite):
        return
    if not _is_checkpoint(out):
        raise OutputError(f"{out} is not a checkpoint folder, so --overwrite does not replace it.")
    if not in_place and (strange := sorted(not_written_by_us(out))):
        raise OutputError(
            f"{out} also holds {', '.join(strange[:3])}{', ...' if strange[3:] else ''}, which is not as headshare "
            "wrote it or not of a checkpoint, and would be lost. Move it away, or write elsewhere."
        )


def is_taken(out: Path, *, overwrite: bool) -> bool:
    """True if something that may be overwritten lies where an output is to go.

    Raises:
        OutputError: if something is there that may not be overwritten, or there is no folder to write in. Where the run
            that wrote it was stopped at its end, the rest of that run's state is removed.
    """
    if not os.path.isdir(out.absolute().parent):  # noqa: PTH112 - unlike Path's, it takes any name for an answer
        raise OutputError(f"there is no folder {out.absolute().parent} to write {out.name} in. Make it first.")
    clear_left(out)
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
    weights = {WEIGHTS, INDEX, MANIFEST}
    return not names or (CONFIG in names and bool(names & weights))


def not_written_by_us(folder: Path) -> Iterator[str]:
    """The files of a checkpoint's folder that are not as its manifest lists them.

    Files of weights count by their names, and others by their digests. Where the manifest does not list the others, or
    there is none, files that checkpoints have count as written.

    Raises:
        CheckpointError: if its digests are of a kind that is not known here.
    """
    listed = _manifest(folder)
    algorithm = algorithm_of(listed, str(folder / MANIFEST))
    weights = listed.get("files")
    beside = listed.get("beside")
    names = {MANIFEST, *(weights if isinstance(weights, dict) else ())}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if (path.is_dir() and not path.is_symlink()) or name in names:
            continue
        if isinstance(beside, dict):
            if path.is_symlink() or not path.is_file() or file_digest(path, algorithm) != beside.get(name):
                yield name
        elif not any(name.count("/") == form.count("/") and fnmatchcase(name, form) for form in WRITTEN):
            yield name


def _manifest(folder: Path) -> Mapping[str, Any]:
    try:
        return read_json(folder / MANIFEST)
    except CheckpointError:
        return {}


@contextmanager
def whole_folder(out: Path, *, overwrite: bool, expected_bytes: int, in_place: bool = False) -> Iterator[Path]:
    """A temporary folder to write in. It becomes `out` when the block ends, and is removed if the block fails.

    Killed at any moment, this leaves no output or a whole one, and the old one where that was to be replaced. The next
    run removes what a killed run left behind. With `in_place`, all that is replaced is also in the new folder.

    Raises:
        OutputError: if the disk is too full, before writing or on the way, or the output cannot be made.
    """
    # what killed runs left behind takes room, so it goes before room is measured
    check_vacant(out, overwrite=overwrite, in_place=in_place)
    parent = out.absolute().parent
    discard_committed(out)
    free = shutil.disk_usage(parent).free
    if free < expected_bytes:
        raise OutputError(
            f"{parent} has {free:,} bytes free; the output needs {expected_bytes:,}. Free some, or write elsewhere."
        )
    try:
        with scratch_folder(parent, _partial(out)) as partial:
            yield partial
            # all entries reach the disk before the rename, so that an output in its place survives a power cut
            for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
                flush_folder(folder)
            _put_in_place(partial, out, overwrite=overwrite, in_place=in_place)
            flush_folder(parent)
    except OSError as error:
        raise OutputError(explain(error, out)) from error


def _partial(out: Path) -> str:
    """The beginning of the names under which an output is written."""
    return run_folder(out, "partial-").name


def _replaced(out: Path) -> Path:
    """The beginning of the path under which an old output waits for the new one; the new one's inode follows."""
    return run_folder(out, "replaced-")


def clear_left(out: Path) -> None:
    """Remove what killed runs left of this output, and put it back where one was stopped between two renames.

    Raises:
        OutputError: if something else is in its place by now.
    """
    remove_dead(out.absolute().parent, _partial(out))
    beginning = _replaced(out)
    with suppress(OSError):
        for old in [path for path in beginning.parent.iterdir() if path.name.startswith(beginning.name)]:
            # a run that is between the two renames has it locked
            with suppress(OSError), locked(old, wait=False):
                if not os.path.lexists(out):
                    old.rename(out)
                elif inode_of(out).endswith(f":{old.name.removeprefix(beginning.name)}"):
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    raise OutputError(
                        f"{old} was at {out} until a run was stopped that was to replace it, and something else is "
                        "there now. Move one of them away."
                    )


def _put_in_place(partial: Path, out: Path, *, overwrite: bool, in_place: bool) -> None:
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
    check_vacant(out, overwrite=True, in_place=in_place)
    if not _exchange(partial, out):
        _replace(partial, out)


def _replace(partial: Path, out: Path) -> None:
    """Put a folder in the place of another in two steps, of which the first can be undone: now, or by the next run."""
    old = _replaced(out)
    old = old.with_name(f"{old.name}{partial.stat().st_ino}")
    with ExitStack() as lock:
        with suppress(OSError):  # the file system has no locks
            lock.enter_context(locked(out))
        out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            old.rename(out)
            raise
        flush_folder(out.absolute().parent)
        old.rename(partial)  # from here on it is as after an exchange: to be removed, by whoever comes


def _exchange(first: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system can (Linux). Return False where it cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def flush_file(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON as Hugging Face does, and flush it to disk."""
    write_text(path, json_text(data))


def json_text(data: Mapping[str, Any]) -> str:
    """JSON as Hugging Face writes it, with a line's end."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if CONTROL.search(text.replace("\n", "")):  # half a character, which UTF-8 cannot hold, is an escape in JSON
        text = json.dumps(data, indent=2)
    return text + "\n"


def write_text(path: Path, text: str) -> None:
    """Write text, and flush it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, following links, and flush it to disk. Nobody may read the copy who may not read the source.

    Raises:
        CheckpointError: if the source cannot be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        original = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror or error}.") from None
    with original, target.open("wb") as copy:
        shutil.copyfileobj(original, copy)
        copy.flush()
        os.fsync(copy.fileno())
    narrow(target, source)


def narrow(path: Path, source: Path) -> None:
    """Take from a file the permissions of others that the file does not give which it was made from."""
    path.chmod(stat.S_IMODE(path.stat().st_mode) & (source.stat().st_mode | 0o700))
