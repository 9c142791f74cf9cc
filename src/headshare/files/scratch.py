"""Temporary files and folders: locked by their maker while it lives, found and removed by the next once it is dead.

Whatever is made for a time is made here. A lock goes with its process, however that ends, so that what nobody has
locked is what a killed run left behind.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from headshare.files.lock import inode_of, locked

PREFIX = ".headshare-partial-"


@contextmanager
def scratch_folder(parent: Path, prefix: str = PREFIX, *, mode: int = 0o777) -> Iterator[Path]:
    """A new folder within this block, whose name begins with the prefix. It is removed, unless it was moved away.

    Others of this prefix whose makers are dead are removed before.
    """
    with _made(parent, prefix, lambda path: path.mkdir(mode)) as folder:
        yield folder


@contextmanager
def scratch_file(parent: Path) -> Iterator[Path]:
    """A new file within this block, as `scratch_folder`."""
    with _made(parent, PREFIX, lambda path: path.touch(0o666, exist_ok=False)) as file:
        yield file


@contextmanager
def _made(parent: Path, prefix: str, make: Callable[[Path], None]) -> Iterator[Path]:
    remove_dead(parent, prefix)
    with ExitStack() as held:
        while True:
            path = parent / f"{prefix}{secrets.token_hex(8)}"
            held.callback(_remove, path)
            make(path)
            try:
                descriptor = held.enter_context(locked(path))
            except FileNotFoundError:
                descriptor = -1
            except OSError:  # the file system has no locks, so nobody takes it for one that was left behind
                break
            # before it was locked, another run could
            if (inode := inode_of(descriptor)) and inode == inode_of(path):
                break
            held.close()
        yield path


def remove_dead(parent: Path, prefix: str = PREFIX) -> None:
    """Remove what killed runs of this user left in a folder under this prefix: all that nobody has locked."""
    with suppress(OSError), os.scandir(parent) as entries:
        for path in [Path(entry.path) for entry in entries if entry.name.startswith(prefix)]:
            with suppress(OSError):
                status = path.lstat()
                plain = stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
                if plain and status.st_uid == _user(status):
                    with locked(path, wait=False):
                        _remove(path)


def _user(status: os.stat_result) -> int:
    """The number of this user. Windows has none, and no locks by which to tell what is dead either."""
    return os.geteuid() if hasattr(os, "geteuid") else status.st_uid


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
