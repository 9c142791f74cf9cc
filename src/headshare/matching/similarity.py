"""Scores of all pairs of units, from one streamed product: each weight is read once, a slice of it at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.layouts import layouts_of
from headshare.errors import OptionError
from headshare.matching.circuits import Circuits
from headshare.matching.functions import CIRCUIT, MatchFunction, get_match_function
from headshare.matching.products import CHUNK_NUMBERS, is_exact, read_unit, unit_products
from headshare.matching.scores import Scores, ScoreTable
from headshare.plan.layout import Layout
from headshare.plan.units import Part, Parts, Sublayer

NEAR_EXACT = 1e-11
NEAR_FLOAT32 = 6e-6
UNRELATED = 1 / 16
MOST_RECHECKED = 20_000
GRID = 2.0**-40


def match_for(layout: Layout, match: str) -> MatchFunction:
    """The match function for this grid: the requested one for attention, `ffn` for feed-forward units.

    Raises:
        OptionError: if no match function has that name, or it is for another kind of unit.
    """
    asked = get_match_function(match)
    if layout.kind is Sublayer.FFN:
        return get_match_function("ffn")
    if asked.kind is not layout.kind:
        raise OptionError(f"the match function '{match}' is for {asked.kind} units, not for {layout.kind}.")
    return asked


def tied_together(function: MatchFunction, layout: Layout) -> list[tuple[Part, ...]]:
    """The sets of parts whose ties this match function chooses together: all of the grid's, or each by itself."""
    return [(part,) for part in function.parts] if function.separate else [tuple(layout.parts)]


def score_units(
    checkpoint: Checkpoint, match: str = "qk", parts: str | Parts = "qkv", *, ffn_groups: int = 1
) -> Scores:
    """Score every pair of units with this match function (feed-forward units with `ffn`).

    Products are accumulated in float64. Each slice is multiplied in float64 for small models, and in float32 for large
    ones. Pairs that are then too close to call are computed again in float64. Ties are therefore exact.

    Raises:
        OptionError: if the match function is not known, or is not for these parts.
        ArchitectureError: if the model is not known.
        CheckpointError: if the checkpoint is already shared or quantised, or a weight is not finite.
    """
    checkpoint.require_dense("score")
    wanted = Parts.parse(parts)
    tables: list[ScoreTable] = []
    for layout in layouts_of(checkpoint, wanted, ffn_groups):
        tables += _score_tables(checkpoint, layout, match_for(layout, match))
    return Scores(model_type=str(checkpoint.config.get("model_type", "unknown")), tables=tuple(tables))


def _score_tables(checkpoint: Checkpoint, layout: Layout, function: MatchFunction) -> list[ScoreTable]:
    if function.circuits:
        circuits = Circuits(checkpoint, layout)
        scores = function.score({CIRCUIT: circuits.of_units()})
        rounding = _Rounding(circuits.exact, circuits.numel * layout.units)
        exact = _Exact(function, {CIRCUIT: circuits.of_pair})
        return [ScoreTable(layout, function.name, tuple(layout.parts), _decided(scores, layout, rounding, exact))]
    parts = tuple(part for part in function.parts if part in layout.parts)
    products = unit_products(checkpoint, layout, parts)
    tables = []
    for tied in tied_together(function, layout):
        scored = tied if function.separate else parts
        scores = function.score({part: products[part] for part in scored})
        rounding = _Rounding.of(layout, scored)
        exact = _Exact(function, {part: partial(_product, checkpoint, layout, part) for part in scored})
        tables.append(ScoreTable(layout, function.name, tied, _decided(scores, layout, rounding, exact)))
    return tables


@dataclass(frozen=True)
class _Rounding:
    """How products were rounded: whether they are in float64, and else how many numbers of all units they are of."""

    exact: bool
    numbers: int

    @classmethod
    def of(cls, layout: Layout, parts: tuple[Part, ...]) -> "_Rounding":
        numbers = min(layout.parts[part].numel for part in parts) * layout.units
        return cls(all(is_exact(layout, part) for part in parts), numbers)


