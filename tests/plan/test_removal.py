"""Removals in a plan: read as they were written, hostile ones refused; indices as text, and coordinates."""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headshare.errors import PlanError
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.section import Borrowed
from headshare.plan.spans import read_indices, spans_of, write_indices
from headshare.plan.tensors import TensorPlan

# ---- the plan

ROWS = {"q": 4, "k": 2, "v": 2, "o": 4}


def small(kind: str = "attention", **changes: Any) -> dict[str, Any]:
    """A plan of 3 layers x 4 groups, as JSON, with a removal and no tie."""
    names = {"attention": ROWS, "ffn": {"gate": 1, "up": 1, "down": 1}}[kind]
    parts = {}
    for part, rows in names.items():
        axis = int(part in ("o", "down"))
        shape = [8, 4 * rows] if axis else [4 * rows, 8]
        place = {"tensor": f"h.{{layer}}.{part}.weight", "axis": axis, "shape": shape, "start": 0, "step": rows}
        parts[part] = {**place, "rows": rows}
    layout = {"kind": kind, "layers": 3, "groups": 4, "parts": parts}
    removal = {"layout": layout, "removed": {"0": "1", "2": "0-2"}, **changes}
    return {"format": 1, "model_type": "x", "selections": [], "removals": [removal]}


def with_ties(plan: dict[str, Any], *ties: list[int], **changes: Any) -> dict[str, Any]:
    layout = copy.deepcopy(plan["removals"][0]["layout"])
    return {**plan, "selections": [{"layout": {**layout, **changes}, "ties": list(ties)}]}


def test_a_plan_without_removals_is_written_as_before_there_were_any() -> None:
    def place(part: str, size: int, rows: int) -> dict[str, Any]:
        shape = [size, 8]
        return {
            "tensor": f"h.{{layer}}.{part}.weight",
            "axis": 0,
            "shape": shape,
            "start": 0,
            "step": rows,
            "rows": rows,
        }

    parts = {"q": place("q", 8, 4), "k": place("k", 4, 2)}
    layout = {"kind": "attention", "layers": 3, "groups": 2, "parts": parts}
    plan = SharePlan.from_dict(
        {"format": 1, "model_type": "x", "selections": [{"layout": layout, "ties": [[1, 0, 0, 1], [2, 1, 0, 0]]}]}
    )
    assert plan.digest == "215a03e023cd9ace1c3442b0ed57221df451449b6c43eec64c0b08cc786dfd40"
    assert "removals" not in plan.model_dump(mode="json")
    assert SharePlan.from_json(plan.to_json()) == plan


def test_a_plan_with_removals_is_read_as_it_was_written() -> None:
    plan = SharePlan.from_dict(small())
    assert plan.model_dump(mode="json")["removals"][0]["removed"] == {"0": "1", "2": "0-2"}
    assert SharePlan.from_json(plan.to_json()) == plan
    removal = plan.removals[0]
    assert (removal.count, removal.indices(2), removal.indices(1)) == (4, [0, 1, 2], [])
    again = Removal(layout=removal.layout, removed={2: [2, 0, 1], 0: (1,), 1: []})
    assert again == removal
    assert Removal(layout=removal.layout, removed=removal.removed) == removal


def test_a_layer_can_lose_all_its_units() -> None:
    plan = SharePlan.from_dict(small(removed={"0": "0-3", "2": "1"}))
    assert plan.removals[0].whole_layers == (0,)
    assert plan.tensors["h.0.q.weight"].stored_shape == (0, 8)
    assert plan.tensors["h.0.o.weight"].reduced_shape == (8, 0)
    assert plan.tensors["h.2.o.weight"].stored_shape == (8, 12)


def edited(change: str, value: Any) -> dict[str, Any]:
    plan = small("ffn" if change.startswith("ffn") else "attention")
    removal = plan["removals"][0]
    *way, last = change.removeprefix("ffn.").split(".")
    holder = removal
    for step in way:
        holder = holder[step]
    holder[last] = value
    return plan


