"""Layouts of a checkpoint's attention and feed-forward units."""

from headshare.architecture.config import text_config
from headshare.architecture.recognition import attention_layout, ffn_layout
from headshare.checkpoint.checkpoint import WEIGHT_DTYPES, Checkpoint
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
    """The grids that these parts belong to, with all the parts those grids have.

    Raises:
        ArchitectureError: if the model's layout is not known.
        PlanError: if a part is not there.
    """
    config, shapes = text_config(checkpoint.config), checkpoint.shapes
    layouts = []
    if parts.attention:
        layouts.append(attention_layout(config, shapes))
    if parts.ffn:
        layouts.append(ffn_layout(config, shapes, ffn_groups))
    for layout in layouts:
        require_one_dtype(layout, checkpoint)
    return tuple(layouts)


def attention_of(dense: Checkpoint) -> Layout:
    """The attention units of a model, with all their parts."""
    return attention_layout(text_config(dense.config), dense.shapes)
