"""State files: bytes, JSON and tensors, each written whole or not at all and followed by a digest of its bytes."""

import hashlib
import json
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from safetensors.torch import load, save
from torch import Tensor

from headshare.errors import HeadshareError
from headshare.files.atomic import write_whole
from headshare.files.untrusted import foreign

_TENSORS = ".safetensors"
_DIGEST_BYTES = hashlib.sha256().digest_size
_TO_DO = "Pass --restart to throw it away and begin anew."


class Workspace:
    """The state files of a run, in one folder. A damaged file is refused with an error of the kind `refused`."""

    def __init__(self, folder: Path, refused: type[HeadshareError]) -> None:
        self.folder = folder
        self.refused = refused

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        write_whole(self.folder / name, data + hashlib.sha256(data).digest())

    def read(self, name: str) -> bytes | None:
        """The checked bytes of a file; None if it is not there.

        Raises:
            HeadshareError: of the kind `refused`, if they are not as they were written.
        """
        path = self.folder / name
        try:
            if not path.is_file():
                return None
            with path.open("rb") as file:
                data = file.read(max(path.stat().st_size - _DIGEST_BYTES, 0))
                digest = file.read()
        except OSError as error:
            raise self.damaged(name, error.strerror or str(error)) from None
        if hashlib.sha256(data).digest() != digest:
            raise self.damaged(name, "its bytes are not those that were written")
        return data

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON object as a file."""
        self.write(name, json.dumps(data).encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object of a file; None if it is not there."""
        data = self.read(name)
        with self._parsing(name):
            content = None if data is None else json.loads(data)
        if not isinstance(content, dict | None):
            raise self.damaged(name, "it holds no JSON object")
        return content

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as one safetensors file."""
        self.write(name, save({key: value.contiguous() for key, value in tensors.items()}))

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a safetensors file; None if it is not there."""
        data = self.read(name)
        with self._parsing(name):
            return None if data is None else load(data)

    def tensors(self, name: str) -> "FolderTensors":
        """The tensors of a subfolder that holds one tensor a file."""
        return FolderTensors(Workspace(self.folder / name, self.refused))

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def damaged(self, name: str, reason: str) -> HeadshareError:
        """The error for a damaged file, to be raised."""
        return self.refused(f"{self._is_damaged(name)}: {reason.splitlines()[0].rstrip('.')}. {_TO_DO}")

    def _parsing(self, name: str) -> AbstractContextManager[None]:
        """The door to a parser with the bytes of a file, whose digest anybody can write."""
        return foreign(self._is_damaged(name), self.refused, _TO_DO)

    def _is_damaged(self, name: str) -> str:
        return f"the state of the run that was stopped is damaged: {self.folder / name}"


class FolderTensors(MutableMapping[str, Tensor]):
    """Tensors by name, each in a file of its own that is read when asked for.

    So there can be more tensors than memory holds. A name is quoted in its file's name, so that no file lies outside
    the folder.
    """

    def __init__(self, files: Workspace) -> None:
        self._files = files
        files.folder.mkdir(exist_ok=True)

    def __getitem__(self, name: str) -> Tensor:
        tensors = self._files.read_tensors(_file_of(name))
        if tensors is None:
            raise KeyError(name)
        return tensors["tensor"]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._files.write_tensors(_file_of(name), {"tensor": tensor})

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._files.delete(_file_of(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._files.folder / _file_of(name)).is_file()

    def __iter__(self) -> Iterator[str]:
        files = self._files.folder.glob(f"*{_TENSORS}")
        return iter(sorted(unquote(path.name.removesuffix(_TENSORS)) for path in files))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _file_of(name: str) -> str:
    return f"{quote(name, safe='')}{_TENSORS}"


def check_readable(saved: Mapping[Any, object]) -> None:
    """Read all saved values once, so that damage is found before hours of work and not after."""
    for _ in saved.values():
        pass


def key_of(*what: Any) -> str:
    """The key of a state or a result: a digest of all that it depends on, in this order."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
