"""Opening a checkpoint: a local folder, or a model on the hub."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.contents import check_named, fetched, reading, weight_files
from headshare.checkpoint.entry import rounding_of
from headshare.checkpoint.header import TensorInfo, check_count, read_whole_header, tensor_info
from headshare.checkpoint.justified import check_config
from headshare.checkpoint.rounding.tensors import joined_parts
from headshare.checkpoint.seal import Metadata
from headshare.errors import CheckpointError
from headshare.files.folder import clear_left
from headshare.files.model_files import ADAPTER, CONFIG, INDEX, WEIGHTS
from headshare.files.opened import stamp_of
from headshare.files.printable import reason_of
from headshare.files.untrusted import foreign, read_json

_HINT = "A Hugging Face checkpoint has one beside its weights."
_HINT_OF_ADAPTER = "It holds an adapter; merge that into its model first (peft's merge_and_unload)."
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_checkpoint(model: str | Path, *, revision: str | None = None, weights: bool = True) -> Checkpoint:
    """Open a local folder or a hub id and read its headers. With weights=False a hub model's weights are not fetched.

    Raises:
        CheckpointError: if there is no such model, its files are missing, truncated or not safetensors, or it is a
            shared checkpoint whose entry in config.json is not valid.
    """
    folder = Path(model)
    try:
        if not folder.exists():
            clear_left(folder)  # a run that was stopped while it replaced this folder left it under another name
        is_folder = folder.is_dir()
        exists = folder.exists()
    except OSError as error:
        raise CheckpointError(f"{model!s:.100} cannot be opened: {error.strerror}.") from None
    if is_folder:
        return _checked(_open_folder(folder))
    if exists:
        raise CheckpointError(f"{model} is a file. Give the folder that holds config.json and the weights.")
    if _looks_local(str(model)):
        raise CheckpointError(f"there is no folder {model}.")
    return _checked(_open_hub(str(model), revision, weights))


def open_base(shared: Checkpoint) -> Checkpoint | None:
    """Open the dense model that a shared checkpoint names, at its commit on the hub; None where none is named.

    A model of another content may be found under the name: `check_origin` tells.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    entry = shared.require_sharing()
    if entry.base_model is None:
        return None
    return open_checkpoint(entry.base_model, revision=None if entry.origin is None else entry.origin.commit)


# marks that wrappers leave in the names of tensors, and how to save a model without them
_SAVE_INNER = "Save the model inside it: model.{}.save_pretrained(...)."
_WRAPPERS: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "torch.compile": (lambda name: "_orig_mod" in name.split("."), _SAVE_INNER.format("_orig_mod")),
    "PEFT": (
        lambda name: name.startswith("base_model.model."),
        "Merge the adapter before saving: model.merge_and_unload().save_pretrained(...).",
    ),
    "DistributedDataParallel": (lambda name: name.startswith("module."), _SAVE_INNER.format("module")),
    "FSDP": (
        lambda name: "_fsdp_wrapped_module" in name.split("."),
        "Save it by the Trainer or accelerate, which gather the whole model.",
    ),
}


def _looks_local(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith("/")


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    _ = checkpoint.sharing
    for wrapper, (marks, advice) in _WRAPPERS.items():
        if name := next((name for name in checkpoint.tensors if marks(name)), None):
            raise CheckpointError(
                f"{checkpoint.name} names a tensor {name:.200}, as {wrapper} does, and transformers would not find it. "
                f"{advice}"
            )
    check_config(checkpoint.name, checkpoint.config, checkpoint.dense_shapes)
    return checkpoint


def _open_folder(folder: Path) -> Checkpoint:
    with reading(folder):
        return _read_folder(folder)


def _read_folder(folder: Path) -> Checkpoint:
    # each file is stamped before it is read, so that whatever comes in its place later is noticed; one file of weights
    # or an adapter also where there is none yet, for then another model would be loaded
    index = [INDEX] if (folder / INDEX).exists() else []
    stamps = {name: stamp_of(folder / name) for name in (CONFIG, WEIGHTS, ADAPTER, *index)}
    config = read_json(folder / CONFIG, _HINT if not (folder / ADAPTER).is_file() else _HINT_OF_ADAPTER)
    weights = weight_files(folder, config)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, Metadata] = {}
    for file in weights.files:
        stamps[file] = stamp_of(folder / file)
        header = read_whole_header(folder / file)
        metadata[file] = header.metadata
        for info in header.tensors:
            if info.name in tensors:
                raise CheckpointError(f"the tensor {info.name} is in both {tensors[info.name].file} and {file}.")
            tensors[info.name] = info
        check_count(len(tensors), folder)
    listed = weights.weight_map or {}
    absent = [name for name, file in listed.items() if name not in tensors or tensors[name].file != file]
    if absent:
        raise CheckpointError(
            f"{folder / str(weights.index)} lists {absent[0]} in {listed[absent[0]]}, where it is not."
        )
    tensors = joined_parts(tensors, rounding_of(config))
    sharded = weights.index is not None
    checkpoint = Checkpoint(str(folder), config, tensors, folder, metadata, stamps, sharded)
    checkpoint.check_unchanged()  # the configuration and all headers are of one checkpoint
    return checkpoint


