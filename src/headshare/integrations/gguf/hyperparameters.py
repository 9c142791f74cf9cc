"""Keys of a GGUF file that describe the model: its sizes, its positions, and where it comes from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.integrations.gguf.number_types import NumberType
from headshare.integrations.gguf.rotary import Rotary
from headshare.integrations.gguf.shape import FileShape
from headshare.sharing.card import licence_of
from headshare.version import __version__

# the version of the quantised types' layout, which has been this one since 2023
_QUANTIZATION = 2
_HUB_ID = re.compile(r"([\w.-]+)/([\w.-]+)")


def hyperparameters(config: Mapping[str, Any], shape: FileShape, rotary: Rotary, rows: int) -> dict[str, Any]:
    """The keys that begin with the architecture's name, for a model that embeds so many tokens."""
    units = [layer.units.count for layer in shape.layers]
    neurons = [layer.neurons.count for layer in shape.layers]
    varied = shape.architecture.varied
    keys: dict[str, Any] = {
        "context_length": context_of(config),
        "embedding_length": shape.hidden,
        "block_count": len(shape.layers),
        "feed_forward_length": neurons if varied else neurons[0],
        "attention.head_count": [shape.queries * count for count in units] if varied else shape.queries * units[0],
        "attention.head_count_kv": units if varied else units[0],
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "vocab_size": rows,
        **rotary.keys,
    }
    return {f"{shape.architecture.name}.{key}": value for key, value in keys.items()}


def context_of(config: Mapping[str, Any]) -> int:
    """The most tokens that llama.cpp should be given: those that attention looks back on, if these are fewer."""
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    return min(longest, window) if isinstance(window, int) and window > 0 else longest


def general(checkpoint: Checkpoint, shape: FileShape, kind: NumberType) -> dict[str, Any]:
    """The keys that say what the model is called, what it was made from, and under which licence."""
    entry = checkpoint.sharing
    base = (None if entry is None else entry.base_model) or checkpoint.name
    hub = _HUB_ID.fullmatch(base)
    name = Path(base).absolute().name
    keys: dict[str, Any] = {
        "general.architecture": shape.architecture.name,
        "general.type": "model",
        "general.name": name if entry is None else f"{name} headshare",
        "general.file_type": kind.file_type,
        "general.quantization_version": _QUANTIZATION,
    }
    keys |= {f"general.{key.replace('_', '.')}": value for key, value in licence_of(checkpoint.path).items()}
    # a name on the hub is a fact about the model; a folder's is one about somebody's disk
    if hub is not None and not Path(base).exists():
        keys |= {
            "general.base_model.count": 1,
            "general.base_model.0.name": hub[2],
            "general.base_model.0.organization": hub[1],
            "general.base_model.0.repo_url": f"https://huggingface.co/{base}",
        }
    elif entry is not None:
        keys |= {"general.base_model.count": 1, "general.base_model.0.name": name}
    keys["headshare.version"] = __version__
    if entry is not None:
        keys["headshare.plan_digest"] = entry.plan.digest
    return keys
