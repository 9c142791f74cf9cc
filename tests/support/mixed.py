"""A plan of every kind of section, for a model of 30 layers of 8 heads, of which nothing else is there."""

from headshare.plan.layout import Layout, Place
from headshare.plan.low_rank import LowRankUnits
from headshare.plan.narrow_values import NarrowValues
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.section import Section
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Sublayer, Tie

LAYERS, GROUPS, HEAD, HIDDEN, NEURONS = 30, 8, 64, 512, 1536


def _place(name: str, axis: int, rows: int, count: int) -> Place:
    shape = (rows * count, HIDDEN) if axis == 0 else (HIDDEN, rows * count)
    return Place(tensor=f"model.layers.{{layer}}.{name}.weight", axis=axis, shape=shape, start=0, step=rows, rows=rows)


def attention() -> Layout:
    parts = {part: _place(f"self_attn.{part}_proj", 0, HEAD, GROUPS) for part in (Part.Q, Part.K, Part.V)}
    parts[Part.O] = _place("self_attn.o_proj", 1, HEAD, GROUPS)
    return Layout(kind=Sublayer.ATTENTION, layers=LAYERS, groups=GROUPS, parts=parts)


def neurons() -> Layout:
    parts = {part: _place(f"mlp.{part}_proj", 0, 1, NEURONS) for part in (Part.GATE, Part.UP)}
    parts[Part.DOWN] = _place("mlp.down_proj", 1, 1, NEURONS)
    return Layout(kind=Sublayer.FFN, layers=LAYERS, groups=NEURONS, parts=parts)


def mixed_plan(model_type: str = "llama") -> SharePlan:
    """Ties of q and k, heads and neurons removed, whole sublayers gone, narrow values, products of low rank."""
    grid = attention()
    ties = tuple(
        Tie(HeadUnit(layer, group), HeadUnit((layer * 7 + group) % 6, (layer + group) % 4))
        for layer in range(8, 26)
        for group in range(layer % 4)
    )
    sections: list[Section] = [
        Selection(layout=grid.only((Part.Q, Part.K)), ties=ties),
        Removal(layout=grid, removed={27: range(GROUPS), 28: [1, 3], 29: [0, 5, 6]}),
        Removal(layout=neurons(), removed={layer: range(layer * 20) for layer in range(5, 28)} | {29: range(NEURONS)}),
        LowRankUnits(layout=grid.only((Part.O,)), units={6: [1, 2], 7: [4]}, ranks={6: [8, 16], 7: [24]}),
        NarrowValues(layout=grid.only((Part.V, Part.O)), widths={10: 48, 11: 40, 20: 16}),
    ]
    return SharePlan.of_sections(sections, model_type)
