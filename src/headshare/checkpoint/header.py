"""Headers of safetensors files: names, types, shapes and places of tensors, all of it checked."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headshare.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 16

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu


@dataclass(frozen=True)
class TensorInfo:
    """The entry of a stored tensor in a file's header: its type, its shape and the place of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of its numbers in torch."""
        return DTYPES[self.dtype]


def read_header(path: Path) -> list[TensorInfo]:
    """The entries of one safetensors file, in the order of their bytes, checked against the file's size.

    Raises:
        CheckpointError: if the header is damaged, or the file is shorter or longer than it says.
    """
    # the header's length is checked before so many bytes are read
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path} is not a whole safetensors file ({size} bytes). Download it again.")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        _check_metadata(header.get("__metadata__"))
        infos = [
            _tensor_info(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error}). Download it again.") from None
    # tensors fill the file without holes or overlaps, so that no byte is read as part of two
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = 8 + length
    for info in infos:
        if info.offset != end:
            raise CheckpointError(
                f"{path}: {info.name} begins at byte {info.offset}, expected {end}. The header is damaged."
            )
        end += info.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} is {size} bytes, but its header describes {end}. It is truncated or damaged; download it again."
        )
    return infos


def check_type(dtype: Any, name: str, where: str) -> None:
    """Refuse a tensor of a type that is not read here. The format has types of less than a byte, and may get more.

    Raises:
        CheckpointError: naming the tensor and the type.
        ValueError: if that is no name of a type.
    """
    if not isinstance(dtype, str) or not dtype.replace("_", "").isalnum():
        raise ValueError(f"{name} has dtype {dtype!r:.60}")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{where} stores {name} as {dtype:.60}, a type that headshare does not read. Save the model in one of "
            f"{', '.join(DTYPES)}."
        )


def _check_metadata(metadata: Any) -> None:
    pairs = {} if metadata is None else dict(metadata)
    if not all(isinstance(text, str) for pair in pairs.items() for text in pair):
        raise ValueError("its metadata is not a map of strings")


def _tensor_info(path: Path, name: str, entry: dict[str, Any], base: int) -> TensorInfo:
    dtype = entry["dtype"]
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    name.encode()  # fails for a lone surrogate, which cannot be written again
    check_type(dtype, name, str(path))
    if len(shape) > MAX_RANK:
        raise ValueError(f"{name} has {len(shape)} dimensions")
    if not all(type(number) is int and 0 <= number < 2**48 for number in (*shape, start, stop)):
        raise ValueError(f"{name} has shape {shape} at {start}:{stop}")
    count = 1
    for number in shape:
        count *= number
    if stop - start != count * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has {stop - start} bytes for shape {shape} of {dtype}")
    return TensorInfo(name=name, dtype=dtype, shape=shape, file=path.name, offset=base + start, nbytes=stop - start)
