"""Files put in place whole or not at all, whatever they hold."""

import errno
import glob
import os
import tempfile
from pathlib import Path

from headshare.errors import OutputError

_PARTIAL = ".headshare-partial-"
# a name can be too long with more added to it
_NAME_BYTES = 100


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary sibling, flushed to disk, then renamed over what is there.

    Raises:
        OutputError: if it cannot be written; nothing is left behind, and what was there stays.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=_partial_prefix(path.name), dir=path.absolute().parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
        flush_folder(path.absolute().parent)
    except OSError as error:
        raise OutputError(explain(error, path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """True if this is the name of a temporary file of `write_whole`."""
    return name.startswith(_PARTIAL)


def remove_partials(folder: Path, *, of: str | None = None) -> None:
    """Remove the temporary files that `write_whole` left in a folder when it was killed.

    They are those of the file that is named, or else of all files in the folder and below. No other process may be
    writing these.
    """
    partials = folder.rglob(f"{_PARTIAL}*") if of is None else folder.glob(f"{glob.escape(_partial_prefix(of))}*")
    for partial in partials:
        partial.unlink(missing_ok=True)


def _partial_prefix(name: str) -> str:
    """How the names of a file's temporary files begin."""
    return f"{_PARTIAL}{os.fsdecode(os.fsencode(name)[:_NAME_BYTES])}-"


def explain(error: OSError, path: Path) -> str:
    """The message for an error of the system at this output, for the person at the keyboard."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"there is no room left for {path} ({error.strerror}). Nothing was left behind; free some and run again."
    return f"{path!s:.300} could not be written: {error.strerror or error}."


def umask() -> int:
    """The process's mask of permissions for new files. The system tells it only when it is set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush_folder(folder: Path) -> None:
    """Make a folder's own entries reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> bool:
    """Fill the buffer with a file's bytes from `offset` on. Return False if the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            return False
        done += count
    return True
