"""Copies in a loaded model: tensors that are stored once under several names are one parameter of several modules.

The modules stay the stock ones. Until the weights are loaded, a copy is an empty parameter, which is what its file
holds. So it takes no memory in any storage, and it trains as one with the parameter that it is.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from headshare.architecture.families import names_elsewhere
from headshare.architecture.modules import module_path
from headshare.errors import PlanError, StorageError
from headshare.storage.rounded import held_by, tie, untied


class ParameterPlace(NamedTuple):
    """The place of a parameter in a model: the path of its module, and its name there."""

    path: str
    leaf: str

    @property
    def name(self) -> str:
        """The parameter's own name in the model."""
        return f"{self.path}.{self.leaf}"

    def get(self, model: nn.Module) -> nn.Parameter:
        """The parameter that stands there now."""
        parameter = model.get_submodule(self.path)._parameters[self.leaf]
        assert parameter is not None
        return parameter

    def put(self, model: nn.Module, parameter: nn.Parameter) -> None:
        """Put a parameter there."""
        model.get_submodule(self.path)._parameters[self.leaf] = parameter


class Copies:
    """The copies of a model, each with the place of the parameter that it is. Built while the model is empty.

    Raises:
        StorageError: if the model has no parameter for one of them alone.
    """

    def __init__(self, model: nn.Module, copies: Mapping[str, str]) -> None:
        # copies of rounded matrices, with the empty tensors that files hold for them
        self._rounded: dict[ParameterPlace, Tensor] = {}
        self._hook: RemovableHandle | None = None
        self._donors = {place_of(model, name): place_of(model, donor) for name, donor in copies.items()}

    def __len__(self) -> int:
        return len(self._donors)

    def empty(self, model: nn.Module) -> None:
        """Leave no rows of the parameters that are copies, as their files have none."""
        for place in self._donors:
            whole = place.get(model)
            place.put(model, nn.Parameter(whole.new_empty(0, *whole.shape[1:]), requires_grad=whole.requires_grad))

    def join(self, model: nn.Module) -> None:
        """Put each stored parameter in the place of its copies, once all weights are loaded.

        On another device than the stored one's, all copies there are one parameter of their own.

        Raises:
            StorageError: if a stored parameter was left on a disk, or in memory until it is used.
        """
        held: dict[tuple[int, torch.device], nn.Parameter] = {}
        for place, donor in self._donors.items():
            device = place.get(model).device
            if _is_offloaded(model, place) or _is_offloaded(model, donor):
                raise StorageError(
                    f"{place.name} is {donor.name}, bit for bit, and one of the two is offloaded. Give the model room "
                    "(device_map=), or expand it first: headshare expand."
                )
            lender = model.get_submodule(donor.path)
            if donor.leaf in held_by(lender):
                self._rounded[place] = place.get(model).detach()
                tie(model.get_submodule(place.path), lender, donor.leaf)
                continue
            stored = donor.get(model)
            if stored.device != device:
                stored = held.setdefault((id(stored), device), nn.Parameter(stored.detach().to(device)))
            place.put(model, stored)
        self._hook = model.register_load_state_dict_pre_hook(self._fill)  # type: ignore[no-untyped-call]

    def _fill(self, _: nn.Module, state: dict[str, Any], prefix: str, *__: object) -> None:
        """Let the model load a state dictionary in which copies have no rows, as `emptied` makes it."""
        for place, donor in self._donors.items():
            held = state.get(f"{prefix}{place.name}")
            if place in self._rounded:
                state.pop(f"{prefix}{place.name}", None)
            elif held is not None and not held.numel():
                state[f"{prefix}{place.name}"] = state[f"{prefix}{donor.name}"]

    def emptied(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dictionary in which copies have no rows, as a file of the model holds them."""
        names = {place.name for place in self._donors}
        rounded = {place.name: empty for place, empty in self._rounded.items()}
        return rounded | {
            name: tensor.new_empty(0, *tensor.shape[1:]) if name in names else tensor for name, tensor in state.items()
        }

    def part(self, model: nn.Module) -> None:
        """Give each copy memory of its own again, as a stock model has it."""
        if self._hook is not None:
            self._hook.remove()
        for place in self._donors:
            untied(model.get_submodule(place.path))
            shared = place.get(model)
            place.put(model, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))


def place_of(model: nn.Module, tensor: str) -> ParameterPlace:
    """The place at which a model keeps a checkpoint's tensor.

    Raises:
        StorageError: if it keeps it in no parameter of its own, as experts that transformers stacks in one.
    """
    for name in (tensor, *names_elsewhere(tensor)):
        path, _, leaf = name.rpartition(".")
        for found in _paths(model, path):
            if model.get_submodule(found)._parameters.get(leaf) is not None:
                return ParameterPlace(found, leaf)
    alike = [name for name, _ in model.named_parameters(remove_duplicate=False) if _is_alike(name, tensor)]
    if len(alike) == 1:
        path, _, leaf = alike[0].rpartition(".")
        return ParameterPlace(path, leaf)
    raise StorageError(
        f"{type(model).__name__} has no parameter for {tensor} alone, so it cannot be held once. Expand the model: "
        "headshare expand"
    )


def _is_alike(name: str, tensor: str) -> bool:
    """True if a parameter's name differs from a tensor's in one step within its layer, as where a class was renamed."""
    ours, theirs = ([*steps[_layer_at(steps) :]] for steps in (name.split("."), tensor.split(".")))
    return (
        len(ours) == len(theirs) > 2
        and sum(one != other for one, other in zip(ours, theirs, strict=True)) == 1
        and ([step for step in ours if step.isdigit()] == [step for step in theirs if step.isdigit()] != [])
    )


def _layer_at(steps: list[str]) -> int:
    """The place of a layer's number in a name; its end where it has none."""
    return next((at for at, step in enumerate(steps) if step.isdigit()), len(steps))


def _is_offloaded(model: nn.Module, place: ParameterPlace) -> bool:
    """True if accelerate brings this parameter only when its module runs."""
    module = model.get_submodule(place.path)
    return hasattr(module, "_hf_hook") and any(each.is_meta for each in module.parameters(recurse=False))


def _paths(model: nn.Module, path: str) -> Iterator[str]:
    try:
        yield module_path(model, path)
    except PlanError:
        return
