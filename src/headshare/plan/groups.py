"""Groups of units by layer, as they stand in a plan's JSON."""

import re
from collections.abc import Collection
from typing import Any

from headshare.errors import PlanError
from headshare.plan.layout import Layout
from headshare.plan.spans import Span, Spans, read_indices, spans_of, write_indices

MAX_ATTENTION_UNITS = 100_000


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
