"""Low-rank units: columns of the output projection stored as a product of two matrices."""

from collections.abc import Collection, Iterator
from typing import Any, ClassVar, NamedTuple

from pydantic import field_serializer, field_validator

from headshare.errors import PlanError
from headshare.plan.layout import Layout, Place
from headshare.plan.removal import Removal, counts
from headshare.plan.section import KEPT, AddedTensor, Choice, ModuleChange, Section, Touched, section_kind
from headshare.plan.spans import MAX_ATTENTION_UNITS, Spans, flat, length, read_groups, read_layer, write_groups
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Sublayer

# names the maker of low-rank columns, and the module that holds them in a loaded model
LOW_RANK = "low_rank"


class LowRankRange(NamedTuple):
    """Dense indices [start, stop) of one unit in an output projection, stored as a product of this rank."""

    start: int
    stop: int
    rank: int

    @property
    def maker(self) -> str:
        """The name of the maker that multiplies the factors."""
        return LOW_RANK

    def moved_to(self, start: int) -> "LowRankRange":
        """The range of the same length and rank that begins at this index."""
        return self._replace(start=start, stop=start + self.stop - self.start)


@section_kind
class LowRankUnits(Section):
    """Units whose columns of the output projection (W_o) are stored as a product of two matrices of low rank.

    The layout has the part o alone. `units` lists groups by layer, as a removal does. `ranks` has one rank for each of
    them, in ascending order of the groups. The other parts of a low-rank unit may be tied or its own.
    """

    key: ClassVar[str] = "factored"
    sign: ClassVar[str] = "f"
    legend: ClassVar[str] = "W_o stored as a product"

    layout: Layout
    units: dict[int, Spans]
    ranks: dict[int, tuple[int, ...]]
    chosen: Choice = Choice()

    @field_validator("layout")
    @classmethod
    def _check_layout(cls, layout: Layout) -> Layout:
        if layout.kind is not Sublayer.ATTENTION or tuple(layout.parts) != (Part.O,):
            raise PlanError(
                f"only part o of attention units is stored as a product; this layout is of {layout.kind} units and has "
                f"{','.join(layout.parts)}."
            )
        if layout.units > MAX_ATTENTION_UNITS:
            raise PlanError(f"{layout.units} attention units; products are for at most {MAX_ATTENTION_UNITS}.")
        if not layout.parts[Part.O].tensor.endswith(".weight"):
            raise PlanError("columns can be stored as a product only in tensors whose names end with .weight.")
        return layout

    @field_validator("units", mode="before")
    @classmethod
    def _read_units(cls, value: Any, info: Any) -> Any:
        """Accept {layer: text, whole numbers or spans}, as a removal does."""
        layout = info.data.get("layout")
        return read_groups(value, layout) if isinstance(layout, Layout) else {}  # which is an error of its own

    @field_validator("ranks", mode="before")
    @classmethod
    def _read_ranks(cls, value: Any, info: Any) -> Any:
        """Accept {layer: [rank, ...]}, one for each unit of that layer."""
        layout = info.data.get("layout")
        units = info.data.get("units")
        if not isinstance(layout, Layout) or units is None:
            return {}  # which is an error of its own
        if not isinstance(value, dict) or len(value) > layout.layers:
            raise PlanError(f"ranks must map some of {layout.layers} layers to lists; found {value!r:.50}.")
        by_layer = {read_layer(key, layout): ranks for key, ranks in value.items()}
        place = layout.parts[Part.O]
        return {
            layer: _checked_ranks(by_layer.get(layer, ()), layer, length(units.get(layer, ())), place)
            for layer in sorted({*by_layer, *units})
            if layer in units or by_layer[layer]
        }

    @field_serializer("units")
    def _write_units(self, units: dict[int, Spans]) -> dict[str, str]:
        return write_groups(units)

    @field_serializer("ranks")
    def _write_ranks(self, ranks: dict[int, tuple[int, ...]]) -> dict[str, list[int]]:
        return {str(layer): list(many) for layer, many in ranks.items()}

    @property
    def place(self) -> Place:
        """The place of the output projection's columns."""
        return self.layout.parts[Part.O]

    @property
    def count(self) -> int:
        """The count of low-rank units in all layers."""
        return sum(map(length, self.units.values()))

    def ranked(self, layer: int) -> list[tuple[int, int]]:
        """Groups and ranks of this layer's low-rank units, in order."""
        return list(zip(flat(self.units.get(layer, ())), self.ranks.get(layer, ()), strict=True))

    def touched(self) -> Iterator[Touched]:
        """The columns of each unit, as a product of the unit's own rank."""
        for layer in self.units:
            for group, rank in self.ranked(layer):
                product = LowRankRange(*self.place.span(group), rank)
                yield Touched(self.place.name(layer), self.place.shape, self.place.axis, product)

    def added(self) -> Iterator[tuple[str, AddedTensor]]:
        """Both factors of each output projection. The units' ranks lie one after the other."""
        outputs = self.place.shape[1 - self.place.axis]
        for layer in self.units:
            name = self.place.name(layer)
            ranks = sum(self.ranks[layer])
            factor_in, factor_out = factor_names(name)
            yield factor_in, AddedTensor(name, (ranks, self.place.rows))
            yield factor_out, AddedTensor(name, (outputs, ranks))

    def modules(self) -> Iterator[ModuleChange]:
        """Output projections that multiply by one factor and then by the other."""
        return (ModuleChange(self.place.name(layer), LOW_RANK) for layer in self.units)

    @property
    def rounding(self) -> str | None:
        """The reason for other roundings: a shared model multiplies by two factors, a stock one by their product."""
        return "factors are multiplied one after the other here, and with each other there" if self.count else None

    @property
    def approximate(self) -> str | None:
        """The numbers that differ from the dense model's: the factors, which only approximate its columns."""
        return "factors, whose product only comes near its columns" if self.count else None

    def conflict(self, other: Section) -> str | None:
        """The conflict with another section: columns also removed, or ties in the same output projection."""
        if isinstance(other, LowRankUnits):
            return "a plan lists factored attention units twice. Make them one."
        if isinstance(other, Removal):
            return self._conflict_with_removal(other)
        return self._conflict_with_ties(other) if isinstance(other, Selection) else None

    def _conflict_with_removal(self, removal: Removal) -> str | None:
        ours = self.layout
        theirs = removal.layout
        if theirs.kind is not ours.kind:
            if any(place.tensor == self.place.tensor for place in theirs.parts.values()):
                return f"{self.place.tensor} holds units of two kinds; in such a tensor none can be factored."
            return None
        if (theirs.layers, theirs.groups, theirs.parts[Part.O]) != (ours.layers, ours.groups, self.place):
            return "a removal and factored units see the attention units of this model in different ways."
        for layer in self.units:
            both = {group for group, _ in self.ranked(layer)} & set(removal.indices(layer))
            if both:
                return f"{HeadUnit(layer, min(both))} is both factored and removed. Make it one of them."
        return None

    def _conflict_with_ties(self, selection: Selection) -> str | None:
        if all(place.tensor != self.place.tensor for place in selection.layout.parts.values()):
            return None
        for tie in selection.ties:
            for unit in tie:
                if unit.layer in self.units:
                    return (
                        f"{tie}, also in {self.place.name(unit.layer)}, which has factored units: in one layer's "
                        "readout, ties and factored units do not mix. Tie q, k and v alone there."
                    )
        return None

    def bars(self, unit: HeadUnit, layout: Layout) -> bool:
        """True if the unit's output projection has low-rank units: it lends no columns."""
        return unit.layer in self.units and any(place.tensor == self.place.tensor for place in layout.parts.values())

    def units_given(self) -> list[HeadUnit]:
        """The units whose columns are stored as products."""
        return [HeadUnit(layer, group) for layer in self.units for group, _ in self.ranked(layer)]

    def describe(self) -> dict[str, Any]:
        """Counts, and the units and their ranks by layer, as plain data."""
        data = self.model_dump(mode="json")
        return {**counts(self, "factored", self.count), "indices": data["units"], "ranks": data["ranks"]}

    def picture(self, others: Collection[Section]) -> str:
        """Signs of all attention units, a line for each layer, and the ranks of the low-rank ones."""
        del others
        layout = self.layout
        width = len(str(layout.layers - 1))
        lines = [self.title(f"{layout.kind}, part o", self.count, "units factored")]
        for layer in range(layout.layers):
            rank_of = dict(self.ranked(layer))
            signs = "".join(self.sign if group in rank_of else KEPT for group in range(layout.groups))
            lines.append(f"  layer {layer:{width}}  {signs}  {_in_words(sorted(rank_of.values()))}".rstrip())
        return "\n".join(lines)


