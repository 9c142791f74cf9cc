"""Storage `vmm`: each unit stands once on a CUDA device, and every weight is one range of addresses over its units.

It is the counterpart of `alias`, which is for CPUs, and uses the driver's virtual memory management. The product is the
stock module's own, on an ordinary tensor. The driver maps whole granules (2 MiB), so that slots must be multiples of
them. Weights are read-only: to train, hold the model by `owner`.
"""

from collections.abc import Callable, Mapping, Set
from typing import ClassVar

import torch
from torch import Tensor, nn

from headshare.architecture.modules import ModuleMap
from headshare.errors import StorageError
from headshare.plan.tensors import TensorPlan
from headshare.storage.pooled.bank import BlockPool, PooledTensor
from headshare.storage.pooled.cuda_driver import OTHERWISE, AddressSpan, Block, Driver, cuda_driver, driver_installed
from headshare.storage.pooled.frozen import install_frozen
from headshare.storage.pooled.shelves import DeviceBlocks, in_slots, placed_on, shelves_of, torch_devices, turned
from headshare.storage.pooled.slots import racks_of


class VmmBank(BlockPool):
    """The bank of the blocks of all devices, one for each slot. Once sealed, whole weights are laid over them."""

    def __init__(
        self,
        tensors: Mapping[str, TensorPlan],
        devices: Mapping[str, torch.device],
        drivers: Callable[[torch.device], Driver],
    ) -> None:
        super().__init__(tensors)
        self._drivers = drivers
        self._shelves = [shelf for rack in racks_of(tensors) for shelf in shelves_of(rack, devices)]
        self._home = {name: n for n, shelf in enumerate(self._shelves) for name in shelf.names}
        self._blocks: dict[tuple[int, int], Block] = {}
        self._own: dict[str, Tensor] = {}

    @classmethod
    def on(cls, tensors: Mapping[str, TensorPlan], devices: Mapping[str, torch.device]) -> "VmmBank":
        """An empty bank for tensors that are on these devices."""
        return cls(tensors, devices, cuda_driver)

    def put(self, name: str, stored: Tensor) -> Tensor:
        """Copy a tensor's rows to blocks of its own, and to replicas of the blocks that other devices use.

        Raises:
            StorageError: if a slot is not a multiple of the device's granularity, or there is no memory for it.
        """
        rack = self._shelves[self._home[name]].rack
        slots = in_slots(self.tensors[name], rack, stored)
        for n, shelf in enumerate(self._shelves):
            own, positions = shelf.wanted(name) if shelf.rack is rack else ([], [])
            if name in shelf.names:
                self._own[name] = self._filled(n, shelf, name, positions, slots).flatten(0, 1)
            elif own:
                self._filled(n, shelf, name, positions, slots[own])
        return turned(self.tensors[name], self._own[name])

    def seal(self) -> dict[str, PooledTensor]:
        """Lay every whole weight over its blocks. Returns the place of each tensor.

        From then on only the mappings keep the memory.

        Raises:
            StorageError: if a tensor did not load, or two that are tied are of different types of number.
        """
        held = {name: self._hold(name) for name in self.tensors}
        for device in {shelf.device for shelf in self._shelves}:
            self._drivers(device).finish()
        self._blocks.clear()
        return held

    def _filled(self, n: int, shelf: DeviceBlocks, name: str, positions: list[int], slots: Tensor) -> Tensor:
        """A view of new blocks at these positions, filled with these slots. Shape: that of the slots."""
        driver = self._drivers(shelf.device)
        if not positions:
            return torch.empty(0, *slots.shape[1:], dtype=slots.dtype, device=shelf.device)
        nbytes = slots[0].numel() * slots.dtype.itemsize
        if nbytes % driver.granularity:
            raise StorageError(
                f"storage vmm maps memory in granules of {driver.granularity:,} bytes, and the blocks of {name} are "
                f"{shelf.rack.height} rows of {shelf.rack.width} {slots.dtype} numbers, {nbytes:,} bytes. {OTHERWISE}"
            )
        blocks = [Block(driver, nbytes) for _ in positions]
        memory = driver.tensor(AddressSpan(driver, blocks)).view(slots.dtype).view(slots.shape)
        memory.copy_(slots)
        self._blocks.update({(n, position): block for position, block in zip(positions, blocks, strict=True)})
        return memory

    def _hold(self, name: str) -> PooledTensor:
        # Replicas are filled when their tensors load, so a missing block means that a tensor did not load.
        n = self._home[name]
        shelf = self._shelves[n]
        own = self._own.get(name)
        blocks = [self._blocks.get((n, position)) for position in shelf.table(name)]
        if own is None or None in blocks:
            raise StorageError(f"{name}, or a tensor whose rows it uses, did not load. Check the checkpoint's files.")
        stored = turned(self.tensors[name], own)
        if not shelf.rack.placed[name].borrows:
            return PooledTensor(stored, stored)
        # Blocks of another size hold another type of number, and so cannot be mapped as rows of this weight.
        slot = shelf.rack.height * shelf.rack.width * own.dtype.itemsize
        known = [block for block in blocks if block is not None]
        if any(block.nbytes != slot for block in known):
            raise StorageError(f"{name} is {own.dtype} and uses rows of another type. Load the model with dtype=.")
        driver = self._drivers(shelf.device)
        whole = driver.tensor(AddressSpan(driver, known)).view(own.dtype).view(-1, shelf.rack.width)
        return PooledTensor(stored, turned(self.tensors[name], whole))


class VmmStorage:
    """The storage of projections whose weights are CUDA mappings. `devices` maps tensors to their devices."""

    name: ClassVar[str] = "vmm"
    trains: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    replicates: ClassVar[bool] = True
    brings_memory: ClassVar[bool] = True

    @classmethod
    def refusal(
        cls,
        tensors: Mapping[str, TensorPlan],  # noqa: ARG003 - whether granules fit them, only their device can say
        dtypes: Set[torch.dtype],  # noqa: ARG003
        devices: Set[str],
    ) -> str | None:
        """The reason why mappings do not fit: they need CUDA devices, and cuda-bindings."""
        if devices != {"cuda"}:
            return placed_on(devices)
        return None if driver_installed() else "cuda-bindings is not installed"

    def __init__(self, devices: Mapping[str, str], drivers: Callable[[torch.device], Driver] = cuda_driver) -> None:
        self.devices = devices
        self.drivers = drivers

    def install(self, model: nn.Module, tensors: Mapping[str, TensorPlan], modules: ModuleMap) -> None:
        """Replace the modules. As their weights load, these all go to one bank.

        Raises:
            StorageError: if the modules are not on CUDA devices or hold several tensors, or the driver cannot be
                reached.
        """
        devices = torch_devices(self.devices, self.name)
        for device in set(devices.values()):
            self.drivers(device)
        install_frozen(model, VmmBank(tensors, devices, self.drivers), modules)
