"""The share plan: which unit takes its weights from which, which are removed or read out by a product of two small
matrices, and how that was chosen. Holds no weight.

A plan with a chain, a cycle or an index out of range cannot be constructed; so nothing that is handed one asks.
A plan read from a checkpoint or a file is untrusted and comes through the same door: `SharePlan.from_json`.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from headshare.errors import PlanError
from headshare.files.atomic import write_whole
from headshare.plan.layout import Layout, Place, check_places, check_tensors
from headshare.plan.low_rank import Factored
from headshare.plan.removal import Removal
from headshare.plan.ties import MAX_NAME, Selection
from headshare.plan.units import HeadUnit, Kind, Part

FORMAT: Literal[1] = 1
MAX_JSON_BYTES = 64 * 2**20


class SharePlan(BaseModel):
    """Layout, ties, and how they were chosen. Frozen, comparable, printable; JSON is its only other form.

    Raises:
        PlanError: on any cycle, chain, repeated recipient, index out of range, later donor or overlapping part; and
            where a removed unit is also tied, or a factored one is removed or has a tie in its layer's readout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    model_type: Annotated[str, Field(max_length=MAX_NAME)] = "unknown"
    selections: Annotated[tuple[Selection, ...], Field(max_length=len(Part))] = ()
    removals: Annotated[tuple[Removal, ...], Field(max_length=len(Kind))] = ()
    factored: Annotated[tuple[Factored, ...], Field(max_length=len(Kind))] = ()

    @model_validator(mode="after")
    def _check(self) -> "SharePlan":
        parts = [part for selection in self.selections for part in selection.parts]
        if len(parts) != len(set(parts)):
            raise PlanError(f"two selections share the same part: {', '.join(parts)}.")
        check_places([selection.layout for selection in self.selections])
        if self.removals:
            self._check_removals()
        if self.factored:
            self._check_factored()
        return self

    def _check_removals(self) -> None:
        if len({removal.layout.kind for removal in self.removals}) < len(self.removals):
            raise PlanError("two removals are of the same kind of unit. Make them one.")
        removed = [removal.layout for removal in self.removals]
        check_places(removed)
        check_tensors([*removed, *(selection.layout for selection in self.selections)])
        for removal in self.removals:
            for selection in self.selections:
                _check_apart(selection, removal)

    def _check_factored(self) -> None:
        if len(self.factored) > 1:
            raise PlanError("a plan lists factored attention units twice. Make them one.")
        check_tensors(self.layouts)
        for one in self.factored:
            for removal in self.removals:
                _check_not_removed(one, removal)
            for selection in self.selections:
                _check_readout_not_tied(one, selection)

    @model_serializer(mode="wrap")
    def _write(self, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """Without `removals` or `factored` where there are none: plans of before there were any keep their digests."""
        data: dict[str, Any] = handler(self)
        for key in ("removals", "factored"):
            if not getattr(self, key):
                data.pop(key, None)
        return data

    @property
    def ties(self) -> int:
        """How many ties there are, over all selections."""
        return sum(len(selection.ties) for selection in self.selections)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The grids of all removals, factored units and selections."""
        own = (*(removal.layout for removal in self.removals), *(one.layout for one in self.factored))
        return (*own, *(selection.layout for selection in self.selections))

    def removed(self, kind: Kind) -> int:
        """How many units of this kind are removed, over all layers; in the feed-forward these are neurons."""
        return sum(removal.count for removal in self.removals if removal.layout.kind is kind)

    def loses_some_of(self, unit: HeadUnit, selection: Selection) -> bool:
        """Whether this unit of the selection's grid, or a neuron of it, is removed."""
        same = (removal for removal in self.removals if removal.layout.kind is selection.layout.kind)
        return any(removal.takes_from(unit, selection.layout) for removal in same)

    def may_lend(self, unit: HeadUnit, selection: Selection) -> bool:
        """Whether a tie to this unit of the selection's grid could be: nothing of it is removed, and the parts that the
        selection shares are not in a readout with factored units."""
        tensors = {place.tensor for place in selection.layout.parts.values()}
        mixed = any(one.place.tensor in tensors and unit.layer in one.units for one in self.factored)
        return not mixed and not self.loses_some_of(unit, selection)

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
        check_format("the plan", data.get("format"))
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


def check_format(what: str, found: Any) -> None:
    """Raise PlanError unless this is the format that this headshare reads."""
    if found != FORMAT:
        raise PlanError(f"{what} has format {found!r:.50}; this headshare reads format {FORMAT}. Upgrade headshare.")


def _check_apart(selection: Selection, removal: Removal) -> None:
    """Raise PlanError if a unit that is tied is removed, or if the two see the same weights in different ways."""
    theirs, ours = selection.layout, removal.layout
    if theirs.kind is not ours.kind:
        shared = {place.tensor for place in theirs.parts.values()} & {place.tensor for place in ours.parts.values()}
        if shared:
            raise PlanError(f"{min(shared)} holds units of two kinds; from such a tensor none can be removed.")
        return
    each, rest = divmod(ours.groups, theirs.groups)
    agree = all(_is_cut_finer(place, ours.parts.get(part), each) for part, place in theirs.parts.items())
    if rest or theirs.layers != ours.layers or not agree:
        raise PlanError(f"a selection and a removal see the {ours.kind} units of this model in different ways.")
    for tie in selection.ties:
        for unit in tie:
            if removal.takes_from(unit, theirs):
                what = f"{unit} is" if each == 1 else f"neurons of {unit} are"
                raise PlanError(f"{tie}, but {what} removed. Remove it or tie it, not both.")


def _check_not_removed(factored: Factored, removal: Removal) -> None:
    """Raise PlanError if a factored unit is removed, or if the two see the same weights in different ways."""
    ours, theirs = factored.layout, removal.layout
    if theirs.kind is not ours.kind:
        if any(place.tensor == factored.place.tensor for place in theirs.parts.values()):
            raise PlanError(f"{factored.place.tensor} holds units of two kinds; in such a tensor none can be factored.")
        return
    if (theirs.layers, theirs.groups, theirs.parts[Part.O]) != (ours.layers, ours.groups, factored.place):
        raise PlanError("a removal and factored units see the attention units of this model in different ways.")
    for layer in factored.units:
        both = {group for group, _ in factored.ranked(layer)} & set(removal.indices(layer))
        if both:
            raise PlanError(f"{HeadUnit(layer, min(both))} is both factored and removed. Make it one of them.")


def _check_readout_not_tied(factored: Factored, selection: Selection) -> None:
    """Raise PlanError if a readout with factored units also gives or takes columns."""
    if all(place.tensor != factored.place.tensor for place in selection.layout.parts.values()):
        return
    for tie in selection.ties:
        for unit in tie:
            if unit.layer in factored.units:
                raise PlanError(
                    f"{tie}, also in {factored.place.name(unit.layer)}, which has factored units: in one layer's "
                    "readout, ties and factored units do not mix. Tie q, k and v alone there."
                )


def _is_cut_finer(coarse: Place, fine: Place | None, each: int) -> bool:
    """Whether the units of one place are those of the other, `each` of them together."""
    whole = None if fine is None else {"rows": fine.rows * each, "step": fine.step * each}
    return (
        whole is not None
        and fine is not None
        and coarse == fine.model_copy(update=whole)
        and (each == 1 or fine.step == fine.rows)
    )


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
