"""Round a model's matrices to 4 bits by GPTQ. Each shared unit is rounded once, on the inputs of all its users.

GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: accurate post-training quantization", 2022) rounds each row of a
matrix by itself, given the Gram matrix of its inputs. So the rows of one tensor that have the same users form one
matrix, whose inputs are those of all the users. The library gptqmodel does the rounding.
"""

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headshare.architecture.modules import ModuleMap
from headshare.calibration.layerwise.layers import Layers
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.int4 import A_WORD, BITS, GROUPS, OFFSET, SCALE_DTYPE, Packing, pack
from headshare.errors import CheckpointError, OptionError, PlanError
from headshare.installing import install
from headshare.integrations.transformers.loading import empty_model
from headshare.plan.tensors import TensorPlan
from headshare.progress import track
from headshare.sharing.expanded import ExpandedTensors
from headshare.sharing.rewrite import PackedMatrix, write_packed
from headshare.text.tokens import Calibration


@dataclass(frozen=True)
class QuantizedModel:
    """A checkpoint, and its layers' whole matrices by name, rounded to 4 bits, as `save` writes them."""

    checkpoint: Checkpoint
    packing: Packing
    matrices: Mapping[str, PackedMatrix]

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the rounded checkpoint as a folder, whole or not at all, and check what was written.

        Raises:
            OutputError: if the folder exists or cannot be written.
        """
        return write_packed(self.checkpoint, self.matrices, self.packing, Path(out), overwrite=overwrite)


def round_by_gptq(
    checkpoint: Checkpoint, calibration: Calibration, *, group: int | None = None, device: str = "cpu"
) -> QuantizedModel:
    """Round the matrices of a dense or a shared checkpoint to 4 bits.

    Each `group` of inputs has a scale (default: the largest of 128, 64, 32, 16 and 8 that fits all matrices). All
    matrices are rounded on the inputs that they have before any is rounded. Memory holds one layer, the hidden states,
    the packed results, and the Gram matrices of shared rows until the last user of the rows has run.

    Raises:
        CheckpointError: if gptqmodel is not installed, the model stores its matrices as (input, output) as GPT-2 does,
            it has experts, no such group fits it, it is rounded already, or it cannot be walked layer by layer.
        OptionError: if the group does not fill whole 32-bit words.
        PlanError: if the plan does more than share rows (of q, k, v, gate and up).
    """
    # Models and plans whose matrices are no rows to be rounded are refused before any layer runs.
    if checkpoint.plan is None:
        checkpoint.require_dense("round it")
    whole = ExpandedTensors.of(checkpoint)
    tensors = whole.files.tensors
    shapes = checkpoint.dense_shapes
    if any(tensor.axis or tensor.removed for tensor in tensors.values()):
        raise PlanError(
            "only ties of q, k and v (and of gate and up) can be rounded to few bits; this plan has others."
        )
    layers = Layers(checkpoint, device=device)
    if layers.in_out:
        raise CheckpointError(f"{checkpoint.name} holds its matrices as (input, output), which are not rounded yet.")
    if layers.ffn is None:
        raise CheckpointError(f"{checkpoint.name} has experts, which are not rounded yet.")

    # Rows are sorted by their users, so that a layer's inputs reach every row that it computes with, also a donor's.
    names = [layers.tensors_of(layer) for layer in range(layers.count)]
    packing = _packing(checkpoint, [name for layer in names for name in layer], shapes, group)
    make = _maker(packing.group)
    pieces = [piece for layer in names for name in layer for piece in _pieces(name, tensors, shapes)]
    users: dict[str, list[_Piece]] = {}
    for piece in pieces:
        for user in piece.users:
            users.setdefault(user, []).append(piece)
    matrices = {name: _empty(shapes[name], packing.group) for layer in names for name in layer}

    # The layers run one after the other, unrounded. Rows are rounded once their last user has given its inputs.
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
            for piece in dict.fromkeys(piece for piece in users[name] if piece.users[-1] == name):
                piece.put(matrices[piece.name])

    # The results are whole matrices, so borrowed rows are copied from their donors, all of which are rounded by now.
    for name, tensor in tensors.items():
        for gap in (gap for gap in tensor.gaps if name in matrices):
            mine = matrices[name]
            theirs = matrices[gap.donor]
            span = gap.stop - gap.start
            mine.packed[gap.start : gap.stop] = theirs.packed.narrow(0, gap.donor_start, span)
            mine.scale[gap.start : gap.stop] = theirs.scale.narrow(0, gap.donor_start, span)
    return QuantizedModel(checkpoint, packing, matrices)


def _packing(
    checkpoint: Checkpoint, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], group: int | None
) -> Packing:
    """The packing of these matrices. Every other linear module of the model is left as it is.

    Raises:
        OptionError: if the group does not fill whole 32-bit words.
        CheckpointError: if the group does not fit a matrix.
    """
    inputs = {shapes[name][1] for name in names}
    fitting = [size for size in GROUPS if all(count % size == 0 for count in inputs)]
    if group is not None and (group < A_WORD or group % A_WORD):
        raise OptionError(f"a group of {group} inputs does not fill words of {A_WORD}; use a multiple of {A_WORD}.")
    if (group is None and not fitting) or (group is not None and any(count % group for count in inputs)):
        sizes = ", ".join(map(str, sorted(inputs)))
        raise CheckpointError(f"matrices of {sizes} inputs do not divide into groups of {group or GROUPS[-1]}.")

    # Loaders must be told which linear modules have plain weights, by their paths in the model.
    model = empty_model(checkpoint)
    rounded = set(ModuleMap.of(model, names).paths().values())
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return Packing(group=group or fitting[0], ignore=tuple(path for path in linear if path not in rounded))


def _empty(shape: tuple[int, ...], group: int) -> PackedMatrix:
    """A matrix of this shape whose rows are yet to be filled."""
    rows, inputs = shape
    packed = torch.zeros(rows, inputs // A_WORD, dtype=torch.int32)
    return PackedMatrix(packed, torch.zeros(rows, inputs // group, dtype=SCALE_DTYPE))


@dataclass(eq=False)
class _Piece:
    """Rows of one tensor that have the same users, which are rounded as one matrix.

    `users` are names of tensors in the order in which layers use them, the rows' own tensor first. A tensor that uses
    the rows several times is there as often, and so are its inputs.
    """

    name: str
    rows: Int[Tensor, " rows"]
    users: tuple[str, ...]
    _task: Any = None

    def task(self, make: Any, whole: ExpandedTensors, device: torch.device) -> Any:
        """The GPTQ task of these rows, which is made when it is first asked for."""
        if self._task is None:
            weight = whole.read(self.name)[self.rows]
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=device)
            linear.weight.data.copy_(weight)
            self._task = make(linear)
        return self._task

    def put(self, matrix: PackedMatrix) -> None:
        """Round the rows and put them into their matrix."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                weight, scale, zero, _, _, loss, *_ = self._task.quantize()
            # Rows that GPTQ cannot solve for are rounded to the nearest numbers, which only the loss tells.
            finite = isinstance(loss, float) and math.isfinite(loss)
            finite = finite and bool(torch.isfinite(weight).all() and torch.isfinite(scale).all())
        except ValueError:  # no rounding has a finite loss
            finite = False
        self._task = None
        if not finite:
            raise CheckpointError(
                f"GPTQ cannot round a matrix: {self.name} has numbers that are not finite, or its inputs have, or they "
                "are too large to be multiplied. Nothing is rounded."
            )

        # Weights over scales are integers again, which are stored packed.
        assert bool((zero == OFFSET).all())
        wide = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
        matrix.packed[self.rows] = pack((weight / wide).round().cpu())
        matrix.scale[self.rows] = scale.detach().to(SCALE_DTYPE).cpu()


