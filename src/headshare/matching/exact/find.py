"""The search for whole tensors that a checkpoint holds several times, by digests that are confirmed byte by byte.

Tensors are read once each, in slices, and only where another has the same type and shape. Equal digests are taken for
nothing: the bytes are compared.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from blake3 import blake3
from torch import Tensor

from headshare.architecture.families import INPUT_EMBEDDINGS, TIED_OUTPUTS
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import TensorInfo
from headshare.progress import track
from headshare.sharing.assembly import SLICE_BYTES
from headshare.sharing.size import parameter_infos
from headshare.sharing.writer import same_tensors

# what is read at once of each tensor
PIECE_BYTES = SLICE_BYTES


class Place(NamedTuple):
    """The place of a tensor's bytes: its file and the offset there."""

    file: str
    offset: int


def identical_tensors(checkpoint: Checkpoint) -> list[list[str]]:
    """Names of the parameters that are the same whole tensor, bit for bit, the first of each in the model's order.

    Tensors that are one place of a file, as those of repeated layers, are the same without being read.

    Raises:
        CheckpointError: if a file ends early or cannot be read.
    """
    alike = _alike(checkpoint)
    to_read = [info for infos in alike for info in _distinct(infos)]
    reading = track(to_read, "looking for what stands twice", len(to_read))
    digests = {Place(info.file, info.offset): digest(checkpoint, info) for info in reading}
    found = [group for infos in alike for group in _grouped(checkpoint, infos, digests)]
    return sorted(found, key=lambda group: in_order(group[0]))


def bytes_to_read(checkpoint: Checkpoint) -> int:
    """The bytes of weights that the search reads, apart from comparisons of what it finds."""
    return sum(info.nbytes for infos in _alike(checkpoint) for info in _distinct(infos))


def digest(checkpoint: Checkpoint, info: TensorInfo) -> bytes:
    """The digest of a stored tensor's bytes, by BLAKE3."""
    total = blake3()
    for piece in pieces(checkpoint, info):
        total.update(piece.numpy().data)
    return total.digest()


def pieces(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[Tensor]:
    """The bytes of a stored tensor, piece by piece; each is valid until the next is asked for."""
    buffer = torch.empty(min(PIECE_BYTES, info.nbytes), dtype=torch.uint8)
    for start in range(0, info.nbytes, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, info.nbytes - start)]
        checkpoint.read_into(piece.numpy().data, info, start)
        yield piece


def in_order(name: str) -> tuple[object, ...]:
    """A key that sorts tensors as a model uses them: the embedding, layers by their numbers, the head."""
    words = re.split(r"(\d+)", name)
    natural = tuple((0, int(word), "") if word.isdigit() else (1, 0, word) for word in words)
    return (not name.endswith(INPUT_EMBEDDINGS), name in TIED_OUTPUTS, natural)


def _alike(checkpoint: Checkpoint) -> list[list[TensorInfo]]:
    """Parameters of one type and shape, wherever there are several, in the model's order."""
    alike: dict[tuple[str, tuple[int, ...]], list[TensorInfo]] = {}
    for info in sorted(parameter_infos(checkpoint).values(), key=lambda info: in_order(info.name)):
        if info.shape and info.nbytes:
            alike.setdefault((info.dtype, info.shape), []).append(info)
    return [infos for infos in alike.values() if len(infos) > 1]


def _distinct(infos: Iterable[TensorInfo]) -> list[TensorInfo]:
    """One tensor for each place, where there are several places."""
    places = {Place(info.file, info.offset): info for info in infos}
    return list(places.values()) if len(places) > 1 else []


def _grouped(checkpoint: Checkpoint, infos: list[TensorInfo], digests: Mapping[Place, bytes]) -> list[list[str]]:
    """Names of those of these tensors that are equal, whatever their digests say."""
    groups: dict[bytes, list[list[TensorInfo]]] = {}
    for info in infos:
        known = groups.setdefault(digests.get(Place(info.file, info.offset), b""), [])
        mine = next((group for group in known if same_tensors(checkpoint, group[0].name, info.name)), None)
        if mine is None:
            known.append([info])
        else:
            mine.append(info)
    return [[info.name for info in group] for known in groups.values() for group in known if len(group) > 1]
