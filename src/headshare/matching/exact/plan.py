"""The plan that stores once what a checkpoint holds several times, bit for bit."""

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.defaults import MAX_NAME
from headshare.matching.exact.find import identical_tensors
from headshare.matching.exact.units import equal_units
from headshare.plan.copies.identical import Copied, IdenticalTensors
from headshare.plan.plan import SharePlan
from headshare.plan.section import Choice, Section

# the name of this match, in plans and on the command line
EXACT = "exact"


def exact_plan(dense: Checkpoint, *, mode: str = EXACT, units: bool = True) -> SharePlan:
    """The plan that stores once what stands several times in a dense checkpoint. Nothing is lost by it.

    Whole tensors that are equal are copies of the first. Where tensors differ, attention units of different layers that
    are equal in some of their parts are tied in those, unless `units` is false. All weights that could be equal are
    read. The plan is empty where nothing stands twice. `mode` is noted in it: how the model came to be so.

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
    sections: list[Section] = []
    if units:
        copies = {name for each in copied for name in each.also}
        sections += equal_units(dense, layout, copies, {each.tensor for each in copied}, chosen)
    if copied:
        sections.append(IdenticalTensors(layout=layout, copied=copied, chosen=chosen))
    return SharePlan.of_sections(sections, model_type=str(dense.config.get("model_type", "unknown")))