def _open_hub(model: str, revision: str | None, weights: bool) -> Checkpoint:
    """Fetch a model, or only its configuration and headers, with huggingface_hub's own cache and credentials."""
    import huggingface_hub as hub

    what = f"{model} is neither a folder here nor a model that can be fetched"
    with foreign(what):
        unreached = "" if weights else _unreached(hub, model, revision)
    with foreign(f"{what}: {unreached}".rstrip(": ")):
        if weights or unreached:
            folder = _fetch(model, revision, local_files_only=bool(unreached))
            return dataclasses.replace(_open_folder(folder), name=model)
        config = read_json(Path(hub.hf_hub_download(model, CONFIG, revision=revision)))
        check_named(model, config)
        if named := config.get("transformers_weights"):
            raise CheckpointError(
                f"config.json of {model} names {named} as its weights, whose headers alone are not fetched. Download "
                f"it (hf download {model} --local-dir FOLDER), and give the folder."
            )
        metadata = hub.get_safetensors_metadata(model, revision=revision)
        infos = [
            _hub_tensor(model, name, file, info)
            for file, header in metadata.files_metadata.items()
            for name, info in header.tensors.items()
        ]
    check_count(len(infos), model)
    sealed = {file: header.metadata or {} for file, header in metadata.files_metadata.items()}
    tensors = joined_parts({info.name: info for info in infos}, rounding_of(config))
    return Checkpoint(model, config, tensors, metadata=sealed)


def _fetch(model: str, revision: str | None, *, local_files_only: bool) -> Path:
    """The folder of a hub model in the hub's cache, which holds what `contents` names and nothing else.

    Small files come first, for they name the rest.
    """
    import huggingface_hub as hub

    def fetch(patterns: list[str], revision: str | None) -> Path:
        found = hub.snapshot_download(
            model, revision=revision, allow_patterns=patterns, local_files_only=local_files_only
        )
        return Path(found)

    folder = fetch(fetched(), revision)
    # all that follows is of the same commit, which the hub's cache names the folder after
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    named = read_json(folder / CONFIG, _HINT).get("transformers_weights") if (folder / CONFIG).is_file() else None
    first = str(named or WEIGHTS)
    fetch([*fetched(folder), escape(first)], commit)
    if first == WEIGHTS and not (folder / WEIGHTS).is_file():
        first = INDEX
    if first.endswith(".json"):
        with suppress(CheckpointError):  # it is opened again, and its damage told, with the folder
            shards = read_json(folder / first).get("weight_map")
            if isinstance(shards, dict):
                files = {str(file) for file in shards.values() if str(file).endswith(".safetensors")}
                fetch([escape(file) for file in sorted(files)], commit)
    return folder


def _unreached(hub: Any, model: str, revision: str | None) -> str:
    """The reason why the hub does not answer, or nothing: then a model may still be in its cache.

    This is one request. The functions that fetch files repeat theirs for half a minute.
    """
    try:
        hub.model_info(model, revision=revision)
    except hub.errors.HfHubHTTPError:  # it answered: there is no such model, or it is not to be had
        raise
    except Exception as error:
        return reason_of(error)
    return ""


def _hub_tensor(model: str, name: str, file: str, info: Any) -> TensorInfo:
    start, stop = info.data_offsets
    entry = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, stop]}
    return tensor_info(file, name, entry, 0, model)
