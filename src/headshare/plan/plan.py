"""The share plan: which units are tied, removed or low-rank, and how they were chosen. It holds no weight.

A plan with a chain, a cycle or an index out of range cannot be constructed, so code that is given a plan need not
check it. A plan from a checkpoint or a file is untrusted and is checked in the same way, by `SharePlan.from_json`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from itertools import combinations, groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_serializer,
    model_validator,
)

from headshare.defaults import MAX_NAME
from headshare.errors import PlanError
from headshare.files.atomic import write_whole
from headshare.files.untrusted import first_error, foreign, is_file, parse_json, read_bytes
from headshare.plan.bits import PlannedBits
from headshare.plan.copies.identical import IdenticalTensors
from headshare.plan.layout import Layout, check_places, check_tensors
from headshare.plan.low_rank import LowRankUnits
from headshare.plan.narrow_values import NarrowValues
from headshare.plan.removal import Removal
from headshare.plan.section import SECTION_KINDS, AddedTensor, Borrowed, Section
from headshare.plan.tensors import (
    TensorPlan,
    added_tensors,
    bias_name,
    bias_plans,
    check_copies,
    check_ranges,
    reduced_tensors,
    tensor_plans,
)
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Sublayer
from headshare.short import short

FORMAT: Literal[1] = 1
MAX_JSON_BYTES = 64 * 2**20
MAX_SECTIONS = 16


class SharePlan(BaseModel):
    """The plan that says which units are tied, removed or low-rank, and how they were chosen.

    It is frozen and comparable.

    Raises:
        PlanError: on any cycle, chain, repeated recipient, index out of range, later donor or overlapping part; where
            a removed unit is also tied; or where a low-rank one is removed, or tied in its layer's output projection.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    model_type: Annotated[str, Field(max_length=MAX_NAME)] = "unknown"
    selections: Annotated[tuple[Selection, ...], Field(max_length=len(Part))] = ()
    removals: Annotated[tuple[Removal, ...], Field(max_length=len(Sublayer))] = ()
    factored: Annotated[tuple[LowRankUnits, ...], Field(max_length=len(Sublayer))] = ()
    # narrow values, and sections of kinds that were registered elsewhere; in JSON each kind has a key of its own
    others: Annotated[tuple[SerializeAsAny[Section], ...], Field(max_length=MAX_SECTIONS)] = ()
    bits: PlannedBits | None = None

    def __repr__(self) -> str:
        return short(self, self.model_type, *(section.told() for section in self.sections))

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """The plan as a notebook shows it."""
        from headshare.plan.describe import as_html

        return as_html(self)

    @model_validator(mode="before")
    @classmethod
    def _read_others(cls, data: Any) -> Any:
        """Gather the sections of registered kinds from their keys."""
        own = set(cls.model_fields)
        keys = [key for key in SECTION_KINDS if key not in own]
        if not isinstance(data, dict) or not any(key in data for key in keys):
            return data
        rest = {key: value for key, value in data.items() if key not in keys}
        read = list(rest.get("others", ()))
        for key in keys:
            listed = data.get(key, ())
            if not isinstance(listed, list | tuple) or len(listed) > MAX_SECTIONS:
                raise PlanError(f"{key} should be a list of at most {MAX_SECTIONS} sections; found {listed!r:.50}.")
            read += [SECTION_KINDS[key].model_validate(section) for section in listed]
        return {**rest, "others": tuple(read)}

    @model_validator(mode="after")
    def _check(self) -> "SharePlan":
        earlier: list[Section] = []
        for _, of_one_kind in groupby(self.sections, key=type):
            alike = list(of_one_kind)
            # sections of one kind against each other
            for before, after in combinations(alike, 2):
                _refuse(after.conflict(before))
            check_places([section.layout for section in alike])
            # then against all kinds before: they agree about each tensor, and claim no unit twice
            check_tensors([section.layout for section in (*alike, *reversed(earlier))])
            for section in alike:
                for other in reversed(earlier):
                    _refuse(section.conflict(other) or other.conflict(section))
            earlier += alike
        if self.others:
            check_ranges(self.sections)
            check_copies(self.copies, self.tensors, self.biases)
        return self

    @model_serializer(mode="wrap")
    def _write(self, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """The plan as JSON data: keys that hold something, and `selections` always: older plans keep their digests."""
        data: dict[str, Any] = handler(self)
        others = zip(self.others, data.pop("others", ()), strict=True)
        for key in ("removals", "factored", "bits"):
            if not getattr(self, key):
                data.pop(key, None)
        for section, written in others:
            data.setdefault(section.key, []).append(written)
        return data

    @classmethod
    def of_sections(cls, sections: Iterable[Section], model_type: str = "unknown") -> "SharePlan":
        """The plan of these sections.

        Raises:
            PlanError: if two sections contradict each other.
        """
        own = {"selections": Selection, "removals": Removal, "factored": LowRankUnits}
        listed = list(sections)
        by_key = {key: tuple(section for section in listed if isinstance(section, kind)) for key, kind in own.items()}
        others = tuple(section for section in listed if not isinstance(section, tuple(own.values())))
        return cls.model_validate({"model_type": model_type, **by_key, "others": others})

    @property
    def sections(self) -> tuple[Section, ...]:
        """All sections of the plan, in order: ties, removals, low-rank units, and kinds registered elsewhere."""
        return (*self.selections, *self.removals, *self.factored, *self.others)

    # what the plan means for each tensor is asked for many times while one model loads, and worked out once

    @cached_property
    def tensors(self) -> Mapping[str, TensorPlan]:
        """Tensor plans of all tensors that the plan changes or borrows from, by name, in dense coordinates."""
        return tensor_plans(self.sections)

    @cached_property
    def biases(self) -> Mapping[str, TensorPlan]:
        """Tensor plans of the biases that lose numbers, by name. Not every model has them."""
        return bias_plans(self.sections)

    @cached_property
    def reduced_tensors(self) -> Mapping[str, TensorPlan]:
        """Tensor plans of all tensors that lend units or borrow some, by name, in reduced coordinates.

        Whole copies are not among them, nor tensors that lend to these alone.
        """
        return reduced_tensors({name: tensor for name, tensor in self.tensors.items() if name not in self.copies})

    @cached_property
    def copies(self) -> Mapping[str, str]:
        """The tensors that are another tensor whole, by name, each with the name of the one that is stored."""
        return dict(copy for section in self.sections for copy in section.copies())

    @cached_property
    def added_tensors(self) -> Mapping[str, AddedTensor]:
        """The tensors that the plan adds to those of a dense model, by name."""
        return added_tensors(self.sections)

    @property
    def identical(self) -> IdenticalTensors | None:
        """The tensors that are stored once under several names, or None."""
        return next((section for section in self.others if isinstance(section, IdenticalTensors)), None)

    @property
    def narrow_values(self) -> NarrowValues | None:
        """The layers whose values are narrower than their keys, or None."""
        return next((section for section in self.others if isinstance(section, NarrowValues)), None)

    @cached_property
    def rewritten(self) -> frozenset[str]:
        """The names of the weights, and of biases beside them, whose kept numbers are not the dense model's."""
        weights = {name for section in self.sections for name in section.rewritten()}
        return frozenset(weights | {bias for bias in map(bias_name, weights) if bias in self.biases})

    @property
    def ties(self) -> int:
        """The count of ties, over all selections."""
        return sum(len(selection.ties) for selection in self.selections)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The grids of all sections, those of ties last."""
        first = (section.layout for section in self.sections[len(self.selections) :])
        return (*first, *(selection.layout for selection in self.selections))

    def removed(self, kind: Sublayer) -> int:
        """The count of units of this sublayer that are removed; in the feed-forward these are neurons."""
        return sum(removal.count for removal in self.removals if removal.layout.kind is kind)

    def may_lend(self, unit: HeadUnit, selection: Selection) -> bool:
        """True if the selection may tie a unit to this one: no section bars it."""
        return not any(section.bars(unit, selection.layout) for section in self.sections)

    def first_layer(self) -> int | None:
        """The first layer that computes something else than the dense model's; None where none does."""
        layers = (section.first_layer() for section in self.sections)
        return min((layer for layer in layers if layer is not None), default=None)

    @property
    def no_stock_equivalent(self) -> str | None:
        """The reason why no stock model computes the same as a model of this plan; None where one does."""
        return next((why for section in self.sections if (why := section.no_stock_equivalent)), None)

    @property
    def only_ties(self) -> bool:
        """True if the plan does nothing but tie units as they are, without scales."""
        ranges = (touched.range for section in self.sections for touched in section.touched())
        changed = any(next(section.modules(), None) for section in self.sections)
        return not changed and all(span is None or isinstance(span, Borrowed) for span in ranges)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as one line of JSON with sorted keys; the inverse of `from_json`."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> "SharePlan":
        """Read and check a plan that somebody else wrote.

        Raises:
            PlanError: if it is not JSON, not of this format, or not a valid plan.
        """
        if len(text) > MAX_JSON_BYTES:
            raise PlanError(f"the plan is {len(text)} bytes of JSON; at most {MAX_JSON_BYTES} are read.")
        return cls.from_dict(parse_json(text, "the plan", PlanError))

    @classmethod
    def from_dict(cls, data: Any) -> "SharePlan":
        """Check a plan that was already parsed, as in a checkpoint's config.json."""
        if not isinstance(data, dict):
            raise PlanError(f"the plan should be a JSON object, found {type(data).__name__}.")
        check_format("the plan", data.get("format"))
        with foreign("the plan is not valid", PlanError):
            try:
                return cls.model_validate(data)
            except ValidationError as error:
                where, why = first_error(error)
                raise PlanError(f"the plan is not valid at {where:.200}: {why:.300}.") from None

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
        if not is_file(path):
            raise PlanError(
                f"there is no plan file at {path}. Make one with: headshare plan --from-scores scores.safetensors"
            )
        return cls.from_json(read_bytes(path, MAX_JSON_BYTES, PlanError))


def check_format(what: str, version: Any) -> None:
    """Raise PlanError unless this is the format that this headshare reads."""
    if version != FORMAT:
        raise PlanError(f"{what} has format {version!r:.50}; this headshare reads format {FORMAT}. Upgrade headshare.")


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise PlanError(reason)


def _readable(data: dict[str, Any]) -> str:
    """Indented JSON in which each list of numbers stands on one line."""
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
