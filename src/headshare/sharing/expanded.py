"""A shared model's tensors in the dense model's shapes: from a shared checkpoint, or from a dense one and a plan."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError
from headshare.plan.added import Extra, factor_names, scale_name
from headshare.plan.plan import SharePlan
from headshare.plan.tensors import GappedTensor
from headshare.sharing.assembly import filled, overwritten, stream
from headshare.sharing.factors import join_columns, split_columns, widened
from headshare.sharing.fits import check_fits, check_shared, tensors_of


@dataclass(frozen=True)
class WholeTensors:
    """Tensors by name, whole: gaps filled from donors, scales multiplied in, products multiplied out (those nearest to
    the dense columns, where nothing is stored yet), zeros where units are removed.

    `tensors` is what a plan makes of them; `stored` says that the checkpoint holds only what it keeps.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, GappedTensor]
    stored: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "WholeTensors":
        """Those of a checkpoint as it is, shared or dense.

        Raises:
            CheckpointError: if it is shared and does not hold what its plan says.
        """
        if checkpoint.sharing is not None and checkpoint.sharing.packing is not None:
            raise CheckpointError(
                f"the matrices of {checkpoint.name} are rounded to 4 bits. Do this to the model before."
            )
        if checkpoint.plan is None:
            return cls(checkpoint, {}, stored=False)
        return cls(checkpoint, tensors_of(check_shared(checkpoint), checkpoint), stored=True)

    @classmethod
    def planned(cls, dense: Checkpoint, plan: SharePlan) -> "WholeTensors":
        """Those that sharing a dense checkpoint by this plan gives; scales are one.

        Raises:
            PlanError: if the plan is for another model.
        """
        check_fits(plan, dense)
        return cls(dense, tensors_of(plan, dense), stored=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Dense shapes by name; the tensors of scales and factors, which a dense model has not, are left out."""
        extra = {scale_name(name) for name, tensor in self.tensors.items() if tensor.scaled}
        extra |= {one for name, tensor in self.tensors.items() if tensor.factored for one in factor_names(name)}
        own = {name: shape for name, shape in self.checkpoint.shapes.items() if name not in extra}
        return own | {name: tensor.shape for name, tensor in self.tensors.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint.tensors

    def read(self, name: str) -> Tensor:
        """This tensor, whole, in the type it is stored as and memory of its own. Its shape is the dense one.

        Raises:
            CheckpointError: if the file ends early or cannot be read.
        """
        tensor, info = self.tensors.get(name), self.checkpoint.tensors[name]
        if tensor is None or not (tensor.gaps or tensor.removed or tensor.factored):
            return self.checkpoint.read(name)
        assembly = filled(info, tensor, self.tensors) if self.stored else overwritten(info, tensor)
        whole = torch.cat(list(stream(assembly, self.checkpoint)))
        scale = self.scale(name)
        if scale is not None:
            scale_columns(whole, tensor, scale)
        if tensor.factored:
            multiply_out(whole, tensor, *self._factors(name, tensor))
        return whole

    def _factors(self, name: str, tensor: GappedTensor) -> tuple[Tensor, Tensor]:
        """The two factors as they are stored, or those nearest to a dense model's columns."""
        if self.stored:
            factor_in, factor_out = map(self.checkpoint.read, factor_names(name))
            return factor_in, factor_out
        dense = self.checkpoint.read(name)
        columns = dense.T if tensor.axis == 0 else dense
        split = [split_columns(columns[:, start:stop], rank) for start, stop, rank in tensor.factored]
        return torch.cat([factor_in for factor_in, _ in split]), torch.cat([out for _, out in split], dim=1)

    def scale(self, name: str) -> Float[Tensor, " scaled"] | None:
        """The scales of this readout's shared channels, in order; None where it has none, or all are one."""
        tensor = self.tensors.get(name)
        if not self.stored or tensor is None or not tensor.scaled:
            return None
        return self.checkpoint.read(scale_name(name))


class Folded(Mapping[str, Tensor]):
    """Readouts that have scales or factors, whole, with these multiplied out. Made when asked for."""

    def __init__(
        self,
        shared: Checkpoint,
        tensors: Mapping[str, GappedTensor],
        extras: Mapping[str, Extra],
        *,
        rounded: bool,
    ) -> None:
        self._shared, self._tensors, self._rounded = shared, tensors, rounded
        self._names = list(dict.fromkeys(extra.weight for extra in extras.values()))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor, info = self._tensors[name], self._shared.tensors[name]
        weight = torch.cat(list(stream(filled(info, tensor, self._tensors), self._shared)))
        if not self._rounded:
            weight = weight.to(widened(weight.dtype))
        if tensor.scaled:
            scale_columns(weight, tensor, self._shared.read(scale_name(name)))
        if tensor.factored:
            multiply_out(weight, tensor, *map(self._shared.read, factor_names(name)))
        return weight

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def scale_columns(weight: Tensor, tensor: GappedTensor, scale: Tensor) -> None:
    """Multiply the scaled channels of a whole readout by their scales, in place."""
    used = 0
    for start, stop in tensor.scaled:
        values = scale[used : used + stop - start]
        weight.narrow(tensor.axis, start, stop - start).mul_(values[:, None] if tensor.axis == 0 else values)
        used += stop - start


def multiply_out(weight: Tensor, tensor: GappedTensor, factor_in: Tensor, factor_out: Tensor) -> None:
    """Put the products of the factors into the factored columns of a whole readout, in place."""
    used = 0
    for start, stop, rank in tensor.factored:
        columns = join_columns(factor_in[used : used + rank], factor_out[:, used : used + rank])
        weight.narrow(tensor.axis, start, stop - start).copy_(columns.T if tensor.axis == 0 else columns)
        used += rank
