"""What came of an export: the file, its bytes beside those of the dense model, and what could not be kept."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.integrations.gguf.hyperparameters import context_of
from headshare.integrations.gguf.number_types import NumberType, type_of
from headshare.integrations.gguf.shape import FileShape
from headshare.integrations.gguf.writing import Placed
from headshare.plan.ties import scale_name
from headshare.sharing.expanded import ExpandedTensors
from headshare.sharing.size import parameter_infos
from headshare.short import short


@dataclass(frozen=True)
class GivenBack:
    """Bytes of the file's tensors that the checkpoint does without and the file does not, by the reason.

    `ties`, `copies` and `low_rank` are written out, `narrow_values` filled up with zeros. `zeros` are units and neurons
    that llama.cpp, or the type's blocks, cannot go without.
    """

    ties: int = 0
    copies: int = 0
    low_rank: int = 0
    narrow_values: int = 0
    zeros: int = 0

    @property
    def all(self) -> int:
        """The bytes of all reasons."""
        return self.ties + self.copies + self.low_rank + self.narrow_values + self.zeros

    def in_words(self) -> str:
        """The reasons in words, with their bytes."""
        words = {
            "ties written out": self.ties,
            "copies written out": self.copies,
            "low-rank factors multiplied": self.low_rank,
            "narrow values filled up with zeros": self.narrow_values,
            "units or neurons of zeros": self.zeros,
        }
        return ", ".join(f"{why} {count:,}" for why, count in words.items() if count)


@dataclass(frozen=True)
class Exported:
    """A GGUF file that was written.

    `bytes` are all of the file's, `tensor_bytes` those of its tensors, and `dense_bytes` those that the dense model's
    tensors would have in this type. `notes` say in words what differs from the checkpoint.
    """

    out: Path
    architecture: str
    dtype: str
    layers: int
    bytes: int
    tensor_bytes: int
    dense_bytes: int
    given_back: GivenBack
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return short(self, self.out.name, self.architecture, self.dtype, f"{self.bytes:,} bytes")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON data, as `--json` prints them."""
        return {**asdict(self), "out": str(self.out), "notes": list(self.notes)}

    def in_words(self) -> str:
        """The export in a few lines."""
        less = 1 - self.tensor_bytes / self.dense_bytes
        beside = f"; the dense model's have {self.dense_bytes:,} ({less:.1%} less)" if less else ""
        lines = [f"{self.tensor_bytes:,} bytes of weights as {self.dtype}, architecture {self.architecture}{beside}"]
        if self.given_back.all:
            lines.append(f"{self.given_back.all:,} bytes are given back: {self.given_back.in_words()}")
        return "\n".join([*lines, *self.notes])


def exported(
    tensors: ExpandedTensors, shape: FileShape, placed: Sequence[Placed], wanted: NumberType, out: Path, size: int
) -> Exported:
    """The account of a file of these tensors, which has so many bytes."""
    checkpoint = tensors.checkpoint
    return Exported(
        out=out,
        architecture=shape.architecture.name,
        dtype=wanted.name,
        layers=len(shape.layers),
        bytes=size,
        tensor_bytes=sum(kind.size_of(tensor.numbers) for tensor, kind in placed),
        dense_bytes=_dense_bytes(tensors, placed, wanted),
        given_back=_given_back(tensors, placed),
        notes=tuple(_notes(checkpoint, shape, placed, wanted)),
    )


def _dense_bytes(tensors: ExpandedTensors, placed: Sequence[Placed], wanted: NumberType) -> int:
    reads_out = {tensor.source: tensor.reads_out for tensor, _ in placed}
    shapes = tensors.checkpoint.dense_shapes
    return sum(
        _bytes_in(
            shapes[name], type_of((wanted.block,) * len(shapes[name]), wanted, reads_out=reads_out.get(name, False))
        )
        for name in parameter_infos(tensors.checkpoint)
        if name in shapes
    )


def _bytes_in(shape: tuple[int, ...], kind: NumberType) -> int:
    """The bytes of a tensor whose rows are filled up to whole blocks."""
    return prod(shape[:-1]) * ceil(shape[-1] / kind.block) * kind.nbytes


def _given_back(tensors: ExpandedTensors, placed: Sequence[Placed]) -> GivenBack:
    found = dict.fromkeys(("ties", "copies", "low_rank", "narrow_values", "zeros"), 0.0)
    added = _added(tensors)
    for tensor, kind in placed:
        each = kind.nbytes / kind.block
        found["zeros"] += tensor.zeros * each
        plan = tensors.files.tensors.get(tensor.source)
        if plan is None:
            continue
        across = prod(plan.shape) // plan.size
        present = sum(stop - start for start, stop in plan.present()) * across
        found["narrow_values"] += (tensor.numbers - tensor.zeros - present) * each
        reason = "copies" if tensor.source in tensors.files.plan.copies else "ties"
        found[reason] += (_length(plan.gaps) * across - added.get(scale_name(tensor.source), 0)) * each
        found["low_rank"] += (_length(plan.made) * across - added.get(tensor.source, 0)) * each
    return GivenBack(**{reason: round(count) for reason, count in found.items()})


def _length(ranges: Sequence[Any]) -> int:
    return sum(each.stop - each.start for each in ranges)


def _added(tensors: ExpandedTensors) -> Mapping[str, int]:
    """Counts of numbers of the tensors that a plan adds: scales by their names, and others by their weights'."""
    counts: dict[str, int] = {}
    for name, tensor in tensors.files.added.items():
        key = name if name == scale_name(tensor.weight) else tensor.weight
        counts[key] = counts.get(key, 0) + prod(tensor.shape)
    return counts


def _notes(checkpoint: Checkpoint, shape: FileShape, placed: Sequence[Placed], wanted: NumberType) -> list[str]:
    """What whoever runs the file should know."""
    notes = []
    config = checkpoint.layouts.config
    if (context := context_of(config)) < config["max_position_embeddings"]:
        notes.append(f"attention looks back {context:,} tokens in some layers, so that is the context of the file")
    uneven = [tensor.name for tensor, kind in placed if len(tensor.shape) > 1 and kind.block < wanted.block]
    if uneven:
        notes.append(
            f"{len(uneven)} matrices are stored as f16, because blocks of {wanted.block} do not fill their rows: "
            f"{uneven[0]}{', ...' if uneven[1:] else ''}"
        )
    gone = shape.attention.layers - len(shape.layers)
    if gone:
        notes.append(f"{gone} layers have nothing left, and are not in the file")
    return notes
