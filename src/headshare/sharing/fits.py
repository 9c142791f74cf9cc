"""The check that a plan fits a checkpoint, and its result, `SharedFiles`, which needs no further check."""

from collections.abc import Mapping
from dataclasses import dataclass

from headshare.architecture.removable import check_removals
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.entry import SharingEntry
from headshare.checkpoint.int4 import (
    A_WORD,
    PACKED,
    PARTS,
    SCALE,
    SHAPE,
    TYPES,
    Packing,
    guards,
    packed_tensors,
    part_of,
)
from headshare.checkpoint.layouts import require_one_dtype
from headshare.errors import CheckpointError, HeadshareError, PlanError
from headshare.plan.plan import SharePlan
from headshare.plan.section import AddedTensor
from headshare.plan.tensors import TensorPlan, tied_names
from headshare.sharing.makers import check_makers


@dataclass(frozen=True)
class SharedFiles:
    """A checkpoint and an entry that was checked against it. The functions of this package take such a pair.

    The entry is the checkpoint's own, or one that is made for a dense checkpoint and its plan. `tensors` has the tensor
    plans of all weights and biases that the plan touches, by name. `added` has the tensors that the plan adds to those
    of a dense model. `stored` is true for a shared checkpoint, which holds only what the plan keeps, and false for a
    dense one that is to be shared.
    """

    checkpoint: Checkpoint
    entry: SharingEntry
    tensors: Mapping[str, TensorPlan]
    added: Mapping[str, AddedTensor]
    stored: bool

    @property
    def plan(self) -> SharePlan:
        """The plan of the entry."""
        return self.entry.plan

    @property
    def tied(self) -> frozenset[str]:
        """The names of the tensors that lend or borrow."""
        return frozenset(tied_names(self.tensors))


def open_shared(checkpoint: Checkpoint) -> SharedFiles:
    """The files of a shared checkpoint, whose tensors are checked to be what its plan says.

    Raises:
        CheckpointError: if the checkpoint is not shared, a tensor is missing or has another shape, or an added one is
            of another type than its weight.
        PlanError: if such units cannot be removed from this model.
    """
    if checkpoint.sharing is None:
        raise CheckpointError(f"{checkpoint.name} is not a shared checkpoint; its config.json names no headshare plan.")
    entry = checkpoint.sharing
    plan = entry.plan
    packing = entry.packing if isinstance(entry.packing, Packing) else None
    tensors = _tensors_of(plan, checkpoint)
    if packing is not None and plan.copies:
        raise CheckpointError(f"{checkpoint.name} holds matrices in an older form of 4 bits, in which none is a copy.")
    if packing is not None:
        tensors = packed_tensors(tensors, packing)
    files = SharedFiles(checkpoint, entry, tensors, plan.added_tensors, stored=True)
    check_makers(files.tensors.values())
    what = "the checkpoint does not hold what its plan says"
    # parts of packed matrices must fit each other before their shapes mean anything
    if packing is not None:
        _check_packed(checkpoint, files.tensors, packing)
        for guard in guards(checkpoint.tensors):
            _check_tensor(checkpoint, guard, (0,), what)
    # every tensor of the plan's grids, whole where the plan leaves it alone
    expected: dict[str, tuple[int, ...]] = {
        place.name(layer): place.shape
        for layout in plan.layouts
        for place in layout.parts.values()
        for layer in range(layout.layers)
    }
    if packing is not None:
        parts = [packing.parts(name, shape) for name, shape in expected.items()]
        expected = {name: shape for matrix in parts for name, shape in matrix.items()}
    expected |= {name: tensor.stored_shape for name, tensor in files.tensors.items()}
    for name, shape in expected.items():
        _check_tensor(checkpoint, name, shape, what)
    check_removals(plan, checkpoint.layouts)
    _check_types(plan, checkpoint)
    # tensors that the plan adds, each in the type of the weight that it belongs to
    for name, added in files.added.items():
        _check_tensor(checkpoint, name, added.shape, what)
        dtype = checkpoint.tensors[name].dtype
        meant = checkpoint.tensors[added.weight].dtype
        rounded = checkpoint.tensors[name].parts or checkpoint.tensors[added.weight].parts
        if added.same_type and dtype != meant and not rounded:
            raise CheckpointError(f"{name} in {checkpoint.name} is {dtype}; it should be {meant} as {added.weight} is.")
    return files


