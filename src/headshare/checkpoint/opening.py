"""Opening a checkpoint: a local folder, or a model on the hub."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headshare.checkpoint.checkpoint import WEIGHT_FILES, Checkpoint
from headshare.checkpoint.header import TensorInfo, check_count, read_whole_header, tensor_info
from headshare.checkpoint.justified import check_config
from headshare.checkpoint.seal import Metadata
from headshare.errors import CheckpointError
from headshare.files.folder import clear_left
from headshare.files.opened import stamp_of
from headshare.files.untrusted import foreign, is_file, read_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


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
    # each file is stamped before it is read, so that whatever comes in its place later is noticed
    stamps = {name: stamp_of(folder / name) for name in (CONFIG, INDEX) if (folder / name).exists()}
    config = read_json(folder / CONFIG, "A Hugging Face checkpoint has one beside its weights.")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, Metadata] = {}
    for file in _weight_files(folder):
        stamps[file] = stamp_of(folder / file)
        header = read_whole_header(folder / file)
        metadata[file] = header.metadata
        for info in header.tensors:
            if info.name in tensors:
                raise CheckpointError(f"the tensor {info.name} is in both {tensors[info.name].file} and {file}.")
            tensors[info.name] = info
        check_count(len(tensors), folder)
    _check_index(folder, tensors)
    checkpoint = Checkpoint(str(folder), config, tensors, folder=folder, metadata=metadata, stamps=stamps)
    checkpoint.check_unchanged()  # the configuration and all headers are of one checkpoint
    return checkpoint


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map from tensor names to files.")
        files = sorted(set(weight_map.values()))
        if any(Path(file).name != file for file in files):
            raise CheckpointError(f"{index} names files outside its folder.")
        missing = [file for file in files if not is_file(folder / file)]
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


def _open_hub(model: str, revision: str | None, weights: bool) -> Checkpoint:
    """Fetch a model, or only its configuration and headers, with huggingface_hub's own cache and credentials."""
    import huggingface_hub as hub

    what = f"{model} is neither a folder here nor a model that can be fetched"
    with foreign(what):
        unreached = "" if weights else _unreached(hub, model, revision)
    with foreign(f"{what}: {unreached}".rstrip(": ")):
        if weights or unreached:
            ignored = [f"*{end}" for end in WEIGHT_FILES if end != ".safetensors"]
            folder = Path(
                hub.snapshot_download(
                    model, revision=revision, ignore_patterns=ignored, local_files_only=bool(unreached)
                )
            )
            return dataclasses.replace(_open_folder(folder), name=model)
        config = hub.hf_hub_download(model, "config.json", revision=revision)
        metadata = hub.get_safetensors_metadata(model, revision=revision)
        infos = [
            _hub_tensor(model, name, file, info)
            for file, header in metadata.files_metadata.items()
            for name, info in header.tensors.items()
        ]
    check_count(len(infos), model)
    sealed = {file: header.metadata or {} for file, header in metadata.files_metadata.items()}
    return Checkpoint(model, read_json(Path(config)), {info.name: info for info in infos}, metadata=sealed)


def _unreached(hub: Any, model: str, revision: str | None) -> str:
    """The reason why the hub does not answer, or nothing: then a model may still be in its cache.

    This is one request. The functions that fetch files repeat theirs for half a minute.
    """
    try:
        hub.model_info(model, revision=revision)
    except hub.errors.HfHubHTTPError:  # it answered: there is no such model, or it is not to be had
        raise
    except Exception as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    return ""


def _hub_tensor(model: str, name: str, file: str, info: Any) -> TensorInfo:
    start, stop = info.data_offsets
    entry = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, stop]}
    return tensor_info(file, name, entry, 0, model)
