"""The stock model around the layers: empty, with the names that its checkpoint uses."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor

from headshare.architecture.recognition import ffn_layout
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.remote_code import check_model_code
from headshare.errors import ArchitectureError
from headshare.integrations.transformers.loading import load_model, quiet
from headshare.plan.layout import Layout
from headshare.storage.registry import TRAINABLE


def on_device(device: torch.device, value: Tensor) -> Tensor:
    """The tensor on this device, in float32 if it is a floating-point one."""
    return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)


def different_prefixes(first: str, second: str) -> tuple[str, str]:
    """What stands before the steps that both paths end in: ("", "model.") for `layers.0.` and `model.layers.0.`"""
    ours, theirs = first.split("."), second.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return "".join(f"{step}." for step in ours), "".join(f"{step}." for step in theirs)


def ffn_or_none(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Layout | None:
    """The feed-forward's layout; None for a model whose feed-forward has none, such as experts."""
    try:
        return ffn_layout(config, shapes)
    except ArchitectureError:  # a mixture of experts has no one W_down to refit
        return None


def whole_model(checkpoint: Checkpoint, device: torch.device, head: bool) -> Any:
    """The stock model, bare or with its head, with all its weights, for checkpoints that transformers converts as it
    loads them."""
    if checkpoint.plan is None:
        model = load_model(checkpoint, dtype=torch.float32)
    else:
        model = load_model(checkpoint, storage=TRAINABLE, dtype=torch.float32).dequantize()
    _without_cache(model.config)
    return (model if head else model.base_model).to(device)


def empty_shell(checkpoint: Checkpoint, head: bool) -> Any:
    """The stock model, bare or with its head, with buffers and no weights.

    Raises:
        CheckpointError: if the model needs code of its own.
    """
    check_model_code(checkpoint)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    with quiet(), init_empty_weights(include_buffers=False):
        built = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        _without_cache(built)
        kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
        return kind.from_config(built, trust_remote_code=False).eval()


def _without_cache(config: Any) -> None:
    """Let layers be called without a cache of keys: one that is there grows with every run. Nor is there a loss of
    routers to add up, whose layers may not run."""
    for one in (config, config.get_text_config()):
        one.use_cache = False
        one.output_router_logits = False
