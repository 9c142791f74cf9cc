"""Storage `vmm`: each unit once on a CUDA device, and every weight one range of addresses over the units it uses.

What `alias` is on a CPU, through the driver's virtual memory management: the product is the stock module's own, on an
ordinary tensor. The driver maps whole granules (2 MiB), so that slots must be multiples of them. Weights are
read-only: to train, hold the model by `owner`.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from headshare.errors import StorageError
from headshare.plan.tensors import GappedTensor
from headshare.storage.pooled.frozen import Bank, Held, install_frozen
from headshare.storage.pooled.product import INSTALL
from headshare.storage.pooled.shelves import Shelf, in_slots, shelves_of, torch_devices, turned
from headshare.storage.pooled.slots import racks_of

OTHERWISE = 'Load the model with storage="indirect".'


@runtime_checkable
class Driver(Protocol):
    """One device's physical memory, its addresses, and what is mapped where. Methods raise StorageError."""

    granularity: int

    def create(self, nbytes: int) -> Any:
        """Physical memory; a handle."""

    def release(self, handle: Any) -> None:
        """Free physical memory, once nothing maps it."""

    def reserve(self, nbytes: int) -> int:
        """A range of addresses, with nothing behind it."""

    def free(self, address: int, nbytes: int) -> None:
        """Give a range of addresses back; nothing is mapped there any more."""

    def map(self, address: int, nbytes: int, handle: Any) -> None:
        """Put all of the handle's memory behind these addresses."""

    def unmap(self, address: int, nbytes: int) -> None:
        """Undo one `map`."""

    def allow(self, address: int, nbytes: int) -> None:
        """Let the device read and write there."""

    def tensor(self, span: "Span") -> Tensor:
        """Bytes at these addresses. The tensor keeps the span alive."""

    def finish(self) -> None:
        """Wait for all work on the device."""


class Block:
    """Physical memory of one slot. The driver keeps it for as long as this, or anything mapped over it, lives."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.nbytes = nbytes
        self.handle = driver.create(nbytes)
        weakref.finalize(self, driver.release, self.handle).atexit = False


class Span:
    """A range of addresses laid over blocks; given back when the last tensor on it is gone.

    Raises:
        StorageError: if the driver refuses; what was mapped by then is unmapped.
    """

    def __init__(self, driver: Driver, blocks: Sequence[Block]) -> None:
        self.nbytes = sum(block.nbytes for block in blocks)
        self.address = driver.reserve(self.nbytes)
        mapped: list[tuple[int, int]] = []
        give_back = weakref.finalize(self, _give_back, driver, self.address, self.nbytes, mapped)
        give_back.atexit = False
        try:
            at = self.address
            for block in blocks:
                driver.map(at, block.nbytes, block.handle)
                mapped.append((at, block.nbytes))
                at += block.nbytes
            driver.allow(self.address, self.nbytes)
        except StorageError:
            give_back()
            raise

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """How torch finds the memory, and keeps this object."""
        return {"version": 3, "shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "strides": None}


def _give_back(driver: Driver, address: int, nbytes: int, mapped: list[tuple[int, int]]) -> None:
    driver.finish()  # kernels may still be reading
    for start, length in mapped:
        driver.unmap(start, length)
    driver.free(address, nbytes)


class VmmBank(Bank):
    """Blocks on every device, one for each slot. Once sealed, whole weights are laid over them."""

    def __init__(
        self,
        tensors: Mapping[str, GappedTensor],
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
    def on(cls, tensors: Mapping[str, GappedTensor], devices: Mapping[str, torch.device]) -> "VmmBank":
        """An empty bank for tensors that are on these devices."""
        return cls(tensors, devices, cuda_driver)

    def put(self, name: str, stored: Tensor) -> Tensor:
        """Copy a tensor's rows to blocks of its own, and to replicas of those that other devices use.

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

    def seal(self) -> dict[str, Held]:
        """Lay every whole weight over its blocks. From then on the mappings alone keep the memory.

        Raises:
            StorageError: if a tensor did not load, or two that are tied are of different types of number.
        """
        held = {name: self._hold(name) for name in self.tensors}
        for device in {shelf.device for shelf in self._shelves}:
            self._drivers(device).finish()
        self._blocks.clear()
        return held

    def _filled(self, n: int, shelf: Shelf, name: str, positions: list[int], slots: Tensor) -> Tensor:
        """New blocks for these positions, holding these slots. Shape: as the slots."""
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
        memory = driver.tensor(Span(driver, blocks)).view(slots.dtype).view(slots.shape)
        memory.copy_(slots)
        self._blocks.update({(n, position): block for position, block in zip(positions, blocks, strict=True)})
        return memory

    def _hold(self, name: str) -> Held:
        n = self._home[name]
        shelf, own = self._shelves[n], self._own.get(name)
        blocks = [self._blocks.get((n, position)) for position in shelf.table(name)]
        if own is None or None in blocks:
            raise StorageError(f"{name}, or a tensor whose rows it uses, did not load. Check the checkpoint's files.")
        stored = turned(self.tensors[name], own)
        if not shelf.rack.placed[name].borrows:
            return Held(stored, stored)
        slot = shelf.rack.height * shelf.rack.width * own.dtype.itemsize
        known = [block for block in blocks if block is not None]
        if any(block.nbytes != slot for block in known):
            raise StorageError(f"{name} is {own.dtype} and uses rows of another type. Load the model with dtype=.")
        driver = self._drivers(shelf.device)
        whole = driver.tensor(Span(driver, known)).view(own.dtype).view(-1, shelf.rack.width)
        return Held(stored, turned(self.tensors[name], whole))


