"""Inner products of all pairs of units, streamed: each weight is read once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit, Part
from headshare.precision import full_float32, short_products
from headshare.progress import track

SLICE_BYTES = 32 * 2**20
CHUNK_NUMBERS = 2**22
BLOCK_UNITS = 256
EXACT_PRODUCTS = 2e9
SLICE_NUMBERS = 65_536
SMALLEST_SQUARE, LARGEST_SQUARE = 2.0**-80, 2.0**100
Scratch = dict[torch.dtype, Tensor]


def unit_products(
    checkpoint: Checkpoint, layout: Layout, parts: tuple[Part, ...]
) -> dict[Part, Float[Tensor, "units units"]]:
    """Inner products of all pairs of units, for each of these parts, in float64. Each weight is read once.

    Raises:
        CheckpointError: if a weight is NaN or infinite, or so large or small that its square is.
    """
    products = {part: torch.zeros(layout.units, layout.units, dtype=torch.float64) for part in parts}
    scratch: Scratch = {}
    for together in _read_together(layout, parts):
        for part, units in _streamed(checkpoint, layout, together):
            largest = accumulate(products[part], units, layout.groups, scratch, exact=is_exact(layout, part))
            if largest is not None and not torch.isfinite(largest).all():
                unit = layout.unit(int((~torch.isfinite(largest)).nonzero()[0, 0]))
                raise CheckpointError(not_finite(unit, layout.parts[part].name(unit.layer), checkpoint))
    for part, product in products.items():
        if not torch.isfinite(product).all():
            raise CheckpointError(
                f"the weights of part {part} in {checkpoint.name} are too large to compare: their squares overflow."
            )
    return products


def _read_together(layout: Layout, parts: tuple[Part, ...]) -> list[tuple[Part, ...]]:
    """Groups of parts that lie in the same rows of the same tensor, and so come from the same reads."""
    groups: dict[tuple[str, int], list[Part]] = {}
    for part in parts:
        place = layout.parts[part]
        groups.setdefault((place.tensor, -1 if place.axis == 1 else place.start), []).append(part)
    return [tuple(group) for group in groups.values()]


def _streamed(
    checkpoint: Checkpoint, layout: Layout, parts: tuple[Part, ...]
) -> Iterator[tuple[Part, Float[Tensor, "units slice"]]]:
    """Slices of all units, part by part, in the type of number in which they are stored. The parts share rows.

    Each slice covers the same numbers of every unit. It is valid until the next is asked for: while one is multiplied,
    the next is read into the other of two buffers. Reads are large, and a slice is handed out in chunks that stay in
    the processor's cache.
    """
    # A line is a row of one unit where units are rows of the tensor, else a row of the tensor, which crosses all units.
    place = layout.parts[parts[0]]
    dtype = checkpoint.tensors[place.name(0)].torch_dtype
    lines = place.rows if place.axis == 0 else place.shape[0]
    widths = {part: layout.parts[part].numel // lines for part in parts}
    per_line = sum(widths.values())
    step = max(1, min(SLICE_BYTES // (layout.units * dtype.itemsize), SLICE_NUMBERS) // per_line)
    starts = range(0, lines, min(step, lines))
    # Two buffers serve in turn, so that reading the next slice overlaps the arithmetic on this one.
    buffers = [
        {part: torch.empty(layout.units, starts.step * widths[part], dtype=dtype) for part in parts}
        for _ in range(min(2, len(starts)))
    ]

    def read(nth: int) -> dict[Part, Tensor]:
        stop = min(starts[nth] + starts.step, lines)
        slices = {part: buffer[:, : (stop - starts[nth]) * widths[part]] for part, buffer in buffers[nth % 2].items()}
        for layer in range(layout.layers):
            _read_layer(checkpoint, layout, layer, starts[nth], stop, slices)
        return slices

    # The reader is always one slice ahead; chunks bound what the products touch at once.
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for nth in track(range(len(starts)), f"matching {','.join(parts)}", len(starts)):
            slices = ahead.result()
            if nth + 1 < len(starts):
                ahead = reader.submit(read, nth + 1)
            for part, units in slices.items():
                for chunk in torch.split(units, max(1, CHUNK_NUMBERS // len(units)), dim=1):
                    yield part, chunk


def _read_layer(
    checkpoint: Checkpoint, layout: Layout, layer: int, start: int, stop: int, slices: dict[Part, Tensor]
) -> None:
    """Read lines [start, stop) of every unit of a layer into their rows of the slices."""
    units_of = {part: units[layer * layout.groups : (layer + 1) * layout.groups] for part, units in slices.items()}
    info = checkpoint.tensors[layout.parts[next(iter(slices))].name(layer)]
    if layout.parts[next(iter(slices))].axis == 1:
        rows = checkpoint.read(info.name, start, stop)
        for part, units in units_of.items():
            for group, unit in enumerate(units):
                first, last = layout.parts[part].span(group)
                unit.view(stop - start, -1).copy_(rows[:, first:last])
        return
    for part, units in units_of.items():
        place = layout.parts[part]
        row_bytes = place.shape[1] * info.torch_dtype.itemsize
        for group, unit in enumerate(units.view(torch.uint8).numpy()):
            checkpoint.read_into(unit.data, info, (place.span(group)[0] + start) * row_bytes)


def is_exact(layout: Layout, part: Part) -> bool:
    """Whether the products of this part are few enough to be computed in float64."""
    return layout.units**2 * layout.parts[part].numel <= EXACT_PRODUCTS


def _room(scratch: Scratch, like: Float[Tensor, "units slice"], dtype: torch.dtype) -> Shaped[Tensor, "units slice"]:
    """Scratch memory of this shape, reused whenever it is large enough: fresh memory costs more than the arithmetic."""
    if dtype not in scratch or scratch[dtype].numel() < like.numel():
        scratch[dtype] = torch.empty(like.numel(), dtype=dtype)
    return scratch[dtype][: like.numel()].view(like.shape)


def accumulate(
    products: Float[Tensor, "units units"],
    units: Float[Tensor, "units slice"],
    groups: int,
    scratch: Scratch,
    *,
    exact: bool,
) -> Float[Tensor, " units"] | None:
    """Add the products of a slice to `products`. Returns each unit's largest magnitude if numbers were extreme.

    Numbers are extreme where a product could over- or underflow. The products of units with themselves show it. Every
    unit is then first divided by a power of two near its largest number, which is exact, and is undone in float64.
    """
    numbers = _room(scratch, units, torch.float64 if exact else torch.float32).copy_(units)
    blocks = _blocks(numbers, groups, stored=units.dtype)
    own = torch.cat([product[:, start:].diagonal() for start, product in blocks])
    if bool(((own > SMALLEST_SQUARE) & (own < LARGEST_SQUARE)).all()):
        for start, product in blocks:
            products[start : start + len(product), : product.shape[1]] += product
        return None
    # the careful way: divide by powers of two, multiply, and multiply back where there is range enough
    largest = numbers.abs().amax(dim=1)
    exponents = torch.frexp(largest).exponent
    scales = torch.ldexp(torch.ones(len(units), dtype=torch.float64), exponents)
    for start, product in _blocks(torch.ldexp(numbers, -exponents[:, None]), groups, stored=units.dtype):
        rows, columns = scales[start : start + len(product), None], scales[None, : product.shape[1]]
        products[start : start + len(product), : product.shape[1]] += product.double() * rows * columns
    return largest


def _blocks(
    numbers: Float[Tensor, "units slice"], groups: int, *, stored: torch.dtype
) -> list[tuple[int, Float[Tensor, "rows columns"]]]:
    """Products of all units with all, in block rows that end at the block's own diagonal: (first row, product).

    Numbers that are `stored` as bfloat16 lose nothing in short products, whose sums are in float32 too. All others are
    multiplied in full.
    """
    height = max(groups, BLOCK_UNITS // groups * groups)
    with short_products() if stored is torch.bfloat16 else full_float32():
        return [
            (start, numbers[start : start + height] @ numbers[: start + height].T)
            for start in range(0, len(numbers), height)
        ]


def not_finite(unit: HeadUnit, name: str, checkpoint: Checkpoint) -> str:
    """The words that refuse a unit with numbers that are none, in the tensor of this name."""
    return (
        f"{name} in {checkpoint.name} holds NaN or infinite numbers (in {unit}). "
        "The file is damaged or the training diverged; headshare does not share such weights."
    )


def read_unit(checkpoint: Checkpoint, layout: Layout, part: Part, index: int) -> Float[Tensor, " numel"]:
    """The numbers of a part of a unit, flattened, in the type of number in which they are stored."""
    unit = layout.unit(index)
    place = layout.parts[part]
    first, last = place.span(unit.group)
    if place.axis == 0:
        return checkpoint.read(place.name(unit.layer), first, last).flatten()
    return checkpoint.read(place.name(unit.layer))[:, first:last].flatten()
