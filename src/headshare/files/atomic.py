"""Put a file in place whole or not at all, knowing nothing of what is in it; and read YAML."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from headshare.errors import HeadshareError, OutputError


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file: a temporary sibling, flushed to disk, then renamed over whatever is there.

    Raises:
        OutputError: if it cannot be written; nothing is left behind, and what was there stays.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=".headshare-partial-", dir=path.absolute().parent)
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


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"*{event.anchor} is an alias; write out what it stands for",
                                       problem_mark=event.start_mark)  # fmt: skip
        return super().compose_node(parent, index)


def read_yaml(path: Path, refused: type[HeadshareError]) -> Any:
    """What a YAML file holds: plain data, no objects, and no aliases, a few of which can stand for more than fits in
    memory.

    Raises:
        HeadshareError: of this kind, if it cannot be read.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)  # noqa: S506 - a safe one
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise refused(f"{path} cannot be read as YAML: {' '.join(str(error).split()):.200}") from None


def explain(error: OSError, path: Path) -> str:
    """What went wrong with this output, for the person at the keyboard."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"there is no room left for {path} ({error.strerror}). Nothing was left behind; free some and run again."
    return f"{path!s:.300} could not be written: {error.strerror or error}."


def umask() -> int:
    """What new files may not allow. The system tells only by setting it."""
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
    """Fill the buffer with a file's bytes from `offset` on; False where the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            return False
        done += count
    return True
