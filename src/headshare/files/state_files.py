"""State files: bytes, JSON and tensors that end with a digest of what stands before it."""

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from urllib.parse import quote, unquote

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from headshare.errors import CalibrationError
from headshare.files.atomic import write_whole

_TENSORS = ".safetensors"
_DIGEST_BYTES = hashlib.sha256().digest_size


def damaged(path: Path, reason: str) -> CalibrationError:
    """The error of a state that cannot be gone on from."""
    return CalibrationError(
        f"the state of the run that was stopped is damaged: {path}: {reason.splitlines()[0].rstrip('.')}. "
        "Pass --restart to throw it away and begin anew."
    )


def write_state(path: Path, data: bytes) -> None:
    """Write bytes whole or not at all, with their digest behind them."""
    write_whole(path, data + hashlib.sha256(data).digest())


def read_state(path: Path) -> bytes | None:
    """The bytes of such a file; None if it is not there.

    Raises:
        CalibrationError: if they are not as they were written.
    """
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file with its digest behind it."""
    write_state(path, save({key: value.contiguous() for key, value in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of such a file; None if it is not there.

    Raises:
        CalibrationError: if the file is damaged.
    """
    data = read_state(path)
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
        found = read_tensors(self._path(name))
        if found is None:
            raise KeyError(name)
        return found["tensor"]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        write_tensors(self._path(name), {"tensor": tensor})

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
