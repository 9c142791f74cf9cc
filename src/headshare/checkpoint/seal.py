"""The seal that ties a plan to the weights that were written by it: its digest, in each weights file's metadata.

Without it, nothing would tell that a plan in config.json was edited, or is another checkpoint's of equal shapes.
Checkpoints that were written before there were seals, or by transformers, have none, and are not checked.

`save_pretrained` cannot write one and be reproducible to the byte. safetensors keeps metadata in a hash map, whose
order is drawn anew for each file, so that a second key moves; the only key that is left is `format`, whose value
transformers sets after it asked the quantizer, and which accelerate refuses unless it is the bare name of a
framework. A digest in config.json could name the weights only by what they hold, and every loading would then read
them once more.
"""

from collections.abc import Mapping

from headshare.checkpoint.entry import SharingEntry
from headshare.errors import CheckpointError
from headshare.plan.plan import SharePlan

# the key in a safetensors file's metadata
PLAN = "headshare.plan"

Metadata = Mapping[str, str]


def seal_of(plan: SharePlan) -> dict[str, str]:
    """The metadata that seals a file of weights."""
    return {PLAN: plan.digest}


def is_sealed(files: Mapping[str, Metadata]) -> bool:
    """Whether any file of weights, given by its metadata, carries a plan's digest: then a manifest goes with it."""
    return any(PLAN in metadata for metadata in files.values())


def check_seal(name: str, entry: SharingEntry | None, files: Mapping[str, Metadata]) -> None:
    """Check that all files of a sealed checkpoint were written by the plan that its config.json holds.

    Raises:
        CheckpointError: naming a file that was not.
    """
    if not is_sealed(files):
        return
    digest = None if entry is None else entry.plan.digest
    for file, metadata in sorted(files.items()):
        if metadata.get(PLAN) != digest:
            raise CheckpointError(
                f"{name}: config.json does not hold the plan by which {file} was written, so one of the two was "
                "changed or is another checkpoint's. Restore it, or share again."
            )
