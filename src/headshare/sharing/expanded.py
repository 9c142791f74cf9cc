"""A shared model's tensors in the dense model's shapes: from a shared checkpoint, or from a dense one and a plan."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError
from headshare.plan.plan import SharePlan
from headshare.plan.tensors import TensorPlan
from headshare.plan.ties import scale_name
from headshare.sharing.assembly import filled, overwritten, stream
from headshare.sharing.factors import widened
from headshare.sharing.fits import SharedFiles, fit_plan, open_shared
from headshare.sharing.makers import join, split


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for, so that not all need be in memory."""

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
    """Tensors by name in their dense shapes: gaps filled from donors, scales multiplied in, made ranges made (those
    nearest to the dense numbers, where nothing is stored yet), zeros where units are removed."""

    files: SharedFiles

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ExpandedTensors":
        """Those of a checkpoint as it is, shared or dense.

        Raises:
            CheckpointError: if it is shared and does not hold what its plan says.
        """
        if checkpoint.sharing is None:
            return cls(SharedFiles(checkpoint, SharePlan(), {}, {}, stored=False))
        if checkpoint.sharing.packing is not None:
            raise CheckpointError(
                f"the matrices of {checkpoint.name} are rounded to 4 bits. Do this to the model before."
            )
        return cls(open_shared(checkpoint))

    @classmethod
    def planned(cls, dense: Checkpoint, plan: SharePlan) -> "ExpandedTensors":
        """Those that sharing a dense checkpoint by this plan gives; scales are one.

        Raises:
            PlanError: if the plan is for another model.
        """
        return cls(fit_plan(plan, dense))

    @property
    def checkpoint(self) -> Checkpoint:
        """Where the numbers come from."""
        return self.files.checkpoint

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint.tensors

    def read(self, name: str, *, rounded: bool = True) -> Tensor:
        """This tensor in its dense shape, in memory of its own. Where it is computed (scaled or made), the result is
        `rounded` to the type it is stored as, or else float32 at least.

        Raises:
            CheckpointError: if the file ends early or cannot be read.
        """
        tensor = self.files.tensors.get(name)
        info = self.checkpoint.tensors[name]
        if tensor is None or tensor.is_whole:
            return self.checkpoint.read(name)
        # first what stands here and what donors lend
        assembly = filled(info, tensor, self.files.tensors) if self.files.stored else overwritten(info, tensor)
        whole = torch.cat(list(stream(assembly, self.checkpoint)))
        if not rounded and (tensor.scaled or tensor.made):
            whole = whole.to(widened(whole.dtype))
        # then what is computed
        scale = self.scale(name)
        if scale is not None:
            _scale_columns(whole, tensor, scale)
        if tensor.made:
            join(tensor, whole, self._added(tensor))
        return whole

    def _added(self, tensor: TensorPlan) -> Callable[[str], Tensor]:
        """The added tensors that made ranges are made from: as stored, or nearest to a dense model's numbers."""
        if self.files.stored:
            return self.checkpoint.read
        return split(tensor, self.checkpoint.read(tensor.name)).__getitem__

    def scale(self, name: str) -> Float[Tensor, " scaled"] | None:
        """The scales of this readout's borrowed channels, in order; None where it has none, or all are one."""
        tensor = self.files.tensors.get(name)
        if not self.files.stored or tensor is None or not tensor.scaled:
            return None
        return self.checkpoint.read(scale_name(name))

    def computed(self, *, rounded: bool) -> LazyTensors:
        """The tensors that are more than copies of what is stored: those that have scales or made ranges."""
        names = dict.fromkeys(added.weight for added in self.files.added.values())
        return LazyTensors(names, lambda name: self.read(name, rounded=rounded))


def _scale_columns(weight: Tensor, tensor: TensorPlan, scale: Tensor) -> None:
    """Multiply the scaled channels of a whole readout by their scales, in place."""
    used = 0
    for start, stop in tensor.scaled:
        values = scale[used : used + stop - start]
        weight.narrow(tensor.axis, start, stop - start).mul_(values[:, None] if tensor.axis == 0 else values)
        used += stop - start
