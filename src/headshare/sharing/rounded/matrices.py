"""Which stored tensors of a checkpoint can be rounded, and the bytes that they then take."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from headshare.architecture.families import INPUT_EMBEDDINGS, TIED_OUTPUTS
from headshare.architecture.model_layouts import ModelLayouts
from headshare.checkpoint.checkpoint import WEIGHT_DTYPES, Checkpoint
from headshare.checkpoint.header import TensorInfo
from headshare.checkpoint.rounding.numbers import groups_of
from headshare.errors import CheckpointError
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
        row = self.inputs if bits == 8 else -(-self.inputs // 2)
        return self.outputs * (row + groups_of(self.inputs, group) * scale_bytes)


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
    embeddings = [name for name in infos if name.endswith(INPUT_EMBEDDINGS) or name in TIED_OUTPUTS]
    found |= dict.fromkeys(embeddings, False)
    matrices: dict[str, Roundable] = {}
    for name, in_out in found.items():
        info = infos.get(name)
        if info is not None and info.dtype in WEIGHT_DTYPES and len(info.shape) == 2 and 0 not in info.shape:
            outputs, inputs = reversed(info.shape) if in_out else info.shape
            matrices[name] = Roundable(name, outputs, inputs, in_out, name in embeddings)
    return matrices


def repeated_outputs(checkpoint: Checkpoint) -> set[str]:
    """Output embeddings that a checkpoint stores although they are the input's: a rounded one is stored once."""
    once = parameter_infos(checkpoint)
    return {name for name in checkpoint.tensors if name in TIED_OUTPUTS and name not in once}


def estimate_rounded(
    checkpoint: Checkpoint, plan: SharePlan, *, bits: int, group: int | None = None, dtype: str | None = None
) -> Estimate:
    """The estimate for this plan and a dense checkpoint whose matrices are then rounded, embeddings too.

    It is what `round_to_nearest` leaves, to the byte. Scales have the type of the weights, which is `dtype` if given.

    Raises:
        ArchitectureError: if the model's layout is not known.
        OptionError: if there is no such type.
    """
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
    size = 0
    for name, info in infos.items():
        each = item_size(info, code)
        size += matrices[name].nbytes(bits, group, each) if name in matrices else prod(info.shape) * each
    saved = estimate.dense_bytes - size
    return replace(estimate, shared_bytes=size, saved_bytes=saved, saved_fraction=saved / estimate.dense_bytes)
