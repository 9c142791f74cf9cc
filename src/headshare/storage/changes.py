"""Module changes: modules of a loaded model that sections of a plan replace, beside any storage of weights.

A section names the modules that it changes (`ModuleChange`), and the functions here build the new ones. A new module
loads its tensors under their own names, has ordinary parameters, and stands beside the modules of every storage.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import nn

from headshare.architecture.modules import ModuleMap
from headshare.errors import StorageError
from headshare.plan.low_rank import LOW_RANK
from headshare.plan.narrow_values import NARROW, NarrowValues
from headshare.plan.plan import SharePlan
from headshare.plan.section import Section
from headshare.plan.tensors import TensorPlan
from headshare.storage.low_rank import LowRankProjection
from headshare.storage.narrow_values import NarrowValuesProjection
from headshare.storage.projection import SharedProjection, dense_module


@runtime_checkable
class Build(Protocol):
    """A function that makes the new module from the stock one."""

    def __call__(self, stock: nn.Module, tensor: TensorPlan | None, section: Section) -> nn.Module:
        """The module that stands in for `stock`, on the same device (meta).

        `tensor` is the tensor plan of the tensor that names the module. It counts without removed units.
        """


@runtime_checkable
class Replaceable(Protocol):
    """A changed module that a stock module can replace again."""

    def stock_module(self, like: nn.Module) -> nn.Module:
        """Fill the empty stock module `like` with weights that compute the same. Returns `like`."""


def _low_rank(stock: nn.Module, tensor: TensorPlan | None, section: Section) -> nn.Module:
    assert tensor is not None, section
    return LowRankProjection(stock, tensor)


def _narrow_values(stock: nn.Module, tensor: TensorPlan | None, section: Section) -> nn.Module:
    assert tensor is not None, section
    assert isinstance(section, NarrowValues), section
    return NarrowValuesProjection(stock, tensor, section.width_in(tensor.name))


# Functions by the kind of change that a section names.
MODULE_CHANGES: dict[str, Build] = {LOW_RANK: _low_rank, NARROW: _narrow_values}


def changed_tensors(plan: SharePlan) -> list[str]:
    """Names of the tensors whose modules the plan's sections change."""
    return [change.tensor for section in plan.sections for change in section.modules()]


def change_modules(model: nn.Module, plan: SharePlan, modules: ModuleMap) -> None:
    """Replace the modules of a stock model that the plan's sections change. `modules` has those of `changed_tensors`.

    Raises:
        StorageError: if nothing here builds such a module, or a module holds several tensors.
        PlanError: if a module has another shape than the plan says.
        StorageError: if it multiplies in another way than we know.
    """
    tensors = plan.tensors
    paths = modules.paths()
    for section in plan.sections:
        for change in section.modules():
            if change.kind not in MODULE_CHANGES:
                raise StorageError(f"the plan holds {change.tensor} as {change.kind!r}, which this headshare cannot.")
            # a change may replace a module around the one that holds the tensor
            path = module_to_change(paths[change.tensor], change.above)
            whole = tensors.get(change.tensor)
            reduced = None if whole is None else whole.reduced(tensors)
            parent, _, leaf = path.rpartition(".")
            built = MODULE_CHANGES[change.kind](model.get_submodule(path), reduced, section)
            setattr(model.get_submodule(parent), leaf, built)


def module_to_change(path: str, above: int) -> str:
    """The path of the module that lies `above` steps above this one."""
    return ".".join(path.split(".")[: -above or None])


def stock_modules(model: nn.Module, stock: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Stock modules, filled, for all of a model's modules that hold weights in another way, by path.

    `stock` has an empty module for each path that `changed_paths` lists.
    """
    filled: dict[str, nn.Module] = {}
    for path in changed_paths(model):
        module = model.get_submodule(path)
        if isinstance(module, SharedProjection):
            filled[path] = dense_module(module, stock[path])
        elif isinstance(module, Replaceable):
            filled[path] = module.stock_module(stock[path])
    return filled


def changed_paths(model: nn.Module) -> list[str]:
    """Paths of the modules that hold weights in another way than stock ones."""
    return [path for path, module in model.named_modules() if isinstance(module, SharedProjection | Replaceable)]
