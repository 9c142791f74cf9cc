"""How a shared model holds its weights in memory: one interface, several realisations.

A storage replaces the modules that a plan touches, before any weight is loaded. The modules keep their names and
load the checkpoint's tensors as they are stored. A storage says of itself all that others need to know; nobody but this
table knows one by its name. `storage="auto"` takes the first that has nothing against it, and says so in the log.
"""

import logging
from collections.abc import Mapping, Set
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from headshare.architecture.modules import ModuleMap
from headshare.errors import StorageError
from headshare.plan.tensors import GappedTensor
from headshare.storage.owner import OwnerStorage
from headshare.storage.pooled.alias import AliasStorage
from headshare.storage.pooled.indirect import IndirectStorage
from headshare.storage.pooled.shelves import placed_on
from headshare.storage.pooled.vmm import VmmStorage

LOGGER = logging.getLogger("headshare")
AUTO = "auto"


@runtime_checkable
class Storage(Protocol):
    """A realisation, made for tensors on these devices: names of tensors to names of devices (cpu, cuda:0, disk).

    Attributes:
        name: what it is asked for by.
        trains: its weights are ordinary parameters, which train, change and move like those of any model.
        packs: matrices of four bits are held in its way, `storage.int4`.
        replicates: a unit that two devices use is held on both.
        brings_memory: its weights take no memory from torch's allocator, so that none is to be set aside for them.
    """

    name: ClassVar[str]
    trains: ClassVar[bool]
    packs: ClassVar[bool]
    replicates: ClassVar[bool]
    brings_memory: ClassVar[bool]

    def __init__(self, devices: Mapping[str, str]) -> None: ...

    @classmethod
    def refusal(cls, tensors: Mapping[str, GappedTensor], dtypes: Set[torch.dtype], devices: Set[str]) -> str | None:
        """The reason why it cannot hold these tensors here, or not well; None if there is none.

        `auto` asks for it. `devices` are kinds: cpu, cuda, disk. Who names a storage gets it all the same, unless
        `install` refuses.
        """

    def install(self, model: nn.Module, tensors: Mapping[str, GappedTensor], modules: ModuleMap) -> None:
        """Replace the modules that hold these tensors.

        Raises:
            StorageError: if the tensors cannot be held so.
        """


# In the order in which `auto` asks them. One that comes after a storage that holds everything is for those who name it.
STORAGES: dict[str, type[Storage]] = {
    storage.name: storage for storage in (AliasStorage, IndirectStorage, OwnerStorage, VmmStorage)
}
# What a model is loaded with that is to be trained, or changed in any other way.
TRAINABLE = next(name for name, storage in STORAGES.items() if storage.trains)


def check_storage(name: str) -> None:
    """Refuse a name that is none.

    Raises:
        StorageError: naming those that exist.
    """
    if name != AUTO and name not in STORAGES:
        raise StorageError(f"there is no storage '{name}'. There are: {AUTO}, {', '.join(STORAGES)}.")


def choose_storage(name: str, tensors: Mapping[str, GappedTensor], dtypes: Set[torch.dtype], devices: Set[str]) -> str:
    """The storage to use; `auto` decides from the types of numbers and of devices (cpu, cuda, disk), and logs why.

    Raises:
        StorageError: if there is no storage of that name.
    """
    check_storage(name)
    if name != AUTO:
        return name
    refusals: list[str] = []
    for storage in STORAGES.values():
        refusal = storage.refusal(tensors, dtypes, devices)
        if refusal is None:
            LOGGER.info("storage %s: %s", storage.name, "; ".join(dict.fromkeys(refusals)) or placed_on(devices))
            return storage.name
        refusals.append(refusal)
    raise StorageError(f"no storage holds this model: {'; '.join(refusals)}.")
