"""Which stored tensors of a checkpoint can be rounded, and the bytes that they then take."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import prod

from headshare.architecture.families import TIED_OUTPUTS, is_embedding
from headshare.architecture.model_layouts import ModelLayouts
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import DTYPES, WEIGHT_DTYPES, TensorInfo
from headshare.checkpoint.int4 import GROUPS
from headshare.checkpoint.rounding.numbers import groups_of, stored_width
from headshare.checkpoint.rounding.tensors import SUFFIXES, scale_type
from headshare.errors import CheckpointError, OptionError, PlanError
from headshare.plan.bits import PlannedBits
from headshare.plan.plan import SharePlan
from headshare.plan.section import AddedTensor
from headshare.plan.units import READOUTS
from headshare.sharing.size import Estimate, dtype_code, estimate_plan, item_size, parameter_infos


@dataclass(frozen=True)
class Roundable:
    """A stored matrix that can be rounded: its inputs and outputs there, and whether it is stored (input, output).

    `embedding` marks the input and the output embedding, which are outside of the layers.
    """

    name: str
    outputs: int
    inputs: int
    in_out: bool = False
    embedding: bool = False

    def nbytes(self, bits: int, group: int | None, scale_bytes: int) -> int:
        """The bytes that it takes in so many bits, its scales included."""
        return self.outputs * (stored_width(self.inputs, bits) + groups_of(self.inputs, group) * scale_bytes)


def roundable(checkpoint: Checkpoint, added: Mapping[str, AddedTensor]) -> dict[str, Roundable]:
    """The matrices of a checkpoint, dense or shared, that can be rounded, by name. `added` are those that a plan adds.

    They are those of attention and feed-forward, each as it is stored, low-rank factors among them, and the input and
    output embeddings. Experts and their routers, positions and heads of classes stay as they are.

    Raises:
        ArchitectureError: if the model's layout is not known.
        CheckpointError: if there is none.
    """
    matrices = _roundable(checkpoint.layouts, checkpoint.tensors, added)
    if not matrices:
        raise CheckpointError(f"{checkpoint.name} has no matrix that can be rounded.")
    return matrices


def _roundable(
    layouts: ModelLayouts, infos: Mapping[str, TensorInfo], added: Mapping[str, AddedTensor]
) -> dict[str, Roundable]:
    found: dict[str, bool] = {}
    for layout in layouts.all:
        for part, place in layout.parts.items():
            in_out = (place.axis == 1) != (part in READOUTS)
            found |= {place.name(layer): in_out for layer in range(layout.layers)}
    found |= {name: False for name, tensor in added.items() if tensor.fill is None}
    embeddings = [name for name in infos if is_embedding(name)]
    found |= dict.fromkeys(embeddings, False)
    matrices: dict[str, Roundable] = {}
    for name, in_out in found.items():
        info = infos.get(name)
        if info is not None and info.dtype in WEIGHT_DTYPES and len(info.shape) == 2 and 0 not in info.shape:
            outputs, inputs = reversed(info.shape) if in_out else info.shape
            matrices[name] = Roundable(name, outputs, inputs, in_out, name in embeddings)
    return matrices


def once(checkpoint: Checkpoint, matrices: Mapping[str, Roundable]) -> dict[str, Roundable]:
    """These matrices without output embeddings that are the input's, and so are not stored again."""
    repeated = repeated_outputs(checkpoint)
    return {name: matrix for name, matrix in matrices.items() if name not in repeated}


@dataclass(frozen=True)
class Bits:
    """The bits of each matrix that is rounded, by name, and how many of its inputs have one scale, by bits."""

    of: Mapping[str, int]
    groups: Mapping[int, int | None]

    def group(self, name: str) -> int | None:
        """The inputs of this matrix that have one scale; None for all of a row."""
        return self.groups[self.of[name]]


def bits_for(
    layouts: ModelLayouts, matrices: Mapping[str, Roundable], bits: int, group: int | None, *, embeddings: bool
) -> Bits:
    """The bits that each of these matrices gets where so many are asked for.

    `embeddings` are rounded to 8 bits, or stay. In 8 bits a `group` of None is a scale for each row. In 4 it is the
    largest of 128, 64, 32, 16 and 8 inputs that divides those of all dense matrices; a stored one of less than half a
    group has no use for 4 bits, and gets 8.

    Raises:
        CheckpointError: if no group divides the inputs of all matrices in 4 bits, or this one does not.
        OptionError: if there is no such rounding.
    """
    if bits not in SUFFIXES:
        raise OptionError(f"there is no rounding to {bits} bits. There are: {', '.join(map(str, sorted(SUFFIXES)))}.")
    if group is not None and not 1 <= group <= 2**16:
        raise OptionError(f"a group of {group} inputs cannot have a scale. Give a number from 1 to {2**16}.")
    asked = {name: matrix for name, matrix in matrices.items() if embeddings or not matrix.embedding}
    if bits == 8:
        return Bits(dict.fromkeys(asked, 8), {8: group})
    size = _fitting(_inputs(layouts), group)
    eight = {name for name, matrix in asked.items() if matrix.embedding or 2 * matrix.inputs < size}
    return Bits({name: 8 if name in eight else 4 for name in asked}, {4: size, 8: None})


