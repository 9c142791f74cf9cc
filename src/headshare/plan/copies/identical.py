"""Identical tensors: whole tensors that stand in a model several times, bit for bit, and are stored once."""

from collections import Counter
from collections.abc import Collection, Iterator
from math import prod
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from headshare.errors import PlanError
from headshare.plan.layout import Layout, Positive
from headshare.plan.section import KEPT, LENDS, Borrowed, Choice, Section, Touched, section_kind
from headshare.plan.units import HeadUnit

# largest mixtures of experts have some 50,000 tensors
MAX_COPIES = 200_000
Name = Annotated[str, Field(min_length=1, max_length=512)]


class Copied(BaseModel):
    """A tensor that is stored, its shape, and the other names under which the model has the same numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: Name
    shape: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=4)]
    also: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MAX_COPIES)]


@section_kind
class IdenticalTensors(Section):
    """Whole tensors (matrices, norms, biases, embeddings, heads, experts) that are one stored tensor each.

    The first of equal tensors is stored, and the others take all their numbers from it. The layout is the grid of the
    model's attention units, and says how its layers are called.
    """

    key: ClassVar[str] = "identical"
    one_type: ClassVar[bool] = False
    sign: ClassVar[str] = "="
    legend: ClassVar[str] = "q, k, v or o is an earlier layer's, bit for bit"

    layout: Layout
    copied: Annotated[tuple[Copied, ...], Field(max_length=MAX_COPIES)]
    chosen: Choice = Choice()

    @field_validator("copied", mode="before")
    @classmethod
    def _measure(cls, value: Any) -> Any:
        """Refuse absurd lengths before anything is read."""
        if not isinstance(value, list | tuple) or len(value) > MAX_COPIES:
            raise PlanError(f"identical tensors are a list of at most {MAX_COPIES}; found {value!r:.50}.")
        return value

    @model_validator(mode="after")
    def _check(self) -> "IdenticalTensors":
        names = Counter(name for each in self.copied for name in (each.tensor, *each.also))
        twice = next((name for name, count in names.items() if count > 1), None)
        if twice is not None:
            raise PlanError(f"{twice} stands twice among identical tensors. All names of one tensor stand together.")
        return self

    @property
    def count(self) -> int:
        """The count of tensors that are not stored, as an equal one is."""
        return sum(len(each.also) for each in self.copied)

    def copies(self) -> Iterator[tuple[str, str]]:
        """Each tensor that is not stored, and the one that stands for it."""
        return ((name, each.tensor) for each in self.copied for name in each.also)

    def touched(self) -> Iterator[Touched]:
        """All rows of each copy, borrowed from the stored tensor."""
        for each in self.copied:
            yield Touched(each.tensor, each.shape, 0)
            for name in each.also:
                yield Touched(name, each.shape, 0, Borrowed(0, each.shape[0], each.tensor, 0))

    def conflict(self, other: Section) -> str | None:
        """The conflict with a second list of identical tensors."""
        return "a plan lists identical tensors twice. Make them one." if isinstance(other, IdenticalTensors) else None

    def units_given(self) -> list[HeadUnit]:
        """All units of the layers in which a tensor of attention is an earlier layer's."""
        names = {name for name, _ in self.copies()}
        layers = self._layers_with(names)
        return [HeadUnit(layer, group) for layer in layers for group in range(self.layout.groups)]

    def first_layer(self) -> int | None:
        """None: every layer computes what the dense model's does."""
        return None

    def describe(self) -> dict[str, Any]:
        """Counts, and every stored tensor with its other names, as plain data."""
        data = self.model_dump(mode="json")
        numbers = sum(prod(each.shape) * len(each.also) for each in self.copied)
        return {"tensors": self.count, "numbers": numbers, "chosen": data["chosen"], "copied": data["copied"]}

    def picture(self, others: Collection[Section]) -> str:
        """A sign for all units of each layer, with the layers whose tensors it has beside them."""
        del others
        layout = self.layout
        donors = dict(self.copies())
        stored = {each.tensor for each in self.copied}
        width = len(str(layout.layers - 1))
        tensors = "tensor is" if self.count == 1 else "tensors are"
        how = f"match {self.chosen.match}, mode {self.chosen.mode}"
        lines = [f"identical tensors: {self.count} {tensors} not stored again, {how}"]
        prefixes = self._prefixes()
        taken = {layer: [name for name in donors if name.startswith(prefix)] for layer, prefix in prefixes.items()}
        lending = {layer for layer, prefix in prefixes.items() if any(name.startswith(prefix) for name in stored)}
        given = {unit.layer for unit in self.units_given()}
        for layer in prefixes:
            sign = self.sign if layer in given else LENDS if layer in lending else KEPT
            lines.append(
                f"  layer {layer:{width}}  {sign * layout.groups}  {self._told(taken[layer], donors)}".rstrip()
            )
        elsewhere = [name for name in donors if not any(name.startswith(prefix) for prefix in prefixes.values())]
        lines += [f"  {name} is {donors[name]}" for name in elsewhere]
        return "\n".join(lines)

    def _told(self, names: list[str], donors: dict[str, str]) -> str:
        """How many of these tensors of a layer are stored in which other layer, in words."""
        prefixes = self._prefixes()
        layer_of = {prefix: str(layer) for layer, prefix in prefixes.items()}
        homes = Counter(
            next((layer for prefix, layer in layer_of.items() if donors[name].startswith(prefix)), "") for name in names
        )
        return ", ".join(
            f"{count} tensors of layer {layer}" if layer else f"{count} tensors from elsewhere"
            for layer, count in homes.items()
        )

    def _prefixes(self) -> dict[int, str]:
        """The beginning of the names of each layer's tensors."""
        place = next(iter(self.layout.parts.values()))
        return {layer: place.prefix(layer) for layer in range(self.layout.layers)}

    def _layers_with(self, names: Collection[str]) -> list[int]:
        """The layers of which a tensor of the grid is among these names, in order."""
        places = self.layout.parts.values()
        return [layer for layer in range(self.layout.layers) if any(place.name(layer) in names for place in places)]
