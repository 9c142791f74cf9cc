"""Bytes: what a model stores, what its matrices take, and what a product of low rank takes."""

from dataclasses import dataclass
from functools import cached_property
from math import isqrt, prod

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import PlanError
from headshare.experiments.peers.matrices import Matrices
from headshare.plan.tensors import bias_name
from headshare.plan.units import READOUTS, Part, Sublayer
from headshare.sharing.size import parameter_bytes, parameter_infos


@dataclass(frozen=True)
class Sizes:
    """Sizes of a dense model. The whole model counts, a tied embedding once."""

    dense: Checkpoint
    matrices: Matrices

    @cached_property
    def whole(self) -> int:
        """Bytes of all parameters."""
        return parameter_bytes(self.dense)

    def item(self, part: Part) -> int:
        """Bytes of one number of this part."""
        return self.matrices.dtype(part).itemsize

    def numbers(self, part: Part) -> int:
        """Numbers of one layer's matrix of this part."""
        return len(self.matrices.outputs(part)) * self.matrices.inputs(part)

    @cached_property
    def in_layers(self) -> int:
        """Bytes of the matrices of all layers."""
        parts = [part for kind in Sublayer for part in self.matrices.parts(kind)]
        return self.matrices.layers.count * sum(self.numbers(part) * self.item(part) for part in parts)

    def share_left(self, saved_bytes: int) -> float:
        """The share of the layers' matrices that may stay, if they alone are to save these bytes.

        Raises:
            PlanError: if they have not so many.
        """
        if saved_bytes >= self.in_layers:
            raise PlanError(
                f"the layers' matrices take {self.in_layers:,} bytes and cannot save {saved_bytes:,}. Ask for less."
            )
        return 1 - saved_bytes / self.in_layers

    def unit(self, kind: Sublayer, layer: int = 0) -> int:
        """Bytes of one unit of a sublayer: its rows and columns, and its entries of biases."""
        layout = self.matrices.layouts[kind]
        total = 0
        for part, place in layout.parts.items():
            total += place.numel * self.item(part)
            bias = self.dense.tensors.get(bias_name(place.name(layer)))
            if part not in READOUTS and bias is not None:
                total += place.rows * bias.torch_dtype.itemsize
        return total

    def layer(self, number: int) -> int:
        """Bytes of everything in one layer."""
        prefix = self.matrices.layers.shell.prefix(number)
        return sum(info.nbytes for name, info in parameter_infos(self.dense).items() if name.startswith(prefix))

    def check(self, saved_bytes: int, asked: int, what: str) -> int:
        """The saved bytes, if they are as many as were asked for.

        Raises:
            PlanError: if they are not.
        """
        if saved_bytes < asked:
            raise PlanError(f"{what} saves {saved_bytes:,} bytes at most, and {asked:,} are asked for. Ask for less.")
        return saved_bytes


def rank_within(numbers: int, outputs: int, inputs: int, *, pivoted: bool) -> int:
    """The largest rank whose product takes no more than these numbers, at least 1.

    Two factors take rank x (outputs + inputs) numbers. Stored *pivoted*, as rank independent rows and the coefficients
    that make the others of them, a product takes rank x (outputs + inputs - rank) (Zhao et al., "PIFA", 2025).
    """
    both = outputs + inputs
    most = min(outputs, inputs)
    if not pivoted:
        return max(1, min(most, numbers // both))
    if numbers >= most * (both - most):
        return most
    rank = (both - isqrt(both * both - 4 * numbers)) // 2
    while rank > 1 and rank * (both - rank) > numbers:
        rank -= 1
    return max(1, rank)


def numbers_of(rank: int, outputs: int, inputs: int, *, pivoted: bool) -> int:
    """The numbers that a matrix of this rank takes; as it is, where that takes no more."""
    factored = rank * (outputs + inputs - rank * pivoted)
    return min(prod((outputs, inputs)), factored)
