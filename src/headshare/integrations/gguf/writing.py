"""Writing of a GGUF file: whole or not at all, one tensor in memory at a time, and read back when it is done."""

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from headshare.errors import CheckpointError, OptionError, OutputError
from headshare.files.atomic import whole_file
from headshare.installing import install
from headshare.integrations.gguf.contents import FileTensor
from headshare.integrations.gguf.number_types import WHOLE_NUMBERS, NumberType
from headshare.integrations.gguf.rounding import in_blocks, rounded
from headshare.progress import track

if TYPE_CHECKING:
    from gguf import GGUFWriter
else:
    GGUFWriter = Any  # the package is not needed before a file is written

MAGIC = b"GGUF"
# tensors begin at multiples of this many bytes
_ALIGNMENT = 32
_AT_ONCE = 2**22
# half of a character, which no text in UTF-8 holds
_HALF = re.compile(r"[\ud800-\udfff]")

Placed = tuple[FileTensor, NumberType]


def check_installed() -> None:
    """Check that the package which writes the format is there.

    Raises:
        OptionError: with the command that installs it.
    """
    try:
        import gguf  # noqa: F401 - it is only looked for
    except ImportError:
        raise OptionError(
            f"GGUF is written by the gguf package, which is not installed. Run: {install('gguf')}"
        ) from None


def check_file(path: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a place for a file that is inside the model, or taken by something that may not be overwritten.

    Raises:
        OutputError: saying which, and what to do.
    """
    place = Path(os.path.realpath(path))
    if Path(os.path.realpath(source)) in place.parents:
        raise OutputError(f"the output {path} is inside the model {source}. Choose a place outside it.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {path.absolute().parent} to write {path.name} in. Make it first.")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputError(f"{path} exists. Choose another name, or pass --overwrite to replace it.")
    if not path.is_file() or path.is_symlink() or _beginning(path) != MAGIC:
        raise OutputError(f"{path} is not a GGUF file, so --overwrite does not replace it.")


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


def write_file(path: Path, keys: Mapping[str, Any], tensors: Sequence[Placed]) -> int:
    """Write a file of these keys and tensors, whole or not at all, and return its size in bytes.

    Raises:
        OutputError: if there is no room, it cannot be written, or it is not what was written when it is read back.
        CheckpointError: if a tensor cannot be read, or its numbers are not finite in the file's type.
    """
    _check_keys(keys)
    needed = sum(_padded(kind.size_of(each.numbers)) for each, kind in tensors)
    free = shutil.disk_usage(path.absolute().parent).free
    if free < needed:
        raise OutputError(
            f"{path.absolute().parent} has {free:,} bytes free; the file needs {needed:,}. Free some, or write "
            "elsewhere."
        )
    with whole_file(path) as temporary:
        writer = _begun(temporary, keys, tensors)
        try:
            digests = [_write_tensor(writer, *placed) for placed in track(tensors, "tensors", len(tensors))]
        finally:
            writer.close()
        size = temporary.stat().st_size
        start = size - needed
        if start % _ALIGNMENT or list(_read_back(temporary, start, tensors)) != digests:
            raise OutputError(f"{path} is not what was written when it is read back. Check the disk, and run again.")
    return size


def _check_keys(keys: Mapping[str, Any]) -> None:
    """Refuse values that the format has no place for: strangers wrote them.

    Raises:
        CheckpointError: naming the first.
    """
    for key, value in keys.items():
        most = 2**31 if isinstance(value, list) else 2**32
        for each in value if isinstance(value, list) else (value,):
            if not _has_place(each, most):
                raise CheckpointError(f"{key} would be {each!r:.60}, for which a GGUF file has no place.")


def _has_place(value: bool | int | float | str, most: int) -> bool:
    if isinstance(value, str):
        return value.isascii() or not _HALF.search(value)
    return 0 <= value < most if type(value) is int else math.isfinite(value)


def _begun(path: Path, keys: Mapping[str, Any], tensors: Sequence[Placed]) -> GGUFWriter:
    """A writer that has written all that comes before the tensors' numbers."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    for key, value in keys.items():
        if key != "general.architecture":  # which it writes by itself
            writer.add_key_value(key, value, _value_type(value))
    for tensor, kind in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),  # not looked at where the type in the file is given
            kind.size_of(tensor.numbers),
            raw_dtype=gguf.GGMLQuantizationType[kind.name.upper()],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _value_type(value: Any) -> Any:
    from gguf import GGUFValueType

    if isinstance(value, list):
        return GGUFValueType.ARRAY
    plain = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    return plain.get(type(value), GGUFValueType.STRING)


def _write_tensor(writer: GGUFWriter, tensor: FileTensor, kind: NumberType) -> bytes:
    """Round a tensor, write it, and return the digest of its bytes."""
    if kind is WHOLE_NUMBERS and tensor.in_rows is not None:
        whole, scale = tensor.in_rows()
        assert tuple(whole.shape) == tensor.shape
        stored = in_blocks(whole.numpy(), scale.to(torch.float32).numpy())
    else:
        numbers = tensor.read()
        assert tuple(numbers.shape) == tensor.shape
        stored = rounded(numbers.to(torch.float32).numpy(), kind, tensor.source)
    writer.write_tensor_data(stored)
    return blake3(stored.view("uint8").data).digest()


def _read_back(path: Path, start: int, tensors: Sequence[Placed]) -> Iterator[bytes]:
    """The digests of the tensors' bytes, as they lie in a file from `start` on."""
    with path.open("rb") as file:
        file.seek(start)
        for tensor, kind in tensors:
            left = size = kind.size_of(tensor.numbers)
            digest = blake3()
            while left and (data := file.read(min(left, _AT_ONCE))):
                digest.update(data)
                left -= len(data)
            file.seek(_padded(size) - size, os.SEEK_CUR)
            yield digest.digest()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
