"""The modules of a loaded model that hold a checkpoint's tensors, and how they multiply."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import nn

from headshare.architecture.families import LINEARS, Linear
from headshare.errors import PlanError, StorageError


class ModulePlace(NamedTuple):
    """The place of a tensor: the path of a module, and the row of the module's weight at which the tensor begins."""

    path: str
    row: int = 0


@dataclass(frozen=True)
class ModuleMap:
    """The places at which a loaded model keeps a checkpoint's tensors, by the tensors' names.

    In transformers' models a module's weight is one tensor. An engine that fuses matrices keeps several tensors in one
    module, one below the other; it makes its own map, reads it by `places`, and fills its modules itself. All other
    methods are for modules that are to be replaced or written whole, and refuse a tensor that shares its module.
    """

    places: Mapping[str, ModulePlace]

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str]) -> "ModuleMap":
        """The map of these tensors in a model whose modules hold one tensor each, as all of transformers' do.

        Raises:
            PlanError: if the model has no module for one of them.
        """
        return cls({name: ModulePlace(module_path(model, name)) for name in names})

    @cached_property
    def _tensors_at(self) -> Counter[str]:
        return Counter(place.path for place in self.places.values())

    def path(self, name: str) -> str:
        """The path of the module whose whole weight this tensor is.

        Raises:
            StorageError: if the module holds more than this tensor.
        """
        path, row = self.places[name]
        if row or self._tensors_at[path] > 1:
            raise StorageError(
                f"{name} begins at row {row} of {path}, a module that fuses several tensors; only a module that holds "
                "one tensor can be replaced. Load the model with separate projections, or let the engine that fuses "
                "them fill its module from the bank of a storage."
            )
        return path

    def paths(self) -> dict[str, str]:
        """The path of every tensor's module.

        Raises:
            StorageError: as `path` does.
        """
        return {name: self.path(name) for name in self.places}

    def module(self, model: nn.Module, name: str) -> nn.Module:
        """The module whose whole weight this tensor is.

        Raises:
            StorageError: as `path` does.
        """
        return model.get_submodule(self.path(name))

    def replace(self, model: nn.Module, name: str, module: nn.Module) -> None:
        """Put another module in the place of the one whose whole weight this tensor is.

        Raises:
            StorageError: as `path` does.
        """
        replace_module(model, self.path(name), module)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at this path."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def linear_of(module: nn.Module) -> Linear | None:
    """The kind of linear module, by its class, that says how it multiplies; None for an unknown class."""
    stock = Linear()
    named = LINEARS.get(type(module).__name__, stock)
    if named != stock:
        return named
    return stock if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward else None


def module_path(model: nn.Module, tensor: str) -> str:
    """The path at which the model keeps a checkpoint's tensor.

    It is the tensor's own path, or that with the base model's prefix added or removed, or else the path most like it.

    Raises:
        PlanError: if the model has no such module.
    """
    path = tensor.removesuffix(".weight")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # transformers loads a base model's checkpoint into a model with a head, and the other way round
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        if _has(model, candidate):
            return candidate
    alike = _most_alike(path, [name for name, _ in model.named_modules()])
    if alike is not None:
        return alike
    raise PlanError(f"the plan shares {tensor}, which {type(model).__name__} does not have.")


def _most_alike(path: str, names: list[str]) -> str | None:
    """The module whose path ends as this one does and shares most of its other steps, or None if several do.

    transformers moves whole towers (language_model.model.layers to model.language_model.layers), but keeps their names.
    """
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
