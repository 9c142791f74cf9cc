"""Layouts: places of each unit's parts in a checkpoint's tensors. A layout holds names and shapes, no weights."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from headshare.errors import PlanError
from headshare.plan.units import HeadUnit, Part, Sublayer
from headshare.short import short

# single neurons are units too: 126 layers of 53,248 are 6.7 million
MAX_UNITS = 10_000_000
MAX_LAYERS = 10_000
MAX_GROUPS = 100_000
Positive = Annotated[int, Field(ge=1, le=2**40)]
NotNegative = Annotated[int, Field(ge=0, le=2**40)]


class Place(BaseModel):
    """The place of one part, in one tensor of each layer.

    Group g owns `rows` indices along `axis`, from `start + g * step` on. `shape` is the dense tensor's. `tensor` is its
    name with `{layer}` for the layer's number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: Annotated[str, Field(max_length=512)]
    axis: Annotated[int, Field(ge=0, le=1)]
    shape: tuple[Positive, Positive]
    start: NotNegative
    step: Positive
    rows: Positive

    def name(self, layer: int) -> str:
        """The tensor's name in that layer."""
        return self.tensor.replace("{layer}", str(layer))

    def prefix(self, layer: int) -> str:
        """The beginning of the names of that layer's tensors, such as `model.layers.7.`"""
        return self.tensor[: self.tensor.index("{layer}")] + f"{layer}."

    def span(self, group: int) -> tuple[int, int]:
        """The indices along `axis` that belong to this group: first, and one past the last."""
        first = self.start + group * self.step
        return first, first + self.rows

    @property
    def numel(self) -> int:
        """The count of numbers that one unit has in this part."""
        return self.rows * self.shape[1 - self.axis]


class Layout(BaseModel):
    """A grid of units, layers by groups, and the place of each of their parts.

    Raises:
        PlanError: if a place reaches outside its tensor or two places overlap.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Sublayer
    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    groups: Annotated[int, Field(ge=1, le=MAX_GROUPS)]
    parts: dict[Part, Place]

    def __repr__(self) -> str:
        return short(self, self.kind, f"{self.layers} layers", f"{self.groups} groups", "+".join(self.parts))

    __str__ = __repr__

    @field_validator("parts")
    @classmethod
    def _in_order(cls, parts: dict[Part, Place]) -> dict[Part, Place]:
        return {part: parts[part] for part in Part if part in parts}

    @model_validator(mode="after")
    def _check(self) -> "Layout":
        if self.layers * self.groups > MAX_UNITS:
            raise PlanError(f"the layout has {self.layers} x {self.groups} units; at most {MAX_UNITS} are supported.")
        for part, place in self.parts.items():
            if place.tensor.count("{layer}") != 1:
                raise PlanError(f"part {part}: the tensor name '{place.tensor}' must hold {{layer}} once.")
            if place.step < place.rows or place.span(self.groups - 1)[1] > place.shape[place.axis]:
                raise PlanError(f"part {part} of {self.groups} groups does not fit in {place.tensor} {place.shape}.")
        check_places([self])
        return self

    @property
    def units(self) -> int:
        """The count of units in all layers."""
        return self.layers * self.groups

    def unit(self, index: int) -> HeadUnit:
        """The unit at this position, counting groups within layers."""
        return HeadUnit(*divmod(index, self.groups))

    def index(self, unit: HeadUnit) -> int:
        """The position of this unit, counting groups within layers; the inverse of `unit`."""
        return unit.layer * self.groups + unit.group

    def only(self, parts: tuple[Part, ...]) -> "Layout":
        """The layout of the same grid with these parts alone.

        Raises:
            PlanError: if the layout lacks one of them.
        """
        missing = [part for part in parts if part not in self.parts]
        if missing:
            raise PlanError(
                f"part {', '.join(missing)} is not in this model's {self.kind} layers, which have "
                f"{', '.join(self.parts)}. Choose among those."
            )
        return self.model_copy(update={"parts": {part: self.parts[part] for part in parts}})


def check_tensors(layouts: Sequence[Layout]) -> None:
    """Raise PlanError if these layouts disagree about a tensor's axis or shape, or name one tensor in two ways."""
    template_of: dict[str, str] = {}
    by_template: dict[str, Place] = {}
    for layout in layouts:
        for place in layout.parts.values():
            known = by_template.setdefault(place.tensor, place)
            if (known.axis, known.shape) != (place.axis, place.shape):
                raise PlanError(f"the parts in {place.tensor} disagree about its axis or shape.")
            for name in map(place.name, range(layout.layers)):
                other = template_of.setdefault(name, place.tensor)
                if other != place.tensor:
                    raise PlanError(f"{other} and {place.tensor} both name {name}, so their parts could overlap.")


def check_places(layouts: Sequence[Layout]) -> None:
    """Raise PlanError if two parts of these layouts can reach the same numbers of the same tensor."""
    check_tensors(layouts)
    by_template: dict[str, list[tuple[Place, int]]] = {}
    for layout in layouts:
        for place in layout.parts.values():
            by_template.setdefault(place.tensor, []).append((place, layout.groups))
    for template, sharing in by_template.items():
        if len(sharing) > 1:
            spans = sorted(place.span(group) for place, groups in sharing for group in range(groups))
            if any(before[1] > after[0] for before, after in pairwise(spans)):
                raise PlanError(f"the parts in {template} overlap.")
