"""Locks of files and folders, which only one process at a time can hold."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from headshare.errors import OutputError
from headshare.files.failures import explain

# Windows opens no folders, and what is locked there its own maker cannot write by another handle. So nothing is locked,
# and two runs on one output do not notice each other.
HAS_LOCKS = os.name != "nt"

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def inode_of(place: Path | int) -> str:
    """The device and the inode of a path or an open file; empty where nothing is.

    They differ once something else is put in its place.
    """
    try:
        status = os.stat(place)  # noqa: PTH116 - it takes descriptors too
    except OSError:
        return ""
    return f"{status.st_dev}:{status.st_ino}"


@contextmanager
def locked(place: Path, *, wait: bool = True) -> Iterator[int]:
    """The open descriptor of a file or folder that no other process has locked within this block.

    Raises:
        BlockingIOError: if another process has locked it, and this one does not wait.
        OSError: if it cannot be opened, or its file system has no locks.
    """
    if not HAS_LOCKS:
        raise OSError(errno.ENOLCK, "this system has no locks", str(place))
    from filelock import lock_descriptor  # only where something is locked: it takes long to import

    # A FileLock would be a file of its own beside each folder, which a killed run leaves behind. A lock on the folder
    # itself stays with it when it is renamed, and goes with its process.
    descriptor = os.open(place, _FLAGS)
    try:
        if not lock_descriptor(descriptor, blocking=wait):
            raise BlockingIOError(errno.EAGAIN, "another process has locked it", str(place))
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A folder that this process alone works in within this block, made if it is not there.

    Raises:
        OutputError: if it cannot be made or locked, or another process works in it.
    """
    if not HAS_LOCKS:
        folder.mkdir(exist_ok=True)
        yield
        return
    with ExitStack() as lock:
        # once locked, the folder must still be the one at this path
        while True:
            try:
                folder.mkdir(exist_ok=True)
                descriptor = lock.enter_context(locked(folder, wait=False))
            except BlockingIOError:
                raise OutputError(
                    f"another run is working on the same output, with its state in {folder}. Wait for it, or choose "
                    "another output."
                ) from None
            except OSError as error:
                raise OutputError(explain(error, folder)) from None
            if inode_of(folder) == inode_of(descriptor):
                break
            lock.close()  # the run that had the folder ended and removed it after it was opened here
        yield
