"""Narrow values: in whole layers, key/value heads whose values have fewer dimensions than their queries and keys."""

from collections.abc import Collection, Iterator
from typing import Any, ClassVar, NamedTuple

from pydantic import field_serializer, field_validator

from headshare.errors import PlanError
from headshare.plan.layout import Layout, Place
from headshare.plan.low_rank import LowRankUnits
from headshare.plan.removal import Removal, counts
from headshare.plan.section import KEPT, Choice, ModuleChange, Removed, Section, Touched, section_kind
from headshare.plan.spans import MAX_ATTENTION_UNITS, read_layer
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Sublayer

# names the module that makes narrow values in a loaded model
NARROW = "narrow_values"
# the width of a picture's bar
BAR = 32


class ValuePlaces(NamedTuple):
    """The tensors of one layer that narrow values are in: the weight that makes them, and the one that reads them."""

    v: str
    o: str


@section_kind
class NarrowValues(Section):
    """Layers in which the values of all key/value heads have the same smaller width.

    The layout has the parts v and o. `widths` gives the width of those layers. Each head keeps the first `width` rows
    of v, and each query head as many columns of o. Before, both are rotated so that the first dimensions matter most
    (`sharing.factors.principal_values`), so no kept number is the dense model's. A unit may be removed all the same: it
    is then gone, and the width is that of the others.
    """

    key: ClassVar[str] = "narrow_values"
    sign: ClassVar[str] = "v"
    legend: ClassVar[str] = "dimensions of values dropped"

    layout: Layout
    widths: dict[int, int]
    chosen: Choice = Choice()

    @field_validator("layout")
    @classmethod
    def _check_layout(cls, layout: Layout) -> Layout:
        if layout.kind is not Sublayer.ATTENTION or tuple(layout.parts) != (Part.V, Part.O):
            raise PlanError(
                f"values of attention units are narrowed in parts v,o; this layout is of {layout.kind} units and has "
                f"{','.join(layout.parts)}."
            )
        if layout.units > MAX_ATTENTION_UNITS:
            raise PlanError(f"{layout.units} attention units; values are narrowed in at most {MAX_ATTENTION_UNITS}.")
        v = layout.parts[Part.V]
        o = layout.parts[Part.O]
        if not all(_is_all_of(place, layout.groups) for place in (v, o)) or v.tensor == o.tensor:
            raise PlanError(
                f"{v.tensor} and {o.tensor} should hold v and o of all units and nothing else; values can only be "
                "narrowed in such tensors."
            )
        if (v.axis, o.axis) != (0, 1) or o.rows % v.rows:
            raise PlanError(f"a unit's {v.rows} values should be rows of {v.tensor}, and columns of {o.tensor}.")
        return layout

    @field_validator("widths", mode="before")
    @classmethod
    def _read_widths(cls, value: Any, info: Any) -> Any:
        """Accept {layer: width}, one for some of the layers."""
        layout = info.data.get("layout")
        if not isinstance(layout, Layout):
            return {}  # which is an error of its own
        if not isinstance(value, dict) or len(value) > layout.layers:
            raise PlanError(f"widths must map some of {layout.layers} layers to whole numbers; found {value!r:.50}.")
        widths = {read_layer(key, layout): width for key, width in value.items()}
        dims = layout.parts[Part.V].rows
        for layer, width in widths.items():
            if type(width) is not int or not 1 <= width < dims:
                raise PlanError(
                    f"values of layer {layer} should be {width!r:.50} wide; they have {dims} dimensions, so narrower "
                    f"ones have 1 to {dims - 1}."
                )
        return {layer: widths[layer] for layer in sorted(widths)}

    @field_serializer("widths")
    def _write_widths(self, widths: dict[int, int]) -> dict[str, int]:
        return {str(layer): width for layer, width in widths.items()}

    @property
    def dims(self) -> int:
        """The dimensions of a head's values in the dense model."""
        return self.layout.parts[Part.V].rows

    def places(self, layer: int) -> ValuePlaces:
        """The tensors of this layer that narrow values are in."""
        return ValuePlaces(*(place.name(layer) for place in self.layout.parts.values()))

    def width_in(self, tensor: str) -> int:
        """The width of the values in the layer that this weight is of."""
        return next(width for layer, width in self.widths.items() if tensor in self.places(layer))

    def touched(self) -> Iterator[Touched]:
        """The dropped dimensions: the last rows of each head's v, and the last columns of each query head's o."""
        for part, place in self.layout.parts.items():
            heads = place.shape[place.axis] // self.dims
            for layer, width in self.widths.items():
                for head in range(heads):
                    dropped = Removed(head * self.dims + width, (head + 1) * self.dims)
                    yield Touched(place.name(layer), place.shape, place.axis, dropped, part is Part.V)

    def rewritten(self) -> Iterator[str]:
        """Both tensors of each narrow layer: they are rotated before dimensions are dropped."""
        for layer in self.widths:
            yield from self.places(layer)

    def modules(self) -> Iterator[ModuleChange]:
        """The modules that make values, which say how wide these are."""
        return (ModuleChange(self.places(layer).v, NARROW) for layer in self.widths)

    @property
    def rounding(self) -> str | None:
        """The reason for other roundings: a stock model adds zeros for dropped dimensions."""
        return "without dropped dimensions of values, sums are rounded in another way" if self.widths else None

    @property
    def approximate(self) -> str | None:
        """The numbers that are not the dense model's: values, and the columns that read them."""
        return "narrow values and the columns that read them, which were rotated" if self.widths else None

    def conflict(self, other: Section) -> str | None:
        """The conflict with another section that changes v or o of a narrow layer, or sees the units differently."""
        if isinstance(other, NarrowValues):
            return "a plan lists narrow values twice. Make them one."
        if isinstance(other, Removal):
            return self._conflict_with_removal(other)
        if isinstance(other, LowRankUnits):
            both = {layer for layer in self.widths if other.place.name(layer) == self.places(layer).o} & set(
                other.units
            )
            if both:
                return (
                    f"layer {min(both)} has narrow values and factored units: in one layer's readout, the two do not "
                    "mix. Do one of them there."
                )
        return self._conflict_with_ties(other) if isinstance(other, Selection) else None

    def _conflict_with_removal(self, removal: Removal) -> str | None:
        theirs = removal.layout
        tensors = {place.tensor for place in self.layout.parts.values()}
        if theirs.kind is not self.layout.kind:
            shared = tensors & {place.tensor for place in theirs.parts.values()}
            return (
                f"{min(shared)} holds units of two kinds; in such a tensor no values are narrowed." if shared else None
            )
        same = all(theirs.parts.get(part) == place for part, place in self.layout.parts.items())
        if (theirs.layers, theirs.groups) != (self.layout.layers, self.layout.groups) or not same:
            return "a removal and narrow values see the attention units of this model in different ways."
        gone = self.widths.keys() & set(removal.whole_layers)
        return f"layer {min(gone)} loses all its attention, so it has no values to narrow." if gone else None

    def _conflict_with_ties(self, selection: Selection) -> str | None:
        for tie in selection.ties:
            for unit in tie:
                if self.bars(unit, selection.layout):
                    return (
                        f"{tie}, but values of layer {unit.layer} are narrow: there, v and o are neither borrowed nor "
                        "lent. Tie q and k alone, or leave its values as wide as they are."
                    )
        return None

    def bars(self, unit: HeadUnit, layout: Layout) -> bool:
        """True if the unit is in a narrow layer, and the other grid has its v or o."""
        if unit.layer not in self.widths:
            return False
        ours = {place.tensor for place in self.layout.parts.values()}
        return any(place.tensor in ours for place in layout.parts.values())

    def units_given(self) -> list[HeadUnit]:
        """All units of the narrow layers."""
        return [HeadUnit(layer, group) for layer in self.widths for group in range(self.layout.groups)]

    def describe(self) -> dict[str, Any]:
        """Counts, and the width of values by layer, as plain data."""
        data = self.model_dump(mode="json")
        return {**counts(self, "narrowed", len(self.units_given())), "dims": self.dims, "widths": data["widths"]}

    def picture(self, others: Collection[Section]) -> str:
        """A bar for each layer: the dimensions that its values keep, and those that are dropped."""
        del others
        width = len(str(self.layout.layers - 1))
        digits = len(str(self.dims))
        lines = [self.title("attention, parts v,o", len(self.units_given()), "units with narrow values")]
        for layer in range(self.layout.layers):
            kept = self.widths.get(layer, self.dims)
            full = round(BAR * kept / self.dims)
            bar = KEPT * full + self.sign * (BAR - full)
            lines.append(f"  layer {layer:{width}}  {bar}  {kept:{digits}} of {self.dims} dimensions")
        return "\n".join(lines)


def _is_all_of(place: Place, groups: int) -> bool:
    """True if the tensor holds this part of all units, one after the other, and nothing else."""
    whole = place.start == 0 and place.step == place.rows and groups * place.rows == place.shape[place.axis]
    return whole and place.tensor.endswith(".weight")
