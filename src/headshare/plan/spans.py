"""Sets of indices as spans and as short text: "3,7-9,15" is 3, 7, 8, 9 and 15. The text is untrusted.

Also groups of units by layer, as they stand in a plan's JSON: a text for each layer.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from headshare.errors import PlanError
from headshare.plan.layout import Layout

MAX_ATTENTION_UNITS = 100_000

_ITEM = re.compile(r"(0|[1-9][0-9]{0,8})(?:-([1-9][0-9]{0,8}))?", re.ASCII)


class Span(NamedTuple):
    """A run of indices [start, stop)."""

    start: int
    stop: int


Spans = tuple[Span, ...]


def read_indices(text: str, below: int) -> Spans:
    """The spans that a text names, in order, neighbours joined; the inverse of `write_indices`.

    Raises:
        PlanError: if it is not of that form, not in ascending order, or names an index of `below` or more.
    """
    longest = (below + 1) * (len(str(below)) + 1)
    if len(text) > longest:
        raise PlanError(f"a list of indices below {below} has {len(text)} characters; it needs at most {longest}.")
    return joined(_read_items(text, below))


def _read_items(text: str, below: int) -> list[Span]:
    spans: list[Span] = []
    for item in text.split(","):
        matched = _ITEM.fullmatch(item)
        if matched is None:
            raise PlanError(f"indices are written like 3,7-9,15; found {item!r:.50}.")
        first = int(matched[1])
        last = first if matched[2] is None else int(matched[2])
        if last < first or (spans and first < spans[-1].stop):
            raise PlanError(f"indices must be in ascending order, each once; found {item} after {spans[-1:]}.")
        if last >= below:
            raise PlanError(f"the index {last} does not exist: there are {below}, counted from 0.")
        spans.append(Span(first, last + 1))
    return spans


def write_indices(spans: Spans) -> str:
    """The shortest text for these spans."""
    return ",".join(str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in joined(spans))


def spans_of(indices: Iterable[int]) -> Spans:
    """The spans of these whole numbers, which may be in any order."""
    return joined([Span(index, index + 1) for index in sorted(set(indices))])


def joined(spans: Iterable[tuple[int, int]]) -> Spans:
    """Spans in ascending order, neighbours joined, and those that overlap."""
    merged: list[Span] = []
    for start, stop in spans:
        if merged and merged[-1].stop >= start:
            merged[-1] = Span(merged[-1].start, max(stop, merged[-1].stop))
        else:
            merged.append(Span(start, stop))
    return tuple(merged)


def length(spans: Iterable[tuple[int, int]]) -> int:
    """The count of indices in spans that do not overlap."""
    return sum(stop - start for start, stop in spans)


# ---- groups of units by layer


def read_layer(key: Any, layout: Layout) -> int:
    """The layer that a key of a plan's JSON names.

    Raises:
        PlanError: if the layout has no such layer.
    """
    layer = int(key) if isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,5}", key, re.ASCII) else key
    if type(layer) is not int or not 0 <= layer < layout.layers:
        raise PlanError(f"the plan names a layer {key!r:.50}; the model has {layout.layers}, from 0 on.")
    return layer


def read_groups(value: Any, layout: Layout) -> dict[int, Spans]:
    """Groups by layer, in order. Layers without groups are left out."""
    if not isinstance(value, dict) or len(value) > layout.layers:
        raise PlanError(f"units are listed by layer, some of {layout.layers}, as indices; found {value!r:.50}.")
    groups = {read_layer(key, layout): _read_spans(indices, layout) for key, indices in value.items()}
    return {layer: groups[layer] for layer in sorted(groups) if groups[layer]}


def write_groups(groups: dict[int, Spans]) -> dict[str, str]:
    """Groups by layer as they stand in a plan's JSON: a text for each layer."""
    return {str(layer): write_indices(spans) for layer, spans in groups.items()}


def flat(spans: Spans) -> list[int]:
    """All indices of these spans, in order."""
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
