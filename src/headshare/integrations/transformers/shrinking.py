"""Take removed units out of a stock model before its weights load, and put zeros in their places afterwards.

A module that loses rows or columns keeps its class, and only becomes smaller. Attention that counts its heads is told
their new number. The attributes that it counts them by are data, in `families`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headshare.architecture.config import text_config
from headshare.architecture.families import Counts
from headshare.architecture.model_layouts import ModelLayouts
from headshare.architecture.modules import ModuleMap, linear_of
from headshare.architecture.removable import check_removals, counts_of
from headshare.errors import ArchitectureError, StorageError
from headshare.plan.plan import SharePlan
from headshare.plan.spans import length
from headshare.plan.tensors import TensorPlan, bias_name
from headshare.plan.units import Part, Sublayer


@dataclass(frozen=True)
class Shrunk:
    """The removals of a plan in a single module: in its weight, and in its bias where it has one."""

    weight: TensorPlan
    bias: TensorPlan | None


class FewerHeads:
    """The configuration that the attention of a single layer sees: some numbers are its own, the others the model's."""

    def __init__(self, config: Any, own: Mapping[str, int]) -> None:
        self.whole = config
        self.own = dict(own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "own" not in self.__dict__:
            raise AttributeError(name)  # a copy that is being made asks before it has anything
        return self.own[name] if name in self.own else getattr(self.whole, name)


def shrunk_of(plan: SharePlan) -> dict[str, Shrunk]:
    """The removals of a plan, module by module, under the names of their tensors."""
    biases = plan.biases
    return {
        name: Shrunk(tensor, biases.get(bias_name(name))) for name, tensor in plan.tensors.items() if tensor.removed
    }


def shrink(model: Any, plan: SharePlan, modules: ModuleMap) -> None:
    """Take removed units out of a stock model on the meta device.

    Raises:
        PlanError: if the model cannot go without such units.
        StorageError: if it has modules of other shapes or kinds, or one that holds several tensors.
        ArchitectureError: if it counts its attention in a way that the plan's groups do not divide.
    """
    # refuse the plan before any module is changed
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    check_removals(plan, ModelLayouts(text_config(model.config.to_dict()), shapes))
    # matrices first, then the numbers by which attention splits what they give into heads
    for name, shrunk in shrunk_of(plan).items():
        _shrink_module(modules.module(model, name), shrunk)
    for attention, counts, numbers in _counted(model, plan, modules):
        for name in counts.attributes:
            setattr(attention, name, _scaled(getattr(attention, name), *numbers))
        if counts.settings:
            own = {name: _scaled(getattr(attention.config, name), *numbers) for name in counts.settings}
            attention.config = FewerHeads(attention.config, own)


def _counted(model: Any, plan: SharePlan, modules: ModuleMap) -> list[tuple[Any, Counts, tuple[int, int]]]:
    """Attention modules that lose units, with the attributes that count them and the numbers (kept, all)."""
    counted = []
    for removal in plan.removals:
        if removal.layout.kind is Sublayer.ATTENTION:
            counts = counts_of(str(model.config.model_type))
            assert counts is not None  # else the removal was refused
            groups = removal.layout.groups
            for layer, spans in removal.removed.items():
                path = modules.path(removal.layout.parts[Part.Q].name(layer)).rpartition(".")[0]
                counted.append((model.get_submodule(path), counts, (groups - length(spans), groups)))
    return counted


def _scaled(number: Any, kept: int, groups: int) -> int:
    if type(number) is not int or number % groups:
        raise ArchitectureError(
            f"the model counts its attention by {number!r:.50}, which {groups} groups do not divide."
        )
    return number // groups * kept


def _shrink_module(module: Any, shrunk: Shrunk) -> None:
    weight = module.weight
    bias = getattr(module, "bias", None)
    linear = linear_of(module)
    if tuple(weight.shape) != shrunk.weight.shape or linear is None:
        raise StorageError(
            f"the model holds {shrunk.weight.name} in a {type(module).__name__} of shape {tuple(weight.shape)}; the "
            f"plan removes rows or columns of a linear layer of shape {shrunk.weight.shape}."
        )
    module.weight = nn.Parameter(weight.new_empty(shrunk.weight.reduced_shape), requires_grad=weight.requires_grad)
    if bias is not None and shrunk.bias is not None:
        module.bias = nn.Parameter(bias.new_empty(shrunk.bias.reduced_shape), requires_grad=bias.requires_grad)
    for attribute, size in zip(linear.sizes, module.weight.shape, strict=True):
        setattr(module, attribute, size)


def regrow(model: Any, plan: SharePlan, stock: Mapping[str, nn.Module], modules: ModuleMap) -> None:
    """Put modules of full size, with zeros where units were removed, in place of smaller ones. Undoes `shrink`.

    `stock` holds an empty module of full size for each path.
    """
    for attention, counts, (kept, groups) in _counted(model, plan, modules):
        for name in counts.attributes:
            setattr(attention, name, getattr(attention, name) // kept * groups)
        if counts.settings:
            attention.config = attention.config.whole
    for name, shrunk in shrunk_of(plan).items():
        whole = _whole(modules.module(model, name), stock[modules.path(name)], shrunk)
        modules.replace(model, name, whole)


@torch.no_grad()
def _whole(small: Any, like: Any, shrunk: Shrunk) -> nn.Module:
    like.weight = nn.Parameter(_with_zeros(small.weight, shrunk.weight))
    if small.bias is not None:
        bias = small.bias if shrunk.bias is None else _with_zeros(small.bias, shrunk.bias)
        like.bias = nn.Parameter(bias.clone(), requires_grad=small.bias.requires_grad)
    like.train(small.training)
    return like  # type: ignore[no-any-return]


def _with_zeros(small: Tensor, tensor: TensorPlan) -> Tensor:
    whole = small.new_zeros(tensor.shape)
    for start, stop in tensor.present():
        whole.narrow(tensor.axis, start, stop - start).copy_(
            small.narrow(tensor.axis, tensor.reduced_index(start), stop - start)
        )
    return whole
