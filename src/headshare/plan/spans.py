"""Sets of indices as spans and as short text: "3,7-9,15" is 3, 7, 8, 9 and 15. The text is untrusted."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from headshare.errors import PlanError

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
