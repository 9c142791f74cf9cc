"""Storage `alias`: each unit once in memory, and every projection's weight one contiguous range of addresses over them.

The product is the stock module's own, on an ordinary tensor; what is shared is only where its pages lie. For
inference on a CPU under Linux. Weights are read-only: to train, hold the model by `owner`.

Pages come from the checkpoint's own file where the rows stand there as the product needs them (the type of numbers
asked for, at a page's boundary: `share` writes them so), else from an arena that they are copied to once.
"""

from collections.abc import Mapping, Set
from math import gcd
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from headshare.architecture.modules import ModuleMap
from headshare.errors import StorageError
from headshare.plan.tensors import GappedTensor
from headshare.storage.pooled.arena import OTHERWISE, PAGE, Arena, Piece, mapped, mappings_left, supported
from headshare.storage.pooled.bank import Bank, Held
from headshare.storage.pooled.frozen import install_frozen
from headshare.storage.pooled.shelves import placed_on, turned
from headshare.storage.pooled.slots import Rack, racks_of
from headshare.storage.pooled.sources import MappedFiles

SPARE_MAPPINGS = 0.5


class Backing(NamedTuple):
    """Where a tensor's stored rows are: an open file, the offset there, bytes per row, and a view of them."""

    descriptor: int
    offset: int
    stride: int
    stored: Tensor


class AliasBank(Bank):
    """Stored rows in files and arenas (one for each type of number); sealed, wholes are laid over them."""

    def __init__(self, tensors: Mapping[str, GappedTensor]) -> None:
        super().__init__(tensors)
        self._racks = racks_of(tensors)
        self._rack_of = {name: rack for rack in self._racks for name in rack.placed}
        self._arenas: dict[torch.dtype, Arena] = {}
        self._backing: dict[str, Backing] = {}
        self._files = MappedFiles()

    def put(self, name: str, stored: Tensor) -> Tensor:
        """Find a tensor's stored rows in the file they were loaded from, or copy them to the arena.

        Raises:
            StorageError: if the rows are not in this machine's own memory, or the system gives no more of it.
        """
        if stored.device.type != "cpu":
            raise StorageError(f"storage alias holds weights in CPU memory; {name} came on {stored.device}.")
        self._backing[name] = self._in_file(name, stored) or self._in_arena(name, stored)
        return turned(self.tensors[name], self._backing[name].stored)

    def seal(self) -> dict[str, Held]:
        """Make all of it read-only, and lay every whole weight over the slots of its rows.

        Raises:
            StorageError: if the system gives no more mappings, or a tie's two ends came in different types.
        """
        held = {name: self._hold(name) for name in self._backing}
        for arena in self._arenas.values():
            arena.seal()
        self._files.close()
        return held

    def _in_file(self, name: str, stored: Tensor) -> Backing | None:
        rack, row = self._rack_of[name], stored.shape[1] * stored.dtype.itemsize
        if self.tensors[name].axis == 1 or row != stride_of(rack, stored.dtype):
            return None
        found = self._files.behind(stored)
        if found is None or found.offset % PAGE:
            return None
        # a mapping of its own: when a page is read the system maps its neighbours, as far as the mapping goes
        rows = mapped([Piece(0, found.descriptor, found.offset, stored.nbytes)], stored.nbytes)
        return Backing(found.descriptor, found.offset, row, rows.view(stored.dtype).view(stored.shape))

    def _in_arena(self, name: str, stored: Tensor) -> Backing:
        arena, rack = self._arena(stored.dtype), self._rack_of[name]
        placed, stride = rack.placed[name], stride_of(rack, stored.dtype)
        offset = self._offset(rack, stored.dtype) + placed.first * rack.height * stride
        region = arena.region(offset, placed.count * rack.height * stride)
        rows = _rows(region, stored.dtype, rack.width, stride)
        across = self.tensors[name].axis == 1
        if across or not rows.is_contiguous():
            rows.copy_(self._files.read(stored).T if across else self._files.read(stored))
        elif not self._files.read_into(region, stored):
            rows.copy_(stored)
        return Backing(arena.descriptor, offset, stride, rows)

    def _hold(self, name: str) -> Held:
        rack, own = self._rack_of[name], self._backing[name]
        placed, slot = rack.placed[name], rack.height * own.stride
        if not placed.borrows:
            return Held(turned(self.tensors[name], own.stored), turned(self.tensors[name], own.stored))
        pieces = []
        for position, source, start, count in placed.runs:
            donor = self._backing.get(source)
            if donor is None or donor.stored.dtype != own.stored.dtype:
                found = "did not load" if donor is None else f"is {donor.stored.dtype}"
                raise StorageError(
                    f"{name} is {own.stored.dtype} and uses rows of {source}, which {found}. {OTHERWISE}"
                )
            pieces.append(Piece(position * slot, donor.descriptor, donor.offset + start * slot, count * slot))
        whole = _rows(mapped(pieces, placed.size * slot), own.stored.dtype, rack.width, own.stride)
        return Held(turned(self.tensors[name], own.stored), turned(self.tensors[name], whole))

    def _arena(self, dtype: torch.dtype) -> Arena:
        if dtype not in self._arenas:
            self._arenas[dtype] = Arena(arena_bytes(self._racks, dtype))
        return self._arenas[dtype]

    def _offset(self, wanted: Rack, dtype: torch.dtype) -> int:
        return arena_bytes(self._racks[: self._racks.index(wanted)], dtype)


