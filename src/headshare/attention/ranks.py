"""Rank correlations of similarities, over all pairs of heads of different layers, and for one head at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Similarities = Float[Tensor, "heads heads"]


def ranks(values: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """The ranks of numbers along the last axis, from 0; equal numbers have the mean of theirs."""
    if values.ndim > 1:
        return torch.stack([ranks(row) for row in values])
    place: Tensor
    counts: Tensor
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    mean: Tensor = counts.cumsum(0).double() - (counts + 1) / 2
    return mean[place]


def rank_correlation(one: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> float | None:
    """Spearman's correlation of two lists of numbers; None where one of them does not vary, or there are too few."""
    if len(one) < 2:
        return None
    a, b = (of - of.mean() for of in (ranks(one), ranks(other)))
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else None


def pairs_of_layers(layers: int, heads: int) -> Int[Tensor, "pairs two"]:
    """All pairs of a head and a head of an earlier layer, in order."""
    layer = torch.arange(layers * heads) // heads
    return (layer[:, None] > layer[None, :]).nonzero()


def over_pairs(one: Similarities, other: Similarities, heads: int) -> float | None:
    """The rank correlation over all pairs of heads of different layers; each layer has so many heads."""
    first, second = pairs_of_layers(len(one) // heads, heads).T
    return rank_correlation(one[first, second], other[first, second])


def within_heads(one: Similarities, other: Similarities, heads: int) -> float | None:
    """The mean, over heads, of the rank correlation over the heads of earlier layers."""
    found = []
    for head in range(heads, len(one)):
        before = head // heads * heads
        correlation = rank_correlation(one[head, :before], other[head, :before])
        found += [] if correlation is None else [correlation]
    return sum(found) / len(found) if found else None
