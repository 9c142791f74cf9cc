"""Locks: one process at a time works on a folder."""

import fcntl
import os
from pathlib import Path

from headshare.errors import OutputError
from headshare.files.atomic import explain


def identity_of(path: Path) -> str:
    """Tells what is at a path from what is put there in its place."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_dev}:{status.st_ino}"


def locked(folder: Path) -> int:
    """The folder, made if it is not there, opened and locked.

    Raises:
        OutputError: if it cannot be made, or another run has locked it.
    """
    while True:
        try:
            folder.mkdir(exist_ok=True)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise OutputError(explain(error, folder)) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise OutputError(
                f"another run is working on the same output, with its state in {folder}. Wait for it, or choose "
                "another output."
            ) from None
        if identity_of(folder) == _identity_of(lock):
            return lock
        os.close(lock)  # its run ended and removed it meanwhile


def _identity_of(descriptor: int) -> str:
    status = os.fstat(descriptor)
    return f"{status.st_dev}:{status.st_ino}"
