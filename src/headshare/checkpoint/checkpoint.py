"""Open a Hugging Face checkpoint: its configuration, and the names, shapes and places of its tensors.

Nothing is read but headers until a tensor is asked for, and then only its rows at hand. Only safetensors files
are opened: a pickle can run code. A hub id works wherever a folder does.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from headshare.checkpoint.header import DTYPES, TensorInfo, read_header
from headshare.checkpoint.int4 import NESTED, Packing
from headshare.checkpoint.refit_record import RefitRecord, is_shown
from headshare.errors import CheckpointError
from headshare.files.atomic import read_at
from headshare.plan.layout import Layout
from headshare.plan.plan import FORMAT, SharePlan

MAX_JSON_BYTES = 100_000_000
METHOD = "headshare"

OUTPUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".npz")
PICKLES = (".pkl", ".pickle", ".joblib")


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files, or only the headers of one on the hub. `read` reads, a few rows at a time."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    folder: Path | None = None
    _descriptors: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    _opening: Lock = field(default_factory=Lock, repr=False, compare=False)

    @cached_property
    def plan(self) -> SharePlan | None:
        """The checked share plan, where this is a shared checkpoint; None where it is dense.

        Raises:
            PlanError: if the checkpoint carries a plan that is not valid.
        """
        entry = self.config.get("quantization_config")
        if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
            return None
        return SharePlan.from_dict(entry.get("plan"))

    @cached_property
    def refit(self) -> RefitRecord | None:
        """What was refitted in this shared checkpoint; None where nothing was.

        Raises:
            PlanError: if the checkpoint carries a record that is not valid.
        """
        entry = self.config.get("quantization_config")
        if self.plan is None or not isinstance(entry, dict) or entry.get("refit") is None:
            return None
        return RefitRecord.from_dict(entry["refit"])

    @cached_property
    def packing(self) -> Packing | None:
        """How the matrices of this shared checkpoint are rounded and packed; None where they are not.

        Raises:
            PlanError: if the checkpoint says so in a way that is not valid.
        """
        entry = self.config.get("quantization_config")
        if self.plan is None or not isinstance(entry, dict) or entry.get(NESTED) is None:
            return None
        return Packing.from_dict(entry[NESTED])

    @property
    def base_model(self) -> str | None:
        """The dense model that this shared checkpoint says it was made from, as it was named then."""
        entry = self.config.get("quantization_config")
        name = entry.get("base_model") if self.plan is not None and isinstance(entry, dict) else None
        return name if isinstance(name, str) and is_shown(name) else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def path(self) -> Path:
        """The local folder.

        Raises:
            CheckpointError: if only the headers were fetched.
        """
        if self.folder is None:
            raise CheckpointError(f"only the headers of {self.name} were fetched; open it with weights=True.")
        return self.folder

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, as stored, in memory of their own. Shape: (stop - start, ...).

        Raises:
            CheckpointError: if the file ends early or cannot be read.
        """
        info = self.tensors[name]
        length = info.shape[0] if info.shape else 1
        stop = length if stop is None else stop
        row_bytes = info.nbytes // length if length else 0
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        if buffer.numel():
            self.read_into(buffer.numpy().data, info, start * row_bytes)
        return buffer.view(info.torch_dtype).view(shape)

    def read_into(self, buffer: memoryview, info: TensorInfo, offset: int) -> None:
        """Fill the buffer with this tensor's bytes from `offset` on."""
        descriptor = self._open(info.file)
        try:
            filled = read_at(descriptor, buffer, info.offset + offset)
        except OSError as error:
            raise CheckpointError(f"{info.file} cannot be read at {info.name}: {error.strerror}.") from None
        if not filled:
            raise CheckpointError(f"{info.file} ends inside {info.name}: it became shorter while it was read.")

    def _open(self, file: str) -> int:
        with self._opening:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{self.path / file} cannot be read: {error.strerror}.") from None
            return self._descriptors[file]

    def close(self) -> None:
        """Close the files that were read. Reading again opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def require_dense(self, purpose: str) -> None:
        """Refuse a checkpoint that is already shared or quantised.

        Raises:
            CheckpointError: naming the method that was found.
        """
        entry = self.config.get("quantization_config")
        if not entry:
            return
        method = entry.get("quant_method", "unknown") if isinstance(entry, dict) else "unknown"
        if method == METHOD:
            how = "expand --unpack" if isinstance(entry, dict) and entry.get(NESTED) else "expand"
            raise CheckpointError(
                f"{self.name} is already shared. To {purpose}, first: headshare {how} {self.name} DENSE"
            )
        raise CheckpointError(
            f"{self.name} is quantised ({method}). headshare can only {purpose} original weights; quantise afterwards."
        )


def quantization_entry(
    plan: SharePlan,
    refit: RefitRecord | None = None,
    base_model: str | None = None,
    packing: Packing | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of a shared checkpoint, which tells transformers who is to load it. What rounds its
    matrices nests inside, under the same name."""
    entry = {"quant_method": METHOD, "format": FORMAT, "plan": plan.model_dump(mode="json")}
    if refit is not None:
        entry["refit"] = refit.model_dump(mode="json")
    if packing is not None:
        entry[NESTED] = packing.to_dict()
    return entry if base_model is None else {**entry, "base_model": base_model}


