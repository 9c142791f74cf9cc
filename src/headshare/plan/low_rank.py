"""Low-rank units: columns of the output projection stored as a product of two matrices."""

from typing import Any

from pydantic import BaseModel, ConfigDict, field_serializer, field_validator

from headshare.errors import PlanError
from headshare.plan.groups import MAX_ATTENTION_UNITS, flat, read_groups, read_layer, write_groups
from headshare.plan.layout import Layout, Place
from headshare.plan.spans import Spans, length
from headshare.plan.ties import Choice
from headshare.plan.units import Kind, Part


class Factored(BaseModel):
    """Units whose columns of the readout (W_o) are stored as a product of two matrices, of a rank for each unit.

    The layout has the part o alone. `units` says which groups, by layer, as a removal does; `ranks` has a number for
    each of them, in ascending order of the groups. What else such a unit has may be tied or its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Layout
    units: dict[int, Spans]
    ranks: dict[int, tuple[int, ...]]
    chosen: Choice = Choice()

    @field_validator("layout")
    @classmethod
    def _check_layout(cls, layout: Layout) -> Layout:
        if layout.kind is not Kind.ATTENTION or tuple(layout.parts) != (Part.O,):
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
        layout, units = info.data.get("layout"), info.data.get("units")
        if not isinstance(layout, Layout) or units is None:
            return {}  # which is an error of its own
        if not isinstance(value, dict) or len(value) > layout.layers:
            raise PlanError(f"ranks must map some of {layout.layers} layers to lists; found {value!r:.50}.")
        found = {read_layer(key, layout): ranks for key, ranks in value.items()}
        place = layout.parts[Part.O]
        return {
            layer: _checked_ranks(found.get(layer, ()), layer, length(units.get(layer, ())), place)
            for layer in sorted({*found, *units})
            if layer in units or found[layer]
        }

    @field_serializer("units")
    def _write_units(self, units: dict[int, Spans]) -> dict[str, str]:
        return write_groups(units)

    @field_serializer("ranks")
    def _write_ranks(self, ranks: dict[int, tuple[int, ...]]) -> dict[str, list[int]]:
        return {str(layer): list(many) for layer, many in ranks.items()}

    @property
    def place(self) -> Place:
        """Where the readout's columns lie."""
        return self.layout.parts[Part.O]

    @property
    def count(self) -> int:
        """How many units there are in all."""
        return sum(map(length, self.units.values()))

    def ranked(self, layer: int) -> list[tuple[int, int]]:
        """Group and rank of this layer's units, in order."""
        return list(zip(flat(self.units.get(layer, ())), self.ranks.get(layer, ()), strict=True))


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
