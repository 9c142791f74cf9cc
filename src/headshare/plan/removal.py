"""Removals: units and single neurons that a model goes without."""

from bisect import bisect_left
from typing import Any

from pydantic import BaseModel, ConfigDict, field_serializer, field_validator, model_validator

from headshare.errors import PlanError
from headshare.plan.groups import MAX_ATTENTION_UNITS, flat, read_groups, write_groups
from headshare.plan.layout import Layout
from headshare.plan.spans import Spans, length
from headshare.plan.ties import Choice
from headshare.plan.units import ATTENTION_PARTS, FFN_PARTS, HeadUnit, Kind, Part


class Removal(BaseModel):
    """Units that a model goes without: attention units, or single neurons (a feed-forward layout of rows = 1).

    The layout has all parts of its kind. `removed` says which groups go, by layer; it is made from whole numbers, and
    in JSON each layer's are one text, such as "3,7-9,15".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        wanted = {
            Kind.ATTENTION: (ATTENTION_PARTS,),
            Kind.FFN: (FFN_PARTS, tuple(part for part in FFN_PARTS if part is not Part.GATE)),
        }[layout.kind]
        if tuple(layout.parts) not in wanted:
            raise PlanError(
                f"{layout.kind} units are removed with all their parts, {','.join(wanted[0])}; "
                f"this removal has {','.join(layout.parts)}."
            )
        self._check_size()
        *features, readout = layout.parts.values()
        if any(place.axis == readout.axis for place in features) or len({place.axis for place in features}) > 1:
            raise PlanError(f"the units of a removal lie along the other axis in {readout.tensor} than elsewhere.")
        if not all(place.tensor.endswith(".weight") for place in layout.parts.values()):
            raise PlanError("units can only be removed from tensors whose names end with .weight.")
        for layer, spans in self.removed.items():
            if length(spans) >= layout.groups:
                raise PlanError(f"all {layout.groups} {layout.kind} units of layer {layer} are removed; keep one.")
        return self

    def _check_size(self) -> None:
        """A few characters can name all units: so there must not be more of them than models have."""
        if self.layout.kind is Kind.ATTENTION and self.layout.units > MAX_ATTENTION_UNITS:
            raise PlanError(f"{self.layout.units} attention units; removals are for at most {MAX_ATTENTION_UNITS}.")
        if self.layout.kind is Kind.FFN and any((p.rows, p.step) != (1, 1) for p in self.layout.parts.values()):
            raise PlanError("the feed-forward loses single neurons: a removal's layout has one row in each group.")

    @property
    def count(self) -> int:
        """How many units or neurons are removed in all."""
        return sum(map(length, self.removed.values()))

    def indices(self, layer: int) -> list[int]:
        """The groups that this layer goes without, in order."""
        return flat(self.removed.get(layer, ()))

    def takes_from(self, unit: HeadUnit, layout: Layout) -> bool:
        """Whether some of this unit is removed. `layout` is the grid that the unit is in, perhaps a coarser one."""
        each = self.layout.groups // layout.groups
        return self._touches(unit.layer, unit.group * each, (unit.group + 1) * each)

    def _touches(self, layer: int, start: int, stop: int) -> bool:
        spans = self.removed.get(layer, ())
        at = bisect_left(spans, start, key=lambda span: span.stop - 1)
        return at < len(spans) and spans[at].start < stop
