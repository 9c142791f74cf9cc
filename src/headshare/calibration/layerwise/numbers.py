"""Numbers that can be calibrated on: the model's weights, and what its layers make of the text, are finite and fit in
memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from headshare.calibration.layerwise.layers import Layers
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CalibrationError, CheckpointError
from headshare.files.printable import reason_of
from headshare.files.untrusted import wants_memory
from headshare.sharing.writer import check_finite


@torch.no_grad()
def check_numbers(checkpoint: Checkpoint, tokens: Int[Tensor, "windows window"], device: str) -> None:
    """Refuse a model whose weights are not all finite, or which gives no finite number on the first of these windows.

    That takes two readings of the model, and spares the hours after which nothing could be fitted or written.

    Raises:
        CheckpointError: naming the tensor or the layer.
    """
    check_finite(checkpoint)
    layers = Layers(checkpoint, device=device)
    stream = layers.start(tokens[:1])
    for layer in range(layers.count):
        layers.run_over(layers.build(layer), layer, stream)
        if not torch.isfinite(stream).all(dim=-1).any():
            raise CheckpointError(
                f"layer {layer} of {checkpoint.name} gives no finite numbers on the calibration text: its weights are "
                "too large, or damaged. Download it again."
            )


@contextmanager
def solved() -> Iterator[None]:
    """Turn systems of equations that have no solution into an error that says why.

    Raises:
        CalibrationError: where the block meets one.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch's stubs lack it
        raise CalibrationError(
            "what the layers give on the calibration text is too large, or too uneven, to be fitted to. Use another "
            f"text, or look at the model's weights ({reason_of(error):.120})."
        ) from error


@contextmanager
def enough_memory(device: str) -> Iterator[None]:
    """Turn memory that ran out into an error that says what to lower. What was kept on disk stays.

    Raises:
        CalibrationError: where the block runs out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not wants_memory(error):
            raise
        where = "" if device == "cpu" else f" of {device}, unless --device cpu has more"
        raise CalibrationError(
            "there is not enough memory for one layer with what it makes of the calibration text. Lower "
            f"--calibration-tokens or, first, --calibration-window{where}; or start more processes, each of which has "
            "a part of the tokens."
        ) from error
