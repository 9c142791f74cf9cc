"""What a long calibration has done so far, in a folder: killed at any moment, the next run goes on from there.

Every file is written whole or not at all. A folder made for another model, text or plan is refused, not used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from headshare.checkpoints import Checkpoint, read_json
from headshare.errors import CalibrationError, CheckpointError, OutputError
from headshare.files import explain, write_whole

_WHAT = "what.json"


class Workspace:
    """A folder with the state of one calibrated run. `what` says, by name, what it belongs to.

    Raises:
        CalibrationError: if the folder is of a run that differs in any of these; it names which.
        OutputError: if it cannot be made.
    """

    def __init__(self, folder: Path, what: Mapping[str, str], *, restart: bool = False) -> None:
        self.folder = folder
        if restart:
            self.remove()
        if folder.is_dir():
            self._check(what)
            return
        try:
            folder.mkdir()
        except OSError as error:
            raise OutputError(explain(error, folder)) from None
        self.write(_WHAT, json.dumps(dict(what), indent=1).encode())

    def _check(self, what: Mapping[str, str]) -> None:
        try:
            found = read_json(self.folder / _WHAT)
        except CheckpointError:
            found = {}
        changed = [name for name in what if found.get(name) != what[name]]
        if changed:
            raise CalibrationError(
                f"{self.folder} holds the state of a run that was stopped, with another {', '.join(changed)}. "
                "Run that again to finish it, or pass --restart to throw its state away."
            )

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        write_whole(self.folder / name, data)

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if it is not there."""
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as one safetensors file, whole or not at all."""
        self.write(name, save({key: value.contiguous() for key, value in tensors.items()}))

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of such a file; None if it is not there."""
        path = self.folder / name
        return load_file(path) if path.is_file() else None

    def tensors(self, name: str) -> "FolderTensors":
        """A subfolder that holds one tensor a file."""
        return FolderTensors(self.folder / name)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Throw the state away: the run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


class FolderTensors(MutableMapping[str, Tensor]):
    """Tensors by name, each a file of its own, read when asked for; so many may be held that do not fit in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def __getitem__(self, name: str) -> Tensor:
        if not self._path(name).is_file():
            raise KeyError(name)
        return load_file(self._path(name))["tensor"]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        write_whole(self._path(name), save({"tensor": tensor.contiguous()}))

    def __delitem__(self, name: str) -> None:
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.name.removesuffix(".safetensors") for path in self._folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells one checkpoint from another without reading its weights: names, shapes, and the files' sizes and times."""
    found = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        found.update(f"{name} {info.dtype} {info.shape} {info.file}\n".encode())
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        status = os.stat(checkpoint.path / file)  # noqa: PTH116 - a path that is certainly there
        found.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return found.hexdigest()
