"""Added tensors: scales of ties and factors of low-rank units, which a dense model has not."""

from collections.abc import Mapping
from typing import NamedTuple

from headshare.plan.plan import SharePlan
from headshare.plan.tensors import GappedTensor, gapped_tensors


class Extra(NamedTuple):
    """A tensor that the dense model does not have: the weight that it stands beside and shares its type with, and its
    shape."""

    weight: str
    shape: tuple[int, ...]


def extra_tensors(plan: SharePlan) -> dict[str, Extra]:
    """Every tensor that a plan adds, by name: scales of scaled ties, and the two factors of factored readouts."""
    tensors = gapped_tensors(plan)
    extra = {name: Extra(scaled_weight_name(name), (count,)) for name, count in _scales(tensors).items()}
    for name, tensor in tensors.items():
        if tensor.factored:
            factor_in, factor_out = factor_names(name)
            extra[factor_in] = Extra(name, (total_rank(tensor), tensor.factored[0].stop - tensor.factored[0].start))
            extra[factor_out] = Extra(name, (tensor.shape[1 - tensor.axis], total_rank(tensor)))
    return extra


def scale_names(plan: SharePlan) -> dict[str, int]:
    """Extra tensors that scaled ties bring, by name, and how many numbers each has."""
    return _scales(gapped_tensors(plan))


def _scales(tensors: Mapping[str, GappedTensor]) -> dict[str, int]:
    return {
        scale_name(name): sum(stop - start for start, stop in tensor.scaled)
        for name, tensor in tensors.items()
        if tensor.scaled
    }


def scale_name(weight_name: str) -> str:
    """The tensor that scales the shared input channels of this readout weight."""
    return weight_name.removesuffix("weight") + "tie_scale"


def scaled_weight_name(scale: str) -> str:
    """The readout weight whose channels this tensor scales; the inverse of `scale_name`."""
    return scale.removesuffix("tie_scale") + "weight"


def factor_names(weight_name: str) -> tuple[str, str]:
    """The two tensors whose product stands for this readout weight's factored columns. Whatever the weight's own
    orientation, the first is ranks x input channels of a unit, the second outputs x ranks; the units' ranks lie one
    after the other."""
    base = weight_name.removesuffix("weight")
    return base + "factor_in", base + "factor_out"


def total_rank(tensor: GappedTensor) -> int:
    """The sum of the ranks of a readout's factored units."""
    return sum(one.rank for one in tensor.factored)
