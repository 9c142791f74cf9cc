"""Makers, which compute a tensor's made ranges from the tensors that a section adds, and the other way round.

A section whose ranges are made names its maker. `share` splits with it; `expand` and calibration join.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from headshare.errors import CheckpointError
from headshare.plan.low_rank import LOW_RANK, factor_names
from headshare.plan.tensors import TensorPlan
from headshare.sharing.factors import join_columns, split_columns


@runtime_checkable
class Maker(Protocol):
    """The maker of some ranges: both directions between dense numbers and the tensors that replace them."""

    def split(self, tensor: TensorPlan, dense: Tensor) -> dict[str, Tensor]:
        """The added tensors, by name, that best approximate the made ranges of this whole dense tensor."""

    def join(self, tensor: TensorPlan, whole: Tensor, read: Callable[[str], Tensor]) -> None:
        """Write the made ranges into a whole tensor, in place; `read` gives an added tensor by its name."""


class LowRank:
    """The maker of low-rank columns: products of two factors, each the nearest of its rank to a unit's columns."""

    def split(self, tensor: TensorPlan, dense: Tensor) -> dict[str, Tensor]:
        """Both factors of an output projection, by name. The units' ranks lie one after the other."""
        pairs = []
        for start, stop, rank in tensor.factored:
            columns = dense.narrow(tensor.axis, start, stop - start)
            pairs.append(split_columns(columns.T if tensor.axis == 0 else columns, rank))
        name_in, name_out = factor_names(tensor.name)
        factor_in = torch.cat([first for first, _ in pairs])
        factor_out = torch.cat([second for _, second in pairs], dim=1)
        return {name_in: factor_in, name_out: factor_out}

    def join(self, tensor: TensorPlan, whole: Tensor, read: Callable[[str], Tensor]) -> None:
        """Write the products of the factors into the columns of their units."""
        name_in, name_out = factor_names(tensor.name)
        factor_in = read(name_in)
        factor_out = read(name_out)
        used = 0
        for start, stop, rank in tensor.factored:
            columns = join_columns(factor_in[used : used + rank], factor_out[:, used : used + rank])
            whole.narrow(tensor.axis, start, stop - start).copy_(columns.T if tensor.axis == 0 else columns)
            used += rank


# every maker, by the name that made ranges give
MAKERS: dict[str, Maker] = {LOW_RANK: LowRank()}


def check_makers(tensors: Iterable[TensorPlan]) -> None:
    """Refuse tensors with made ranges that nothing here makes.

    Raises:
        CheckpointError: naming the tensor and the maker.
    """
    for tensor in tensors:
        for made in tensor.made:
            if made.maker not in MAKERS:
                raise CheckpointError(
                    f"{tensor.name} is made by {made.maker!r}, for which this headshare has no maker."
                )


def _makers_of(tensor: TensorPlan) -> list[Maker]:
    """The makers of this tensor's ranges, each once."""
    return [MAKERS[name] for name in dict.fromkeys(made.maker for made in tensor.made)]


def split(tensor: TensorPlan, dense: Tensor) -> dict[str, Tensor]:
    """The added tensors that best approximate a dense tensor's made ranges, by name."""
    return {name: added for maker in _makers_of(tensor) for name, added in maker.split(tensor, dense).items()}


def join(tensor: TensorPlan, whole: Tensor, read: Callable[[str], Tensor]) -> None:
    """Write a tensor's made ranges into it, in place."""
    for maker in _makers_of(tensor):
        maker.join(tensor, whole, read)
