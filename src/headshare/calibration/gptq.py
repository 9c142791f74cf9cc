"""Round a model's matrices to 4 bits by GPTQ. Each stored row is rounded once, on the inputs of all its users.

GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: accurate post-training quantization", 2022) rounds each row of a
matrix by itself, given the Gram matrix of its inputs. So stored rows that have the same users form one matrix, whose
inputs are those of all the users (`pieces.py`). The library gptqmodel does the rounding.
"""

import contextlib
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.pieces import Piece, pieces_of
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import DTYPES
from headshare.checkpoint.int4 import BITS, OFFSET
from headshare.checkpoint.rounding.numbers import Rounded, groups_of
from headshare.checkpoint.rounding.tensors import scale_type
from headshare.errors import CheckpointError
from headshare.installing import install
from headshare.progress import track
from headshare.sharing.expanded import ExpandedTensors
from headshare.sharing.rounded.matrices import Roundable, bits_for, once, roundable
from headshare.sharing.rounded.write import RoundedCheckpoint, check_roundable, nearest_of
from headshare.text.tokens import Calibration


def round_by_gptq(
    checkpoint: Checkpoint,
    calibration: Calibration,
    *,
    group: int | None = None,
    embeddings: bool = False,
    device: str = "cpu",
) -> RoundedCheckpoint:
    """Round the layers' matrices of a dense or a shared checkpoint to 4 bits, under any plan.

    Each `group` of inputs has a scale. `bits_for` has the default, and says which matrices get 8 bits to the nearest:
    those that a plan left next to no inputs, and `embeddings`. All matrices are rounded on the inputs that they have
    before any is rounded. Memory holds one layer, the hidden states, the results, and the Gram matrices of shared rows
    until the last user of the rows has run.

    Raises:
        CheckpointError: if gptqmodel is not installed, no such group fits it, it is rounded already, or it cannot be
            walked layer by layer.
        OptionError: if there is no such group.
    """
    layers = Layers(checkpoint, device=device)
    matrices = roundable(checkpoint, check_roundable(checkpoint))
    bits = bits_for(checkpoint.layouts, once(checkpoint, matrices), BITS, group, embeddings=embeddings)
    size = bits.groups[BITS]
    assert size is not None
    make = _maker(size)
    names = [layers.tensors_of(layer) for layer in range(layers.count)]
    pieces = [piece for piece in pieces_of(ExpandedTensors.of(checkpoint), matrices) if bits.of[piece.name] == BITS]
    found = {piece.name: _empty(checkpoint, matrices[piece.name], size) for piece in pieces}

    # The layers run one after the other, unrounded. Rows are rounded once their last user has given its inputs.
    tasks: dict[Piece, Any] = {}
    stream = layers.start(calibration.tokens)
    for layer, by_name in track(list(enumerate(names)), "rounding", len(names)):
        module = layers.build(layer)
        for at in layers.batches(range(len(stream)), stream.shape[1]):
            left, seen = layers.run(module, layer, stream[at], tuple(dict.fromkeys(by_name.values())))
            stream[at] = left.cpu()
            for piece in pieces:
                for use in (use for use in piece.uses if use.user in by_name):
                    if piece not in tasks:
                        tasks[piece] = make(_linear(_rows_of(checkpoint, piece, matrices), size, layers.device))
                    tasks[piece].add_batch(_filled(use.inputs(seen.inputs[by_name[use.user]]), size), None)
        for piece in [piece for piece in tasks if piece.uses[-1].user in by_name]:
            _put(piece, tasks.pop(piece), found[piece.name], matrices[piece.name].inputs)

    def numbers(name: str) -> Rounded:
        return found[name] if name in found else nearest_of(checkpoint, matrices[name], bits.of[name], bits.group(name))

    return RoundedCheckpoint(checkpoint, matrices, bits, {BITS: "by GPTQ"}, numbers)


def _rows_of(checkpoint: Checkpoint, piece: Piece, matrices: Mapping[str, Roundable]) -> Tensor:
    """The stored rows of a piece; a row is an output."""
    whole = checkpoint.read(piece.name)
    return (whole.T if matrices[piece.name].in_out else whole)[piece.rows].float()


def _linear(rows: Tensor, group: int, device: torch.device) -> nn.Linear:
    """A module of these rows, with inputs that are always zero in the place of what the last group lacks."""
    filled = _filled(rows, group)
    linear = nn.Linear(filled.shape[1], len(filled), bias=False, device=device)
    linear.weight.data.copy_(filled)
    return linear


def _filled(inputs: Tensor, group: int) -> Tensor:
    return pad(inputs, (0, -inputs.shape[-1] % group))


def _empty(checkpoint: Checkpoint, matrix: Roundable, group: int) -> Rounded:
    """A matrix whose rows are yet to be filled."""
    numbers = torch.zeros(matrix.outputs, matrix.inputs, dtype=torch.int8)
    dtype = DTYPES[scale_type(BITS, checkpoint.tensors[matrix.name].dtype)]
    return Rounded(numbers, torch.zeros(matrix.outputs, groups_of(matrix.inputs, group), dtype=dtype))


def _put(piece: Piece, task: Any, matrix: Rounded, inputs: int) -> None:
    """Round the rows of a piece and put them into their matrix.

    Raises:
        CheckpointError: if they cannot be rounded.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            weight, scale, zero, _, _, loss, *_ = task.quantize()
        # Rows that GPTQ cannot solve for are rounded to the nearest numbers, which only the loss tells.
        finite = isinstance(loss, float) and math.isfinite(loss)
        finite = finite and bool(torch.isfinite(weight).all() and torch.isfinite(scale.to(matrix.scale.dtype)).all())
    except ValueError:  # no rounding has a finite loss
        finite = False
    if not finite:
        raise CheckpointError(
            f"GPTQ cannot round a matrix: {piece.name} has numbers that are not finite, or its inputs have, or they "
            "are too large to be multiplied. Nothing is rounded."
        )
    # Weights over scales are integers again, which are stored.
    assert bool((zero == OFFSET).all())
    wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    matrix.numbers[piece.rows] = (weight / wide).round().nan_to_num_()[:, :inputs].to(torch.int8).cpu()
    matrix.scale[piece.rows] = scale.detach().to(matrix.scale.dtype).cpu()


def _maker(group: int) -> Any:
    """A function that makes gptqmodel's GPTQ task of a linear module.

    Raises:
        CheckpointError: if gptqmodel is not installed.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from gptqmodel.quantization import QuantizeConfig
            from gptqmodel.quantization.gptq import GPTQ
    except ImportError as error:
        raise CheckpointError(f"rounding to few bits needs gptqmodel ({error}): {install('gptq')}") from None

    # The rounding is symmetric and keeps the order of inputs, as the stored form has neither zeros nor an order.
    def make(linear: nn.Linear) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            task = GPTQ(
                linear,
                QuantizeConfig(
                    bits=BITS,
                    group_size=group,
                    sym=True,
                    desc_act=False,
                    act_group_aware=False,
                    offload_to_disk=False,
                    fallback=None,
                ),
            )
            task.quantizer.configure(perchannel=True)
        return task

    return make
