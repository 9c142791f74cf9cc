"""Random plans as somebody would write them down by hand, with the shapes of their tensors."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from headshare.plan.plan import SharePlan

Weights = dict[str, np.ndarray]
Json = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A plan as somebody would write it down by hand, and how its tensors look."""

    selections: list[Json]
    shapes: dict[str, tuple[int, ...]]

    @property
    def plan(self) -> SharePlan:
        return plan_of(*self.selections)


def plan_of(*selections: Json) -> SharePlan:
    return SharePlan.from_json(json.dumps({"format": 1, "model_type": "x", "selections": selections}))


@st.composite
def flat_ties(draw: st.DrawFn, layers: int, groups: int) -> list[list[int]]:
    recipients = {
        (layer, group) for layer in range(1, layers) for group in range(groups) if draw(st.integers(0, 2)) > 0
    }
    ties = []
    for layer, group in draw(st.permutations(sorted(recipients))):
        kept = [(n, g) for n in range(layer) for g in range(groups) if (n, g) not in recipients]
        ties.append([layer, group, *draw(st.sampled_from(kept))])
    return ties


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Separate, stacked or interleaved parts, along rows or columns, with numbers beside them that none owns."""
    layers, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    parts = draw(st.lists(st.sampled_from("qkvo"), min_size=1, max_size=3, unique=True))
    fusion = draw(st.sampled_from(["separate", "stacked", "interleaved"]))
    axis, width, before, after = (draw(st.integers(0, most)) for most in (1, 3, 2, 2))
    rows = {part: draw(st.integers(1, 3)) for part in parts}
    places, shapes, offset = {}, {}, 0
    for part in parts:
        step = sum(rows.values()) if fusion == "interleaved" else rows[part]
        start = before + (0 if fusion == "separate" else offset)
        size = before + after + groups * (rows[part] if fusion == "separate" else sum(rows.values()))
        offset += rows[part] * (groups if fusion == "stacked" else 1)
        shape = (size, width + 1) if axis == 0 else (width + 1, size)
        tensor = "h.{layer}." + (part if fusion == "separate" else "all") + ".weight"
        places[part] = {"tensor": tensor, "axis": axis, "shape": shape, "start": start, "step": step} | {
            "rows": rows[part]
        }
        shapes |= {tensor.replace("{layer}", str(layer)): shape for layer in range(layers)}
    cut = draw(st.integers(1, len(parts)))
    selections = []
    for some in filter(None, (parts[:cut], parts[cut:])):
        layout = {
            "kind": "attention",
            "layers": layers,
            "groups": groups,
            "parts": {part: places[part] for part in some},
        }
        scale = "o" in some and draw(st.booleans())
        selections.append({"layout": layout, "ties": draw(flat_ties(layers, groups)), "scale": scale})
    shapes |= {"embed.weight": (5, 2), "norm.weight": (3,), "h.0.number": ()}
    return Example(selections, shapes)
