"""The share plan: which unit takes its weights from which, which are removed or read out by a product of two small
matrices, and how that was chosen. Holds no weight.

A plan with a chain, a cycle or an index out of range cannot be constructed; so nothing that is handed one asks.
A plan read from a checkpoint or a file is untrusted and comes through the same door: `SharePlan.from_json`.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from headshare.errors import PlanError
from headshare.files.atomic import write_whole
from headshare.plan.layout import MAX_UNITS, Layout, Place, check_places, check_tensors
from headshare.plan.spans import Span, Spans, length, read_indices, spans_of, write_indices
from headshare.plan.units import ATTENTION_PARTS, FFN_PARTS, HeadUnit, Kind, Part, Tie

FORMAT: Literal[1] = 1
MAX_JSON_BYTES = 64 * 2**20
MAX_NAME = 200
MAX_ATTENTION_UNITS = 100_000


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
        return _read_groups(value, layout) if isinstance(layout, Layout) else {}  # which is an error of its own

    @field_serializer("removed")
    def _write_removed(self, removed: dict[int, Spans]) -> dict[str, str]:
        return _write_groups(removed)

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
        return _flat(self.removed.get(layer, ()))

    def takes_from(self, unit: HeadUnit, layout: Layout) -> bool:
        """Whether some of this unit is removed. `layout` is the grid that the unit is in, perhaps a coarser one."""
        each = self.layout.groups // layout.groups
        return self._touches(unit.layer, unit.group * each, (unit.group + 1) * each)

    def _touches(self, layer: int, start: int, stop: int) -> bool:
        spans = self.removed.get(layer, ())
        at = bisect_left(spans, start, key=lambda span: span.stop - 1)
        return at < len(spans) and spans[at].start < stop


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
        return _read_groups(value, layout) if isinstance(layout, Layout) else {}  # which is an error of its own

    @field_validator("ranks", mode="before")
    @classmethod
    def _read_ranks(cls, value: Any, info: Any) -> Any:
        """Accept {layer: [rank, ...]}, one for each unit of that layer."""
        layout, units = info.data.get("layout"), info.data.get("units")
        if not isinstance(layout, Layout) or units is None:
            return {}  # which is an error of its own
        if not isinstance(value, dict) or len(value) > layout.layers:
            raise PlanError(f"ranks must map some of {layout.layers} layers to lists; found {value!r:.50}.")
        found = {_read_layer(key, layout): ranks for key, ranks in value.items()}
        place = layout.parts[Part.O]
        return {
            layer: _checked_ranks(found.get(layer, ()), layer, length(units.get(layer, ())), place)
            for layer in sorted({*found, *units})
            if layer in units or found[layer]
        }

    @field_serializer("units")
    def _write_units(self, units: dict[int, Spans]) -> dict[str, str]:
        return _write_groups(units)

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
        return list(zip(_flat(self.units.get(layer, ())), self.ranks.get(layer, ()), strict=True))


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


def _read_layer(key: Any, layout: Layout) -> int:
    layer = int(key) if isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,5}", key, re.ASCII) else key
    if type(layer) is not int or not 0 <= layer < layout.layers:
        raise PlanError(f"the plan names a layer {key!r:.50}; the model has {layout.layers}, from 0 on.")
    return layer


def _read_groups(value: Any, layout: Layout) -> dict[int, Spans]:
    """Groups by layer, in order, without layers of none."""
    if not isinstance(value, dict) or len(value) > layout.layers:
        raise PlanError(f"units are listed by layer, some of {layout.layers}, as indices; found {value!r:.50}.")
    found = {_read_layer(key, layout): _read_spans(indices, layout) for key, indices in value.items()}
    return {layer: found[layer] for layer in sorted(found) if found[layer]}


def _write_groups(groups: dict[int, Spans]) -> dict[str, str]:
    return {str(layer): write_indices(spans) for layer, spans in groups.items()}


def _flat(spans: Spans) -> list[int]:
    return [index for start, stop in spans for index in range(start, stop)]


def _read_spans(value: Any, layout: Layout) -> Spans:
    if isinstance(value, str):
        return read_indices(value, layout.groups)
    if not isinstance(value, Collection) or len(value) > layout.groups:
        raise PlanError(f"groups are written like 3,7-9,15; found {value!r:.50}.")
    if value and all(isinstance(item, Span) for item in value):
        return read_indices(write_indices(tuple(value)), layout.groups)
    if not all(type(index) is int and 0 <= index < layout.groups for index in value):
        raise PlanError(f"groups are whole numbers below {layout.groups}; found {value!r:.50}.")
    return spans_of(value)


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