def bits_of(
    planned: PlannedBits, layouts: ModelLayouts, matrices: Mapping[str, Roundable], added: Mapping[str, AddedTensor]
) -> Bits:
    """The bits that a plan gives these matrices; those that it adds have the bits of the matrix that they belong to.

    A stored one of less than half a group of inputs has no use for 4 bits, and gets 8.

    Raises:
        PlanError: if it names a matrix that the model has not.
    """
    places = [(place, layout.layers) for layout in layouts.all for place in layout.parts.values()]
    known = {place.name(layer) for place, layers in places for layer in range(layers)} | set(matrices)
    unknown = sorted(set(planned.of) - known)
    if unknown:
        raise PlanError(f"the plan rounds {unknown[0]:.200}, which is no matrix of this model. Plan for it again.")
    group = planned.group or 1
    wanted = {name: planned.of.get(added[name].weight if name in added else name) for name in matrices}
    of = {
        name: 8 if bits == 4 and 2 * matrices[name].inputs < group else bits
        for name, bits in wanted.items()
        if bits is not None
    }
    return Bits(of, {4: planned.group, 8: None})


def groups_fitting(checkpoint: Checkpoint, sizes: Collection[int]) -> list[int]:
    """Those of these sizes of a group that divide the inputs of all dense matrices of a checkpoint."""
    inputs = _inputs(checkpoint.layouts)
    return [size for size in sizes if all(count % size == 0 for count in inputs)]


def _inputs(layouts: ModelLayouts) -> set[int]:
    """The counts of inputs that a model's dense matrices have."""
    places = [(part, place) for layout in layouts.all for part, place in layout.parts.items()]
    return {place.shape[place.axis if part in READOUTS else 1 - place.axis] for part, place in places}


def _fitting(inputs: set[int], group: int | None) -> int:
    fitting = [size for size in GROUPS if all(count % size == 0 for count in inputs)]
    if (group is None and not fitting) or (group is not None and any(count % group for count in inputs)):
        sizes = ", ".join(map(str, sorted(inputs)))
        raise CheckpointError(f"matrices of {sizes} inputs do not divide into groups of {group or GROUPS[-1]}.")
    return group or fitting[0]


def repeated_outputs(checkpoint: Checkpoint) -> set[str]:
    """Output embeddings that a checkpoint stores although they are the input's: a rounded one is stored once."""
    infos = parameter_infos(checkpoint)
    return {name for name in checkpoint.tensors if name in TIED_OUTPUTS and name not in infos}


def estimate_rounded(
    checkpoint: Checkpoint, plan: SharePlan, *, bits: int, group: int | None = None, dtype: str | None = None
) -> Estimate:
    """The estimate for this plan and a dense checkpoint whose matrices are then rounded, embeddings to 8 bits.

    It is what rounding leaves, to the byte. Weights have the type `dtype` if it is given.

    Raises:
        ArchitectureError: if the model's layout is not known.
        CheckpointError: if a group does not fit.
        OptionError: if there is no such type or rounding.
    """
    layouts = checkpoint.layouts

    def chosen(matrices: Mapping[str, Roundable]) -> Bits:
        return bits_for(layouts, matrices, bits, group, embeddings=True)

    return _estimate(checkpoint, plan, dtype, chosen)


def estimate_planned(checkpoint: Checkpoint, plan: SharePlan, *, dtype: str | None = None) -> Estimate:
    """The estimate for this plan and a dense checkpoint, rounded to the plan's own bits where it has some.

    Raises:
        OptionError, PlanError: if there is no such type, or the plan is of another model.
    """
    planned = plan.bits
    if planned is None:
        return estimate_plan(checkpoint, plan, dtype=dtype)
    layouts = checkpoint.layouts
    return _estimate(checkpoint, plan, dtype, lambda matrices: bits_of(planned, layouts, matrices, plan.added_tensors))


def _estimate(
    checkpoint: Checkpoint, plan: SharePlan, dtype: str | None, chosen: Callable[[Mapping[str, Roundable]], Bits]
) -> Estimate:
    estimate = estimate_plan(checkpoint, plan, dtype=dtype)
    code = dtype_code(dtype)
    tensors = {**plan.tensors, **plan.biases}
    infos = {
        name: replace(info, shape=tensors[name].stored_shape if name in tensors else info.shape)
        for name, info in parameter_infos(checkpoint).items()
    }
    added = plan.added_tensors
    infos |= {name: replace(infos[extra.weight], name=name, shape=extra.shape) for name, extra in added.items()}
    matrices = _roundable(checkpoint.layouts, infos, added)
    rounded = chosen(matrices)
    size = 0
    for name, info in infos.items():
        if name in rounded.of:
            scale = DTYPES[scale_type(rounded.of[name], code or info.dtype)].itemsize
            size += matrices[name].nbytes(rounded.of[name], rounded.group(name), scale)
        else:
            size += prod(info.shape) * item_size(info, code)
    saved = estimate.dense_bytes - size
    return replace(estimate, shared_bytes=size, saved_bytes=saved, saved_fraction=saved / estimate.dense_bytes)
