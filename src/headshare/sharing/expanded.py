"""Expanded tensors: a shared model's, in dense shapes, from a shared checkpoint or from a dense one and a plan."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.entry import SharingEntry
from headshare.errors import CheckpointError
from headshare.plan.plan import SharePlan
from headshare.plan.tensors import TensorPlan
from headshare.plan.ties import scale_name
from headshare.sharing.assembly import filled, overwritten, stream
from headshare.sharing.factors import widened
from headshare.sharing.fits import SharedFiles, fit_plan, open_shared
from headshare.sharing.makers import join, split


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each computed when it is asked for, so that not all need be in memory."""

    def __init__(self, names: Collection[str], make: Callable[[str], Tensor]) -> None:
        self._names = names
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class ExpandedTensors:
    """Tensors of a shared model by name, in their dense shapes.

    Borrowed ranges are filled from donors, scales are multiplied in, made ranges are computed, and removed ones are
    zeros. Where nothing is stored yet, made ranges are those that come nearest to the dense numbers.
    """

    files: SharedFiles

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ExpandedTensors":
        """The expanded tensors of a checkpoint, shared or dense.

        Raises:
            CheckpointError: if it is shared and does not hold what its plan says.
        """
        if checkpoint.sharing is None:
            return cls(SharedFiles(checkpoint, SharingEntry(SharePlan()), {}, {}, stored=False))
        if checkpoint.sharing.packing is not None:
            raise CheckpointError(
                f"the matrices of {checkpoint.name} are rounded to 4 bits. Do this to the model before."
            )
        return cls(open_shared(checkpoint))

    @classmethod
    def planned(cls, dense: Checkpoint, plan: SharePlan) -> "ExpandedTensors":
        """The expanded tensors that sharing a dense checkpoint by this plan gives; scales are one.

        Raises:
            PlanError: if the plan is for another model.
        """
        return cls(fit_plan(plan, dense))

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the numbers are read from."""
        return self.files.checkpoint

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint.tensors

    def read(self, name: str, *, rounded: bool = True) -> Tensor:
        """The tensor of this name in its dense shape, in new memory.

        Where it is computed (scaled or made), the result is `rounded` to the type of the stored tensor, or else is in
        float32 or better.

        Raises:
            CheckpointError: if the file ends early or cannot be read.
        """
        tensor = self.files.tensors.get(name)
        info = self.checkpoint.tensors[name]
        if tensor is None or tensor.is_whole:
            return self.checkpoint.read(name)
        # first the numbers that are stored here and those that donors lend
        assembly = filled(info, tensor, self.files.tensors) if self.files.stored else overwritten(info, tensor)
        whole = torch.cat(list(stream(assembly, self.checkpoint)))
        if not rounded and (tensor.scaled or tensor.made):
            whole = whole.to(widened(whole.dtype))
        # then the numbers that are computed from them
        scale = self.scale(name)
        if scale is not None:
            _scale_columns(whole, tensor, scale)
        if tensor.made:
            join(tensor, whole, self._added(tensor))
        return whole

    def _added(self, tensor: TensorPlan) -> Callable[[str], Tensor]:
        """A reader of the added tensors behind made ranges: as stored, or nearest to a dense model's numbers."""
        if self.files.stored:
            return self.checkpoint.read
        return split(tensor, self.checkpoint.read(tensor.name)).__getitem__

    def scale(self, name: str) -> Float[Tensor, " scaled"] | None:
        """The scales of this output projection's borrowed channels, in order; None where all are one."""
        tensor = self.files.tensors.get(name)
        if not self.files.stored or tensor is None or not tensor.scaled:
            return None
        return self.checkpoint.read(scale_name(name))

    def computed(self, *, rounded: bool) -> LazyTensors:
        """The expanded tensors with scales or made ranges, which are more than copies of stored ones."""
        names = dict.fromkeys(added.weight for added in self.files.added.values())
        return LazyTensors(names, lambda name: self.read(name, rounded=rounded))


def _scale_columns(weight: Tensor, tensor: TensorPlan, scale: Tensor) -> None:
    """Multiply the scaled channels of a whole output projection by their scales, in place."""
    used = 0
    for start, stop in tensor.scaled:
        values = scale[used : used + stop - start]
        weight.narrow(tensor.axis, start, stop - start).mul_(values[:, None] if tensor.axis == 0 else values)
        used += stop - start
