"""The page of a plan: what was done, a picture of each section, sizes by layer, and every tie."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headshare.checkpoint.entry import SharingEntry
from headshare.checkpoint.header import TensorInfo
from headshare.checkpoint.int4 import PACKED, Packing
from headshare.pages.cells import bars_of_layers
from headshare.pages.page import render
from headshare.pages.svg import Figure
from headshare.plan.describe import titles
from headshare.plan.plan import SharePlan
from headshare.sharing.picture.sections import ROLES, panel_of
from headshare.sharing.picture.sizes import LayerSize, sizes_of
from headshare.tables import Table

MOST_TIES = 5_000  # rows of the table of ties


@dataclass(frozen=True)
class Inspected:
    """What a page is of: its name, its plan, and for a checkpoint the entry and the tensors."""

    name: str
    plan: SharePlan
    entry: SharingEntry | None = None
    tensors: Mapping[str, TensorInfo] | None = None


def plan_page(of: Inspected) -> str:
    """The page of a plan, or of a checkpoint that was made by one, as one HTML file."""
    plan = of.plan
    drawn = [(panel_of(section, plan.sections), section) for section in plan.sections]
    sizes = sizes_of(plan, of.tensors)
    bars = [panel for (panel, cells), _ in drawn if not cells]
    roles = {group.get("class") for (panel, cells), _ in drawn if cells for group in panel.root.iter("g")}
    return render(
        "inspect.html",
        of=of,
        facts=list(_facts(of)),
        titles=titles(plan),
        cells=[panel for (panel, cells), _ in drawn if cells],
        bars=Figure("bars", "By layer", "The gray part of a bar is what the dense model has more.", [
            *([bars_of_layers(*_size_bars(of, sizes))] if any(layer is not None for layer in sizes) else []), *bars,
        ]),
        legend={role: words for role, words in ROLES.items() if role in roles},
        layers=_layers(of, sizes),
        ties=_ties(plan),
        left_off=max(0, plan.ties - MOST_TIES),
    )  # fmt: skip


def _facts(of: Inspected) -> Sequence[tuple[str, str]]:
    facts = [("model type", of.plan.model_type), ("plan", of.plan.digest[:12])]
    entry = of.entry
    if entry is not None:
        facts += [("base model", entry.base_model)] if entry.base_model else []
        facts += [("rounded", entry.packing.in_words())] if entry.packing else []
        facts += [("refitted", entry.refit.in_words())] if entry.refit else []
    if of.tensors is not None:
        facts.append(("stored", f"{sum(info.nbytes for info in of.tensors.values()):,} bytes"))
    return facts


def _size_bars(of: Inspected, sizes: Mapping[int | None, LayerSize]) -> tuple[str, list[tuple[float, float, str]]]:
    unit, factor = ("numbers", 1e6) if of.tensors is None else ("MB", 1e6)
    layers = 1 + max(layer for layer in sizes if layer is not None)
    by_layer = [sizes.get(layer, LayerSize()) for layer in range(layers)]
    title = "millions of numbers that the plan stores" if of.tensors is None else f"{unit} stored"
    rows = []
    for size in by_layer:
        kept, whole = size.stored / factor, size.dense / factor
        words = f"{kept:.3g} of {whole:.3g}" if size.stored != size.dense else f"{kept:.3g}"
        rows.append((kept, max(kept, whole), words))
    return title, rows


def _layers(of: Inspected, sizes: Mapping[int | None, LayerSize]) -> Table:
    """A row for each layer: its size, and the units that each section changes there."""
    unit = "numbers" if of.tensors is None else "bytes"
    heads = ["layer", f"{unit} stored", f"{unit} spared"]
    columns: list[Mapping[int, int]] = []
    for section in of.plan.sections:
        heads.append(section.picture(of.plan.sections).splitlines()[0].partition(" (")[0].partition(": ")[0])
        columns.append(Counter(unit_.layer for unit_ in section.units_given()))
    if of.tensors is not None and of.entry is not None and isinstance(of.entry.packing, Packing):
        packed = sizes_of(of.plan, {name: info for name, info in of.tensors.items() if name.endswith(PACKED)})
        heads.append("bytes of 4 bits")
        columns.append({layer: size.stored for layer, size in packed.items() if layer is not None})
    rows = []
    for layer in sorted(sizes, key=lambda one: (one is None, one or 0)):
        size = sizes[layer]
        name = "elsewhere" if layer is None else str(layer)
        counts = ["" if layer is None else f"{column.get(layer, 0):,}" for column in columns]
        rows.append([name, f"{size.stored:,}", f"{size.dense - size.stored:,}", *counts])
    return Table(heads, rows, words=())


def _ties(plan: SharePlan) -> Table:
    """A row for each tie: parts, recipient and donor."""
    rows = [
        [str(selection.layout.kind), ", ".join(selection.parts), *(str(number) for unit in tie for number in unit)]
        for selection in plan.selections
        for tie in sorted(selection.ties)
    ]
    return Table(["units", "parts", "layer", "group", "donor's layer", "donor's group"], rows[:MOST_TIES], words=(0, 1))