class CudaDriver:
    """A CUDA device, through cuda-bindings.

    Raises:
        StorageError: if there is no such device, or no cuda-bindings.
    """

    def __init__(self, device: torch.device) -> None:
        if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
            raise StorageError(f"storage vmm needs cuda-bindings: {INSTALL}. {OTHERWISE}")
        if device.type != "cuda" or not torch.cuda.is_available():
            raise StorageError(f"storage vmm needs a CUDA device; {device} is none, or is not here.")
        from cuda.bindings import driver

        self.device = device
        self._cuda = driver
        self.finish()  # from here on the device has the context that torch uses
        self._properties = allocation(driver, device.index)
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(self._done(driver.cuMemGetAllocationGranularity(self._properties, minimum)))

    def create(self, nbytes: int) -> Any:
        """Physical memory on the device; a handle."""
        return self._done(self._cuda.cuMemCreate(nbytes, self._properties, 0))

    def release(self, handle: Any) -> None:
        """Free physical memory, once nothing maps it."""
        self._done(self._cuda.cuMemRelease(handle))

    def reserve(self, nbytes: int) -> int:
        """A range of addresses, with nothing behind it."""
        return int(self._done(self._cuda.cuMemAddressReserve(nbytes, 0, self._cuda.CUdeviceptr(0), 0)))

    def free(self, address: int, nbytes: int) -> None:
        """Give a range of addresses back."""
        self._done(self._cuda.cuMemAddressFree(self._cuda.CUdeviceptr(address), nbytes))

    def map(self, address: int, nbytes: int, handle: Any) -> None:
        """Put all of the handle's memory behind these addresses."""
        self._done(self._cuda.cuMemMap(self._cuda.CUdeviceptr(address), nbytes, 0, handle, 0))

    def unmap(self, address: int, nbytes: int) -> None:
        """Undo one `map`."""
        self._done(self._cuda.cuMemUnmap(self._cuda.CUdeviceptr(address), nbytes))

    def allow(self, address: int, nbytes: int) -> None:
        """Let the device read and write there."""
        access = access_of(self._cuda, self.device.index)
        self._done(self._cuda.cuMemSetAccess(self._cuda.CUdeviceptr(address), nbytes, [access], 1))

    def tensor(self, span: Span) -> Tensor:
        """Bytes at these addresses."""
        return torch.as_tensor(span, device=self.device)

    def finish(self) -> None:
        """Wait for all work on the device."""
        torch.cuda.synchronize(self.device)

    def _done(self, answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise StorageError(f"the CUDA driver on {self.device} refused: {status.name}. {OTHERWISE}")
        return values[0] if values else None


@cache
def cuda_driver(device: torch.device) -> Driver:
    """The driver of a device, the same for all who ask."""
    return CudaDriver(device)


def allocation(driver: Any, index: int) -> Any:
    """What is asked of physical memory: that it is the device's own."""
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = index
    return properties


def access_of(driver: Any, index: int) -> Any:
    """The right of a device to read and write."""
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = index
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


class VmmStorage:
    """Install projections whose weights are mapped. `devices` says where each tensor's module is."""

    def __init__(self, devices: Mapping[str, str], drivers: Callable[[torch.device], Driver] = cuda_driver) -> None:
        self.devices = devices
        self.drivers = drivers

    def install(self, model: nn.Module, tensors: Mapping[str, GappedTensor], modules: Mapping[str, str]) -> None:
        """Replace the modules; their weights go to one bank as they load.

        Raises:
            StorageError: if the modules are not on CUDA devices, or the driver cannot be reached.
        """
        devices = torch_devices(self.devices, "vmm")
        for device in set(devices.values()):
            self.drivers(device)
        install_frozen(model, VmmBank(tensors, devices, self.drivers), modules)
