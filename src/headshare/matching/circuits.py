"""Inner products of the circuits of all pairs of units: of W_q^T W_k, by which a head scores one token against another.

Where x and y are the hidden states of two tokens as they leave the norm before the attention, a head scores y, as seen
from x, by x^T W_q^T W_k y. The scale of that norm is multiplied into both matrices. The inner product of two such forms
is that of all their numbers, hidden x hidden of them, so a slice of all forms is made at a time, a few of their rows,
and multiplied as units' weights are. For single pairs it is the sum of all entries of (W_q W_q'^T) * (W_k W_k'^T).

A unit of several query heads has a form for each. Forms of two units are compared in order, head by head, as a tie
replaces them. Rotary positions turn a form by the distance of the tokens; what is compared is the form at no distance,
since turns that are alike in both heads change little (docs/attention.md has what other choices tell). Biases, norms of
queries and keys, and relative positions stay with the recipient, and are left out.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.architecture.config import text_config
from headshare.architecture.norms import input_norm
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError
from headshare.matching.products import CHUNK_NUMBERS, EXACT_PRODUCTS, Scratch, accumulate, not_finite
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit, Part
from headshare.progress import track

# of the forms that are made at a time
FORM_BYTES = 2**28
Queries = Float[Tensor, "groups heads rows hidden"]
Keys = Float[Tensor, "groups rows hidden"]


@dataclass(frozen=True)
class Circuits:
    """The circuits of a checkpoint's attention units.

    Raises:
        CheckpointError: if a weight is NaN or infinite, or so large that products overflow, or the scale of a norm is
            not there.
    """

    checkpoint: Checkpoint
    layout: Layout

    @property
    def heads(self) -> int:
        """Query heads of one unit."""
        return self.layout.parts[Part.Q].rows // self.layout.parts[Part.K].rows

    @property
    def hidden(self) -> int:
        """The width of a hidden state."""
        place = self.layout.parts[Part.Q]
        return place.shape[1 - place.axis]

    @property
    def numel(self) -> int:
        """The count of numbers in the forms of one unit."""
        return self.heads * self.hidden**2

    @property
    def exact(self) -> bool:
        """Whether the products of units are few enough to be computed in float64."""
        return self.layout.units**2 * self.numel <= EXACT_PRODUCTS

    def of_units(self) -> Float[Tensor, "units units"]:
        """The inner products of all pairs of units."""
        return self._products(1)

    def of_heads(self) -> Float[Tensor, "heads heads"]:
        """The inner products of all pairs of query heads, in the order of layers, units, and heads in a unit."""
        return self._products(self.heads)

    def of_pair(self, first: int, second: int) -> float:
        """The inner product of two units alone, in float64. It depends on nothing but their numbers."""
        (a, b), (c, d) = (self._of_layer(unit.layer, (unit.group,)) for unit in map(self.layout.unit, (first, second)))
        of_keys = b[0] @ d[0].T
        return sum(float((of_queries * of_keys).sum()) for of_queries in a[0] @ c[0].mT)

    def _products(self, apart: int) -> Float[Tensor, "forms forms"]:
        """The inner products of all units' forms, in as many vectors for each unit as it has to be taken `apart`."""
        layout, hidden = self.layout, self.hidden
        dtype = torch.float64 if self.exact else torch.float32
        forms = layout.units * self.heads
        step = max(1, min(hidden, FORM_BYTES // (forms * hidden * dtype.itemsize)))
        total = torch.zeros((layout.units * apart,) * 2, dtype=torch.float64)
        scratch: Scratch = {}
        each = layout.groups * self.heads
        for start in track(range(0, hidden, step), "matching circuits", -(-hidden // step)):
            stop = min(start + step, hidden)
            made = torch.empty(forms, stop - start, hidden, dtype=dtype)
            for layer in range(layout.layers):
                queries, keys = self._of_layer(layer, range(layout.groups))
                rows = queries[..., start:stop].to(dtype).mT @ keys.to(dtype)[:, None]
                made[layer * each : (layer + 1) * each] = rows.flatten(0, 1)
            slices = made.view(len(total), -1)
            for chunk in torch.split(slices, max(1, CHUNK_NUMBERS // len(slices)), dim=1):
                accumulate(total, chunk, layout.groups * apart, scratch, exact=self.exact)
        if not torch.isfinite(total).all():
            raise CheckpointError(
                f"the queries and keys in {self.checkpoint.name} are too large to compare: their products overflow."
            )
        return total

    def _of_layer(self, layer: int, groups: Iterable[int]) -> tuple[Queries, Keys]:
        """Queries and keys of some units of a layer in float64, the scale of the norm before them multiplied in."""
        found = {part: torch.stack(list(self._units(part, layer, groups))) for part in (Part.Q, Part.K)}
        return found[Part.Q].view(-1, self.heads, found[Part.K].shape[1], self.hidden), found[Part.K]

    def _units(self, part: Part, layer: int, groups: Iterable[int]) -> Iterator[Float[Tensor, "rows hidden"]]:
        place = self.layout.parts[part]
        name = place.name(layer)
        read = self.checkpoint.read
        whole = read(name).T if place.axis == 1 else None
        for group in groups:
            start, stop = place.span(group)
            rows = read(name, start, stop) if whole is None else whole[start:stop]
            if not torch.isfinite(rows).all():
                raise CheckpointError(not_finite(HeadUnit(layer, group), name, self.checkpoint))
            yield rows.double() * self._scales[layer]

    @cached_property
    def _scales(self) -> Float[Tensor, "layers hidden"]:
        """The scale of the norm before the attention of each layer; ones where there is none."""
        layers = range(self.layout.layers)
        scales = torch.ones(len(layers), self.hidden, dtype=torch.float64)
        norm = input_norm(text_config(self.checkpoint.config), self.layout, self.checkpoint.tensors)
        if norm is None:
            return scales
        for layer in layers:
            name = norm.name(layer)
            info = self.checkpoint.tensors.get(name)
            if info is None or info.shape != (self.hidden,):
                raise CheckpointError(
                    f"{name}, the scale of the norm before the attention, should have {self.hidden} numbers in "
                    f"{self.checkpoint.name}, and {'is missing' if info is None else f'is {info.shape}'}. Match by "
                    "another function than circuit, or download the model again."
                )
            scales[layer] = self.checkpoint.read(name).double() + norm.offset
            if not torch.isfinite(scales[layer]).all():
                raise CheckpointError(f"{name} in {self.checkpoint.name} holds NaN or infinite numbers.")
        return scales
