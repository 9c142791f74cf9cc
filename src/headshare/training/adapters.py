"""LoRA on the matrices of a shared model that are not shared, through peft; merged in the end."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from headshare.errors import TrainingError
from headshare.integrations.transformers.loading import quiet
from headshare.storage.projection import SharedProjection


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """The model with adapters of this rank on every plain projection of its layers, and all else frozen.

    Raises:
        TrainingError: if peft is not installed, or there is no such projection.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise TrainingError("LoRA needs peft, which is not installed. Run: pip install 'headshare[train]'") from None
    names = plain_projections(model)
    across = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    if not names:
        raise TrainingError("every projection of this model is shared; train it in full, without LoRA.")
    with quiet():  # the two libraries' warnings to each other
        adapted: nn.Module = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=across)
        )
    return adapted


def without_adapters(model: Any) -> Any:
    """The model as it was, with the adapters' products added to its matrices."""
    return model.merge_and_unload()


def plain_projections(model: nn.Module) -> list[str]:
    """Stock projections within layers that lend nothing and take nothing."""
    found = []
    for name, module in model.named_modules():
        within = any(step.isdigit() for step in name.split("."))
        if within and isinstance(module, nn.Linear | Conv1D) and not isinstance(module, SharedProjection):
            found.append(name)
    return found
