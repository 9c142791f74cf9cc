"""The table of storages: ways in which a shared model holds its weights in memory, behind a single interface.

A storage replaces the modules that a plan touches, before any weight is loaded. The modules keep their names and
load the checkpoint's tensors as they are stored. A storage describes itself completely: no other module knows one by
its name. `storage="auto"` takes the first that does not refuse, and says so in the log.
"""

import logging
from collections.abc import Mapping, Set
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from headshare.architecture.modules import ModuleMap
from headshare.errors import StorageError
from headshare.plan.tensors import TensorPlan
from headshare.storage.names import AUTO, NAMES
from headshare.storage.owner import OwnerStorage
from headshare.storage.pooled.alias import AliasStorage
from headshare.storage.pooled.indirect import IndirectStorage
from headshare.storage.pooled.shelves import placed_on
from headshare.storage.pooled.vmm import VmmStorage

LOGGER = logging.getLogger("headshare")


@runtime_checkable
class Storage(Protocol):
    """A storage for tensors on these devices. `devices` maps names of tensors to names of devices (cpu, cuda:0, disk).

    Attributes:
        name: the name by which users ask for it.
        trains: True if its weights are ordinary parameters, which train, change and move like those of any model.
        packs: True if rounded matrices are held in its way.
        replicates: True if it holds a unit that two devices use on both.
        brings_memory: True if its weights take no memory from torch's allocator, which then must reserve none.
    """

    name: ClassVar[str]
    trains: ClassVar[bool]
    packs: ClassVar[bool]
    replicates: ClassVar[bool]
    brings_memory: ClassVar[bool]

    def __init__(self, devices: Mapping[str, str]) -> None: ...

    @classmethod
    def refusal(cls, tensors: Mapping[str, TensorPlan], dtypes: Set[torch.dtype], devices: Set[str]) -> str | None:
        """The reason why it cannot hold these tensors here, or not well; None if there is none.

        `auto` asks for it. `devices` are kinds: cpu, cuda, disk. A user who names a storage gets it all the same,
        unless `install` refuses.
        """

    def install(self, model: nn.Module, tensors: Mapping[str, TensorPlan], modules: ModuleMap) -> None:
        """Replace the modules that hold these tensors.

        Raises:
            StorageError: if the storage cannot hold the tensors.
        """


STORAGES: dict[str, type[Storage]] = dict(
    zip(NAMES, (AliasStorage, IndirectStorage, OwnerStorage, VmmStorage), strict=True)
)
# The storage for a model that is to be trained, or changed in any other way.
TRAINABLE = next(name for name, storage in STORAGES.items() if storage.trains)


def check_storage(name: str) -> None:
    """Refuse a name that no storage has.

    Raises:
        StorageError: naming the storages that exist.
    """
    if name != AUTO and name not in STORAGES:
        raise StorageError(f"there is no storage '{name}'. There are: {AUTO}, {', '.join(STORAGES)}.")


def choose_storage(
    name: str,
    tensors: Mapping[str, TensorPlan],
    dtypes: Set[torch.dtype],
    devices: Set[str],
    *,
    packs: bool = False,
) -> str:
    """The name of the storage to use. `auto` takes the first that does not refuse, and logs why.

    `dtypes` are types of numbers, and `devices` kinds of devices (cpu, cuda, disk). With `packs`, it must hold rounded
    matrices.

    Raises:
        StorageError: if there is no storage of that name.
    """
    check_storage(name)
    if name != AUTO:
        return name
    refusals: list[str] = []
    for storage in STORAGES.values():
        refusal = storage.refusal(tensors, dtypes, devices)
        if packs and not storage.packs:
            refusal = f"{storage.name} does not hold rounded matrices"
        if refusal is None:
            LOGGER.info("storage %s: %s", storage.name, "; ".join(dict.fromkeys(refusals)) or placed_on(devices))
            return storage.name
        refusals.append(refusal)
    raise StorageError(f"no storage holds this model: {'; '.join(refusals)}.")
