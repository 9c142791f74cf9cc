"""The search for units that stand in several layers, bit for bit, where the tensors that hold them differ."""

from collections.abc import Collection, Iterator

from blake3 import blake3
from torch import Tensor, uint8

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.layouts import require_one_dtype
from headshare.errors import CheckpointError
from headshare.plan.layout import Layout, Place
from headshare.plan.section import Choice
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Tie
from headshare.progress import track


def equal_units(
    checkpoint: Checkpoint, layout: Layout, copies: Collection[str], lenders: Collection[str], chosen: Choice
) -> list[Selection]:
    """Ties of the units of a grid that equal one of an earlier layer in a part: a selection for parts with equal ties.

    `copies` are tensors that are others whole, and are left out; `lenders` are those others, which lend units and
    borrow none. Tensors are read one at a time, and once more where a digest is to be confirmed.

    Raises:
        CheckpointError: if a file ends early or cannot be read.
    """
    try:
        require_one_dtype(layout, checkpoint)
    except CheckpointError:  # such a grid is not tied
        return []
    parts_of: dict[tuple[Tie, ...], list[Part]] = {}
    for part, place in layout.parts.items():
        ties = tuple(_ties(checkpoint, layout, place, copies, lenders))
        if ties:
            parts_of.setdefault(ties, []).append(part)
    return [Selection(layout=layout.only(tuple(parts)), ties=ties, chosen=chosen) for ties, parts in parts_of.items()]


def _ties(
    checkpoint: Checkpoint, layout: Layout, place: Place, copies: Collection[str], lenders: Collection[str]
) -> Iterator[Tie]:
    """The ties of one part, each to the first unit that has the same bytes."""
    first: dict[bytes, HeadUnit] = {}
    for layer in track(range(layout.layers), "looking for equal units", layout.layers):
        name = place.name(layer)
        if name in copies:
            continue
        whole = checkpoint.read(name)
        found: dict[bytes, HeadUnit] = {}
        for group in range(layout.groups):
            rows = _bytes(whole, place, group)
            key = blake3(rows.numpy().data).digest()
            donor = first.get(key)
            if donor is None:
                found.setdefault(key, HeadUnit(layer, group))
            elif name not in lenders and _same(checkpoint, place, donor, rows):
                yield Tie(HeadUnit(layer, group), donor)
        first |= found  # units of one layer do not lend to each other


def _bytes(whole: Tensor, place: Place, group: int) -> Tensor:
    """The bytes of a unit's rows or columns."""
    start, stop = place.span(group)
    return whole.narrow(place.axis, start, stop - start).contiguous().flatten().view(uint8)


def _same(checkpoint: Checkpoint, place: Place, donor: HeadUnit, rows: Tensor) -> bool:
    """True if these are the donor's bytes, whatever their digests say."""
    return bool((_bytes(checkpoint.read(place.name(donor.layer)), place, donor.group) == rows).all())