HOSTILE: dict[str, Any] = {
    "removals that are no list": {**small(), "removals": 7},
    "a hundred removals": {**small(), "removals": small()["removals"] * 100},
    "two of a kind": {**small(), "removals": small()["removals"] * 2},
    "a key of its own": small(code="import os"),
    "no layout": {**small(), "removals": [{"removed": {"0": "1"}}]},
    "a list": small(removed=["1"]),
    "text": small(removed="1"),
    "no map": small(removed=None),
    "a layer that is not there": small(removed={"3": "1"}),
    "a negative layer": small(removed={"-1": "1"}),
    "a layer of words": small(removed={"first": "1"}),
    "a layer written in another way": small(removed={"00": "1"}),
    "a layer in other digits": small(removed={"\u0661": "1"}),
    "more layers than there are": small(removed={str(n): "1" for n in range(4)}),
    "a layer of nothing": small(removed={"0": ""}),
    "numbers that are a number": small(removed={"0": 1}),
    "numbers that are nothing": small(removed={"0": None}),
    "numbers that are fractions": small(removed={"0": [1.0]}),
    "numbers that are truths": small(removed={"0": [True]}),
    "numbers that are pairs": small(removed={"0": [[0, 1]]}),
    "a number out of range": small(removed={"0": "4"}),
    "a negative number": small(removed={"0": "-1"}),
    "a negative number in a list": small(removed={"0": [-1]}),
    "a list out of range": small(removed={"0": [4]}),
    "a huge number": small(removed={"0": "9" * 18}),
    "a huge range": small(removed={"0": "0-999999999"}),
    "a range backwards": small(removed={"0": "2-1"}),
    "a range of ranges": small(removed={"0": "0-1-2"}),
    "a number twice": small(removed={"0": "1,1"}),
    "ranges that overlap": small(removed={"0": "0-1,1-2"}),
    "numbers out of order": small(removed={"0": "2,1"}),
    "spaces": small(removed={"0": "1, 2"}),
    "leading zeros": small(removed={"0": "01"}),
    "other digits": small(removed={"0": "\u0661"}),
    "a trailing comma": small(removed={"0": "1,"}),
    "a line's end": small(removed={"0": "1\n"}),
    "a text far too long": small(removed={"0": "1," * 10**6}),
    "a list far too long": small(removed={"0": [1] * 10**6}),
    "parts missing": edited("layout.parts", {"q": small()["removals"][0]["layout"]["parts"]["q"]}),
    "parts of the other kind": edited("layout.kind", "ffn"),
    "neurons in groups": edited("ffn.layout.parts.down", {
        "tensor": "h.{layer}.down.weight", "axis": 1, "shape": [8, 8], "start": 0, "step": 2, "rows": 2}),
    "o along the same axis": edited("layout.parts.o", {
        "tensor": "h.{layer}.o.weight", "axis": 0, "shape": [16, 8], "start": 0, "step": 4, "rows": 4}),
    "k along another axis": edited("layout.parts.k", {
        "tensor": "h.{layer}.k.weight", "axis": 1, "shape": [8, 8], "start": 0, "step": 2, "rows": 2}),
    "a tensor that is no weight": edited("layout.parts.q.tensor", "h.{layer}.q.bias"),
    "absurdly many layers": edited("layout.layers", 2**40),
    "absurdly many groups": edited("layout.groups", 2**40),
    "more groups than fit": edited("layout.groups", 5),
    "the tensors of both kinds are the same": {**small(), "removals": [
        small()["removals"][0], edited("ffn.layout.parts.down", {
            "tensor": "h.{layer}.o.weight", "axis": 1, "shape": [8, 16], "start": 0, "step": 1, "rows": 1},
        )["removals"][0]]},
    "a tie to a removed unit": with_ties(small(), [1, 0, 0, 1]),
    "a tie of a removed unit": with_ties(small(), [2, 1, 0, 0]),
    "a tie of a group that loses a neuron": with_ties(
        small("ffn"), [2, 0, 0, 1], groups=2, parts={"down": {
            "tensor": "h.{layer}.down.weight", "axis": 1, "shape": [8, 4], "start": 0, "step": 2, "rows": 2}}),
    "units seen in another way": with_ties(small(), parts={"q": {
        "tensor": "h.{layer}.q.weight", "axis": 0, "shape": [16, 8], "start": 1, "step": 3, "rows": 3}}),
    "a tensor of another shape": with_ties(small(), parts={"q": {
        "tensor": "h.{layer}.q.weight", "axis": 0, "shape": [16, 9], "start": 0, "step": 4, "rows": 4}}),
    "fewer layers": with_ties(small(), layers=2),
    "ties of the other kind in a removed tensor": with_ties(small(), kind="ffn", parts={"up": {
        "tensor": "h.{layer}.q.weight", "axis": 0, "shape": [16, 8], "start": 0, "step": 4, "rows": 4}}),
    "two names of one tensor": with_ties(edited("layout.layers", 12), layers=12, parts={"q": {
        "tensor": "{layer}.q.weight", "axis": 0, "shape": [16, 8], "start": 0, "step": 4, "rows": 4}}) | {
            "removals": [edited("layout.parts.q.tensor", "1{layer}.q.weight")["removals"][0] | {
                "layout": edited("layout.parts.q.tensor", "1{layer}.q.weight")["removals"][0]["layout"]
                | {"layers": 12}}]},
}  # fmt: skip


