"""Checks that refuse a checkpoint with code of its own: a model class, a tokenizer class, or a kernel to be fetched.

transformers would run such code, or ask on standard input whether to. headshare decides before transformers is called.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError
from headshare.files.untrusted import read_json

# options of every `from_pretrained` of a model: no code from the folder, and no pickle, which can run code too
LOCAL_ONLY = {"trust_remote_code": False, "use_safetensors": True}

_KERNELS = ("attn_implementation", "experts_implementation")


def check_model_code(checkpoint: Checkpoint) -> None:
    """Refuse a model that transformers can only build with code from outside.

    Raises:
        CheckpointError: if the model's class is in the folder, or its configuration names a kernel on the hub.
    """
    if "auto_map" in checkpoint.config and str(checkpoint.config.get("model_type")) not in _known_types():
        raise CheckpointError(
            f"{checkpoint.name} needs model code of its own (auto_map), which headshare does not run. "
            "Load it yourself with trust_remote_code=True if you trust it; share, expand and inspect need no model."
        )
    for key, kernel in _kernels(checkpoint.config):
        raise CheckpointError(
            f"config.json of {checkpoint.name} names a kernel to fetch and run ({key}: {kernel!r:.100}), which "
            f"headshare does not do. Take {key} out of config.json."
        )


def check_tokenizer_code(checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer whose class is in the folder, unless transformers has the class that it names.

    Raises:
        CheckpointError: naming the class.
    """
    file = Path(checkpoint.path) / "tokenizer_config.json"
    if not file.is_file():
        return
    config = read_json(file)
    mapped = config.get("auto_map")
    code = mapped.get("AutoTokenizer") if isinstance(mapped, Mapping) else mapped
    if code and not _is_known_tokenizer(config.get("tokenizer_class")):
        raise CheckpointError(
            f"{checkpoint.name} needs tokenizer code of its own ({code!r:.100}), which headshare does not run. "
            "Replace its tokenizer by one of transformers' own: tokenizer.json, and tokenizer_config.json without "
            "auto_map."
        )


def _kernels(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys and values, nested ones too, that name a repository of kernels: those with a slash."""
    for key, value in config.items():
        nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if str(key).removeprefix("_").removesuffix("_internal") in _KERNELS:
            yield from ((key, name) for name in (value, *nested) if isinstance(name, str) and "/" in name)
        else:
            for inner in (value, *nested):
                if isinstance(inner, dict):
                    yield from _kernels(inner)


def _known_types() -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())


def _is_known_tokenizer(name: Any) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(name, str):
        return False
    names = (name, f"{name.removesuffix('Fast')}Fast")
    return any(tokenizer_class_from_name(known) is not None for known in names)
