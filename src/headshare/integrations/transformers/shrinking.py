"""Take removed units out of a stock model before its weights load, and put zeros in their places afterwards.

A module that loses rows or columns keeps its class, and only becomes smaller. So it is with dimensions of values.
Attention that counts its heads, or all dimensions of their values, is told the new number. The attributes that it
counts them by are data, in `families`. Attention that loses all its heads is replaced (`absent.py`); a feed-forward
without neurons works as it is.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headshare.architecture.config import text_config
from headshare.architecture.families import Counts, Linear, family_of
from headshare.architecture.model_layouts import ModelLayouts
from headshare.architecture.modules import ModuleMap, linear_of, module_path, replace_module
from headshare.architecture.removable import attention_kinds, check_removals, counts_of
from headshare.errors import ArchitectureError, StorageError
from headshare.integrations.transformers.absent import AbsentAttention, BiasOnly, take_places
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
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


def check_attention(config: Any, plan: SharePlan) -> None:
    """Refuse an implementation of attention that cannot run a plan's model.

    Raises:
        StorageError: naming it.
    """
    name = str(getattr(config, "_attn_implementation", None))
    if plan.narrow_values is not None and "flash" in name:
        raise StorageError(
            f"{name} is for heads whose values are as wide as keys; this model has narrower ones. "
            'Load it with attn_implementation="sdpa".'
        )


def shrink(model: Any, plan: SharePlan, modules: ModuleMap) -> None:
    """Take removed units, and dropped dimensions of values, out of a stock model on the meta device.

    Raises:
        PlanError: if the model cannot go without such units.
        StorageError: if it has modules of other shapes or kinds, or one that holds several tensors.
        ArchitectureError: if it counts its attention in a way that the plan's groups do not divide.
    """
    # refuse the plan before any module is changed
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    config = text_config(model.config.to_dict())
    check_removals(plan, ModelLayouts(config, shapes))
    # matrices first, then the numbers by which attention splits what they give into heads
    for name, shrunk in shrunk_of(plan).items():
        module: Any = modules.module(model, name)
        linear = _shrink_module(module, shrunk)
        # a class that stores (input, output) flattens its inputs, which has no meaning where these have no width
        if linear.in_out and module.weight.shape[0] == 0:
            modules.replace(model, name, BiasOnly(module.weight, module.bias))
    for attention, counts, numbers in _counted(model, plan):
        for name in counts.attributes:
            setattr(attention, name, _scaled(getattr(attention, name), *numbers))
        if counts.settings:
            own = {name: _scaled(getattr(attention.config, name), *numbers) for name in counts.settings}
            attention.config = FewerHeads(attention.config, own)
    # last, attention of which nothing is left
    for removal in _attention_removals(plan):
        for layer in removal.whole_layers:
            replace_module(model, _attention_path(model, removal, layer), _absent(model, removal, layer))
        if removal.whole_layers:
            kinds = attention_kinds(config, removal.layout.layers)
            take_places(_attentions(model, removal), kinds, removal.whole_layers)


def _attention_removals(plan: SharePlan) -> Iterator[Removal]:
    return (removal for removal in plan.removals if removal.layout.kind is Sublayer.ATTENTION)


def _attention_path(model: nn.Module, removal: Removal, layer: int) -> str:
    """The path of the module that computes attention: the one that holds queries."""
    return module_path(model, removal.layout.parts[Part.Q].name(layer)).rpartition(".")[0]


def _attentions(model: nn.Module, removal: Removal) -> list[Any]:
    """The attention modules of all layers."""
    return [model.get_submodule(_attention_path(model, removal, layer)) for layer in range(removal.layout.layers)]


def _absent(model: nn.Module, removal: Removal, layer: int) -> AbsentAttention:
    """The module in the place of a layer's attention."""
    path = _attention_path(model, removal, layer)
    beside, _, output = module_path(model, removal.layout.parts[Part.O].name(layer)).rpartition(".")
    return AbsentAttention(model.get_submodule(path), output if beside == path else None)


def _counted(model: Any, plan: SharePlan) -> list[tuple[Any, Counts, tuple[int, int]]]:
    """Attention modules that lose units or dimensions, with the attributes that count them and numbers (kept, all)."""
    counted = []
    family = family_of(str(model.config.model_type))
    values = plan.narrow_values
    if values is not None and family is not None and family.narrow_values is not None:
        for layer, width in values.widths.items():
            path = module_path(model, values.places(layer).v).rpartition(".")[0]
            counted.append((model.get_submodule(path), family.narrow_values, (width, values.dims)))
    for removal in _attention_removals(plan):
        groups = removal.layout.groups
        for layer in removal.removed.keys() - set(removal.whole_layers):
            counts = counts_of(str(model.config.model_type))
            assert counts is not None  # else the removal was refused
            attention = model.get_submodule(_attention_path(model, removal, layer))
            counted.append((attention, counts, (groups - len(removal.indices(layer)), groups)))
    return counted


def _scaled(number: Any, kept: int, groups: int) -> int:
    if type(number) is not int or number % groups:
        raise ArchitectureError(
            f"the model counts its attention by {number!r:.50}, which {groups} groups do not divide."
        )
    return number // groups * kept


def _shrink_module(module: Any, shrunk: Shrunk) -> Linear:
    """Make the module smaller, and return its kind."""
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
    return linear


def regrow(model: Any, plan: SharePlan, stock: Mapping[str, nn.Module], modules: ModuleMap) -> None:
    """Put modules of full size, with zeros where units were removed, in place of smaller ones. Undoes `shrink`.

    `stock` holds an empty module of full size for each path.
    """
    for attention, counts, (kept, groups) in _counted(model, plan):
        for name in counts.attributes:
            setattr(attention, name, getattr(attention, name) // kept * groups)
        if counts.settings:
            attention.config = attention.config.whole
    for name, shrunk in shrunk_of(plan).items():
        whole = _whole(modules.module(model, name), stock[modules.path(name)], shrunk)
        modules.replace(model, name, whole)
    for removal in _attention_removals(plan):
        attentions = _attentions(model, removal)
        for layer in removal.whole_layers:
            replace_module(model, _attention_path(model, removal, layer), attentions[layer].stock)
        take_places(_attentions(model, removal), [""] * len(attentions), ())


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


def stock_copies(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Empty dense modules by path, of the classes that this model would have without sharing."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        stock = type(model)(config)
    return {path: stock.get_submodule(path) for path in paths}
