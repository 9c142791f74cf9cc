"""The contents of a checkpoint's folder: which files hold its weights, and which others its model needs.

Both are decided here alone, by the names in `files.model_files`. Weights are chosen in transformers' order: those that
config.json names, then `model.safetensors`, then the shards of an index. What transformers would choose by other rules
is refused. Other files belong to the model only if they are named there, however small the rest may be.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from headshare.errors import CheckpointError
from headshare.files.model_files import (
    ADAPTER,
    CARD,
    CODE,
    CONFIG,
    INDEX,
    LICENCE,
    MODULES,
    OF_A_MODULE,
    RECORDS,
    SAFE,
    SETTINGS,
    TOKENIZER,
    WEIGHTS,
)
from headshare.files.untrusted import MAX_JSON_BYTES, is_file, parse_json, read_bytes, read_json

# keys of config.json that name files of their own folder, and so do not fit a copy
FILE_KEYS = ("transformers_weights", "configuration_files")
_OTHER_FORMATS = (SAFE, ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".npz")
# classes of sentence-transformers' modules that hold weights
_WITH_WEIGHTS = ("Dense", "LayerNorm", "WeightedLayerPooling", "CNN", "LSTM", "WordEmbeddings", "WordWeights")

# a file of the hub's cache, which a model there is a folder of links to: of its own, or shared by all models
_BLOB = re.compile(r"/(models--[^/]+/blobs|blobs/[0-9a-f]{2})/(?:[0-9a-f]{40}|[0-9a-f]{64})$")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's weights. Several have an index, of this name, from tensors to files."""

    files: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None


def weight_files(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """The files that transformers loads from a folder with this configuration.

    Raises:
        CheckpointError: if it has none, some are missing, one is no safetensors file, or an adapter lies beside them.
    """
    check_named(str(folder), config)
    named = config.get("transformers_weights")
    chosen = [named] if named is not None else [name for name in (WEIGHTS, INDEX) if (folder / name).is_file()]
    if not chosen:
        raise CheckpointError(_no_weights(folder))
    first: str = chosen[0]
    if not is_file(folder / first):
        raise CheckpointError(f"config.json of {folder} names {first} as its weights, which is not there.")
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds a model ({first}) and an adapter ({ADAPTER}), which transformers loads together where "
            f"peft is installed. Merge them (peft's merge_and_unload), or move the adapter to a folder of its own."
        )
    return _shards(folder, first) if first.endswith(".json") else WeightFiles((first,))


