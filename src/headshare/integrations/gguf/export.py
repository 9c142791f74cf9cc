"""The export of a checkpoint, shared or dense, as a GGUF file that llama.cpp runs."""

from pathlib import Path

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import ArchitectureError, CheckpointError, OptionError
from headshare.files.untrusted import foreign
from headshare.integrations.gguf.contents import contents_of
from headshare.integrations.gguf.exported import Exported, exported
from headshare.integrations.gguf.hyperparameters import general, hyperparameters
from headshare.integrations.gguf.number_types import number_type, type_of
from headshare.integrations.gguf.rotary import rotary_of
from headshare.integrations.gguf.shape import shape_of
from headshare.integrations.gguf.vocabulary import vocabulary
from headshare.integrations.gguf.writing import check_file, check_installed, write_file
from headshare.sharing.expanded import ExpandedTensors
from headshare.sharing.fits import open_shared

ENDING = ".gguf"


# types in which what is rounded already loses nothing, or next to nothing
_TAKING_ROUNDED = ("q8_0", "bf16", "f16", "f32")


def export_gguf(checkpoint: Checkpoint, out: str | Path, *, dtype: str = "f16", overwrite: bool = False) -> Exported:
    """Write a checkpoint, shared or dense, as one GGUF file that unmodified llama.cpp runs, and that computes the same.

    Removed units, neurons and sublayers stay removed. Ties, scales and low-rank factors are multiplied out, narrow
    values are filled up with zeros, and the result says how many bytes that gives back. Matrices are stored as `dtype`:
    f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0. The tokenizer comes along.

    Raises:
        OptionError: if there is no such type, the file does not end in .gguf, or the gguf package is not installed.
        ArchitectureError: if llama.cpp does not run such a model, with the reason.
        CheckpointError: if the checkpoint is incomplete, would be rounded twice, or its tokenizer is of another kind.
        OutputError: if the file exists or cannot be written; nothing of it is left behind.
    """
    out = Path(out)
    wanted = number_type(dtype)
    if out.suffix != ENDING:
        raise OptionError(f"{out.name} should end in {ENDING}, which is the only format that is written so far.")
    check_installed()
    check_file(out, checkpoint.path, overwrite=overwrite)
    _check_rounding(checkpoint, dtype)
    rounded = checkpoint.sharing is not None and checkpoint.sharing.packing is not None
    tensors = ExpandedTensors(open_shared(checkpoint)) if rounded else ExpandedTensors.of(checkpoint)
    shape = shape_of(checkpoint, block=wanted.block)
    config = checkpoint.layouts.config
    with foreign(f"config.json of {checkpoint.name} cannot be written as GGUF", ArchitectureError):
        rotary = rotary_of(config, shape.head_dim)
    contents = contents_of(tensors, shape, rotary)
    rows = contents[0].shape[0]
    with foreign(f"config.json of {checkpoint.name} cannot be written as GGUF", ArchitectureError):
        keys = {**general(checkpoint, shape, wanted), **hyperparameters(config, shape, rotary, rows)}
    keys |= vocabulary(checkpoint, rows)
    placed = [(each, type_of(each.shape, wanted, reads_out=each.reads_out)) for each in contents]
    checkpoint.check_unchanged()  # the settings and the tokenizer are those of the weights, which are watched
    size = write_file(out, keys, placed)
    return exported(tensors, shape, placed, wanted, out, size)


def _check_rounding(checkpoint: Checkpoint, dtype: str) -> None:
    """Refuse matrices that are rounded already where they would be rounded again, in blocks that do not fit each other.

    Those of 8 bits are stored as they are in q8_0, and 4 bits lose next to nothing there.

    Raises:
        CheckpointError: saying what to export instead.
    """
    entry = checkpoint.sharing
    if entry is None:
        checkpoint.require_dense("export it")
    elif entry.packing is not None and (entry.rounding is None or dtype not in _TAKING_ROUNDED):
        raise CheckpointError(
            f"the matrices of {checkpoint.name} are rounded already. Export them as q8_0, or "
            "the folder that they were rounded from."
        )
