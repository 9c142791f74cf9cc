"""The check that a plan fits a checkpoint, made once, at the door."""

from collections.abc import Mapping

from headshare.architecture.config import text_config
from headshare.architecture.removable import check_removals
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.int4 import A_WORD, PACKED, PARTS, SCALE, SHAPE, TYPES, Packing, packed_tensors, part_of
from headshare.checkpoint.layouts import require_one_dtype
from headshare.errors import CheckpointError, HeadshareError, PlanError
from headshare.plan.added import extra_tensors
from headshare.plan.plan import SharePlan
from headshare.plan.tensors import GappedTensor, gapped_biases, gapped_tensors


def tensors_of(plan: SharePlan, checkpoint: Checkpoint) -> dict[str, GappedTensor]:
    """What the plan makes of this checkpoint's tensors: of weights, and of biases that are there and lose something."""
    biases = {name: bias for name, bias in gapped_biases(plan).items() if name in checkpoint.tensors}
    found = {**gapped_tensors(plan), **biases}
    packing = None if checkpoint.sharing is None else checkpoint.sharing.packing
    return found if packing is None else packed_tensors(found, packing)


def check_fits(plan: SharePlan, checkpoint: Checkpoint) -> None:
    """Raise PlanError unless every tensor of the plan's layouts is in this dense checkpoint, in its shape, and the
    units that the plan removes can be removed from such a model."""
    for layout in plan.layouts:
        for place in layout.parts.values():
            for layer in range(layout.layers):
                _check_tensor(checkpoint, place.name(layer), place.shape, "the plan is for another model", PlanError)
    for selection in plan.selections:
        require_one_dtype(selection.layout, checkpoint)
    if plan.removals:
        check_removals(plan, text_config(checkpoint.config), checkpoint.shapes)
        for name, bias in gapped_biases(plan).items():
            if name in checkpoint.tensors:
                _check_tensor(checkpoint, name, bias.shape, "the plan is for another model", PlanError)
    for one in plan.factored:
        require_one_dtype(one.layout, checkpoint)
    taken = sorted(set(extra_tensors(plan)) & set(checkpoint.tensors))
    if taken:
        raise PlanError(f"the plan adds {taken[0]}, which is a tensor of {checkpoint.name} already.")


def check_shared(checkpoint: Checkpoint) -> SharePlan:
    """The plan of a shared checkpoint whose tensors are what the plan says.

    Raises:
        CheckpointError: if the checkpoint is not shared, a tensor is missing or has another shape, or a factor is of
            another type than its readout.
        PlanError: if such units cannot be removed from this model.
    """
    if checkpoint.sharing is None:
        raise CheckpointError(f"{checkpoint.name} is not a shared checkpoint; its config.json names no headshare plan.")
    plan, packing = checkpoint.sharing.plan, checkpoint.sharing.packing
    tensors = tensors_of(plan, checkpoint)
    if packing is not None:
        _check_packed(checkpoint, tensors, packing)
    expected: dict[str, tuple[int, ...]] = {
        place.name(layer): place.shape
        for layout in plan.layouts
        for place in layout.parts.values()
        for layer in range(layout.layers)
    }
    if packing is not None:
        parts = [packing.parts(name, shape) for name, shape in expected.items()]
        expected = {name: shape for one in parts for name, shape in one.items()}
    expected |= {name: tensor.stored_shape for name, tensor in tensors.items()}
    for name, shape in expected.items():
        _check_tensor(checkpoint, name, shape, "the checkpoint does not hold what its plan says")
    if plan.removals:
        dense = {name: tensor.shape for name, tensor in tensors.items()}
        check_removals(plan, text_config(checkpoint.config), {**checkpoint.shapes, **dense})
    for name, extra in extra_tensors(plan).items():
        _check_tensor(checkpoint, name, extra.shape, "the checkpoint does not hold what its plan says")
        found, meant = checkpoint.tensors[name].dtype, checkpoint.tensors[extra.weight].dtype
        if tensors[extra.weight].factored and found != meant:
            raise CheckpointError(f"{name} in {checkpoint.name} is {found}; it should be {meant} as {extra.weight} is.")
    return plan


def _check_packed(checkpoint: Checkpoint, tensors: Mapping[str, GappedTensor], packing: Packing) -> None:
    """Every packed matrix has its parts, in their types, and in shapes that fit each other.

    Raises:
        CheckpointError: naming the first that has not.
    """
    what = "the checkpoint does not hold packed matrices as its config.json says"
    stems = {name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith(PARTS)}
    for stem in sorted(stems):
        found = [checkpoint.tensors.get(part_of(stem, part)) for part in PARTS]
        wanted_types = [(TYPES[PACKED], 2), (TYPES[SCALE], 2), (TYPES[SHAPE], 1)]
        if [one and (one.dtype, len(one.shape)) for one in found] != wanted_types:
            raise CheckpointError(f"{what}: {stem} should have {', '.join(PARTS)}, of {', '.join(TYPES.values())}.")
        packed, scale, shape = (one for one in found if one is not None)
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
        found = "no such tensor" if info is None else f"shape {info.shape}"
        raise error(f"{what}: {name} should have shape {shape}; {checkpoint.name} has {found}.")