def check_named(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that names files which headshare does not open, or which transformers chooses among.

    Raises:
        CheckpointError: naming them.
    """
    weights = config.get("transformers_weights")
    if weights is not None and not (isinstance(weights, str) and weights.endswith((SAFE, f"{SAFE}.index.json"))):
        raise CheckpointError(
            f"config.json of {name} names {weights!r:.100} as its weights, which is not a safetensors file "
            "(a pickle can run code). Take transformers_weights out of config.json."
        )
    if weights is not None and Path(weights).name != weights:
        raise CheckpointError(
            f"config.json of {name} names {weights!r:.100} as its weights, which is not in the same folder. Move the "
            "file there, or take transformers_weights out of config.json."
        )
    others = config.get("configuration_files")
    if others is not None and others != [CONFIG]:
        raise CheckpointError(
            f"config.json of {name} leaves the choice of a configuration to transformers' version "
            f"(configuration_files: {others!r:.100}). Make the right one config.json, without that key."
        )


def _shards(folder: Path, index: str) -> WeightFiles:
    path = folder / index
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to files.")
    files = sorted(set(weight_map.values()))
    if any(Path(file).name != file for file in files):
        raise CheckpointError(f"{path} names files outside its folder.")
    if others := [file for file in files if not file.endswith(SAFE)]:
        raise CheckpointError(
            f"{path} names {others[0]!r:.100}, which is not a safetensors file (a pickle can run code)."
        )
    if WEIGHTS in files and len(files) > 1:
        raise CheckpointError(f"{path} names {WEIGHTS} as one of {len(files)} files; alone it is a whole model's name.")
    missing = [file for file in files if not is_file(folder / file)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of its {len(files)} weight files: {', '.join(missing[:3])}. "
            "Download them again."
        )
    return WeightFiles(tuple(files), index, weight_map)


def _no_weights(folder: Path) -> str:
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_FORMATS)
    if not others or any(name.endswith(SAFE) for name in others):
        return f"{folder} holds no {WEIGHTS} and no {INDEX}."
    return (
        f"{folder} holds its weights only as {', '.join(others[:3])}, which headshare does not open "
        "(a pickle can run code). Convert it first: transformers' save_pretrained writes safetensors."
    )


def companions(folder: Path) -> list[str]:
    """The other files of a folder that belong to its model, by their names within it: what `used_files` and a licence.

    Raises:
        CheckpointError: if the folder cannot be read.
    """
    with reading(folder):
        return sorted({*used_files(folder), *_matching(folder, (*LICENCE, *RECORDS))})


def used_files(folder: Path) -> list[str]:
    """The files beside config.json and the weights that something is loaded from, by their names within the folder.

    They are the tokenizer, settings, modules of a sentence embedder, and code where a configuration names some.

    Raises:
        CheckpointError: if the folder cannot be read.
    """
    with reading(folder):
        names = {*_matching(folder, (*TOKENIZER, *SETTINGS)), *_of_modules(folder)}
        if any(_names_code(folder / name) for name in (CONFIG, *names) if name.endswith("config.json")):
            names |= set(_matching(folder, CODE))
        return sorted(names)


def fetched(folder: Path | None = None) -> list[str]:
    """Patterns of the files to fetch from the hub, the weights aside.

    Where `folder` has what was fetched by them, they grow by those files that its own files name.
    """
    names = [CONFIG, INDEX, CARD, ADAPTER, *TOKENIZER, *SETTINGS, *LICENCE, *CODE]
    modules = [] if folder is None else module_folders(folder)
    return [*names, *(f"{module}/{pattern}" for module in modules for pattern in OF_A_MODULE)]


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Name the file of a checkpoint's folder that the system does not let us read.

    Raises:
        CheckpointError: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from None


def check_inside(folder: Path, name: str) -> None:
    """Refuse a file that is a link to somewhere outside its folder: a private file there would be passed on.

    Raises:
        CheckpointError: naming it.
    """
    if not is_inside(folder, name):
        raise CheckpointError(
            f"{folder / name} is a link to {os.path.realpath(folder / name)}, outside its folder, so it is not copied "
            "into the output. Put a copy in the place of the link."
        )


def is_inside(folder: Path, name: str) -> bool:
    """True if a file lies in its folder, or is a link to within it or to a model's file in the hub's cache."""
    real = Path(os.path.realpath(folder / name))
    return Path(os.path.realpath(folder)) in real.parents or _BLOB.search(real.as_posix()) is not None


def module_folders(folder: Path) -> list[str]:
    """Subfolders that a sentence embedder's modules.json names: all that is in them belongs to the model."""
    return sorted(_modules(folder))


def without_weights(folder: Path) -> list[str]:
    """The subfolders of a sentence embedder's modules whose weights do not come along: no safetensors file has them."""
    return sorted(
        module
        for module, kind in _modules(folder).items()
        if not any((folder / module).rglob(f"*{SAFE}"))
        and (kind in _WITH_WEIGHTS or any(path.suffix in _OTHER_FORMATS for path in (folder / module).rglob("*")))
    )


def _modules(folder: Path) -> dict[str, str]:
    """The subfolders that a sentence embedder's modules.json names, and the names of their modules' classes."""
    listed = folder / MODULES
    try:
        modules = parse_json(read_bytes(listed, MAX_JSON_BYTES), listed) if listed.is_file() else []
    except CheckpointError:
        return {}
    entries = [module for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    named = {
        PurePosixPath(module["path"]): str(module.get("type")).rpartition(".")[2]
        for module in entries
        if isinstance(module.get("path"), str)
    }
    inside = {path: kind for path, kind in named.items() if path.parts and not any(s[0] in "./" for s in path.parts)}
    return {str(path): kind for path, kind in inside.items()}


def _of_modules(folder: Path) -> Iterator[str]:
    for module in module_folders(folder):
        for path in (folder / module).rglob("*"):
            inside = path.relative_to(folder)
            hidden = any(step.startswith(".") for step in inside.parts)
            if not hidden and path.is_file() and any(fnmatchcase(path.name, each) for each in OF_A_MODULE):
                yield inside.as_posix()


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[str]:
    for pattern in patterns:
        inner = PurePosixPath(pattern).parent
        place = folder / inner
        names = [path.name for path in place.iterdir() if path.is_file()] if place.is_dir() else []
        yield from ((inner / name).as_posix() for name in names if fnmatchcase(name, PurePosixPath(pattern).name))


def _names_code(path: Path) -> bool:
    return path.is_file() and b'"auto_map"' in path.read_bytes()