def require_one_dtype(layout: Layout, checkpoint: Checkpoint) -> None:
    """Refuse a part whose tensors are of different types in different layers, or not floating-point weights.

    Raises:
        CheckpointError: naming the part and the types.
    """
    for place in layout.parts.values():
        dtypes = {checkpoint.tensors[place.name(layer)].dtype for layer in range(layout.layers)}
        if len(dtypes) > 1 or not dtypes <= set(WEIGHT_DTYPES):
            raise CheckpointError(
                f"{place.tensor} is stored as {', '.join(sorted(dtypes))} in its layers; units can be shared only "
                f"where all layers have one of {', '.join(WEIGHT_DTYPES)}."
            )


def open_checkpoint(model: str | Path, *, revision: str | None = None, weights: bool = True) -> Checkpoint:
    """Open a local folder or a hub id and read its headers. With weights=False a hub model's weights are not fetched.

    Raises:
        CheckpointError: if there is no such model, or its files are missing, truncated or not safetensors.
        PlanError: if it is a shared checkpoint whose plan is not valid.
    """
    folder = Path(model)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:
        raise CheckpointError(f"{model!s:.100} cannot be opened: {error.strerror}.") from None
    if is_folder:
        return _checked(_open_folder(folder))
    if exists:
        raise CheckpointError(f"{model} is a file. Give the folder that holds config.json and the weights.")
    if _looks_local(str(model)):
        raise CheckpointError(f"there is no folder {model}.")
    return _checked(_open_hub(str(model), revision, weights))


def _looks_local(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith("/")


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    _ = checkpoint.plan, checkpoint.refit, checkpoint.packing
    return checkpoint


def _open_folder(folder: Path) -> Checkpoint:
    config = read_json(folder / "config.json", "A Hugging Face checkpoint has one beside its weights.")
    tensors: dict[str, TensorInfo] = {}
    files = _weight_files(folder)
    for file in files:
        for info in read_header(folder / file):
            if info.name in tensors:
                raise CheckpointError(f"the tensor {info.name} is in both {tensors[info.name].file} and {file}.")
            tensors[info.name] = info
    _check_index(folder, tensors)
    return Checkpoint(name=str(folder), config=config, tensors=tensors, folder=folder)


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map from tensor names to files.")
        files = sorted(set(weight_map.values()))
        if any(Path(file).name != file for file in files):
            raise CheckpointError(f"{index} names files outside its folder.")
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of its {len(files)} weight files: {', '.join(missing[:3])}. "
                "Download them again."
            )
        return files
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    raise CheckpointError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    others = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHT_FILES)
    if not others or any(name.endswith(".safetensors") for name in others):
        return f"{folder} holds no model.safetensors and no model.safetensors.index.json."
    return (
        f"{folder} holds its weights only as {', '.join(others[:3])}, which headshare does not open "
        "(a pickle can run code). Convert it first: transformers' save_pretrained writes safetensors."
    )


def _check_index(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    weight_map = read_json(index)["weight_map"]
    absent = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file != file]
    if absent:
        raise CheckpointError(f"{index} lists {absent[0]} in {weight_map[absent[0]]}, where it is not.")


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """A JSON object from a file of sane size.

    Raises:
        CheckpointError: if it is missing, too large, or not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no {path.name} in {path.parent}. {hint}".rstrip())
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is {path.stat().st_size} bytes, too large for what it should be.")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object, found {type(data).__name__}.")
    return data


def _open_hub(model: str, revision: str | None, weights: bool) -> Checkpoint:
    """Fetch a model, or only its configuration and headers, with huggingface_hub's own cache and credentials."""
    import huggingface_hub as hub

    try:
        if weights:
            ignored = [f"*{end}" for end in WEIGHT_FILES if end != ".safetensors"]
            folder = Path(hub.snapshot_download(model, revision=revision, ignore_patterns=ignored))
            return dataclasses.replace(_open_folder(folder), name=model)
        config = hub.hf_hub_download(model, "config.json", revision=revision)
        metadata = hub.get_safetensors_metadata(model, revision=revision)
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client, and the one beneath it, raise what they like
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{model} is neither a folder here nor a model that can be fetched: {reason}") from None
    infos = [
        _hub_tensor(model, name, file, info)
        for file, one in metadata.files_metadata.items()
        for name, info in one.tensors.items()
    ]
    return Checkpoint(name=model, config=read_json(Path(config)), tensors={info.name: info for info in infos})


def _hub_tensor(model: str, name: str, file: str, info: Any) -> TensorInfo:
    start, stop = info.data_offsets
    if info.dtype not in DTYPES:
        raise CheckpointError(f"{model} stores {name} as {info.dtype}, a type that headshare does not know.")
    return TensorInfo(name, info.dtype, tuple(info.shape), file, start, stop - start)