def _rows(region: Tensor, dtype: torch.dtype, width: int, stride: int) -> Tensor:
    """Rows of `width` numbers, `stride` bytes apart. Shape: rows x width."""
    return region.view(dtype).view(-1, stride // dtype.itemsize)[:, :width]


def stride_of(rack: Rack, dtype: torch.dtype) -> int:
    """Bytes from one row to the next: as few as make a slot a multiple of the page size."""
    step = PAGE // gcd(PAGE, rack.height)
    return -(-rack.width * dtype.itemsize // step) * step


def arena_bytes(racks: list[Rack], dtype: torch.dtype) -> int:
    """What these racks take in memory, padding included."""
    return sum(rack.slots * rack.height * stride_of(rack, dtype) for rack in racks)


def mappings_needed(racks: list[Rack]) -> int:
    """How many mappings all stored rows and whole weights take, at most."""
    return sum(3 + len(placed.runs) * placed.borrows for rack in racks for placed in rack.placed.values())


def _impossible(racks: list[Rack]) -> str | None:
    """The reason why these racks cannot be held by aliases, or None."""
    if not supported():
        return "this system cannot map one piece of memory at several addresses"
    needed, left = mappings_needed(racks), mappings_left()
    if left is not None and needed > left * SPARE_MAPPINGS:
        return f"it would take {needed} mappings, of {left} that vm.max_map_count still allows"
    return None


def _wasteful(racks: list[Rack], tensors: Mapping[str, GappedTensor], dtypes: Set[torch.dtype]) -> str | None:
    """The reason why aliases would save nothing, or None."""
    for dtype in dtypes:
        held = arena_bytes(racks, dtype)
        dense = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors.values()) * dtype.itemsize
        if held >= dense > 0:
            return f"rows padded to whole pages would take {held:,} bytes where the dense weights take {dense:,}"
    return None


class AliasStorage:
    """Install projections that multiply with aliased weights. `devices` says where each tensor's module is."""

    name: ClassVar[str] = "alias"
    trains: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    replicates: ClassVar[bool] = False
    brings_memory: ClassVar[bool] = False

    @classmethod
    def refusal(cls, tensors: Mapping[str, GappedTensor], dtypes: Set[torch.dtype], devices: Set[str]) -> str | None:
        """Aliases are for a CPU whose system has mappings enough, and for rows that need little padding."""
        if devices != {"cpu"}:
            return placed_on(devices)
        racks = racks_of(tensors)
        return _impossible(racks) or _wasteful(racks, tensors, dtypes)

    def __init__(self, devices: Mapping[str, str]) -> None:
        self.devices = devices

    def install(self, model: nn.Module, tensors: Mapping[str, GappedTensor], modules: ModuleMap) -> None:
        """Replace the modules; their weights go to one bank as they load. Padding, however much, is allowed.

        Raises:
            StorageError: if a module is not on the CPU or holds several tensors, or this system, or its limit on
                mappings, does not allow it.
        """
        elsewhere = sorted(set(self.devices.values()) - {"cpu"})
        if elsewhere:
            raise StorageError(
                "storage alias holds all shared weights in CPU memory; some of this model's are placed on "
                f"{elsewhere[0]}. Place them so (device_map=). {OTHERWISE}"
            )
        reason = _impossible(racks_of(tensors))
        if reason:
            raise StorageError(f"storage alias cannot hold this model: {reason}. {OTHERWISE}")
        install_frozen(model, AliasBank(tensors), modules)
