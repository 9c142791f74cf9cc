"""Ties: units that take their weights from donors in earlier layers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from headshare.errors import PlanError
from headshare.plan.layout import MAX_UNITS, Layout
from headshare.plan.units import HeadUnit, Part, Tie

MAX_NAME = 200


class Choice(BaseModel):
    """How ties, or removed or factored units, were chosen; for people and for reproduction, read by no code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: Annotated[str, Field(max_length=MAX_NAME)] = "given"
    mode: Annotated[str, Field(max_length=MAX_NAME)] = "given"
    ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    scores_digest: Annotated[str, Field(max_length=MAX_NAME)] | None = None


class Selection(BaseModel):
    """Ties of one grid of units, each sharing the same parts.

    `kind` says what the recipient takes; "weights" is the only kind so far. With `scale`, each channel of the
    recipient's attention output carries one number, applied before W_o.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        most = layout.units if isinstance(layout, Layout) else MAX_UNITS
        if len(value) > most:
            raise PlanError(f"the plan lists {len(value)} ties for {most} units.")
        return tuple(_read_tie(item) for item in value)

    @field_serializer("ties")
    def _write_ties(self, ties: tuple[Tie, ...]) -> list[list[int]]:
        return [[*tie.recipient, *tie.donor] for tie in ties]

    @model_validator(mode="after")
    def _check(self) -> "Selection":
        donor_of: dict[HeadUnit, HeadUnit] = {}
        for recipient, donor in self.ties:
            self._check_tie(recipient, donor)
            if recipient in donor_of:
                raise PlanError(f"{recipient} is tied twice: to {donor_of[recipient]} and to {donor}. Keep one tie.")
            donor_of[recipient] = donor
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


def _read_tie(item: Any) -> Tie:
    if isinstance(item, Tie):
        return item
    if not isinstance(item, list | tuple) or len(item) != 4 or not all(type(number) is int for number in item):
        raise PlanError(f"a tie is [layer, group, donor layer, donor group], four whole numbers; found {item!r:.100}.")
    recipient_layer, recipient_group, donor_layer, donor_group = item
    return Tie(HeadUnit(recipient_layer, recipient_group), HeadUnit(donor_layer, donor_group))
