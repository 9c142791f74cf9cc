"""Virtual memory of CUDA devices: reserved addresses, physical blocks, and mappings between the two."""

import weakref
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from headshare.errors import StorageError
from headshare.installing import install

OTHERWISE = 'Load the model with storage="indirect".'


@runtime_checkable
class Driver(Protocol):
    """The driver of a device: its physical memory, its addresses, and their mappings. Methods raise StorageError."""

    granularity: int

    def create(self, nbytes: int) -> Any:
        """The handle of new physical memory."""

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

    def tensor(self, span: "AddressSpan") -> Tensor:
        """The bytes at these addresses as a tensor, which keeps the span alive."""

    def finish(self) -> None:
        """Wait for all work on the device."""


class Block:
    """Physical memory of one slot. The driver keeps it for as long as this object, or a mapping of it, lives."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.nbytes = nbytes
        self.handle = driver.create(nbytes)
        weakref.finalize(self, driver.release, self.handle).atexit = False


class AddressSpan:
    """A range of addresses over blocks, which is given back when the last tensor on it is gone.

    Raises:
        StorageError: if the driver refuses. Blocks that were mapped by then are unmapped.
    """

    def __init__(self, driver: Driver, blocks: Sequence[Block]) -> None:
        self.nbytes = sum(block.nbytes for block in blocks)
        self.address = driver.reserve(self.nbytes)
        # filled as blocks are mapped, so that a refusal half-way gives back exactly what there is
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
        """The description by which torch finds the memory, and keeps this object."""
        return {"version": 3, "shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "strides": None}


def _give_back(driver: Driver, address: int, nbytes: int, mapped: list[tuple[int, int]]) -> None:
    driver.finish()  # kernels may still be reading
    for start, length in mapped:
        driver.unmap(start, length)
    driver.free(address, nbytes)


def driver_installed() -> bool:
    """Whether cuda-bindings can be imported."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


class CudaDriver:
    """The driver of a CUDA device, called through cuda-bindings.

    Raises:
        StorageError: if there is no such device, or cuda-bindings is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        if not driver_installed():
            raise StorageError(f"storage vmm needs cuda-bindings: {install('kernels')}. {OTHERWISE}")
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
        """The handle of new physical memory on the device."""
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

    def tensor(self, span: AddressSpan) -> Tensor:
        """The bytes at these addresses as a tensor, which keeps the span alive."""
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
    """The driver of a device, the same object at every call."""
    return CudaDriver(device)


def allocation(driver: Any, index: int) -> Any:
    """The request for physical memory: that it is the device's own."""
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