def _pieces(name: str, tensors: Mapping[str, TensorPlan], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[_Piece]:
    """Pieces of the rows that a tensor stores, one for each combination of users."""
    # For each row, its own tensor and then those that borrow it, in the order of their layers.
    users: list[tuple[str, ...]] = [(name,)] * shapes[name][0]
    for other in sorted(tensors.values(), key=lambda tensor: _layer_of(tensor.name)):
        for gap in (gap for gap in other.gaps if gap.donor == name):
            for row in range(gap.donor_start, gap.donor_start + gap.stop - gap.start):
                users[row] = (*users[row], other.name)

    # Rows that are borrowed themselves are pieces of their donor, and are left out here.
    stored = torch.full((len(users),), name not in tensors)
    if name in tensors:
        for start, stop in tensors[name].kept():
            stored[start:stop] = True
    for same in dict.fromkeys(users):
        rows = torch.tensor([row for row, its in enumerate(users) if its == same and stored[row]], dtype=torch.long)
        if len(rows):
            yield _Piece(name, rows, same)


def _layer_of(name: str) -> int:
    """The number of the layer that this tensor is in, which its name holds."""
    return next(int(step) for step in name.split(".") if step.isdigit())


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

    # The rounding is symmetric and keeps the order of inputs, as the packed format stores neither zeros nor an order.
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
