"""Headers of safetensors files: names, types, shapes and places of tensors, all of it checked."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from headshare.errors import CheckpointError
from headshare.files.printable import is_shown
from headshare.files.untrusted import foreign, parse_json

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 16
# the largest mixtures of experts, packed in 4 bits, have some 200,000; an entry has 8 to 10 values
MAX_TENSORS = 300_000
VALUES_OF_TENSOR = 10
# product of the dimensions of an empty tensor that are not 0: no file bounds it, and rows are counted in loops
MAX_EMPTY = 2**31

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


# the types in which weights are stored
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """The entry of a stored tensor in a file's header: its type, its shape and the place of its bytes.

    A rounded matrix stands as one tensor, in the shape and the type that its numbers mean. `parts` are the tensors that
    it is stored as, and `nbytes` what those take.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    parts: "Parts | None" = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of its numbers in torch."""
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Parts:
    """The tensors that a rounded matrix is stored as: whole numbers, scales, and a guard of no numbers.

    Numbers have a row for each output, and `group` inputs of a row one scale (None: all). With `in_out` the matrix that
    they mean is stored the other way round, (input, output).
    """

    numbers: TensorInfo
    scale: TensorInfo
    guard: TensorInfo
    bits: int
    group: int | None
    in_out: bool

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The entries of all of them."""
        return (self.numbers, self.scale, self.guard)


class Header(NamedTuple):
    """The header of a safetensors file: its tensors in the order of their bytes, and its metadata."""

    tensors: list[TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path) -> list[TensorInfo]:
    """The entries of one safetensors file, in the order of their bytes, checked against the file's size.

    Raises:
        CheckpointError: if the header is damaged, or the file is shorter or longer than it says.
    """
    return read_whole_header(path).tensors


def read_whole_header(path: Path) -> Header:
    """The header of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: as `read_header`.
    """
    # the header's length is checked before so many bytes are read
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path} is not a whole safetensors file ({size} bytes). Download it again.")
        raw = file.read(length)
    with foreign(f"{path} has a damaged header", CheckpointError, "Download it again."):
        header = parse_json(raw, f"the header of {path}", CheckpointError, VALUES_OF_TENSOR * MAX_TENSORS)
        metadata = _metadata(header.get("__metadata__"))
        infos = [
            tensor_info(path.name, name, entry, 8 + length, str(path))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    check_count(len(infos), path)
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
    return Header(infos, metadata)


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


def check_count(tensors: int, where: object) -> None:
    """Raise CheckpointError if there are more tensors than any model has; each costs time and memory, even if empty."""
    if tensors > MAX_TENSORS:
        raise CheckpointError(f"{where} has {tensors:,} tensors; at most {MAX_TENSORS:,} are read.")


def _metadata(stored: Any) -> Mapping[str, str]:
    pairs = {} if stored is None else dict(stored)
    if not all(isinstance(text, str) for pair in pairs.items() for text in pair):
        raise ValueError("its metadata is not a map of strings")
    return pairs


def tensor_info(file: str, name: str, entry: Mapping[str, Any], base: int, where: str) -> TensorInfo:
    """The checked entry of one tensor in the header of `file`, whose numbers begin at byte `base`.

    `where` is the file or the model, as errors name it.

    Raises:
        ValueError: or another exception, if it makes no sense.
    """
    dtype = entry["dtype"]
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not is_shown(name):  # half a character, besides, could not be written again
        raise ValueError(f"{name!a:.100} is too long for a name, or a terminal would act on it")
    check_type(dtype, name, where)
    if len(shape) > MAX_RANK:
        raise ValueError(f"{name} has {len(shape)} dimensions")
    if not all(type(number) is int and 0 <= number < 2**48 for number in (*shape, start, stop)):
        raise ValueError(f"{name} has shape {shape} at {start}:{stop}")
    count = math.prod(shape)
    if not count and math.prod(number or 1 for number in shape) > MAX_EMPTY:
        raise ValueError(f"{name} has no numbers in shape {shape}; its other dimensions are too large")
    if stop - start != count * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has {stop - start} bytes for shape {shape} of {dtype}")
    return TensorInfo(name=name, dtype=dtype, shape=shape, file=file, offset=base + start, nbytes=stop - start)
