"""The contents of a folder, and a check that they stay."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS, INDEX, MANIFEST = "model.safetensors", "model.safetensors.index.json", "headshare.json"


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below, and the kind of everything else, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"link to {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path.relative_to(folder))] = "folder"
    return found


def numbers(path: Path) -> bytes:
    """A safetensors file less its header: the tensors' numbers, in order."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def unseal(folder: Path) -> None:
    """Take the plan's digest out of the weights, as whoever writes another plan may do."""
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})


def left_behind(parent: Path) -> list[str]:
    """Hidden names in a folder: what a run that failed may not leave, and a run that was killed leaves for the next."""
    return sorted(path.name for path in parent.iterdir() if path.name.startswith("."))


@contextmanager
def nothing_changes(folder: Path) -> Iterator[None]:
    """Fail if a file below is other than before, or was only written anew."""
    before = contents(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    yield
    assert before == (contents(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()})


def seen(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of everything below."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}
