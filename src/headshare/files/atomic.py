"""Files put in place whole or not at all, whatever they hold."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headshare.errors import OutputError
from headshare.files.failures import explain
from headshare.files.scratch import PREFIX, scratch_file


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary sibling, flushed to disk, then renamed over what is there.

    Raises:
        OutputError: if it cannot be written; nothing of it is left behind, and what was there stays.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of a file to write in. It takes the file's place when the block ends, as in `write_whole`.

    Raises:
        OutputError: if it cannot be written; nothing of it is left behind, and what was there stays.
    """
    path = Path(path)
    try:
        with scratch_file(path.absolute().parent) as temporary:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            flush_folder(path.absolute().parent)
    except OSError as error:
        raise OutputError(explain(error, path)) from error


def is_partial(name: str) -> bool:
    """True if this is the name of a temporary file of `write_whole`."""
    return name.startswith(PREFIX)


def remove_partials(folder: Path) -> None:
    """Remove the temporary files that `write_whole` left in a folder and below when it was killed.

    No other process may be writing there.
    """
    for partial in folder.rglob(f"{PREFIX}*"):
        partial.unlink(missing_ok=True)


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
