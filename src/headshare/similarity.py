"""Score all pairs of units from one streamed product: each weight is read once, and only one slice is in memory."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headshare.checkpoints import WEIGHT_DTYPES, Checkpoint
from headshare.configuration import text_config
from headshare.errors import CheckpointError, HeadshareError, PlanError
from headshare.layout import Layout, Place, attention_layout, ffn_layout
from headshare.matching import MatchFunction, Products, get_match_function
from headshare.progress import track
from headshare.units import Kind, Part, Parts

SLICE_BYTES = 64 * 2**20
BLOCK_UNITS = 256
EXACT_PRODUCTS = 2e9
NEAR_EXACT = 1e-11
NEAR_FLOAT32 = 2e-6


@dataclass(frozen=True)
class ScoreTable:
    """Matching scores of all pairs in one grid of units. Row: recipient, column: donor; meaningful below the diagonal
    of layers, zero elsewhere. `parts` are those whose ties this table chooses (all, unless matched separately)."""

    layout: Layout
    match: str
    parts: tuple[Part, ...]
    scores: Float[Tensor, "units units"]


@dataclass(frozen=True)
class Scores:
    """What `score_units` found: one table for each grid, or one for each part when matched separately."""

    model_type: str
    tables: tuple[ScoreTable, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over layouts and scores, so that a plan can say what it was made from."""
        digest = hashlib.sha256(self._header().encode())
        for table in self.tables:
            digest.update(table.scores.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _header(self) -> str:
        tables = [
            {"match": table.match, "parts": list(table.parts), "layout": table.layout.model_dump(mode="json")}
            for table in self.tables
        ]
        return json.dumps({"format": 1, "model_type": self.model_type, "tables": tables}, sort_keys=True)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: one float64 matrix a table, everything else in its metadata."""
        matrices = {str(index): table.scores.contiguous() for index, table in enumerate(self.tables)}
        save_file(matrices, path, metadata={"headshare": self._header()})
        Path(path).chmod(0o644)

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read what `save` wrote.

        Raises:
            PlanError: if the file is missing or is not a scores file.
        """
        if not Path(path).is_file():
            raise PlanError(f"there is no scores file at {path}. Make one with: headshare score MODEL -o {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["headshare"])
                tables = tuple(
                    _read_table(entry, file.get_tensor(str(index))) for index, entry in enumerate(header["tables"])
                )
            return cls(model_type=str(header["model_type"]), tables=tables)
        except HeadshareError:
            raise
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise PlanError(f"{path} is not a scores file of headshare: {error}") from None


def _read_table(entry: dict[str, object], scores: Tensor) -> ScoreTable:
    layout = Layout.model_validate(entry["layout"])
    parts = tuple(Part(part) for part in entry["parts"])  # type: ignore[attr-defined]
    if scores.shape != (layout.units, layout.units) or scores.dtype != torch.float64:
        raise ValueError(f"{tuple(scores.shape)} {scores.dtype} scores for {layout.units} units")
    if not torch.isfinite(scores).all():
        raise ValueError("scores that are not finite")
    return ScoreTable(layout, str(entry["match"]), parts, scores)


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
        _require_weights(layout, checkpoint)
    return tuple(layouts)


def _require_weights(layout: Layout, checkpoint: Checkpoint) -> None:
    for place in layout.parts.values():
        dtypes = {checkpoint.tensors[place.name(layer)].dtype for layer in range(layout.layers)}
        if len(dtypes) > 1 or not dtypes <= set(WEIGHT_DTYPES):
            raise CheckpointError(
                f"{place.tensor} is stored as {', '.join(sorted(dtypes))} in its layers; units can be shared only "
                f"where all layers have one of {', '.join(WEIGHT_DTYPES)}."
            )


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
    wanted = Parts.parse(parts) if isinstance(parts, str) else parts
    tables: list[ScoreTable] = []
    for layout in layouts_of(checkpoint, wanted, ffn_groups):
        function = get_match_function(match if layout.kind is Kind.ATTENTION else "ffn")
        if function.kind is not layout.kind:
            raise PlanError(f"the match function '{match}' is for {function.kind} units, not for {layout.kind}.")
        tables += _score_tables(checkpoint, layout, function)
    return Scores(model_type=str(checkpoint.config.get("model_type", "unknown")), tables=tuple(tables))


def _score_tables(checkpoint: Checkpoint, layout: Layout, function: MatchFunction) -> list[ScoreTable]:
    parts = tuple(part for part in function.parts if part in layout.parts)
    if function.kind is Kind.FFN:
        parts = tuple(part for part in parts if part is not Part.DOWN)
    products = {part: unit_products(checkpoint, layout, part) for part in parts}
    groups = [(part,) for part in parts] if function.separate else [parts]
    tables = []
    for group in groups:
        scores = function.score({part: products[part] for part in group})
        scores = _decided(scores, checkpoint, layout, function, group)
        tied = group if function.separate else tuple(layout.parts)
        tables.append(ScoreTable(layout, function.name, tied, scores))
    return tables


def unit_products(checkpoint: Checkpoint, layout: Layout, part: Part) -> Float[Tensor, "units units"]:
    """Inner products of this part of all pairs of units, in float64. One pass over the part's weights.

    Raises:
        CheckpointError: if a weight is NaN or infinite.
    """
    place = layout.parts[part]
    exact = layout.units**2 * place.numel <= EXACT_PRODUCTS
    dtype = torch.float64 if exact else torch.float32
    products = torch.zeros(layout.units, layout.units, dtype=torch.float64)
    lines = place.rows if place.axis == 0 else place.shape[0]
    per_line = place.numel // lines
    step = max(1, SLICE_BYTES // (layout.units * per_line * dtype.itemsize))
    steps = range(0, lines, step)
    for start in track(steps, f"matching {part}", len(steps)):
        units = torch.stack(list(_slices(checkpoint, layout, place, start, min(start + step, lines)))).to(dtype)
        if not torch.isfinite(units).all():
            raise CheckpointError(_not_finite(units, checkpoint, layout, place))
        _accumulate(products, units, layout.groups)
    return products


def _slices(
    checkpoint: Checkpoint, layout: Layout, place: Place, start: int, stop: int
) -> Iterator[Float[Tensor, " slice"]]:
    """For every unit in order, the same slice of its part, flattened."""
    for layer in range(layout.layers):
        name = place.name(layer)
        rows = None if place.axis == 0 else checkpoint.read(name, start, stop)
        for group in range(layout.groups):
            first, last = place.span(group)
            if rows is None:
                yield checkpoint.read(name, first + start, first + stop).flatten()
            else:
                yield rows[:, first:last].flatten()


def _accumulate(products: Float[Tensor, "units units"], units: Float[Tensor, "units slice"], groups: int) -> None:
    """Add one slice's products, block row by block row, up to each block's own diagonal."""
    block = max(groups, BLOCK_UNITS // groups * groups)
    for start in range(0, len(units), block):
        stop = min(start + block, len(units))
        products[start:stop, :stop] += units[start:stop] @ units[:stop].T


def _not_finite(units: Tensor, checkpoint: Checkpoint, layout: Layout, place: Place) -> str:
    index = int((~torch.isfinite(units)).any(dim=1).nonzero()[0, 0])
    unit = layout.unit(index)
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
    """Keep pairs with strictly earlier layers, and recompute those too close to their recipient's best to call."""
    layer_of = torch.arange(layout.units) // layout.groups
    allowed = layer_of[:, None] > layer_of[None, :]
    near = NEAR_EXACT if _all_exact(layout, parts) else NEAR_FLOAT32
    masked = scores.masked_fill(~allowed, float("-inf"))
    close = allowed & (masked >= masked.amax(dim=1, keepdim=True) - near)
    result = scores.masked_fill(~allowed, 0.0)
    for index in (close.sum(dim=1) > 1).nonzero().flatten().tolist():
        donors = close[index].nonzero().flatten().tolist()
        result[index, donors] = _exact_scores(checkpoint, layout, function, parts, index, donors)
    return result


def _all_exact(layout: Layout, parts: tuple[Part, ...]) -> bool:
    return all(layout.units**2 * layout.parts[part].numel <= EXACT_PRODUCTS for part in parts)


def _exact_scores(
    checkpoint: Checkpoint,
    layout: Layout,
    function: MatchFunction,
    parts: tuple[Part, ...],
    recipient: int,
    donors: list[int],
) -> Float[Tensor, " donors"]:
    """Scores of one recipient with a few donors, each pair alone in float64: equal units get equal scores."""
    scores = []
    for donor in donors:
        products: dict[Part, Tensor] = {}
        for part in parts:
            a = read_unit(checkpoint, layout, part, recipient).double()
            b = read_unit(checkpoint, layout, part, donor).double()
            ab = (a * b).sum()
            products[part] = torch.stack([torch.stack([(a * a).sum(), ab]), torch.stack([ab, (b * b).sum()])])
        scores.append(function.score(_typed(products))[0, 1])
    return torch.stack(scores)


def _typed(products: dict[Part, Tensor]) -> Products:
    return products


def read_unit(checkpoint: Checkpoint, layout: Layout, part: Part, index: int) -> Float[Tensor, " numel"]:
    """One part of one unit, flattened, as stored."""
    unit, place = layout.unit(index), layout.parts[part]
    first, last = place.span(unit.group)
    if place.axis == 0:
        return checkpoint.read(place.name(unit.layer), first, last).flatten()
    return checkpoint.read(place.name(unit.layer))[:, first:last].flatten()
