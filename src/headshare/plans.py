"""The share plan: which unit takes its weights from which, and how that was chosen. Holds no weight.

A plan with a chain, a cycle or an index out of range cannot be constructed; so nothing that is handed one asks.
A plan read from a checkpoint or a file is untrusted and comes through the same door: `SharePlan.from_json`.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from headshare.errors import PlanError
from headshare.files import write_whole
from headshare.layout import MAX_UNITS, Layout, check_places
from headshare.units import HeadUnit, Part, Tie

FORMAT: Literal[1] = 1
MAX_JSON_BYTES = 64 * 2**20
MAX_NAME = 200


class Choice(BaseModel):
    """How a selection's ties were chosen; for people and for reproduction, read by no code."""

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


class SharePlan(BaseModel):
    """Layout, ties, and how they were chosen. Frozen, comparable, printable; JSON is its only other form.

    Raises:
        PlanError: on any cycle, chain, repeated recipient, index out of range, later donor or overlapping part.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    model_type: Annotated[str, Field(max_length=MAX_NAME)] = "unknown"
    selections: Annotated[tuple[Selection, ...], Field(max_length=len(Part))] = ()

    @model_validator(mode="after")
    def _check(self) -> "SharePlan":
        parts = [part for selection in self.selections for part in selection.parts]
        if len(parts) != len(set(parts)):
            raise PlanError(f"two selections share the same part: {', '.join(parts)}.")
        check_places([selection.layout for selection in self.selections])
        return self

    @property
    def ties(self) -> int:
        """How many ties there are, over all selections."""
        return sum(len(selection.ties) for selection in self.selections)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as one line of JSON, keys sorted; the inverse of `from_json`."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> "SharePlan":
        """Read and check a plan that somebody else wrote.

        Raises:
            PlanError: if it is not JSON, not of this format, or not a valid plan.
        """
        if len(text) > MAX_JSON_BYTES:
            raise PlanError(f"the plan is {len(text)} bytes of JSON; at most {MAX_JSON_BYTES} are read.")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is not JSON: {error}.") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> "SharePlan":
        """Check a plan that was already parsed, as in a checkpoint's config.json."""
        if not isinstance(data, dict):
            raise PlanError(f"the plan should be a JSON object, found {type(data).__name__}.")
        if data.get("format") != FORMAT:
            raise PlanError(f"the plan has format {data.get('format')!r}; this headshare reads format {FORMAT}.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(step) for step in first["loc"])
            raise PlanError(f"the plan is not valid at {where}: {first['msg']}.") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as indented JSON, one tie a line.

        Raises:
            OutputError: if it cannot be written; nothing is left behind.
        """
        write_whole(path, _readable(self.model_dump(mode="json")).encode())

    @classmethod
    def load(cls, path: str | Path) -> "SharePlan":
        """Read a plan from a file; the inverse of `save`.

        Raises:
            PlanError: if the file is missing or is not a valid plan.
        """
        path = Path(path)
        if not path.is_file():
            raise PlanError(f"there is no plan file at {path}. Make one with: headshare plan scores.safetensors")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise PlanError(f"{path} is {path.stat().st_size} bytes; a plan has at most {MAX_JSON_BYTES}.")
        return cls.from_json(path.read_bytes())


def _read_tie(item: Any) -> Tie:
    if isinstance(item, Tie):
        return item
    if not isinstance(item, list | tuple) or len(item) != 4 or not all(type(number) is int for number in item):
        raise PlanError(f"a tie is [layer, group, donor layer, donor group], four whole numbers; found {item!r:.100}.")
    recipient_layer, recipient_group, donor_layer, donor_group = item
    return Tie(HeadUnit(recipient_layer, recipient_group), HeadUnit(donor_layer, donor_group))


def _readable(data: dict[str, Any]) -> str:
    text = json.dumps(data, indent=1, sort_keys=True)
    lines: list[str] = []
    depth = 0
    for line in text.split("\n"):
        stripped = line.strip()
        number = stripped.rstrip(",").lstrip("-").isdigit() or stripped in ("[", "]", "],")
        if depth and number:
            lines[-1] += stripped + (" " if stripped.endswith(",") and stripped[:-1].isdigit() else "")
            depth += stripped.count("[") - stripped.count("]")
        elif stripped == "[":
            lines.append(line)
            depth = 1
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"
