"""Sections of a plan, built from the units that it gives up: ties, removals, low-rank units, narrow values.

A builder sees all units of its actions at once, over all layers, and yields sections of any kind. So an action can
bring a builder, and a kind of section, of its own. Knows no cost and no weight.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from headshare.plan.layout import Layout
from headshare.plan.low_rank import LowRankUnits
from headshare.plan.narrow_values import NarrowValues
from headshare.plan.removal import Removal
from headshare.plan.section import Choice, Section
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Sublayer, Tie


@dataclass(frozen=True)
class Taken:
    """A step that a plan takes: the units that it gives up, and the layout that they are in.

    `parts` are the parts that the units share with the donor. `rank` is that of the low-rank product which stands for
    the units' own columns. `width` is that of the values of all units of their layer.
    """

    layout: Layout
    units: tuple[HeadUnit, ...]
    parts: tuple[Part, ...] = ()
    donor: HeadUnit | None = None
    rank: int = 0
    width: int = 0


SectionBuilder = Callable[[Sequence[Taken], Choice], Iterator[Section]]


def tie_sections(taken: Sequence[Taken], choice: Choice) -> Iterator[Section]:
    """Selections of all ties. Parts with equal ties are one selection; ties that share o have scales."""
    for layout, mine in _by_grid(taken):
        # A plan names each part once, so the ties of all actions that share it are put together.
        ties: dict[Part, list[Tie]] = {}
        for step in mine:
            assert step.donor is not None
            for part in step.parts:
                ties.setdefault(part, []).extend(Tie(unit, step.donor) for unit in step.units)

        # Parts whose ties are equal become one selection.
        together: dict[tuple[Tie, ...], list[Part]] = {}
        for part in layout.parts:
            if part in ties:
                together.setdefault(tuple(sorted(ties[part])), []).append(part)
        for same, parts in together.items():
            scale = Part.O in parts
            yield Selection(layout=layout.only(tuple(parts)), ties=same, scale=scale, chosen=choice)


def removal_sections(taken: Sequence[Taken], choice: Choice) -> Iterator[Section]:
    """Removals of attention units, and of neurons."""
    for layout, mine in _by_grid(taken):
        removed: dict[int, list[int]] = {}
        for unit in (unit for step in mine for unit in step.units):
            removed.setdefault(unit.layer, []).append(unit.group)
        yield Removal(layout=layout, removed=removed, chosen=choice)


def low_rank_sections(taken: Sequence[Taken], choice: Choice) -> Iterator[Section]:
    """Sections of low-rank units: attention units whose columns of o become products, with their ranks."""
    for layout, mine in _by_grid(taken):
        ranks = {unit: step.rank for step in mine for unit in step.units}
        ordered: dict[int, list[HeadUnit]] = {}
        for unit in sorted(ranks):
            ordered.setdefault(unit.layer, []).append(unit)
        yield LowRankUnits(
            layout=layout.only((Part.O,)),
            units={layer: [unit.group for unit in units] for layer, units in ordered.items()},
            ranks={layer: tuple(ranks[unit] for unit in units) for layer, units in ordered.items()},
            chosen=choice,
        )


def narrow_values_sections(taken: Sequence[Taken], choice: Choice) -> Iterator[Section]:
    """The section of narrow values, each layer at the least width of its steps."""
    for layout, mine in _by_grid(taken):
        widths: dict[int, int] = {}
        for step in mine:
            layer = step.units[0].layer
            widths[layer] = min(step.width, widths.get(layer, step.width))
        yield NarrowValues(layout=layout.only((Part.V, Part.O)), widths=widths, chosen=choice)


def _by_grid(taken: Sequence[Taken]) -> Iterator[tuple[Layout, list[Taken]]]:
    """The steps of each kind of sublayer together, which are all of one layout."""
    for kind in Sublayer:
        mine = [step for step in taken if step.layout.kind is kind]
        if mine:
            yield mine[0].layout, mine