def _product(checkpoint: Checkpoint, layout: Layout, part: Part, first: int, second: int) -> float:
    """The inner product of two units in one part, computed alone in float64."""
    a, b = (read_unit(checkpoint, layout, part, index).double() for index in (first, second))
    return float(a.dot(b))


@dataclass
class _Exact:
    """Scores of single pairs, each computed alone in float64, so that equal units get equal scores.

    `products` computes the inner product of two units, by the names that the match function gives products. `squares`
    keeps those of units with themselves from one call to the next.
    """

    function: MatchFunction
    products: Mapping[str, Callable[[int, int], float]]
    squares: dict[tuple[str, int], float] = field(default_factory=dict)

    def __call__(self, pair: tuple[int, int]) -> float:
        of_two: dict[str, Tensor] = {}
        for name, product in self.products.items():
            for index in pair:
                if (name, index) not in self.squares:
                    self.squares[name, index] = product(index, index)
            aa, bb = (self.squares[name, index] for index in pair)
            ab = product(*pair)
            of_two[name] = torch.tensor([[aa, ab], [ab, bb]], dtype=torch.float64)
        return float(self.function.score(of_two)[0, 1])


def _decided(
    scores: Float[Tensor, "units units"],
    layout: Layout,
    rounding: _Rounding,
    exact: Callable[[tuple[int, int]], float],
) -> Float[Tensor, "units units"]:
    """The scores of pairs whose donor lies in a strictly earlier layer, exact wherever they are too close to call.

    Two kinds of pairs are too close: donors whose score is near their recipient's best, and recipients whose best
    scores are near one another. All scores are then rounded to GRID, far below any difference that weights can mean, so
    that equal units have equal scores. Where more than MOST_RECHECKED pairs are too close (in a model of copies), all
    scores are rounded to the width of "close" instead.
    """
    # Only a donor of an earlier layer can be chosen, so only such pairs can be close calls.
    layer_of = torch.arange(layout.units) // layout.groups
    allowed = layer_of[:, None] > layer_of[None, :]
    masked = scores.masked_fill(~allowed, float("-inf"))
    best = masked.amax(dim=1)
    # A pair can decide a tie if rounding could make it the best of its recipient. It matters only where there are
    # several such pairs, or where the order of two recipients is open as well.
    near = _near(best, rounding)
    close = allowed & (masked >= (best - near)[:, None])
    undecided = (close.sum(dim=1) > 1) | _has_neighbour(best, near)
    result = scores.masked_fill(~allowed, 0.0)
    pairs = (close & undecided[:, None]).nonzero()
    if len(pairs) > MOST_RECHECKED:
        step = float(near.max())
        return torch.round(result / step) * step
    # Computing a pair again reads two units from disk, which is why there is a limit above.
    for recipient, donor in pairs.tolist():
        result[recipient, donor] = exact((recipient, donor))
    return torch.round(result / GRID) * GRID


def _near(best: Float[Tensor, " units"], rounding: _Rounding) -> Float[Tensor, " units"]:
    """The distance from each of these scores within which another may be as high, by the rounding of the products.

    Chunks are summed in float64, so that their errors average out. Measured over correlations of 0 to 0.99, chunks of
    4,096 to 65,536 numbers and both ways of multiplying, errors stay below a quarter of this distance.
    """
    if rounding.exact:
        return torch.full_like(best, NEAR_EXACT)
    chunks = rounding.numbers / CHUNK_NUMBERS
    near: Tensor = NEAR_FLOAT32 * (best.abs() + UNRELATED) / max(1.0, chunks) ** 0.5
    return near.nan_to_num(0.0, posinf=0.0)


def _has_neighbour(best: Float[Tensor, " units"], near: Float[Tensor, " units"]) -> Bool[Tensor, " units"]:
    """Whether another unit's best score is within `near` of a unit's own, for each unit."""
    ordered, order = best.sort()
    gap = ordered.diff() <= near[order][1:]
    side = torch.zeros(1, dtype=torch.bool)
    has_neighbour = torch.empty_like(best, dtype=torch.bool)
    has_neighbour[order] = torch.cat([gap, side]) | torch.cat([side, gap])
    return has_neighbour
