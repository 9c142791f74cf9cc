"""The columns of output projections under a plan: stored here, borrowed, low-rank products, or removed.

Knows the plan and the tensors of the shared model. Solves nothing and runs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headshare.calibration.refit.regression import BorrowedColumns, LowRankColumns
from headshare.plan.low_rank import LowRankRange
from headshare.plan.plan import SharePlan
from headshare.plan.spans import length
from headshare.plan.tensors import TensorPlan
from headshare.plan.units import Part
from headshare.sharing.expanded import ExpandedTensors


@dataclass(frozen=True)
class PlannedColumns:
    """The columns that a plan leaves to the output projections of a shared model, by the tensors' names.

    `weights` are the shared model's as they are before the refit, and `device` is where indices and columns are put.
    A column is the part of the matrix that one input is multiplied by; the bias, where there is one, is the last.
    """

    plan: SharePlan
    weights: ExpandedTensors
    device: torch.device

    @property
    def _tensors(self) -> Mapping[str, TensorPlan]:
        return self.weights.files.tensors

    def changed(self, layer: int) -> dict[str, Tensor]:
        """Tensors of this layer that do not store all their numbers themselves, whole, by name.

        Those that are rewritten are left out: the fit of a layer starts from the dense model's.
        """
        names = {place.name(layer) for layout in self.plan.layouts for place in layout.parts.values()}
        planned = [self._tensors[name] for name in sorted((names & self._tensors.keys()) - self.plan.rewritten)]
        return {
            tensor.name: self.weights.read(tensor.name) for tensor in planned if tensor.stored_shape != tensor.shape
        }

    def dtype(self, name: str) -> torch.dtype:
        """The type in which the shared model stores this tensor."""
        return self.weights.checkpoint.tensors[name].torch_dtype

    def owned(self, name: str, weight: Tensor) -> Bool[Tensor, "..."]:
        """A mask of the numbers that this weight stores and nobody borrows.

        It leaves out those of donors and of recipients, and what is removed or a product.
        """
        if name not in self._tensors:
            return torch.ones_like(weight, dtype=torch.bool)
        tensor = self._tensors[name]
        owned = torch.zeros_like(weight, dtype=torch.bool)
        for start, stop in tensor.kept():
            owned.narrow(tensor.axis, start, stop - start).fill_(value=True)
        for gap in (gap for other in self._tensors.values() for gap in other.gaps if gap.donor == name):
            owned.narrow(tensor.axis, gap.donor_start, gap.stop - gap.start).fill_(value=False)
        return owned

    def present(self, name: str) -> tuple[int, Int[Tensor, " present"] | None]:
        """The axis along which a tensor's units lie, and its indices there less the removed ones; None for all."""
        if name not in self._tensors or not self._tensors[name].removed:
            return 0, None
        tensor = self._tensors[name]
        return tensor.axis, torch.cat([self._range(0, 0), *(self._range(*span) for span in tensor.present())])

    def free(self, name: str, count: int) -> Int[Tensor, " free"]:
        """Columns that this projection stores, of `count`, the bias included."""
        if name not in self._tensors:
            return torch.arange(count, device=self.device)
        tensor = self._tensors[name]
        spans = [*tensor.kept(), (tensor.size, count)]
        return torch.cat([self._range(start, stop) for start, stop in spans])

    def nothing_to_fit(self, name: str, count: int) -> bool:
        """True if the plan leaves this projection none of its `count` columns, the bias included."""
        tensor = self._tensors.get(name)
        return tensor is not None and count == tensor.size == length(tensor.removed)

    def lent(self, name: str, refitted: Mapping[str, Tensor]) -> tuple[BorrowedColumns, ...]:
        """Columns that are not fitted: those borrowed from donors, and those that other kinds of section make.

        A donor that is among the `refitted` tensors already lends its columns as they are there.
        """
        if name not in self._tensors:
            return ()
        tensor = self._tensors[name]
        scale = self.weights.scale(name)
        donors = {donor: self._projection(donor, refitted) for donor in {gap.donor for gap in tensor.gaps}}
        lent = []
        used = 0  # the scales of all scaled gaps lie one after the other in one tensor
        for gap in tensor.gaps:
            inputs = self._range(gap.start, gap.stop)
            columns = donors[gap.donor][:, gap.donor_start : gap.donor_start + len(inputs)]
            scaled = (gap.start, gap.stop) in tensor.scaled
            own = None
            if scaled and scale is not None:
                own = scale[used : used + len(inputs)].to(columns)
                used += len(inputs)
            lent.append(BorrowedColumns(inputs, columns, scaled, own))
        # Columns that another kind of section makes stay as they are.
        for made in (made for made in tensor.made if not isinstance(made, LowRankRange)):
            columns = self._projection(name, refitted)[:, made.start : made.stop]
            lent.append(BorrowedColumns(self._range(made.start, made.stop), columns, False, None))
        return tuple(lent)

    def narrow(self, name: str) -> tuple[LowRankColumns, ...]:
        """Columns that are stored as low-rank products, one entry for each unit."""
        factored = self._tensors[name].factored if name in self._tensors else ()
        return tuple(LowRankColumns(self._range(start, stop), rank) for start, stop, rank in factored)

    def foreign(self, layer: int, part: Part, inputs: int) -> Int[Tensor, " foreign"]:
        """Inputs, of so many, that another layer's v (or up) makes.

        In a freshly shared model, the projection's own columns say nothing about them.
        """
        maker = Part.V if part is Part.O else Part.UP
        foreign = [self._range(0, 0)]
        for selection in self.plan.selections:
            if maker in selection.layout.parts:
                size = inputs // selection.layout.groups
                groups = [tie.recipient.group for tie in selection.ties if tie.recipient.layer == layer]
                foreign += [self._range(group * size, (group + 1) * size) for group in groups]
        return torch.cat(foreign)

    def _projection(self, name: str, refitted: Mapping[str, Tensor]) -> Float[Tensor, "outputs inputs"]:
        """An output projection as the shared model has it by now."""
        whole = refitted[name] if name in refitted else self.weights.read(name)
        in_out = self._tensors[name].axis == 0
        return (whole.T if in_out else whole).to(self.device, torch.float64)

    def _range(self, start: int, stop: int) -> Int[Tensor, " span"]:
        return torch.arange(start, stop, device=self.device)
