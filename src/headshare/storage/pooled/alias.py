"""Storage `alias`: each unit stands once in memory, and every weight is one range of addresses over its units.

The product is the stock module's own, on an ordinary tensor whose pages are shared with others. It is for inference on
a CPU under Linux. Weights are read-only: to train, hold the model by `owner`.

Pages come from the checkpoint's own file where the rows stand there as the product needs them: in the type of number
that is asked for, and at a page's boundary, as `share` writes them. Otherwise they come from an arena, to which the
rows are copied once.
"""

from collections.abc import Mapping, Set
from math import gcd
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from headshare.architecture.modules import ModuleMap
from headshare.errors import StorageError
from headshare.plan.tensors import TensorPlan
from headshare.storage.pooled.arena import OTHERWISE, PAGE, Arena, Piece, mapped, mappings_left, supported
from headshare.storage.pooled.bank import BlockPool, PooledTensor
from headshare.storage.pooled.frozen import install_frozen
from headshare.storage.pooled.shelves import placed_on, turned
from headshare.storage.pooled.slots import BlockLayout, racks_of
from headshare.storage.pooled.sources import MappedFiles

# The share that a model may take of the mappings that the process may still make.
SPARE_MAPPINGS = 0.5


class Backing(NamedTuple):
    """The place of a tensor's stored rows: an open file, the offset there, bytes per row, and a view of the rows."""

    descriptor: int
    offset: int
    stride: int
    stored: Tensor


class AliasBank(BlockPool):
    """The bank of rows in files and in arenas, one for each type. Once sealed, whole weights are laid over them."""

    def __init__(self, tensors: Mapping[str, TensorPlan]) -> None:
        super().__init__(tensors)
        self.racks = racks_of(tensors)
        self._rack_of = {name: rack for rack in self.racks for name in rack.placed}
        self._arenas: dict[torch.dtype, Arena] = {}
        self._backing: dict[str, Backing] = {}
        self._files = MappedFiles()

    def put(self, name: str, stored: Tensor) -> Tensor:
        """Find a tensor's stored rows in the file that they were loaded from, or copy them to the arena.

        Raises:
            StorageError: if the rows are not in this machine's own memory, or the system gives no more of it.
        """
        if stored.device.type != "cpu":
            raise StorageError(f"storage alias holds weights in CPU memory; {name} came on {stored.device}.")
        self._backing[name] = self._in_file(name, stored) or self._in_arena(name, stored)
        return turned(self.tensors[name], self._backing[name].stored)

    def seal(self) -> dict[str, PooledTensor]:
        """Make the bank read-only, and lay every whole weight over its slots. Returns the place of each tensor.

        Raises:
            StorageError: if the system gives no more mappings, or tied tensors came in different types of number.
        """
        held = {name: self._hold(name) for name in self._backing}
        for arena in self._arenas.values():
            arena.seal()
        self._files.close()
        return held

    def _in_file(self, name: str, stored: Tensor) -> Backing | None:
        rack = self._rack_of[name]
        row = stored.shape[1] * stored.dtype.itemsize
        if self.tensors[name].axis == 1 or row != stride_of(rack, stored.dtype):
            return None
        place = self._files.behind(stored)
        if place is None or place.offset % PAGE:
            return None
        # a mapping of its own: when a page is read the system maps its neighbours, as far as the mapping goes
        try:
            rows = mapped([Piece(0, place.descriptor, place.offset, stored.nbytes)], stored.nbytes)
        except StorageError:  # some file systems lend no shared pages
            return None
        return Backing(place.descriptor, place.offset, row, rows.view(stored.dtype).view(stored.shape))

    def _in_arena(self, name: str, stored: Tensor) -> Backing:
        arena = self._arena(stored.dtype)
        rack = self._rack_of[name]
        placed = rack.placed[name]
        stride = stride_of(rack, stored.dtype)
        offset = self._offset(rack, stored.dtype) + placed.first * rack.height * stride
        region = arena.region(offset, placed.count * rack.height * stride)
        rows = _rows(region, stored.dtype, rack.width, stride)
        # Rows that stand in the file as in the arena are read straight into it; padded or transposed ones are copied.
        across = self.tensors[name].axis == 1
        if across or not rows.is_contiguous():
            rows.copy_(self._files.read(stored).T if across else self._files.read(stored))
        elif not self._files.read_into(region, stored):
            rows.copy_(stored)
        return Backing(arena.descriptor, offset, stride, rows)

    def _hold(self, name: str) -> PooledTensor:
        rack = self._rack_of[name]
        own = self._backing[name]
        placed = rack.placed[name]
        slot = rack.height * own.stride
        if not placed.borrows:
            return PooledTensor(turned(self.tensors[name], own.stored), turned(self.tensors[name], own.stored))
        # each run of slots is one piece of the file or arena that holds its donor
        pieces = []
        for position, source, start, count in placed.runs:
            donor = self._backing.get(source)
            if donor is None or donor.stored.dtype != own.stored.dtype:
                state = "did not load" if donor is None else f"is {donor.stored.dtype}"
                raise StorageError(
                    f"{name} is {own.stored.dtype} and uses rows of {source}, which {state}. {OTHERWISE}"
                )
            pieces.append(Piece(position * slot, donor.descriptor, donor.offset + start * slot, count * slot))
        whole = _rows(mapped(pieces, placed.size * slot), own.stored.dtype, rack.width, own.stride)
        return PooledTensor(turned(self.tensors[name], own.stored), turned(self.tensors[name], whole))

    def _arena(self, dtype: torch.dtype) -> Arena:
        if dtype not in self._arenas:
            self._arenas[dtype] = Arena(arena_bytes(self.racks, dtype))
        return self._arenas[dtype]

    def _offset(self, wanted: BlockLayout, dtype: torch.dtype) -> int:
        return arena_bytes(self.racks[: self.racks.index(wanted)], dtype)


