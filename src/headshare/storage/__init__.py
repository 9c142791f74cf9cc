"""How a shared model holds its weights in memory: one interface, several realisations.

A storage replaces the modules that a plan touches, before any weight is loaded. The modules keep their names and
load the checkpoint's tensors as they are stored. `storage="auto"` picks what suits the machine; today that is `owner`.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import nn

from headshare.errors import PlanError
from headshare.gaps import GappedTensor
from headshare.storage.owner import OwnerStorage


@runtime_checkable
class Storage(Protocol):
    """What a realisation does."""

    def install(self, model: nn.Module, tensors: Mapping[str, GappedTensor], modules: Mapping[str, str]) -> None:
        """Replace the modules that hold these tensors. `modules` maps each tensor's name to its module's path."""


STORAGES: dict[str, Storage] = {"owner": OwnerStorage()}


def get_storage(name: str) -> Storage:
    """The realisation of that name; `auto` chooses.

    Raises:
        PlanError: naming those that exist.
    """
    chosen = "owner" if name == "auto" else name
    if chosen not in STORAGES:
        raise PlanError(f"there is no storage '{name}'. There are: auto, {', '.join(STORAGES)}.")
    return STORAGES[chosen]
