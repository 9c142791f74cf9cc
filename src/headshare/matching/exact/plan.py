"""The plan that stores once what a checkpoint holds several times, bit for bit."""

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.defaults import MAX_NAME
from headshare.matching.exact.find import identical_tensors
from headshare.plan.copies.identical import Copied, IdenticalTensors
from headshare.plan.plan import SharePlan
from headshare.plan.section import Choice

# the name of this match, in plans and on the command line
EXACT = "exact"


def exact_plan(dense: Checkpoint, *, mode: str = EXACT) -> SharePlan:
    """The plan that stores once what stands several times in a dense checkpoint. Nothing is lost by it.

    All weights that could be equal are read once. The plan is empty where nothing stands twice. `mode` is noted in it:
    how the model came to be so.

    Raises:
        ArchitectureError: if the model's layout is not known.
        CheckpointError: if the checkpoint is shared or quantised, or a file cannot be read.
    """
    dense.require_dense("look for what stands twice in")
    layout = dense.layouts.attention
    copied = tuple(
        Copied(tensor=first, shape=dense.tensors[first].shape, also=tuple(others))
        for first, *others in identical_tensors(dense)
    )
    chosen = Choice(match=EXACT, mode=mode[:MAX_NAME])
    sections = [IdenticalTensors(layout=layout, copied=copied, chosen=chosen)] * bool(copied)
    return SharePlan.of_sections(sections, model_type=str(dense.config.get("model_type", "unknown")))
