"""Files that stay what they were when they were opened: one that was replaced or changed since is refused, not read."""

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from headshare.errors import CheckpointError
from headshare.files.atomic import read_at


class Stamp(NamedTuple):
    """The identity of a file's content: it differs once another file is in its place, or it was written to."""

    device: int
    inode: int
    size: int
    changed_ns: int


def stamp_of(place: Path | int) -> Stamp | None:
    """The stamp of a path or of an open file; None where nothing is."""
    try:
        status = os.stat(place)  # noqa: PTH116 - it takes descriptors too
    except OSError:
        return None
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class OpenedFiles:
    """The files of a folder, opened when they are first read and closed when nothing refers to this object any more.

    `stamps` are those of the files when their headers were read. A file without one is not checked.
    """

    def __init__(self, folder: Path, stamps: Mapping[str, Stamp | None]) -> None:
        self._folder = folder
        self._stamps = stamps
        self._descriptors: dict[str, int] = {}
        self._opening = Lock()
        weakref.finalize(self, _close_all, self._descriptors)

    def read_into(self, buffer: memoryview, file: str, offset: int, what: str) -> None:
        """Fill the buffer with a file's bytes from `offset` on.

        Raises:
            CheckpointError: if the file cannot be read, ends before, or is not what it was. `what` is what is read.
        """
        descriptor = self._open(file)
        try:
            filled = read_at(descriptor, buffer, offset)
        except OSError as error:
            raise CheckpointError(f"{self._folder / file} cannot be read at {what}: {error.strerror}.") from None
        # looked at after reading, so that what was written to meanwhile is not taken for good
        self._check(file, descriptor)
        if not filled:
            raise CheckpointError(f"{self._folder / file} ends inside {what}: it is shorter than its header says.")

    def check_unchanged(self) -> None:
        """Check that all stamped files are still in their places, and the same.

        Raises:
            CheckpointError: naming one that is not.
        """
        for file in self._stamps:
            self._check(file, self._folder / file)

    def _check(self, file: str, place: Path | int) -> None:
        if file in self._stamps and stamp_of(place) != self._stamps[file]:
            raise CheckpointError(
                f"{self._folder / file} was replaced or changed while it was in use, so that what was read of it does "
                "not fit together. Let the other program finish, and run again."
            )

    def _open(self, file: str) -> int:
        with self._opening:
            if file not in self._descriptors:
                try:
                    descriptor = os.open(self._folder / file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{self._folder / file} cannot be read: {error.strerror}.") from None
                self._descriptors[file] = descriptor
            return self._descriptors[file]

    def close(self) -> None:
        """Close the files. Reading again opens them again."""
        with self._opening:
            _close_all(self._descriptors)


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