def factor_names(weight_name: str) -> tuple[str, str]:
    """The names of the two factors whose product gives the low-rank columns of this output projection.

    The first factor is ranks x input channels of a unit, the second outputs x ranks, whatever the weight's own
    orientation. The units' ranks lie one after the other.
    """
    base = weight_name.removesuffix("weight")
    return base + "factor_in", base + "factor_out"


def _in_words(ranks: list[int]) -> str:
    """Count and ranks of low-rank units in words: "3 of rank 8", "2 of rank 4 to 16"."""
    if not ranks:
        return ""
    return f"{len(ranks)} of rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[-1] != ranks[0] else "")


def _checked_ranks(value: Any, layer: int, count: int, place: Place) -> tuple[int, ...]:
    outputs = place.shape[1 - place.axis]
    most = min(place.rows, outputs) - 1
    if not isinstance(value, list | tuple) or len(value) != count:
        raise PlanError(f"layer {layer} has {count} factored units; it needs as many ranks, found {value!r:.50}.")
    for rank in value:
        if type(rank) is not int or not 1 <= rank <= most:
            raise PlanError(
                f"a factored unit of layer {layer} has rank {rank!r:.50}; its columns are {outputs} x {place.rows}: "
                f"a product of them has a rank from 1 to {most}."
            )
    return tuple(value)
