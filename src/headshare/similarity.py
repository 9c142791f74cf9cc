"""Score all pairs of units from one streamed product: each weight is read once, and only one slice is in memory."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headshare.checkpoints import Checkpoint, require_one_dtype
from headshare.configuration import text_config
from headshare.errors import CheckpointError, PlanError
from headshare.layout import Layout, Place
from headshare.matching import MatchFunction, get_match_function
from headshare.progress import track
from headshare.recognition import attention_layout, ffn_layout
from headshare.scores import Scores, ScoreTable
from headshare.units import Kind, Part, Parts

SLICE_BYTES = 64 * 2**20
BLOCK_UNITS = 256
EXACT_PRODUCTS = 2e9
NEAR_EXACT = 1e-11
NEAR_FLOAT32 = 2e-6
MOST_RECHECKED = 20_000
SLICE_NUMBERS = 65_536
SAFE_EXPONENT = 50
GRID = 2.0**-40


def layouts_of(checkpoint: Checkpoint, parts: Parts, ffn_groups: int = 1) -> tuple[Layout, ...]:
    """The grids that these parts belong to, with all the parts those grids have.

    Raises:
        ArchitectureError: if the model's layout is not known.
        PlanError: if a part is not there.
    """
    config, shapes = text_config(checkpoint.config), checkpoint.shapes
    layouts = []
    if parts.attention:
        layouts.append(attention_layout(config, shapes))
    if parts.ffn:
        layouts.append(ffn_layout(config, shapes, ffn_groups))
    for layout in layouts:
        require_one_dtype(layout, checkpoint)
    return tuple(layouts)


def match_for(layout: Layout, match: str) -> MatchFunction:
    """The match function for this grid: the one asked for, or for feed-forward units `ffn`.

    Raises:
        PlanError: if there is none of that name, or it is for another kind of unit.
    """
    asked = get_match_function(match)
    if layout.kind is Kind.FFN:
        return get_match_function("ffn")
    if asked.kind is not layout.kind:
        raise PlanError(f"the match function '{match}' is for {asked.kind} units, not for {layout.kind}.")
    return asked


def tied_together(function: MatchFunction, layout: Layout) -> list[tuple[Part, ...]]:
    """The sets of parts whose ties this match function chooses together: all of the grid's, or each by itself."""
    return [(part,) for part in function.parts] if function.separate else [tuple(layout.parts)]


def score_units(
    checkpoint: Checkpoint, match: str = "qk", parts: str | Parts = "qkv", *, ffn_groups: int = 1
) -> Scores:
    """Score every pair of units with this match function (feed-forward units with `ffn`).

    Products are accumulated in float64; each slice is multiplied in float64 for small models and in float32 for
    large ones, and pairs too close to call are then computed again in float64. Ties are therefore exact.

    Raises:
        ArchitectureError, PlanError: if the model or the match function is not known.
        CheckpointError: if the checkpoint is already shared or quantised, or a weight is not finite.
    """
    checkpoint.require_dense("score")
    wanted = Parts.parse(parts)
    tables: list[ScoreTable] = []
    for layout in layouts_of(checkpoint, wanted, ffn_groups):
        tables += _score_tables(checkpoint, layout, match_for(layout, match))
    return Scores(model_type=str(checkpoint.config.get("model_type", "unknown")), tables=tuple(tables))


def _score_tables(checkpoint: Checkpoint, layout: Layout, function: MatchFunction) -> list[ScoreTable]:
    parts = tuple(part for part in function.parts if part in layout.parts)
    products = unit_products(checkpoint, layout, parts)
    tables = []
    for tied in tied_together(function, layout):
        scored = tied if function.separate else parts
        scores = function.score({part: products[part] for part in scored})
        scores = _decided(scores, checkpoint, layout, function, scored)
        tables.append(ScoreTable(layout, function.name, tied, scores))
    return tables


def unit_products(
    checkpoint: Checkpoint, layout: Layout, parts: tuple[Part, ...]
) -> dict[Part, Float[Tensor, "units units"]]:
    """Inner products of all pairs of units, for each of these parts, in float64. Reads each weight once.

    Raises:
        CheckpointError: if a weight is NaN or infinite, or so large or small that its square is.
    """
    products = {part: torch.zeros(layout.units, layout.units, dtype=torch.float64) for part in parts}
    for together in _read_together(layout, parts):
        for part, units in _streamed(checkpoint, layout, together):
            low, high = units.aminmax(dim=1)
            largest = torch.maximum(-low, high)
            if not torch.isfinite(largest).all():
                raise CheckpointError(_not_finite(largest, checkpoint, layout, layout.parts[part]))
            _accumulate(products[part], units, largest, layout.groups)
    for part, product in products.items():
        if not torch.isfinite(product).all():
            raise CheckpointError(
                f"the weights of part {part} in {checkpoint.name} are too large to compare: their squares overflow."
            )
    return products


def _read_together(layout: Layout, parts: tuple[Part, ...]) -> list[tuple[Part, ...]]:
    """Parts that lie in the same rows of the same tensor, and so come from the same reads."""
    groups: dict[tuple[str, int], list[Part]] = {}
    for part in parts:
        place = layout.parts[part]
        groups.setdefault((place.tensor, -1 if place.axis == 1 else place.start), []).append(part)
    return [tuple(group) for group in groups.values()]


