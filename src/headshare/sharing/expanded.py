"""Expanded tensors: a shared model's, in dense shapes, from a shared checkpoint or from a dense one and a plan."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.entry import SharingEntry
from headshare.errors import CheckpointError
from headshare.plan.narrow_values import NarrowValues
from headshare.plan.plan import SharePlan
from headshare.plan.tensors import TensorPlan, bias_name
from headshare.plan.ties import scale_name
from headshare.sharing.assembly import filled, overwritten, stream
from headshare.sharing.factors import by_group, value_bases, widened
from headshare.sharing.fits import SharedFiles, fit_plan, open_shared
from headshare.sharing.makers import join, split
from headshare.sharing.writer import all_finite

# the part of products' squared size by which narrow values may be further from dense ones than they need be
NEAREST = 1e-9


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
            raise CheckpointError(f"the matrices of {checkpoint.name} are rounded. Do this to the model before.")
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

    def shape(self, name: str) -> tuple[int, ...]:
        """The dense shape of the tensor of this name."""
        tensor = self.files.tensors.get(name)
        return self.checkpoint.tensors[name].shape if tensor is None else tensor.shape

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
        if not self.files.stored and name in self._rotated:
            return _without_removed(self._rotated[name], tensor).to(
                info.torch_dtype if rounded else widened(info.torch_dtype)
            )
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

    @cached_property
    def _rotated(self) -> LazyTensors:
        return rotated_tensors(self.checkpoint, self.files.plan)

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


def rotated_tensors(dense: Checkpoint, plan: SharePlan) -> LazyTensors:
    """The tensors of a dense model that narrow values are in, with values rotated by the weights alone, by name.

    They have all dimensions still: first those that the plan keeps. Numbers are float64.

    Raises:
        CheckpointError: when one is asked for whose numbers are not finite.
    """
    values = plan.narrow_values
    if values is None:
        return LazyTensors((), lambda _: torch.empty(0))
    weights = {name: layer for layer in values.widths for name in values.places(layer)}
    biases = {bias_name(name): layer for name, layer in weights.items()}
    layer_of = {name: layer for name, layer in {**weights, **biases}.items() if name in plan.rewritten}
    layer_of = {name: layer for name, layer in layer_of.items() if name in dense.tensors}

    @lru_cache(maxsize=2)  # a layer's tensors are asked for one after the other
    def rotated(layer: int) -> dict[str, Tensor]:
        return _rotated_layer(dense, values, layer)

    return LazyTensors(layer_of, lambda name: rotated(layer_of[name])[name])


def _rotated_layer(dense: Checkpoint, values: NarrowValues, layer: int) -> dict[str, Tensor]:
    """The rotated tensors of one layer, by name."""
    places = values.places(layer)
    bias = bias_name(places.v)
    rows, readers = _values_and_readers(dense.read, values, layer, biased=bias in dense.tensors)
    bases = value_bases(rows @ rows.mT, readers.mT @ readers)
    made = bases.of_values(rows.flatten(0, 1))
    rotated = {places.v: made[:, : dense.tensors[places.v].shape[1]], places.o: bases.of_readers(dense.read(places.o))}
    return {**rotated, bias: made[:, -1]} if bias in dense.tensors else rotated


def _values_and_readers(
    read: Callable[[str], Tensor], values: NarrowValues, layer: int, *, biased: bool
) -> tuple[Float[Tensor, "groups dims inputs"], Float[Tensor, "groups outputs_of_readers dims"]]:
    """The rows that make each key/value head's values, the bias as a last column, and the columns that read them.

    So their second moments are those for inputs whose channels are independent and of size one, as norms make them.
    """
    places = values.places(layer)
    tensors = {name: read(name) for name in (*places, *[bias_name(places.v)] * biased)}
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise CheckpointError(f"{name} holds NaN or infinite numbers. The file is damaged or training diverged.")
    rows = torch.cat([tensor.view(len(tensor), -1) for name, tensor in tensors.items() if name != places.o], dim=1)
    groups = values.layout.groups
    return rows.double().view(groups, values.dims, -1), by_group(tensors[places.o], groups, values.dims)


def rotated_otherwise(shared: SharedFiles, dense: SharedFiles) -> list[int]:
    """The layers of narrow values whose products W_o W_v are further from the dense model's than they need be.

    The products say whether numbers are those that were written: rotated values themselves depend on how a machine
    rounds. A removed unit has none.
    """
    values = shared.plan.narrow_values
    stored = ExpandedTensors(shared)
    return [layer for layer in (values.widths if values else ()) if not _is_nearest(stored, dense, layer)]


def _is_nearest(stored: ExpandedTensors, dense: SharedFiles, layer: int) -> bool:
    values = stored.files.plan.narrow_values
    assert values is not None
    places = values.places(layer)
    biased = bias_name(places.v) in dense.checkpoint.tensors
    rows, readers = _values_and_readers(dense.checkpoint.read, values, layer, biased=biased)
    own_rows, own_readers = _values_and_readers(stored.read, values, layer, biased=biased)
    # |R V - R' V'|^2 for all readers R of each head's V, by sums that are no larger than its dimensions
    moments = rows @ rows.mT
    reading = readers.mT @ readers
    size = (reading * moments).sum(dim=(1, 2))
    mixed = ((readers.mT @ own_readers) * (rows @ own_rows.mT)).sum(dim=(1, 2))
    own = ((own_readers.mT @ own_readers) * (own_rows @ own_rows.mT)).sum(dim=(1, 2))
    least = value_bases(moments, reading).importance[:, values.widths[layer] :].sum(dim=1)
    rounding = max((4 * torch.finfo(stored.checkpoint.tensors[places.v].torch_dtype).eps) ** 2, NEAREST)
    kept = dense.tensors[places.v].present()
    there = [any(start <= group * values.dims < stop for start, stop in kept) for group in range(len(size))]
    return bool((size - 2 * mixed + own <= least + rounding * size)[there].all())


def _without_removed(whole: Tensor, tensor: TensorPlan) -> Tensor:
    """A copy with zeros in the place of removed indices."""
    whole = whole.clone()
    for start, stop in tensor.removed:
        whole.narrow(tensor.axis, start, stop - start).zero_()
    return whole


def _scale_columns(weight: Tensor, tensor: TensorPlan, scale: Tensor) -> None:
    """Multiply the scaled channels of a whole output projection by their scales, in place."""
    used = 0
    for start, stop in tensor.scaled:
        values = scale[used : used + stop - start]
        weight.narrow(tensor.axis, start, stop - start).mul_(values[:, None] if tensor.axis == 0 else values)
        used += stop - start
