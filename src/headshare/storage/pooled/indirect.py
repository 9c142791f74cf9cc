"""Storage `indirect`: each unit stands once in a bank, and kernels find a projection's rows by a table of slots.

For inference on CUDA devices. The bank of a device is one tensor for each width of weights, made when the first weight
arrives and never again. Weights are read-only: to train, hold the model by `owner`.
"""

import logging
from collections.abc import Mapping, Set
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from headshare.architecture.modules import ModuleMap
from headshare.errors import StorageError
from headshare.plan.tensors import TensorPlan
from headshare.storage.pooled.bank import BlockPool, PooledTensor
from headshare.storage.pooled.frozen import FrozenProjection, install_frozen
from headshare.storage.pooled.product import KERNEL_DTYPES, BlockTable, kernels, kernels_installed, slot_linear
from headshare.storage.pooled.shelves import DeviceBlocks, in_slots, placed_on, shelves_of, torch_devices, turned
from headshare.storage.pooled.slots import racks_of

LOGGER = logging.getLogger("headshare")
ROWS_OF_TILE = 16


class IndirectBank(BlockPool):
    """The bank of all devices' slots. A tensor's own are one run; those borrowed from another device are copies."""

    def __init__(self, tensors: Mapping[str, TensorPlan], devices: Mapping[str, torch.device]) -> None:
        super().__init__(tensors)
        self._shelves = [shelf for rack in racks_of(tensors) for shelf in shelves_of(rack, devices)]
        self._home = {name: n for n, shelf in enumerate(self._shelves) for name in shelf.names}
        self._memory: dict[int, Tensor] = {}
        self._arrived: set[str] = set()

    @classmethod
    def on(cls, tensors: Mapping[str, TensorPlan], devices: Mapping[str, torch.device]) -> "IndirectBank":
        """An empty bank for tensors that are on these devices."""
        return cls(tensors, devices)

    def put(self, name: str, stored: Tensor) -> Tensor:
        """Copy a tensor's rows to its own slots, and to the replicas of these on other devices.

        Raises:
            StorageError: if the rows are of another type of number than those that came before.
        """
        rack = self._shelves[self._home[name]].rack
        slots = in_slots(self.tensors[name], rack, stored)
        for n, shelf in enumerate(self._shelves):
            if shelf.rack is not rack:
                continue
            memory = self._room(n, shelf, stored.dtype, name)
            own, positions = shelf.wanted(name)
            if name in shelf.names and own:
                memory[positions[0] : positions[0] + len(own)].copy_(slots)
            elif own:
                memory[positions] = slots[own].to(memory.device)
        self._arrived.add(name)
        return self._shown(name)

    def seal(self) -> dict[str, PooledTensor]:
        """Make the table of every whole weight. Returns the place of each tensor.

        Raises:
            StorageError: if some tensor has not arrived.
        """
        missing = sorted(set(self.tensors) - self._arrived)
        if missing:
            raise StorageError(f"{missing[0]} did not load, and its rows may be used by others. Check the files.")
        return {name: PooledTensor(self._shown(name), self._slots(name)) for name in self.tensors}

    def _room(self, n: int, shelf: DeviceBlocks, dtype: torch.dtype, name: str) -> Tensor:
        if n not in self._memory:
            size = (len(shelf.positions), shelf.rack.height, shelf.rack.width)
            self._memory[n] = torch.empty(size, dtype=dtype, device=shelf.device)
        if self._memory[n].dtype != dtype:
            raise StorageError(
                f"{name} is {dtype} and other shared weights are {self._memory[n].dtype}; a bank holds one type. "
                "Load the model with dtype= one of them."
            )
        return self._memory[n]

    def _shown(self, name: str) -> Tensor:
        """A view of a tensor's own rows, as a torch storage of its own: savers then see that no other shares it."""
        shelf = self._shelves[self._home[name]]
        memory = self._memory[self._home[name]]
        placed = shelf.rack.placed[name]
        first = shelf.positions[placed.first] if placed.count else 0
        rows = from_dlpack(memory[first : first + placed.count].flatten(0, 1))
        return turned(self.tensors[name], rows)

    def _slots(self, name: str) -> BlockTable:
        shelf = self._shelves[self._home[name]]
        memory = self._memory[self._home[name]]
        return BlockTable(memory, torch.tensor(shelf.table(name), dtype=torch.int32, device=memory.device))


class IndirectProjection(FrozenProjection):
    """A projection whose product reads the rows of its weight in the bank, by their slots."""

    _whole: BlockTable

    def forward(self, x: Tensor) -> Tensor:
        """The projection of x."""
        self.check_weight()
        if self.tie_scale is not None:
            x = x * self.channel_scale(self.tie_scale)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self._whole.bank.dtype)
        across = (self.axis == 1) != self.in_out  # rows of the bank are input channels
        if not self.bias_after or self.bias is None:
            return slot_linear(x, self._whole, self.bias, across=across)
        return slot_linear(x, self._whole, None, across=across) + self.bias

    def whole_weight(self) -> Tensor:
        """The dense weight, put together anew."""
        rows = self._whole.gather()
        return rows.T if self.axis == 1 else rows


class IndirectStorage:
    """The storage of projections that multiply with slots of a bank. `devices` maps tensors to their devices."""

    name: ClassVar[str] = "indirect"
    trains: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    replicates: ClassVar[bool] = True
    brings_memory: ClassVar[bool] = False

    @classmethod
    def refusal(cls, tensors: Mapping[str, TensorPlan], dtypes: Set[torch.dtype], devices: Set[str]) -> str | None:
        """The reason why kernels do not fit: other devices, no triton, or types or blocks that they cannot take."""
        if devices != {"cuda"}:
            return placed_on(devices)
        if not kernels_installed():
            return "triton is not installed"
        others = sorted(str(dtype) for dtype in dtypes - KERNEL_DTYPES)
        if others:
            return f"there are no kernels for {others[0]}"
        for rack in racks_of(tensors):
            if rack.height % ROWS_OF_TILE:
                return (
                    f"its weights are shared in blocks of {rack.height} rows, and kernels take multiples of "
                    f"{ROWS_OF_TILE}"
                )
        return None

    def __init__(self, devices: Mapping[str, str]) -> None:
        self.devices = devices

    def install(self, model: nn.Module, tensors: Mapping[str, TensorPlan], modules: ModuleMap) -> None:
        """Replace the modules. As their weights load, these all go to one bank.

        Raises:
            StorageError: if the modules are on devices of several kinds or hold several tensors, or kernels are needed
                and not installed.
        """
        devices = torch_devices(self.devices, self.name)
        if any(device.type == "cuda" for device in devices.values()):
            kernels()
        else:
            LOGGER.info("storage indirect gathers every weight at every call on a CPU: that is for testing")
        install_frozen(model, IndirectBank(tensors, devices), modules, IndirectProjection)
