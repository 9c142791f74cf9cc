"""The rows of a checkpoint's stored matrices that are rounded together, and which inputs they are rounded on.

Rows of q, k, v, gate and up see whole inputs of a layer. Those of one tensor that have the same users form a piece.
A row of an output projection sees the features of its own columns; in the place of those that others borrow it also
sees what these users give them, scaled as the tie is. Of a product, the first factor sees the channels of its unit,
and the second what the first makes of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headshare.plan.low_rank import LowRankRange, factor_names
from headshare.plan.tensors import TensorPlan
from headshare.sharing.expanded import ExpandedTensors
from headshare.sharing.rounded.matrices import Roundable


class Use(NamedTuple):
    """A use of some rows: the weight of the module that computes with them, and their inputs from those of it."""

    user: str
    inputs: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Piece:
    """Stored rows of one matrix that are rounded together: their places there, and their uses in the layers' order."""

    name: str
    rows: Int[Tensor, " rows"]
    uses: tuple[Use, ...]


def pieces_of(whole: ExpandedTensors, matrices: Mapping[str, Roundable]) -> list[Piece]:
    """The pieces of all of a checkpoint's layers' matrices that can be rounded; of embeddings there are none."""
    copies = whole.files.plan.copies
    tensors = {name: tensor for name, tensor in whole.files.tensors.items() if name not in copies}
    found: list[Piece] = []
    for name, matrix in matrices.items():
        if matrix.embedding or name in whole.files.added:
            continue
        tensor = tensors.get(name)
        if tensor is None:
            found.append(Piece(name, torch.arange(matrix.outputs), (Use(name, _all),)))
        elif tensor.axis == (1 if matrix.in_out else 0):
            found += _of_outputs(tensor, tensors.values())
        else:
            uses = tuple(_uses_of_columns(tensor, tensors.values(), whole))
            found.append(Piece(name, torch.arange(matrix.outputs), uses))
    for tensor in tensors.values():
        if tensor.factored:
            found += [piece for piece in _of_factors(tensor, whole) if piece.name in matrices]
    return [_with_copies(piece, copies) for piece in found] if copies else found


def _with_copies(piece: Piece, copies: Mapping[str, str]) -> Piece:
    """A piece with the uses of its tensor's copies too, which give it inputs as the tensor's own module does."""
    names = [name for name, donor in copies.items() if donor == piece.name]
    more = [Use(name, use.inputs) for use in piece.uses if use.user == piece.name for name in names]
    return replace(piece, uses=tuple(sorted([*piece.uses, *more], key=lambda use: layer_of(use.user))))


def _all(inputs: Tensor) -> Tensor:
    return inputs


def _of_outputs(tensor: TensorPlan, tensors: Iterable[TensorPlan]) -> Iterator[Piece]:
    """Pieces of the rows that a tensor stores, one for each combination of users."""
    # For each row, its own tensor and then those that borrow it, in the order of their layers.
    users: list[tuple[str, ...]] = [(tensor.name,)] * tensor.size
    for other in sorted((each for each in tensors if each.gaps), key=lambda each: layer_of(each.name)):
        for gap in (gap for gap in other.gaps if gap.donor == tensor.name):
            for row in range(gap.donor_start, gap.donor_start + gap.stop - gap.start):
                users[row] = (*users[row], other.name)
    # Rows that are borrowed themselves are pieces of their donor, and are left out here.
    stored: dict[tuple[str, ...], list[int]] = {}
    for start, stop in tensor.kept():
        for row in range(start, stop):
            stored.setdefault(users[row], []).append(tensor.stored_index(row))
    for same, rows in stored.items():
        yield Piece(tensor.name, torch.tensor(rows), tuple(Use(user, _all) for user in same))


def _uses_of_columns(tensor: TensorPlan, tensors: Iterable[TensorPlan], whole: ExpandedTensors) -> Iterator[Use]:
    """The uses of an output projection's stored columns: its own first."""
    kept = [index for start, stop in tensor.kept() for index in range(start, stop)]
    yield Use(tensor.name, partial(_taken, torch.tensor(kept)))
    for other in sorted((each for each in tensors if each.gaps), key=lambda each: layer_of(each.name)):
        gaps = [gap for gap in other.gaps if gap.donor == tensor.name]
        if gaps:
            lent = [range(gap.start, gap.stop) for gap in gaps]
            places = [
                tensor.stored_index(gap.donor_start + step) for gap in gaps for step in range(gap.stop - gap.start)
            ]
            taken = torch.tensor([index for span in lent for index in span])
            scale = _scales(other, whole)[taken]
            yield Use(other.name, partial(_lent, taken, scale, torch.tensor(places), len(kept)))


def _scales(tensor: TensorPlan, whole: ExpandedTensors) -> Float[Tensor, " channels"]:
    """The factors of all channels of an output projection: a tie's where it is scaled, else 1."""
    factors = torch.ones(tensor.size)
    stored = whole.scale(tensor.name)
    if stored is not None:
        factors[[index for start, stop in tensor.scaled for index in range(start, stop)]] = stored.float()
    return factors


def _taken(columns: Int[Tensor, " kept"], inputs: Tensor) -> Tensor:
    return inputs[..., columns.to(inputs.device)]


def _lent(
    taken: Int[Tensor, " lent"], scale: Float[Tensor, " lent"], places: Int[Tensor, " lent"], count: int, inputs: Tensor
) -> Tensor:
    """What a user gives the columns that it borrows, at their places among those that the donor stores."""
    made = inputs.new_zeros(*inputs.shape[:-1], count)
    # one column may be borrowed several times, and then sees the sum of what it is given
    given = inputs[..., taken.to(inputs.device)] * scale.to(inputs)
    made.index_add_(-1, places.to(inputs.device), given)
    return made


def _of_factors(tensor: TensorPlan, whole: ExpandedTensors) -> Iterator[Piece]:
    name_in, name_out = factor_names(tensor.name)
    read = whole.checkpoint.read
    factor_in = read(name_in).float()
    used = 0
    spans: list[tuple[LowRankRange, Tensor]] = []
    for unit in tensor.factored:
        rows = torch.arange(used, used + unit.rank)
        yield Piece(name_in, rows, (Use(tensor.name, partial(_channels, unit)),))
        spans.append((unit, factor_in[rows]))
        used += unit.rank
    outputs = whole.checkpoint.tensors[name_out].shape[0]
    yield Piece(name_out, torch.arange(outputs), (Use(tensor.name, partial(_through, spans)),))


def _channels(unit: LowRankRange, inputs: Tensor) -> Tensor:
    return inputs[..., unit.start : unit.stop]


def _through(spans: list[tuple[LowRankRange, Tensor]], inputs: Tensor) -> Tensor:
    """What the first factors of all units make of their channels, side by side."""
    return torch.cat([_channels(unit, inputs) @ factor.to(inputs).T for unit, factor in spans], dim=-1)


def layer_of(name: str) -> int:
    """The number of the layer that this tensor is in, which its name holds."""
    return next(int(step) for step in name.split(".") if step.isdigit())
