"""How a shared model holds its weights in memory: one interface, several realisations.

A storage replaces the modules that a plan touches, before any weight is loaded. The modules keep their names and
load the checkpoint's tensors as they are stored. `storage="auto"` picks what suits the machine and says so in the log:
`indirect` where the model is to run on CUDA devices, `alias` on this machine's CPU, `owner` elsewhere. `vmm` is used
where it is asked for.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from headshare.errors import PlanError
from headshare.plan.tensors import GappedTensor
from headshare.storage.owner import OwnerStorage
from headshare.storage.pooled import alias, indirect
from headshare.storage.pooled.alias import AliasStorage
from headshare.storage.pooled.indirect import IndirectStorage
from headshare.storage.pooled.vmm import VmmStorage

LOGGER = logging.getLogger("headshare")


@runtime_checkable
class Storage(Protocol):
    """What a realisation does."""

    def install(self, model: nn.Module, tensors: Mapping[str, GappedTensor], modules: Mapping[str, str]) -> None:
        """Replace the modules that hold these tensors. `modules` maps each tensor's name to its module's path."""


# Each makes a storage for tensors on these devices: names of tensors to names of devices (cpu, cuda:0, disk).
STORAGES: dict[str, Callable[[Mapping[str, str]], Storage]] = {
    "alias": AliasStorage,
    "indirect": IndirectStorage,
    "owner": lambda _: OwnerStorage(),
    "vmm": VmmStorage,
}


def check_storage(name: str) -> None:
    """Refuse a name that is none.

    Raises:
        PlanError: naming those that exist.
    """
    if name != "auto" and name not in STORAGES:
        raise PlanError(f"there is no storage '{name}'. There are: auto, {', '.join(STORAGES)}.")


def choose_storage(name: str, tensors: Mapping[str, GappedTensor], dtypes: set[torch.dtype], devices: set[str]) -> str:
    """The storage to use; `auto` decides from the types of numbers and of devices (cpu, cuda, disk), and logs why.

    Raises:
        PlanError: if there is no storage of that name.
    """
    check_storage(name)
    if name != "auto":
        return name
    chosen, reason = _best(tensors, dtypes, devices)
    LOGGER.info("storage %s: %s", chosen, reason)
    return chosen


def _best(tensors: Mapping[str, GappedTensor], dtypes: set[torch.dtype], devices: set[str]) -> tuple[str, str]:
    if devices == {"cpu"}:
        reason = alias.refusal(tensors, dtypes)
        if reason:
            return "owner", f"aliases are not possible: {reason}"
        return "alias", "the model is placed on this machine's CPU"
    if devices == {"cuda"}:
        reason = indirect.refusal(tensors, dtypes)
        return ("owner", reason) if reason else ("indirect", "the model is placed on CUDA devices")
    return "owner", f"the model is placed on {', '.join(sorted(devices))}"
