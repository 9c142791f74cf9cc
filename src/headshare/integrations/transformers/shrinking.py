"""Take removed units out of a stock model before its weights load, and put zeros in their places afterwards.

A module that loses rows or columns stays what it is, only smaller. Attention that counts its heads is told their
number: the names of what it counts by are data, in `families`.
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
from headshare.plan.tensors import GappedTensor, bias_name, gapped_biases, gapped_tensors
from headshare.plan.units import Kind, Part


@dataclass(frozen=True)
class Shrunk:
    """What a plan removes from one module: some of its weight, and of its bias where it has one."""

    weight: GappedTensor
    bias: GappedTensor | None


class FewerHeads:
    """A model's configuration as one layer's attention sees it: some numbers are its own, all else is the model's."""

    def __init__(self, config: Any, own: Mapping[str, int]) -> None:
        self.whole = config
        self.own = dict(own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "own" not in self.__dict__:
            raise AttributeError(name)  # a copy that is being made asks before it has anything
        return self.own[name] if name in self.own else getattr(self.whole, name)


def shrunk_of(plan: SharePlan) -> dict[str, Shrunk]:
    """What the plan removes from the module of each of these tensors."""
    biases = gapped_biases(plan)
    return {
        name: Shrunk(tensor, biases.get(bias_name(name)))
        for name, tensor in gapped_tensors(plan).items()
        if tensor.removed
    }


def shrink(model: Any, plan: SharePlan, modules: ModuleMap) -> None:
    """Take removed units out of a stock model on the meta device.

    Raises:
        PlanError: if the model cannot go without such units.
        StorageError: if it has modules of other shapes or kinds, or one that holds several tensors.
        ArchitectureError: if it counts its attention in a way that the plan's groups do not divide.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    check_removals(plan, ModelLayouts(text_config(model.config.to_dict()), shapes))
    for name, shrunk in shrunk_of(plan).items():
        _shrink_module(modules.module(model, name), shrunk)
    for attention, counts, numbers in _counted(model, plan, modules):
        for name in counts.attributes:
            setattr(attention, name, _scaled(getattr(attention, name), *numbers))
        if counts.settings:
            own = {name: _scaled(getattr(attention.config, name), *numbers) for name in counts.settings}
            attention.config = FewerHeads(attention.config, own)


def _counted(model: Any, plan: SharePlan, modules: ModuleMap) -> list[tuple[Any, Counts, tuple[int, int]]]:
    """Every attention module that loses units, what it counts them by, and how many it keeps, of how many."""
    found = []
    for removal in plan.removals:
        if removal.layout.kind is Kind.ATTENTION:
            counts = counts_of(str(model.config.model_type))
            assert counts is not None  # else the removal was refused
            groups = removal.layout.groups
            for layer, spans in removal.removed.items():
                path = modules.path(removal.layout.parts[Part.Q].name(layer)).rpartition(".")[0]
                found.append((model.get_submodule(path), counts, (groups - length(spans), groups)))
    return found


def _scaled(number: Any, kept: int, groups: int) -> int:
    if type(number) is not int or number % groups:
        raise ArchitectureError(
            f"the model counts its attention by {number!r:.50}, which {groups} groups do not divide."
        )
    return number // groups * kept


def _shrink_module(module: Any, shrunk: Shrunk) -> None:
    weight, bias = module.weight, getattr(module, "bias", None)
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
    """Put whole modules, with zeros where units were removed, in place of smaller ones. The inverse of `shrink`.

    `stock` holds an empty module of the whole size for each path.
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


def _with_zeros(small: Tensor, tensor: GappedTensor) -> Tensor:
    whole = small.new_zeros(tensor.shape)
    for start, stop in tensor.present():
        whole.narrow(tensor.axis, start, stop - start).copy_(
            small.narrow(tensor.axis, tensor.reduced_index(start), stop - start)
        )
    return whole
