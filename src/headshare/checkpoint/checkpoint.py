"""Hugging Face checkpoints: the configuration, and the names, shapes and places of the tensors.

Only headers are read until a tensor is asked for, and then only the rows that are needed. Only safetensors files
are opened: a pickle can run code. A hub id works wherever a folder does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headshare.architecture.config import text_config
from headshare.architecture.model_class import class_name, predicts_next
from headshare.architecture.model_layouts import ModelLayouts
from headshare.checkpoint.entry import METHOD, SharingEntry
from headshare.checkpoint.header import TensorInfo
from headshare.checkpoint.names import changed_prefixes, follow
from headshare.checkpoint.rounding.numbers import Rounded, dense
from headshare.checkpoint.rounding.tensors import stored_parts, whole_numbers
from headshare.checkpoint.seal import Metadata, check_seal
from headshare.errors import CheckpointError
from headshare.files.opened import OpenedFiles, Stamp
from headshare.plan.plan import SharePlan
from headshare.short import short, tail


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in a folder of safetensors files, or only the headers of one on the hub.

    A rounded matrix is one of its `tensors`, and reads as the numbers that it means.

    It is `sharded` if an index says which file holds which tensor. `metadata` is that of each file of weights. `stamps`
    tell whether config.json and those files are still the ones that were opened: what was replaced or changed since is
    refused when it is read.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    folder: Path | None = None
    metadata: Mapping[str, Metadata] = field(default_factory=dict, repr=False)
    stamps: Mapping[str, Stamp | None] = field(default_factory=dict, repr=False, compare=False)
    sharded: bool = False

    def __repr__(self) -> str:
        size = sum(info.nbytes for info in self.tensors.values())
        quantization = self.config.get("quantization_config")
        kind = "shared" if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD else ""
        family = self.config.get("model_type")
        return short(self, tail(self.name), family, f"{len(self.tensors)} tensors", f"{size:,} bytes", kind)

    @cached_property
    def sharing(self) -> SharingEntry | None:
        """The checked entry of headshare in config.json, where this is a shared checkpoint; None where it is dense.

        Tensors that were renamed since are called as they are here.

        Raises:
            CheckpointError: if the entry is not valid, or the weights were written by another plan.
        """
        check_seal(self.name, self.entry, self.metadata)
        return None if self.entry is None else follow(self.entry, self.tensors)

    @cached_property
    def entry(self) -> SharingEntry | None:
        """The entry as config.json holds it, with the names that tensors had when it was written.

        Raises:
            CheckpointError: if it is not valid.
        """
        return SharingEntry.from_config(self.config.get("quantization_config"))

    @property
    def plan(self) -> SharePlan | None:
        """The share plan; None where this is a dense checkpoint."""
        return None if self.sharing is None else self.sharing.plan

    @property
    def stored(self) -> list[TensorInfo]:
        """The entries of all tensors as the files hold them."""
        return stored_parts(self.tensors.values())

    def widened(self) -> "Checkpoint":
        """This checkpoint with rounded matrices that read in float32, in which each number is exact."""
        infos = (replace(info, dtype="F32") if info.parts else info for info in self.tensors.values())
        return replace(self, tensors={info.name: info for info in infos})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The stored shapes of the tensors, by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors in the dense model, by name, without tensors that a plan adds."""
        if self.plan is None:
            return self.shapes
        changed = {**self.plan.tensors, **self.plan.biases}
        added = self.plan.added_tensors
        return {
            name: changed[name].shape if name in changed else info.shape
            for name, info in self.tensors.items()
            if name not in added
        }

    @cached_property
    def layouts(self) -> ModelLayouts:
        """The layouts of the model, shared or dense, in the dense model's shapes."""
        return ModelLayouts(text_config(self.config), self.dense_shapes)

    @cached_property
    def model_class(self) -> str | None:
        """The name of transformers' class for this model, as `class_name` finds it; None for the bare model.

        Raises:
            CheckpointError: if config.json does not name classes as a list.
        """
        return class_name(self.config, self.tensors)

    @property
    def predicts_next(self) -> bool:
        """True if this model predicts the next token, so that it can write, and its predictions can be followed."""
        return predicts_next(self.model_class, self.config)

    @property
    def path(self) -> Path:
        """The local folder of the checkpoint.

        Raises:
            CheckpointError: if only the headers were fetched.
        """
        if self.folder is None:
            raise CheckpointError(f"only the headers of {self.name} were fetched; open it with weights=True.")
        return self.folder

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, as stored, in new memory. Shape: (stop - start, ...).

        Raises:
            CheckpointError: if the file ends early, cannot be read, or was replaced or changed since it was opened.
        """
        info = self.tensors[name]
        length = info.shape[0] if info.shape else 1
        stop = length if stop is None else stop
        if info.parts is not None:
            return self._read_rounded(info, start, stop)
        return self._read_stored(info, start, stop)

    def read_rounded(self, name: str, start: int = 0, stop: int | None = None) -> Rounded:
        """Rows [start, stop) of a rounded matrix's whole numbers, one to each place, and their scales.

        Rows are outputs, whichever way round the model stores the matrix.
        """
        parts = self.tensors[name].parts
        assert parts is not None, name
        stop = parts.numbers.shape[0] if stop is None else stop
        numbers = whole_numbers(self._read_stored(parts.numbers, start, stop), parts)
        return Rounded(numbers, self._read_stored(parts.scale, start, stop))

    def _read_rounded(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        assert info.parts is not None
        if info.parts.in_out:  # a row of the tensor takes one number of each stored row
            whole = dense(*self.read_rounded(info.name), info.parts.group, info.torch_dtype)
            return whole.T[start:stop].contiguous()
        return dense(*self.read_rounded(info.name, start, stop), info.parts.group, info.torch_dtype)

    def _read_stored(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        length = info.shape[0] if info.shape else 1
        row_bytes = info.nbytes // length if length else 0
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        if buffer.numel():
            self.read_into(buffer.numpy().data, info, start * row_bytes)
        return buffer.view(info.torch_dtype).view(shape)

    def read_into(self, buffer: memoryview, info: TensorInfo, offset: int) -> None:
        """Fill the buffer with this tensor's bytes from `offset` on."""
        self._files.read_into(buffer, info.file, info.offset + offset, info.name)

    @cached_property
    def _files(self) -> OpenedFiles:
        return OpenedFiles(self.path, self.stamps)

    def check_unchanged(self) -> None:
        """Check that config.json and the files of weights are still those that were opened.

        Raises:
            CheckpointError: naming one that was replaced or changed.
        """
        self._files.check_unchanged()

    def close(self) -> None:
        """Close the files that were read. Reading again opens them again."""
        self._files.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def named_as(self, shared: "Checkpoint") -> "Checkpoint":
        """This dense checkpoint with its tensors called as they are in a shared checkpoint that came from it."""
        prefixes = changed_prefixes(shared.require_sharing().plan, self.tensors)
        if prefixes is None:
            return self
        infos = (replace(info, name=prefixes.back().renamed(name)) for name, info in self.tensors.items())
        return replace(self, tensors={info.name: info for info in infos})

    def require_sharing(self) -> SharingEntry:
        """The entry of headshare in a shared checkpoint's config.json.

        Raises:
            CheckpointError: if the checkpoint is dense.
        """
        if self.sharing is None:
            raise CheckpointError(f"{self.name} is a dense checkpoint: nothing in it is tied.")
        return self.sharing

    def require_dense(self, purpose: str) -> None:
        """Refuse a checkpoint that is already shared or quantised.

        Raises:
            CheckpointError: naming the method that was found.
        """
        entry = self.config.get("quantization_config")
        if not entry:
            return
        if self.sharing is not None:
            how = "expand" if self.sharing.packing is None else "expand --unpack"
            raise CheckpointError(
                f"{self.name} is already shared. To {purpose}, first: headshare {how} {self.name} DENSE"
            )
        method = entry.get("quant_method", "unknown") if isinstance(entry, dict) else "unknown"
        raise CheckpointError(
            f"{self.name} is quantised ({method}). headshare can only {purpose} original weights; quantise afterwards."
        )
