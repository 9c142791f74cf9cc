"""Panels of a plan's sections: one for each, whatever its kind."""

from collections import Counter
from collections.abc import Callable, Sequence

from headshare.pages.cells import Cell, bars_of_layers, cells_panel
from headshare.pages.svg import Panel
from headshare.plan.low_rank import LowRankUnits
from headshare.plan.narrow_values import NarrowValues
from headshare.plan.removal import Removal
from headshare.plan.section import Section
from headshare.plan.spans import length
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Sublayer

# from so many units on, cells are too many to look at, and layers have bars
MOST_CELLS = 12_000

# what colours mean, in the order of a legend
ROLES = {
    "kept": "kept",
    "s2": "kept, and lends to later layers",
    "s0": "uses a donor's weights: layer.group",
    "s1": "removed",
    "s4": "W_o as a product: its rank",
    "s3": "changed in another way",
}


def panel_of(section: Section, others: Sequence[Section]) -> tuple[Panel, bool]:
    """The panel of a section, and whether it consists of cells. `others` are all sections of the plan."""
    title = section.picture(others).splitlines()[0].partition(":")[0]
    if isinstance(section, NarrowValues):
        layers = range(section.layout.layers)
        widths = [section.widths.get(layer, section.dims) for layer in layers]
        rows = [(float(width), float(section.dims), f"{width} of {section.dims}") for width in widths]
        return bars_of_layers(f"{title}: dimensions of values", rows), False
    if section.layout.units > MOST_CELLS or (isinstance(section, Removal) and section.layout.kind is Sublayer.FFN):
        units = "neurons" if section.layout.kind is Sublayer.FFN and isinstance(section, Removal) else "units"
        return bars_of_layers(f"{title}: {units} that are kept", _counted(section)), False
    lent = None
    if isinstance(section, Selection):
        lent = Counter((tie.donor.layer, tie.recipient.layer) for tie in section.ties)
    cell = _cell_of(section, others)
    layout = section.layout
    rows_of_cells = [[cell(HeadUnit(layer, group)) for group in range(layout.groups)] for layer in range(layout.layers)]
    return cells_panel(title, rows_of_cells, lent), True


def _counted(section: Section) -> list[tuple[float, float, str]]:
    """For each layer, the units that it keeps, and all."""
    groups = section.layout.groups
    if isinstance(section, Removal):
        gone = {layer: length(spans) for layer, spans in section.removed.items()}
    else:
        gone = Counter(unit.layer for unit in section.units_given())
    kept = [groups - gone.get(layer, 0) for layer in range(section.layout.layers)]
    return [(float(count), float(groups), f"{count:,} of {groups:,}") for count in kept]


def _cell_of(section: Section, others: Sequence[Section]) -> Callable[[HeadUnit], Cell]:
    if isinstance(section, Selection):
        return _tied(section, others)
    if isinstance(section, LowRankUnits):
        ranks = {(layer, group): rank for layer in section.units for group, rank in section.ranked(layer)}
        return lambda unit: (
            Cell("s4", str(ranks[unit]), f"{unit}: W_o is a product of rank {ranks[unit]}")
            if unit in ranks
            else Cell(tip=f"{unit}: kept")
        )
    given = frozenset(section.units_given())
    role, word = ("s1", section.sign) if isinstance(section, Removal) else ("s3", section.sign)
    what = section.legend or section.key
    return lambda unit: Cell(role, word, f"{unit}: {what}") if unit in given else Cell(tip=f"{unit}: kept")


def _tied(selection: Selection, others: Sequence[Section]) -> Callable[[HeadUnit], Cell]:
    donors = {tie.recipient: tie.donor for tie in selection.ties}
    lends = Counter(tie.donor for tie in selection.ties)
    # a unit that another section of the same grid takes whole is not there to be tied
    grid = (selection.layout.kind, selection.layout.groups)
    same = [other for other in others if (other.layout.kind, other.layout.groups) == grid and other.takes_whole]
    gone = {unit: other.legend for other in same for unit in other.units_given()}

    def cell(unit: HeadUnit) -> Cell:
        if unit in donors:
            donor = donors[unit]
            return Cell("s0", f"{donor.layer}.{donor.group}", f"{unit} takes its weights from {donor}")
        if unit in gone:
            return Cell("s1", Removal.sign, f"{unit}: {gone[unit]}")
        if unit in lends:
            return Cell("s2", f"→{lends[unit]}", f"{unit} lends to {lends[unit]} later")
        return Cell(tip=f"{unit}: kept")

    return cell
