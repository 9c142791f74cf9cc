"""The module of a loaded model that holds a checkpoint's tensor, found by the tensor's name."""

from torch import nn

from headshare.errors import PlanError


def module_path(model: nn.Module, tensor: str) -> str:
    """Where the model keeps a checkpoint's tensor: at its own path, with the base model's prefix more or less, or
    in the module most like it.

    Raises:
        PlanError: if the model has no such module.
    """
    path = tensor.removesuffix(".weight")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        if _has(model, candidate):
            return candidate
    found = _most_alike(path, [name for name, _ in model.named_modules()])
    if found is not None:
        return found
    raise PlanError(f"the plan shares {tensor}, which {type(model).__name__} does not have.")


def _most_alike(path: str, names: list[str]) -> str | None:
    """The one module that ends as this path does and shares most of its other steps: transformers moves whole towers
    (language_model.model.layers to model.language_model.layers), but keeps what they are called."""
    steps = path.split(".")
    layer = next((n for n, step in enumerate(steps) if step.isdigit()), None)
    if not layer:
        return None
    tail = "." + ".".join(steps[layer - 1 :])
    alike = sorted((len(set(steps) & set(name.split("."))), name) for name in names if name.endswith(tail))
    if not alike or (len(alike) > 1 and alike[-2][0] == alike[-1][0]):
        return None
    return alike[-1][1]


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
