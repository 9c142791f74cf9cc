"""LoRA adapters, through peft, on the matrices of a shared model that are not shared; merged in the end."""

from typing import Any

from torch import nn

from headshare.architecture.families import Linear
from headshare.architecture.modules import linear_of
from headshare.errors import TrainingError
from headshare.installing import install
from headshare.integrations.transformers.loading import quiet


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """The model with adapters of this rank on every plain projection of its layers, and all else frozen.

    Raises:
        TrainingError: if peft is not installed, or there is no such projection.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise TrainingError(f"LoRA needs peft, which is not installed. Run: {install('train')}") from None
    plain = plain_projections(model)
    if not plain:
        raise TrainingError("every projection of this model is shared; train it in full, without LoRA.")
    in_out = any(linear.in_out for linear in plain.values())
    with quiet():  # the two libraries' warnings to each other
        adapted: nn.Module = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(plain), fan_in_fan_out=in_out)
        )
    return adapted


def without_adapters(model: Any) -> Any:
    """The model without adapters, whose products are added to its matrices."""
    return model.merge_and_unload()


def plain_projections(model: nn.Module) -> dict[str, Linear]:
    """Projections within layers that lend nothing and borrow nothing, by their paths. Those without numbers are not."""
    holding = ((path, module) for path, module in model.named_modules() if getattr(module, "weight", None) is not None)
    modules = ((path, linear_of(module)) for path, module in holding if module.weight.numel())
    within = ((path, linear) for path, linear in modules if any(step.isdigit() for step in path.split(".")))
    return {path: linear for path, linear in within if linear is not None}
