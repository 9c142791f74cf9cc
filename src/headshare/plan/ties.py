"""Ties: units that take their weights from donors in earlier layers."""

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, Literal

from pydantic import field_serializer, field_validator, model_validator

from headshare.errors import PlanError
from headshare.plan.layout import Layout
from headshare.plan.section import (
    KEPT,
    LENDS,
    AddedTensor,
    Borrowed,
    Choice,
    Scaled,
    Section,
    Touched,
    section_kind,
)
from headshare.plan.units import HeadUnit, Part, Tie

# each costs microseconds wherever a plan is read; the largest models have some 16,000 units in groups of neurons
MAX_TIES = 200_000


@section_kind
class Selection(Section):
    """The selection: ties of one grid of units, which all share the same parts.

    `kind` says what the recipient borrows; "weights" is the only kind so far. With `scale`, each channel of the
    recipient's attention output is multiplied by a number of its own before W_o.
    """

    key: ClassVar[str] = "selections"
    sign: ClassVar[str] = "·"

    layout: Layout
    ties: tuple[Tie, ...]
    kind: Literal["weights"] = "weights"
    scale: bool = False
    chosen: Choice = Choice()

    @field_validator("ties", mode="before")
    @classmethod
    def _read_ties(cls, value: Any, info: Any) -> Any:
        """Accept [[recipient layer, recipient group, donor layer, donor group], ...], refusing absurd lengths first."""
        if not isinstance(value, list | tuple):
            raise PlanError(f"ties must be a list of [layer, group, donor layer, donor group], found {type(value)}.")
        layout = info.data.get("layout")
        most = min(layout.units, MAX_TIES) if isinstance(layout, Layout) else MAX_TIES
        if len(value) > most:
            raise PlanError(f"the plan lists {len(value)} ties; for this grid there can be {most}.")
        return tuple(_read_tie(item) for item in value)

    @field_serializer("ties")
    def _write_ties(self, ties: tuple[Tie, ...]) -> list[list[int]]:
        return [[*tie.recipient, *tie.donor] for tie in ties]

    @model_validator(mode="after")
    def _check(self) -> "Selection":
        # each recipient has one donor, in an earlier layer
        donor_of: dict[HeadUnit, HeadUnit] = {}
        for recipient, donor in self.ties:
            self._check_tie(recipient, donor)
            if recipient in donor_of:
                raise PlanError(f"{recipient} is tied twice: to {donor_of[recipient]} and to {donor}. Keep one tie.")
            donor_of[recipient] = donor
        # no donor is itself a recipient, so that one step from a recipient leads to stored weights
        for recipient, donor in self.ties:
            if donor in donor_of:
                raise PlanError(
                    f"{recipient} takes its weights from {donor}, which is itself tied to {donor_of[donor]}. "
                    f"Tie it to {donor_of[donor]} directly."
                )
        if self.scale and Part.O not in self.layout.parts:
            raise PlanError("a scale belongs to ties that share o; this selection shares " + "".join(self.layout.parts))
        return self

    def _check_tie(self, recipient: HeadUnit, donor: HeadUnit) -> None:
        for unit in (recipient, donor):
            if not (0 <= unit.layer < self.layout.layers and 0 <= unit.group < self.layout.groups):
                raise PlanError(
                    f"{unit} does not exist: the model has {self.layout.layers} layers of {self.layout.groups} groups."
                )
        if donor.layer >= recipient.layer:
            raise PlanError(f"{recipient} takes its weights from {donor}; a donor must be in an earlier layer.")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that every tie of this selection shares."""
        return tuple(self.layout.parts)

    def touched(self) -> Iterator[Touched]:
        """The recipients' indices, borrowed from donors, and scaled where ties of `o` have scales; and the donors."""
        for part, place in self.layout.parts.items():
            for recipient, donor in self.ties:
                name = place.name(recipient.layer)
                donor_name = place.name(donor.layer)
                span = place.span(recipient.group)
                yield Touched(name, place.shape, place.axis, Borrowed(*span, donor_name, place.span(donor.group)[0]))
                yield Touched(donor_name, place.shape, place.axis)
                if self.scale and part is Part.O:
                    yield Touched(name, place.shape, place.axis, Scaled(*span))

    def added(self) -> Iterator[tuple[str, AddedTensor]]:
        """The scales of each output projection with scaled ties, filled with ones where nothing was fitted."""
        if not self.scale:
            return
        place = self.layout.parts[Part.O]
        recipients = Counter(tie.recipient.layer for tie in self.ties)
        for layer, count in recipients.items():
            weight = place.name(layer)
            yield scale_name(weight), AddedTensor(weight, (count * place.rows,), fill=1.0, same_type=False)

    @property
    def rounding(self) -> str | None:
        """The reason for other roundings: scales multiply a shared model's inputs and a stock model's weights."""
        return "scales of ties multiply inputs here, and weights there" if self.scale and self.ties else None

    def conflict(self, other: Section) -> str | None:
        """The conflict with another selection of the same part, which would have two donors."""
        if isinstance(other, Selection) and set(self.parts) & set(other.parts):
            return f"two selections share the same part: {', '.join((*other.parts, *self.parts))}."
        return None

    def units_given(self) -> set[HeadUnit]:
        """The recipients."""
        return {tie.recipient for tie in self.ties}

    def by_layer(self) -> dict[int, list[tuple[int, int, int]]]:
        """Recipients by layer, in order, each as (group, donor layer, donor group)."""
        ties_of: dict[int, list[tuple[int, int, int]]] = {}
        for tie in sorted(self.ties):
            ties_of.setdefault(tie.recipient.layer, []).append((tie.recipient.group, *tie.donor))
        return ties_of

    def describe(self) -> dict[str, Any]:
        """Counts, and every tie as four numbers, as plain data."""
        return {
            "kind": str(self.layout.kind),
            "parts": [str(part) for part in self.parts],
            "layers": self.layout.layers,
            "groups": self.layout.groups,
            "recipients": len(self.ties),
            "ratio": len(self.ties) / self.layout.units,
            "chosen": self.chosen.model_dump(mode="json"),
            "ties": [[*tie.recipient, *tie.donor] for tie in self.ties],
        }

    def picture(self, others: Collection[Section]) -> str:
        """Signs of all units, a line for each layer, with the donor of each recipient beside it."""
        layout = self.layout
        lenders = {tie.donor for tie in self.ties}
        by_layer = self.by_layer()
        # a unit that another section of the same grid takes whole has that section's sign
        grid = (layout.kind, layout.groups)
        same_grid = [section for section in others if (section.layout.kind, section.layout.groups) == grid]
        gone = {unit: section.sign for section in same_grid if section.takes_whole for unit in section.units_given()}
        width = len(str(layout.layers - 1))
        # one line a layer: its signs, then its ties
        lines = [self.title(f"{layout.kind}, parts {','.join(self.parts)}", len(self.ties), "units given up")]
        for layer in range(layout.layers):
            ties = by_layer.get(layer, [])
            given = {group for group, _, _ in ties}
            signs = "".join(
                self.sign
                if group in given
                else LENDS
                if (layer, group) in lenders
                else gone.get(HeadUnit(layer, group), KEPT)
                for group in range(layout.groups)
            )
            notes = "  ".join(f"{group}<-{donor_layer}.{donor_group}" for group, donor_layer, donor_group in ties)
            lines.append(f"  layer {layer:{width}}  {signs}  {notes}".rstrip())
        return "\n".join(lines)


def scale_name(weight_name: str) -> str:
    """The name of the tensor that scales the borrowed input channels of this output projection."""
    return weight_name.removesuffix("weight") + "tie_scale"


def _read_tie(item: Any) -> Tie:
    if isinstance(item, Tie):
        return item
    if not isinstance(item, list | tuple) or len(item) != 4 or not all(type(number) is int for number in item):
        raise PlanError(f"a tie is [layer, group, donor layer, donor group], four whole numbers; found {item!r:.100}.")
    recipient_layer, recipient_group, donor_layer, donor_group = item
    return Tie(HeadUnit(recipient_layer, recipient_group), HeadUnit(donor_layer, donor_group))
