"""Removals: units, single neurons and whole sublayers that a model goes without."""

from bisect import bisect_left
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

from pydantic import field_serializer, field_validator, model_validator

from headshare.errors import PlanError
from headshare.plan.layout import Layout, Place
from headshare.plan.section import KEPT, Choice, Removed, Section, Touched, section_kind
from headshare.plan.spans import MAX_ATTENTION_UNITS, Span, Spans, flat, length, read_groups, write_groups
from headshare.plan.ties import Selection
from headshare.plan.units import ATTENTION_PARTS, FFN_PARTS, READOUTS, HeadUnit, Part, Sublayer

# the width of a picture of neurons
BAR = 32
# sublayers as a picture names them
WORDS = {Sublayer.ATTENTION: "attention", Sublayer.FFN: "feed-forward"}


@section_kind
class Removal(Section):
    """Units that a model goes without: attention units, or single neurons (a feed-forward layout of rows = 1).

    The layout has all parts of its sublayer. `removed` lists the removed groups by layer. It is made from whole
    numbers; in JSON the groups of each layer are one text, such as "3,7-9,15". A layer of which all groups are listed
    goes without its attention or its feed-forward: nothing is left of it but the output projection's bias.
    """

    key: ClassVar[str] = "removals"
    one_type: ClassVar[bool] = False
    sign: ClassVar[str] = "x"
    legend: ClassVar[str] = "removed"
    takes_whole: ClassVar[bool] = True

    layout: Layout
    removed: dict[int, Spans]
    chosen: Choice = Choice()

    @field_validator("removed", mode="before")
    @classmethod
    def _read_removed(cls, value: Any, info: Any) -> Any:
        """Accept {layer: text, whole numbers or spans}; texts are measured before they are read."""
        layout = info.data.get("layout")
        return read_groups(value, layout) if isinstance(layout, Layout) else {}  # which is an error of its own

    @field_serializer("removed")
    def _write_removed(self, removed: dict[int, Spans]) -> dict[str, str]:
        return write_groups(removed)

    @model_validator(mode="after")
    def _check(self) -> "Removal":
        layout = self.layout
        # all parts of the sublayer, so that nothing of a removed unit stays behind
        wanted = {
            Sublayer.ATTENTION: (ATTENTION_PARTS,),
            Sublayer.FFN: (FFN_PARTS, tuple(part for part in FFN_PARTS if part is not Part.GATE)),
        }[layout.kind]
        if tuple(layout.parts) not in wanted:
            raise PlanError(
                f"{layout.kind} units are removed with all their parts, {','.join(wanted[0])}; "
                f"this removal has {','.join(layout.parts)}."
            )
        self._check_size()
        # removed units are outputs of the matrices that compute features, and inputs of the one that reads them
        *features, readout = layout.parts.values()
        if any(place.axis == readout.axis for place in features) or len({place.axis for place in features}) > 1:
            raise PlanError(f"the units of a removal lie along the other axis in {readout.tensor} than elsewhere.")
        if not all(place.tensor.endswith(".weight") for place in layout.parts.values()):
            raise PlanError("units can only be removed from tensors whose names end with .weight.")
        return self

    def _check_size(self) -> None:
        """Refuse more units than models have, since a few characters of JSON can name them all."""
        if self.layout.kind is Sublayer.ATTENTION and self.layout.units > MAX_ATTENTION_UNITS:
            raise PlanError(f"{self.layout.units} attention units; removals are for at most {MAX_ATTENTION_UNITS}.")
        if self.layout.kind is Sublayer.FFN and any((p.rows, p.step) != (1, 1) for p in self.layout.parts.values()):
            raise PlanError("the feed-forward loses single neurons: a removal's layout has one row in each group.")

    @property
    def count(self) -> int:
        """The count of units or neurons that are removed in all layers."""
        return sum(map(length, self.removed.values()))

    def indices(self, layer: int) -> list[int]:
        """The removed groups of this layer, in order."""
        return flat(self.removed.get(layer, ()))

    @property
    def whole_layers(self) -> tuple[int, ...]:
        """The layers that go without all units, and so without this sublayer, in order."""
        return tuple(layer for layer, spans in self.removed.items() if length(spans) == self.layout.groups)

    def touched(self) -> Iterator[Touched]:
        """The removed indices of every part. In output projections they are inputs, elsewhere outputs."""
        for part, place in self.layout.parts.items():
            for layer, groups in self.removed.items():
                for start, stop in _indices(place, groups):
                    yield Touched(
                        place.name(layer), place.shape, place.axis, Removed(start, stop), part not in READOUTS
                    )

    @property
    def rounding(self) -> str | None:
        """The reason for other roundings: sums have fewer terms than in a stock model, which adds zeros there."""
        return "without removed units, sums are rounded in another way" if self.count else None

    def conflict(self, other: Section) -> str | None:
        """The conflict with another section: units removed twice, or also tied, or laid out in another way there."""
        if isinstance(other, Removal) and other.layout.kind is self.layout.kind:
            return "two removals are of the same kind of unit. Make them one."
        return self._conflict_with_ties(other) if isinstance(other, Selection) else None

    def _conflict_with_ties(self, selection: Selection) -> str | None:
        theirs = selection.layout
        ours = self.layout
        if theirs.kind is not ours.kind:
            shared = {place.tensor for place in theirs.parts.values()} & {place.tensor for place in ours.parts.values()}
            if shared:
                return f"{min(shared)} holds units of two kinds; from such a tensor none can be removed."
            return None
        each, rest = divmod(ours.groups, theirs.groups)
        agree = all(_is_cut_finer(place, ours.parts.get(part), each) for part, place in theirs.parts.items())
        if rest or theirs.layers != ours.layers or not agree:
            return f"a selection and a removal see the {ours.kind} units of this model in different ways."
        for tie in selection.ties:
            for unit in tie:
                if self.takes_from(unit, theirs):
                    what = f"{unit} is" if each == 1 else f"neurons of {unit} are"
                    return f"{tie}, but {what} removed. Remove it or tie it, not both."
        return None

    def bars(self, unit: HeadUnit, layout: Layout) -> bool:
        """True if something of the unit is removed: it neither lends nor borrows."""
        return layout.kind is self.layout.kind and self.takes_from(unit, layout)

    def units_given(self) -> list[HeadUnit]:
        """The removed attention units or single neurons."""
        return [HeadUnit(layer, group) for layer in self.removed for group in self.indices(layer)]

    def first_layer(self) -> int | None:
        """The first layer that loses units."""
        return min(self.removed, default=None)

    def describe(self) -> dict[str, Any]:
        """Counts, the removed groups of each layer as text, and the layers that lose all of them, as plain data."""
        indices = self.model_dump(mode="json")["removed"]
        whole = list(self.whole_layers)
        return {**counts(self, "removed", self.count), "indices": indices, "whole_layers": whole}

    def picture(self, others: Collection[Section]) -> str:
        """Signs of all attention units, a line for each layer; for neurons, of which there are thousands, a bar."""
        del others
        layout = self.layout
        attention = layout.kind is Sublayer.ATTENTION
        width = len(str(layout.layers - 1))
        digits = len(str(layout.groups))
        lines = [self.title(str(layout.kind), self.count, "units removed" if attention else "neurons removed")]
        for layer in range(layout.layers):
            count = length(self.removed.get(layer, ()))
            if attention:
                gone = set(self.indices(layer))
                signs = "".join(self.sign if group in gone else KEPT for group in range(layout.groups))
            else:
                kept = round(BAR * (1 - count / layout.groups))
                signs = KEPT * kept + self.sign * (BAR - kept)
            none = f"  no {WORDS[layout.kind]}" if count == layout.groups else ""
            lines.append(f"  layer {layer:{width}}  {signs}  {count:{digits}} of {layout.groups}{none}")
        return "\n".join(lines)

    def takes_from(self, unit: HeadUnit, layout: Layout) -> bool:
        """True if some of this unit is removed. `layout` is the unit's grid, which may be coarser than this one."""
        each = self.layout.groups // layout.groups
        return self._touches(unit.layer, unit.group * each, (unit.group + 1) * each)

    def _touches(self, layer: int, start: int, stop: int) -> bool:
        spans = self.removed.get(layer, ())
        at = bisect_left(spans, start, key=lambda span: span.stop - 1)
        return at < len(spans) and spans[at].start < stop


def counts(section: Section, done: str, count: int) -> dict[str, Any]:
    """The grid of a section and the count of its units, under the key `done`, as plain data."""
    return {
        "kind": str(section.layout.kind),
        "layers": section.layout.layers,
        "groups": section.layout.groups,
        done: count,
        "ratio": count / section.layout.units,
        "chosen": section.chosen.model_dump(mode="json"),
    }


def _indices(place: Place, groups: Spans) -> Spans:
    """The indices that these groups have in this place."""
    if (place.start, place.step, place.rows) == (0, 1, 1):
        return groups
    if place.step == place.rows:
        return tuple(Span(place.span(start)[0], place.span(stop - 1)[1]) for start, stop in groups)
    return tuple(Span(*place.span(group)) for start, stop in groups for group in range(start, stop))


def _is_cut_finer(coarse: Place, fine: Place | None, each: int) -> bool:
    """True if each unit of the coarse place is `each` neighbouring units of the fine one."""
    whole = None if fine is None else {"rows": fine.rows * each, "step": fine.step * each}
    return (
        whole is not None
        and fine is not None
        and coarse == fine.model_copy(update=whole)
        and (each == 1 or fine.step == fine.rows)
    )