def _rows(region: Tensor, dtype: torch.dtype, width: int, stride: int) -> Tensor:
    """Rows of `width` numbers in this memory, `stride` bytes apart. Shape: rows x width."""
    return region.view(dtype).view(-1, stride // dtype.itemsize)[:, :width]


def stride_of(rack: BlockLayout, dtype: torch.dtype) -> int:
    """Bytes from one row to the next: the fewest that make a slot a multiple of the page size."""
    step = PAGE // gcd(PAGE, rack.height)
    return -(-rack.width * dtype.itemsize // step) * step


def arena_bytes(racks: list[BlockLayout], dtype: torch.dtype) -> int:
    """Bytes that these layouts take in memory, padding included."""
    return sum(rack.slots * rack.height * stride_of(rack, dtype) for rack in racks)


def mappings_needed(racks: list[BlockLayout]) -> int:
    """The number of mappings that all stored rows and whole weights take, at most."""
    return sum(3 + len(placed.runs) * placed.borrows for rack in racks for placed in rack.placed.values())


def _impossible(racks: list[BlockLayout]) -> str | None:
    """The reason why these layouts cannot be held by aliases, or None."""
    if not supported():
        return "this system cannot map one piece of memory at several addresses"
    needed = mappings_needed(racks)
    left = mappings_left()
    if left is not None and needed > left * SPARE_MAPPINGS:
        return f"it would take {needed} mappings, of {left} that vm.max_map_count still allows"
    return None


def _wasteful(racks: list[BlockLayout], tensors: Mapping[str, TensorPlan], dtypes: Set[torch.dtype]) -> str | None:
    """The reason why aliases would save nothing, or None."""
    for dtype in dtypes:
        held = arena_bytes(racks, dtype)
        dense = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors.values()) * dtype.itemsize
        if held >= dense > 0:
            return f"rows padded to whole pages would take {held:,} bytes where the dense weights take {dense:,}"
    return None


class AliasStorage:
    """The storage of projections that multiply with aliased weights. `devices` maps tensors to their devices."""

    name: ClassVar[str] = "alias"
    trains: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    replicates: ClassVar[bool] = False
    brings_memory: ClassVar[bool] = False

    @classmethod
    def refusal(cls, tensors: Mapping[str, TensorPlan], dtypes: Set[torch.dtype], devices: Set[str]) -> str | None:
        """The reason why aliases do not fit: they need a CPU, enough mappings, and rows that need little padding."""
        if devices != {"cpu"}:
            return placed_on(devices)
        racks = racks_of(tensors)
        return _impossible(racks) or _wasteful(racks, tensors, dtypes)

    def __init__(self, devices: Mapping[str, str]) -> None:
        self.devices = devices

    def install(self, model: nn.Module, tensors: Mapping[str, TensorPlan], modules: ModuleMap) -> None:
        """Replace the modules. As their weights load, these all go to one bank. Any amount of padding is allowed.

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
        bank = AliasBank(tensors)
        reason = _impossible(bank.racks)
        if reason:
            raise StorageError(f"storage alias cannot hold this model: {reason}. {OTHERWISE}")
        install_frozen(model, bank, modules)
