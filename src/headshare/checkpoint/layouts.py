"""Layouts of a checkpoint's attention and feed-forward units."""

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import WEIGHT_DTYPES
from headshare.errors import CheckpointError
from headshare.plan.layout import Layout
from headshare.plan.units import Parts


def require_one_dtype(layout: Layout, checkpoint: Checkpoint) -> None:
    """Refuse a part whose tensors are of different types in different layers, or not floating-point weights.

    Raises:
        CheckpointError: naming the part and the types.
    """
    for place in layout.parts.values():
        dtypes = {checkpoint.tensors[place.name(layer)].dtype for layer in range(layout.layers)}
        if len(dtypes) > 1 or not dtypes <= set(WEIGHT_DTYPES):
            raise CheckpointError(
                f"{place.tensor} is stored as {', '.join(sorted(dtypes))} in its layers; units can be shared only "
                f"where all layers have one of {', '.join(WEIGHT_DTYPES)}."
            )


def layouts_of(checkpoint: Checkpoint, parts: Parts, ffn_groups: int = 1) -> tuple[Layout, ...]:
    """The layouts of the sublayers that these parts belong to, each with all parts of its sublayer.

    Raises:
        ArchitectureError: if the model's layout is not known.
        PlanError: if the neurons do not divide into that many groups.
    """
    layouts = []
    if parts.attention:
        layouts.append(checkpoint.layouts.attention)
    if parts.ffn:
        layouts.append(checkpoint.layouts.ffn_in(ffn_groups))
    for layout in layouts:
        require_one_dtype(layout, checkpoint)
    return tuple(layouts)