def _streamed(
    checkpoint: Checkpoint, layout: Layout, parts: tuple[Part, ...]
) -> Iterator[tuple[Part, Float[Tensor, "units slice"]]]:
    """The same slice of every unit, for each part, slice after slice. Parts of one call lie in the same rows."""
    place = layout.parts[parts[0]]
    dtype = torch.float64 if all(_is_exact(layout, part) for part in parts) else torch.float32
    lines = place.rows if place.axis == 0 else place.shape[0]
    per_line = sum(layout.parts[part].numel for part in parts) // lines
    step = max(1, min(SLICE_BYTES // (layout.units * dtype.itemsize), SLICE_NUMBERS) // per_line)
    starts = range(0, lines, step)
    for start in track(starts, f"matching {','.join(parts)}", len(starts)):
        stop = min(start + step, lines)
        slices: dict[Part, list[Tensor]] = {part: [] for part in parts}
        for layer in range(layout.layers):
            rows = checkpoint.read(place.name(layer), start, stop) if place.axis == 1 else None
            for part, group in ((part, group) for part in parts for group in range(layout.groups)):
                first, last = layout.parts[part].span(group)
                if rows is None:
                    piece = checkpoint.read(place.name(layer), first + start, first + stop)
                else:
                    piece = rows[:, first:last]
                slices[part].append(piece.flatten())
        for part in parts:
            yield part, torch.stack(slices[part]).to(dtype)


def _is_exact(layout: Layout, part: Part) -> bool:
    return layout.units**2 * layout.parts[part].numel <= EXACT_PRODUCTS


def _accumulate(
    products: Float[Tensor, "units units"],
    units: Float[Tensor, "units slice"],
    largest: Float[Tensor, " units"],
    groups: int,
) -> None:
    """Add one slice's products, block row by block row, up to each block's own diagonal.

    Where numbers are so large or small that a product could over- or underflow, every unit is first divided by a
    power of two near its largest number; that is exact, and undone in float64.
    """
    exponents = torch.frexp(largest).exponent
    extreme = bool((exponents.abs() > SAFE_EXPONENT).any())
    scaled = torch.ldexp(units, -exponents[:, None]) if extreme else units
    scales = torch.ldexp(torch.ones(len(units), dtype=torch.float64), exponents)
    block = max(groups, BLOCK_UNITS // groups * groups)
    for start in range(0, len(units), block):
        stop = min(start + block, len(units))
        product = (scaled[start:stop] @ scaled[:stop].T).double()
        if extreme:
            product = product * scales[start:stop, None] * scales[None, :stop]
        products[start:stop, :stop] += product


def _not_finite(largest: Float[Tensor, " units"], checkpoint: Checkpoint, layout: Layout, place: Place) -> str:
    unit = layout.unit(int((~torch.isfinite(largest)).nonzero()[0, 0]))
    return (
        f"{place.name(unit.layer)} in {checkpoint.name} holds NaN or infinite numbers (in {unit}). "
        "The file is damaged or the training diverged; headshare does not share such weights."
    )


def _decided(
    scores: Float[Tensor, "units units"],
    checkpoint: Checkpoint,
    layout: Layout,
    function: MatchFunction,
    parts: tuple[Part, ...],
) -> Float[Tensor, "units units"]:
    """Keep pairs with strictly earlier layers, and make exact those that are too close to call.

    Too close are donors near their recipient's best, and recipients whose bests are near one another's. All scores
    are then rounded to GRID, far below what weights can mean, so that equal units have equal scores. Where more than
    MOST_RECHECKED pairs are too close (a model of copies), all are rounded to what is close instead.
    """
    layer_of = torch.arange(layout.units) // layout.groups
    allowed = layer_of[:, None] > layer_of[None, :]
    near = NEAR_EXACT if all(_is_exact(layout, part) for part in parts) else NEAR_FLOAT32
    masked = scores.masked_fill(~allowed, float("-inf"))
    best = masked.amax(dim=1)
    close = allowed & (masked >= best[:, None] - near)
    undecided = (close.sum(dim=1) > 1) | _has_neighbour(best, near)
    result = scores.masked_fill(~allowed, 0.0)
    pairs = (close & undecided[:, None]).nonzero()
    if len(pairs) > MOST_RECHECKED:
        return torch.round(result / near) * near
    for recipient, donor in pairs.tolist():
        result[recipient, donor] = _exact_score(checkpoint, layout, function, parts, recipient, donor)
    return torch.round(result / GRID) * GRID


def _has_neighbour(best: Float[Tensor, " units"], near: float) -> Bool[Tensor, " units"]:
    """Whether another unit's best score is within `near` of this one's."""
    ordered, order = best.sort()
    gap = ordered.diff() <= near
    side = torch.zeros(1, dtype=torch.bool)
    found = torch.empty_like(best, dtype=torch.bool)
    found[order] = torch.cat([gap, side]) | torch.cat([side, gap])
    return found


def _exact_score(
    checkpoint: Checkpoint, layout: Layout, function: MatchFunction, parts: tuple[Part, ...], recipient: int, donor: int
) -> float:
    """The score of one pair, alone, in float64: equal units get equal scores."""
    products: dict[Part, Tensor] = {}
    for part in parts:
        a = read_unit(checkpoint, layout, part, recipient).double()
        b = read_unit(checkpoint, layout, part, donor).double()
        ab = (a * b).sum()
        products[part] = torch.stack([torch.stack([(a * a).sum(), ab]), torch.stack([ab, (b * b).sum()])])
    return float(function.score(products)[0, 1])


def read_unit(checkpoint: Checkpoint, layout: Layout, part: Part, index: int) -> Float[Tensor, " numel"]:
    """One part of one unit, flattened, as stored."""
    unit, place = layout.unit(index), layout.parts[part]
    first, last = place.span(unit.group)
    if place.axis == 0:
        return checkpoint.read(place.name(unit.layer), first, last).flatten()
    return checkpoint.read(place.name(unit.layer))[:, first:last].flatten()
