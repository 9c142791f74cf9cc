"""What a long calibration has done so far, in a folder: killed at any moment, the next run goes on from there.

Every file is written whole or not at all and ends with the SHA-256 of the rest; a damaged one is refused. One run at a
time works in a folder, which it locks. A folder made for another model, text or setting is refused, not used.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from headshare.calibration.costs.curves import Path as PricedPath
from headshare.calibration.costs.curves import paths_from_json, paths_to_json
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CalibrationError, OutputError, PlanError
from headshare.files.atomic import explain, flush_folder, write_whole

NAME_BYTES = 100
_BESIDE = (".json", ".model", ".tiktoken", ".txt")
_WHAT = "what.json"
_WRITING = "writing.json"
_TENSORS = ".safetensors"
_PARTIAL = ".headshare-partial-*"
_DIGEST_BYTES = hashlib.sha256().digest_size


class Workspace:
    """A folder with the state of one calibrated run, locked until it is closed. `what` says what it belongs to; without
    it, the state is looked at and not taken up.

    Raises:
        CalibrationError: if the folder is of a run that differs in any of these (it names which), or is damaged.
        OutputError: if it cannot be made, or another run is working in it.
    """

    def __init__(self, folder: Path, what: Mapping[str, str] | None = None, *, restart: bool = False) -> None:
        self.folder = folder
        self._lock = locked(folder)
        try:
            if restart:
                self._empty()
            if what is not None:
                self._begin(what)
        except BaseException:
            self.close()
            raise

    def _begin(self, what: Mapping[str, str]) -> None:
        """Take up what is there; `what` is the first file of a state and the last to stay, so without it all goes."""
        found = self.read_json(_WHAT)
        if found is None:
            self._empty()
            self.write_json(_WHAT, dict(what))
            return
        changed = [name for name in {**found, **what} if found.get(name) != what.get(name)]
        if changed:
            raise CalibrationError(
                f"{self.folder} holds the state of a run with another {', '.join(changed)}. "
                "Run that one again to go on with it, or pass --restart to throw its state away."
            )
        for partial in self.folder.rglob(_PARTIAL):
            partial.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        _write(self.folder / name, data)

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if it is not there.

        Raises:
            CalibrationError: if they are not as they were written.
        """
        return _read(self.folder / name)

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON object."""
        self.write(name, json.dumps(data).encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None if it is not there."""
        data = self.read(name)
        try:
            found = None if data is None else json.loads(data)
        except ValueError as error:
            raise damaged(self.folder / name, str(error)) from None
        if not isinstance(found, dict | None):
            raise damaged(self.folder / name, "it holds no JSON object")
        return found

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as one safetensors file, whole or not at all."""
        _write_tensors(self.folder / name, tensors)

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of such a file; None if it is not there."""
        return _read_tensors(self.folder / name)

    def tensors(self, name: str) -> "FolderTensors":
        """A subfolder that holds one tensor a file."""
        return FolderTensors(self.folder / name)

    def paths(self, key: str) -> "SavedPaths":
        """The paths of the layers that were priced under this key."""
        return SavedPaths(self, key)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def note_writing(self, out: Path) -> None:
        """Note that all is done but to put this output in its place; `settle` then tells whether it came there."""
        self.write_json(_WRITING, {"before": identity_of(out)})

    def remove(self) -> None:
        """Throw the state away: the run is done."""
        self._empty()
        with suppress(OSError):
            self.folder.rmdir()

    def _empty(self) -> None:
        """Remove all that is in the folder, first what would make the rest look like a state."""
        self.delete(_WHAT)
        flush_folder(self.folder)
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let other runs in. A state in which nothing was done yet is not kept."""
        files = {path.name for path in self.folder.rglob("*") if path.is_file()}
        if files == {_WHAT}:
            self.remove()
        os.close(self._lock)


@contextmanager
def workspace(folder: Path, what: Mapping[str, str], *, restart: bool = False) -> Iterator[Workspace]:
    """A workspace that is removed when the block ends, and kept for the next run when the block fails.

    Raises:
        CalibrationError, OutputError: as `Workspace` does.
    """
    work = Workspace(folder, what, restart=restart)
    try:
        yield work
        work.remove()
    finally:
        work.close()


def workspace_of(out: Path, what: str = "calibrating") -> Path:
    """Where the state of a calibrated run to this output, or of another kind of run, is kept until it is done."""
    place = out.absolute()
    raw = os.fsencode(place.name)
    name = place.name
    if len(raw) > NAME_BYTES:  # a name can be too long with more added to it
        name = f"{os.fsdecode(raw[:NAME_BYTES])}-{hashlib.sha256(raw).hexdigest()[:16]}"
    return place.parent / f".{name}.headshare-{what}"


def settle(out: Path) -> dict[str, Any] | None:
    """Throw away the state of a run that was stopped after its output was in place, and say what it belonged to; None,
    and nothing happens, where there is no such state.

    Raises:
        OutputError: if another run is working in it.
    """
    folder = workspace_of(out)
    if not folder.is_dir():
        return None
    try:
        work = Workspace(folder)
    except CalibrationError:  # whoever takes the state up says so
        return None
    try:
        what, writing = work.read_json(_WHAT), work.read_json(_WRITING)
        if what is not None and (writing is None or identity_of(out) in ("", writing.get("before"))):
            return None
        work.remove()
    except CalibrationError:
        return None
    finally:
        work.close()
    return what


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


def damaged(path: Path, reason: str) -> CalibrationError:
    """The error of a state that cannot be gone on from."""
    return CalibrationError(
        f"the state of the run that was stopped is damaged: {path}: {reason.splitlines()[0].rstrip('.')}. "
        "Pass --restart to throw it away and begin anew."
    )


def _write(path: Path, data: bytes) -> None:
    write_whole(path, data + hashlib.sha256(data).digest())


def _read(path: Path) -> bytes | None:
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            data = file.read(max(path.stat().st_size - _DIGEST_BYTES, 0))
            digest = file.read()
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from None
    if hashlib.sha256(data).digest() != digest:
        raise damaged(path, "its bytes are not those that were written")
    return data


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    _write(path, save({key: value.contiguous() for key, value in tensors.items()}))


def _read_tensors(path: Path) -> dict[str, Tensor] | None:
    data = _read(path)
    try:
        return None if data is None else load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise damaged(path, str(error)) from None


class FolderTensors(MutableMapping[str, Tensor]):
    """Tensors by name, each a file of its own, read when asked for; so many may be held that do not fit in memory.

    A name is quoted in its file's name, so that none reaches outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{quote(name, safe='')}{_TENSORS}"

    def __getitem__(self, name: str) -> Tensor:
        found = _read_tensors(self._path(name))
        if found is None:
            raise KeyError(name)
        return found["tensor"]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        _write_tensors(self._path(name), {"tensor": tensor})

    def __delitem__(self, name: str) -> None:
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            raise KeyError(name) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._path(name).is_file()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(unquote(path.name.removesuffix(_TENSORS)) for path in self._folder.glob(f"*{_TENSORS}")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class SavedPaths(MutableMapping[int, list[PricedPath]]):
    """The paths of the layers priced so far, a file each."""

    def __init__(self, work: Workspace, key: str) -> None:
        self._work, self._prefix = work, f"prices-{key}-"

    def _file(self, layer: int) -> str:
        return f"{self._prefix}{layer}.json"

    def __getitem__(self, layer: int) -> list[PricedPath]:
        saved = self._work.read(self._file(layer))
        if saved is None:
            raise KeyError(layer)
        try:
            return paths_from_json(saved)
        except PlanError as error:
            raise damaged(self._work.folder / self._file(layer), str(error)) from None

    def __setitem__(self, layer: int, given: list[PricedPath]) -> None:
        self._work.write(self._file(layer), paths_to_json(given).encode())

    def __delitem__(self, layer: int) -> None:
        self._work.delete(self._file(layer))

    def __iter__(self) -> Iterator[int]:
        names = (path.name for path in self._work.folder.glob(f"{self._prefix}*.json"))
        return iter(sorted(int(name.removeprefix(self._prefix).removesuffix(".json")) for name in names))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells one checkpoint from another without reading its weights: names, shapes, and the sizes and times of its
    files, the tokenizer's and the generation settings too."""
    found = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        found.update(f"{name} {info.dtype} {info.shape} {info.file}\n".encode())
    beside = (path.name for path in checkpoint.path.iterdir() if path.suffix in _BESIDE and path.is_file())
    for file in sorted({info.file for info in checkpoint.tensors.values()} | (set(beside) - {"config.json"})):
        status = os.stat(checkpoint.path / file)  # noqa: PTH116 - a path that is certainly there
        found.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return found.hexdigest()