@pytest.mark.parametrize("plan", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_removal_cannot_be_read_from_a_file_or_a_checkpoint(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as found:
        SharePlan.from_json(json.dumps(plan))
    assert len(str(found.value)) < 1000
    assert "\n" not in str(found.value)


def test_a_removal_names_the_unit_that_is_tied_too() -> None:
    with pytest.raises(PlanError, match="layer 0, group 1, but layer 0, group 1 is removed"):
        SharePlan.from_dict(with_ties(small(), [1, 0, 0, 1]))
    plan = SharePlan.from_dict(with_ties(small(), [1, 0, 0, 0], [2, 3, 0, 3]))
    assert plan.ties == 2


def test_attention_units_beyond_reason_are_refused_before_they_are_counted() -> None:
    plan = small(removed={"0": "0-99998"})
    layout = plan["removals"][0]["layout"] | {"layers": 100, "groups": 100_000}
    for place in layout["parts"].values():
        place["shape"] = [100_000 * place["rows"] if axis == place["axis"] else 8 for axis in (0, 1)]
    plan["removals"][0]["layout"] = layout
    with pytest.raises(PlanError, match="10000000 attention units"):
        SharePlan.from_dict(plan)


# ---- indices and coordinates


@given(
    st.integers(1, 60).flatmap(lambda below: st.tuples(st.just(below), st.sets(st.integers(0, below - 1), min_size=1)))
)
def test_indices_are_read_as_they_were_written(drawn: tuple[int, set[int]]) -> None:
    below, indices = drawn
    spans = spans_of(indices)
    text = write_indices(spans)
    assert read_indices(text, below) == spans
    assert [index for start, stop in spans for index in range(start, stop)] == sorted(indices)
    assert all(before.stop < after.start for before, after in pairwise(spans))
    with pytest.raises(PlanError):
        read_indices(text, max(indices))


@given(st.integers(1, 200), st.text("0123456789,- x", max_size=30))
def test_any_text_is_refused_or_names_indices_in_range(below: int, text: str) -> None:
    try:
        spans = read_indices(text, below)
    except PlanError:
        return
    flat = [index for start, stop in spans for index in range(start, stop)]
    assert flat and flat == sorted(set(flat)) and flat[0] >= 0 and flat[-1] < below
    assert read_indices(write_indices(spans), below) == spans


SETS = st.integers(1, 8).flatmap(
    lambda size: st.tuples(st.just(size), st.sets(st.integers(0, size - 1), max_size=size - 1))
)
FATES = st.lists(st.sampled_from(["keep", "remove", ("a", 0), ("a", 5), ("b", 3)]), min_size=1, max_size=12)


def some_tensors(donors: dict[str, tuple[int, set[int]]], fates: list[Any]) -> dict[str, TensorPlan]:
    """Two donors that lose something, and a recipient, each of whose indices is kept, removed or taken from a donor."""
    tensors = {
        name: TensorPlan(name, (size, 1), 0, removed=spans_of(removed)) for name, (size, removed) in donors.items()
    }
    there = {name: [i for start, stop in one.present() for i in range(start, stop)] for name, one in tensors.items()}
    gaps = tuple(
        Borrowed(index, index + 1, fate[0], there[fate[0]][fate[1] % len(there[fate[0]])])
        for index, fate in enumerate(fates)
        if isinstance(fate, tuple)
    )
    removed = spans_of(index for index, fate in enumerate(fates) if fate == "remove")
    return {**tensors, "c": TensorPlan("c", (len(fates), 1), 0, gaps, removed=removed)}


@settings(max_examples=200)
@given(st.fixed_dictionaries({"a": SETS, "b": SETS}), FATES)
def test_stored_reduced_and_dense_coordinates_are_of_the_same_numbers(
    donors: dict[str, tuple[int, set[int]]], fates: list[Any]
) -> None:
    tensors = some_tensors(donors, fates)
    dense = {name: np.arange(1, one.size + 1) + 100 * ord(name) for name, one in tensors.items()}
    stored = {name: np.concatenate([[], *(dense[name][a:b] for a, b in one.kept())]) for name, one in tensors.items()}
    small = {name: one.reduced(tensors) for name, one in tensors.items()}
    for name, one in tensors.items():
        expected, gone = dense[name].copy(), np.zeros(one.size, bool)
        for gap in one.gaps:
            expected[gap.start] = dense[gap.donor][gap.donor_start]
        for start, stop in one.removed:
            gone[start:stop] = True
        assert one.stored_shape == small[name].stored_shape == (len(stored[name]), 1)
        assert small[name].shape == one.reduced_shape == (int((~gone).sum()), 1)
        assert put_together(one, tensors, stored) == list(np.where(gone, 0, expected))
        assert put_together(small[name], small, stored) == list(expected[~gone])


def put_together(one: TensorPlan, tensors: dict[str, TensorPlan], stored: dict[str, np.ndarray]) -> list[float]:
    found: list[float] = []
    for source, start, stop in one.whole():
        first = tensors[source].stored_index(start) if source else 0
        found += list(stored[source][first : first + stop - start]) if source else [0.0] * (stop - start)
    return found