def fit_plan(plan: SharePlan, dense: Checkpoint) -> SharedFiles:
    """The files of a dense checkpoint and a plan for it, checked.

    Every tensor of the plan's grids is there in its dense shape, and a model of this family works without the units
    that the plan removes.

    Raises:
        PlanError: if the plan is for another model.
    """
    # the grids and their tensors
    what = "the plan is for another model"
    for layout in plan.layouts:
        for place in layout.parts.values():
            for layer in range(layout.layers):
                _check_tensor(dense, place.name(layer), place.shape, what, PlanError)
    for section in plan.sections:
        if section.one_type:
            require_one_dtype(section.layout, dense)
    # what the plan does with them
    check_removals(plan, dense.layouts)
    _check_types(plan, dense)
    files = SharedFiles(dense, SharingEntry(plan), _tensors_of(plan, dense), plan.added_tensors, stored=False)
    check_makers(files.tensors.values())
    for name, tensor in files.tensors.items():
        _check_tensor(dense, name, tensor.shape, what, PlanError)
    taken = sorted(set(files.added) & set(dense.tensors))
    if taken:
        raise PlanError(f"the plan adds {taken[0]}, which is a tensor of {dense.name} already.")
    return files


def _tensors_of(plan: SharePlan, checkpoint: Checkpoint) -> dict[str, TensorPlan]:
    """Tensor plans of this checkpoint: of the weights, and of biases that are there and lose numbers."""
    biases = {name: bias for name, bias in plan.biases.items() if name in checkpoint.tensors}
    return {**plan.tensors, **biases}


def _check_types(plan: SharePlan, checkpoint: Checkpoint) -> None:
    """Check that each copy has the type of the tensor that it is.

    Raises:
        CheckpointError: naming the first that has another.
    """
    infos = checkpoint.tensors
    for name, donor in plan.copies.items():
        if name in infos and donor in infos and infos[name].dtype != infos[donor].dtype and not infos[donor].parts:
            raise CheckpointError(
                f"{name} in {checkpoint.name} is {infos[name].dtype}, and is to be {donor}, which is "
                f"{infos[donor].dtype}."
            )


def _check_packed(checkpoint: Checkpoint, tensors: Mapping[str, TensorPlan], packing: Packing) -> None:
    """Check that every packed matrix has its parts, in their types, and in shapes that fit each other.

    Raises:
        CheckpointError: naming the first that has not.
    """
    what = "the checkpoint does not hold packed matrices as its config.json says"
    stems = {name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith(PARTS)}
    for stem in sorted(stems):
        parts = [checkpoint.tensors.get(part_of(stem, part)) for part in PARTS]
        wanted_types = [(TYPES[PACKED], 2), (TYPES[SCALE], 2), (TYPES[SHAPE], 1)]
        if [part and (part.dtype, len(part.shape)) for part in parts] != wanted_types:
            raise CheckpointError(f"{what}: {stem} should have {', '.join(PARTS)}, of {', '.join(TYPES.values())}.")
        packed, scale, shape = (part for part in parts if part is not None)
        # stored rows are those that the plan keeps; the matrix's own shape is the dense one
        rows, words = packed.shape
        for name, wanted in ((scale.name, (rows, words * A_WORD // packing.group)), (shape.name, (2,))):
            _check_tensor(checkpoint, name, wanted, what)
        dense = tensors[packed.name].shape[0] if packed.name in tensors else rows
        if words * A_WORD % packing.group or checkpoint.read(shape.name).tolist() != [dense, words * A_WORD]:
            raise CheckpointError(
                f"{what}: {shape.name} should say {[dense, words * A_WORD]}, in groups of {packing.group}."
            )


def _check_tensor(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    what: str,
    error: type[HeadshareError] = CheckpointError,
) -> None:
    info = checkpoint.tensors.get(name)
    if info is None or info.shape != shape:
        there = "no such tensor" if info is None else f"shape {info.shape}"
        raise error(f"{what}: {name} should have shape {shape}; {checkpoint.name} has {there}.")
