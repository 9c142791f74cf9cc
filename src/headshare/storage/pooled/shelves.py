"""Slots of a layout on each device: the slots of the tensors that are there, and the slots that these borrow.

A slot whose tensor is on one device and whose borrower is on another is held on both, and filled when it loads.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from headshare.errors import StorageError
from headshare.plan.tensors import TensorPlan
from headshare.storage.pooled.slots import BlockLayout


@dataclass(frozen=True)
class DeviceBlocks:
    """The part of a layout that stands on one device. `positions` gives each slot that is here its place, from 0 on.

    Slots stand in the layout's order, so that those of a tensor that is here are one run.
    """

    rack: BlockLayout
    device: torch.device
    names: frozenset[str]
    positions: Mapping[int, int]

    def table(self, name: str) -> list[int]:
        """The positions of the slots of a whole weight that is used here, in order."""
        return [self.positions[slot] for slot in self.rack.table(name)]

    def wanted(self, name: str) -> tuple[list[int], list[int]]:
        """A tensor's own slots that stand here (all of them, if the tensor is here), and their positions."""
        placed = self.rack.placed[name]
        own = [n for n in range(placed.count) if placed.first + n in self.positions]
        return own, [self.positions[placed.first + n] for n in own]


def shelves_of(rack: BlockLayout, devices: Mapping[str, torch.device]) -> list[DeviceBlocks]:
    """The parts of a layout, one for each device that has some of its tensors."""
    by_device: dict[torch.device, list[str]] = {}
    for name in rack.placed:
        by_device.setdefault(devices[name], []).append(name)
    return [_shelf(rack, device, names) for device, names in by_device.items()]


def _shelf(rack: BlockLayout, device: torch.device, names: list[str]) -> DeviceBlocks:
    placed = [rack.placed[name] for name in names]
    own = {slot for blocks in placed for slot in range(blocks.first, blocks.first + blocks.count)}
    used = {slot for name in names for slot in rack.table(name)}
    positions = {slot: position for position, slot in enumerate(sorted(own | used))}
    return DeviceBlocks(rack, device, frozenset(names), positions)


def in_slots(tensor: TensorPlan, rack: BlockLayout, stored: Tensor) -> Tensor:
    """Slots of stored rows, which are in the stock module's orientation; a view. Shape: count x height x width."""
    rows = stored.T if tensor.axis == 1 else stored
    return rows.view(rows.shape[0] // rack.height, rack.height, rack.width)


def turned(tensor: TensorPlan, rows: Tensor) -> Tensor:
    """Rows turned back into the stock module's orientation, from that in which `in_slots` puts them."""
    return rows.T if tensor.axis == 1 else rows


def placed_on(devices: Set[str]) -> str:
    """The clause, for logs and refusals, that names a model's devices. `devices` are kinds: cpu, cuda, disk."""
    words = {"cpu": "this machine's CPU", "cuda": "CUDA devices"}
    only = next(iter(devices)) if len(devices) == 1 else None
    return f"the model is placed on {words.get(only or '') or ', '.join(sorted(devices))}"


def torch_devices(devices: Mapping[str, str], storage: str) -> dict[str, torch.device]:
    """The devices of all tensors, checked to be of one kind: CUDA, or for testing this machine's CPU.

    A plan that shares nothing, but removes units or stores them in low rank, has no tensors to be held.

    Raises:
        StorageError: if they are of several kinds, or of another one.
    """
    kinds = sorted({device.partition(":")[0] for device in devices.values()})
    if kinds not in ([], ["cuda"], ["cpu"]):
        raise StorageError(
            f"storage {storage} holds all shared weights on CUDA devices; this model's are placed on "
            f'{" and ".join(kinds)}. Place them so (device_map=), or load the model with storage="owner".'
        )
    return {name: _with_index(torch.device(device)) for name, device in devices.items()}


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
