"""Round a model's matrices to few bits by GPTQ, each shared unit once, on what all its users give it.

GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: accurate post-training quantization", 2022) rounds each row of a
matrix by itself, given the products of its inputs. So the rows of one tensor that have the same users are one matrix,
whose inputs are those of all the users; gptqmodel does the rounding.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headshare.calibration import Calibration
from headshare.checkpoints import Checkpoint
from headshare.errors import CheckpointError, PlanError
from headshare.gaps import GappedTensor
from headshare.progress import track
from headshare.streams import Layers
from headshare.whole import WholeTensors

BITS = 4
GROUP = 128
SCALE_BYTES = 2


@dataclass
class Rounded:
    """The layers' matrices with rounded numbers, whole, by name, in the types that they are stored as; and the bytes
    that packing them would save: so many bits a number, and for each group of inputs of a row a scale and a zero."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    saved_bytes: int = 0


def round_by_gptq(
    checkpoint: Checkpoint,
    calibration: Calibration,
    *,
    bits: int = BITS,
    group: int = GROUP,
    device: str = "cpu",
) -> Rounded:
    """Round a dense or a shared checkpoint's matrices, all on the inputs that they have before any is rounded.

    One layer and the hidden states are in memory at a time, and the products of the inputs of shared rows until their
    last user has been walked. Inputs are grouped by `group`, or all together where that does not divide them.

    Raises:
        CheckpointError: if gptqmodel is not there, the model's matrices stand the other way round (GPT-2's), or the
            model cannot be walked layer by layer.
        PlanError: if the plan ties, removes or factors columns of a readout.
    """
    whole = WholeTensors.of(checkpoint)
    tensors, shapes = whole.tensors, whole.shapes
    if any(tensor.axis != 0 for tensor in tensors.values()):
        raise PlanError(
            "only ties of q, k and v (and of gate and up) can be rounded to few bits; this plan has others."
        )
    layers = Layers(checkpoint, device=device)
    if layers.in_out:
        raise CheckpointError(f"{checkpoint.name} holds its matrices as (input, output), which are not rounded yet.")
    make = _maker(bits, group)
    result, names = Rounded(), [layers.tensors_of(layer) for layer in range(layers.count)]
    pieces = [piece for layer in names for name in layer for piece in _pieces(name, tensors, shapes)]
    users: dict[str, list[_Piece]] = {}
    for piece in pieces:
        for user in piece.users:
            users.setdefault(user, []).append(piece)
    stream = layers.start(calibration.tokens)
    for layer, by_name in track(list(enumerate(names)), "rounding", len(names)):
        module = layers.build(layer)
        for at in layers.batches(range(len(stream)), stream.shape[1]):
            left, seen = layers.run(module, layer, stream[at], tuple(dict.fromkeys(by_name.values())))
            stream[at] = left.cpu()
            for name, path in by_name.items():
                for piece in users[name]:
                    piece.task(make, whole, layers.device).add_batch(seen.inputs[path], None)
        for name in by_name:
            for piece in (piece for piece in users[name] if piece.users[-1] == name):
                piece.put(result, whole, bits, group)
    for name, tensor in tensors.items():
        if name not in result.tensors:  # all of its rows are borrowed
            result.tensors[name] = whole.read(name)
        for gap in tensor.gaps:
            size = gap.stop - gap.start
            result.tensors[name][gap.start : gap.stop] = result.tensors[gap.donor].narrow(0, gap.donor_start, size)
    return result


@dataclass
class _Piece:
    """Rows of one tensor that have the same users: tensors, in the order in which layers use them, its own first."""

    name: str
    rows: Int[Tensor, " rows"]
    users: tuple[str, ...]
    _task: Any = None

    def task(self, make: Any, whole: WholeTensors, device: torch.device) -> Any:
        """GPTQ of these rows."""
        if self._task is None:
            weight = whole.read(self.name)[self.rows]
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=device)
            linear.weight.data.copy_(weight)
            self._task = make(linear)
        return self._task

    def put(self, result: Rounded, whole: WholeTensors, bits: int, group: int) -> None:
        """Round, and put the rows into the result."""
        with contextlib.redirect_stdout(sys.stderr):
            found = self._task.quantize()[0].detach()
        self._task = None
        if self.name not in result.tensors:
            result.tensors[self.name] = whole.read(self.name)
        kept = result.tensors[self.name]
        kept[self.rows] = found.to(kept.dtype).cpu()
        rows, inputs = found.shape
        groups = inputs // group if inputs % group == 0 else 1
        packed = rows * inputs * bits / 8 + rows * groups * (SCALE_BYTES + bits / 8)
        result.saved_bytes += int(rows * inputs * kept.element_size() - packed)


def _pieces(name: str, tensors: Mapping[str, GappedTensor], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[_Piece]:
    """The rows that a tensor stores, by their users."""
    users: list[tuple[str, ...]] = [(name,)] * shapes[name][0]
    for other in sorted(tensors.values(), key=lambda one: _layer_of(one.name)):
        for gap in (gap for gap in other.gaps if gap.donor == name):
            for row in range(gap.donor_start, gap.donor_start + gap.stop - gap.start):
                users[row] = (*users[row], other.name)
    stored = torch.full((len(users),), name not in tensors)
    if name in tensors:
        for start, stop in tensors[name].kept():
            stored[start:stop] = True
    for same in dict.fromkeys(users):
        rows = torch.tensor([row for row, one in enumerate(users) if one == same and stored[row]], dtype=torch.long)
        if len(rows):
            yield _Piece(name, rows, same)


def _layer_of(name: str) -> int:
    return next(int(step) for step in name.split(".") if step.isdigit())


def _maker(bits: int, group: int) -> Any:
    """Makes gptqmodel's GPTQ of a linear module.

    Raises:
        CheckpointError: if gptqmodel is not installed.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from gptqmodel.quantization import QuantizeConfig
            from gptqmodel.quantization.gptq import GPTQ
    except ImportError as error:
        raise CheckpointError(
            f'rounding to few bits needs gptqmodel ({error}): pip install "headshare[gptq]"'
        ) from None

    def make(linear: nn.Linear) -> Any:
        size = group if linear.in_features % group == 0 else -1
        with contextlib.redirect_stdout(sys.stderr):
            task = GPTQ(
                linear,
                QuantizeConfig(
                    bits=bits, group_size=size, sym=True, desc_act=False, act_group_aware=False, offload_to_disk=False
                ),
            )
            task.quantizer.configure(perchannel=True)
        return task

    return make
