"""Units of low rank in a plan: read as they were written, hostile ones refused."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headshare.errors import PlanError
from headshare.plan.layout import Layout, Place
from headshare.plan.low_rank import LowRankUnits
from headshare.plan.plan import SharePlan
from headshare.plan.units import Part, Sublayer
from headshare.sharing.factors import join_columns, split_columns


def small(**changes: Any) -> dict[str, Any]:
    """A plan of 3 layers x 4 groups, as JSON, with factored units and nothing else."""
    place = {"tensor": "h.{layer}.o.weight", "axis": 1, "shape": [8, 16], "start": 0, "step": 4, "rows": 4}
    layout = {"kind": "attention", "layers": 3, "groups": 4, "parts": {"o": place}}
    factored = {"layout": layout, "units": {"0": "1", "2": "0-2"}, "ranks": {"0": [2], "2": [1, 2, 3]}, **changes}
    return {"format": 1, "model_type": "x", "selections": [], "factored": [factored]}


def edited(change: str, value: Any, plan: dict[str, Any] | None = None) -> dict[str, Any]:
    plan = plan or small()
    *way, last = change.split(".")
    holder = plan["factored"][0]
    for step in way:
        holder = holder[step]
    holder[last] = value
    return plan


def place_of(part: str, axis: int = 0, rows: int = 4) -> dict[str, Any]:
    shape = [8, 4 * rows] if axis else [4 * rows, 8]
    return {
        "tensor": f"h.{{layer}}.{part}.weight",
        "axis": axis,
        "shape": shape,
        "start": 0,
        "step": rows,
        "rows": rows,
    }


def with_ties(parts: dict[str, Any], *ties: list[int], kind: str = "attention") -> dict[str, Any]:
    layout = {"kind": kind, "layers": 3, "groups": 4, "parts": parts}
    return {**small(), "selections": [{"layout": layout, "ties": list(ties)}]}


def with_removed(removed: dict[str, str], kind: str = "attention", **parts: Any) -> dict[str, Any]:
    own = {part: place_of(part) for part in "qkv"} | {"o": place_of("o", 1)}
    if kind == "ffn":
        own = {"up": place_of("up", rows=1), "down": place_of("down", 1, 1)}
    layout = {"kind": kind, "layers": 3, "groups": 4, "parts": own | parts}
    return {**small(), "removals": [{"layout": layout, "removed": removed}]}


def many(groups: int, layers: int = 100) -> dict[str, Any]:
    plan = small(units={}, ranks={})
    plan["factored"][0]["layout"] |= {"layers": layers, "groups": groups}
    return edited("layout.parts.o.shape", [8, groups * 4], plan)


HOSTILE: dict[str, Any] = {
    "factored units that are no list": {**small(), "factored": 7},
    "a hundred of them": {**small(), "factored": small()["factored"] * 100},
    "two of a kind": {**small(), "factored": small()["factored"] * 2},
    "a key of its own": small(code="import os"),
    "no layout": {**small(), "factored": [{"units": {"0": "1"}, "ranks": {"0": [1]}}]},
    "no ranks": {**small(), "factored": [{"layout": small()["factored"][0]["layout"], "units": {"0": "1"}}]},
    "no units": {**small(), "factored": [{"layout": small()["factored"][0]["layout"], "ranks": {"0": [1]}}]},
    "units that are a list": small(units=["1"]),
    "units that are nothing": small(units=None),
    "a layer that is not there": small(units={"3": "1"}, ranks={"3": [1]}),
    "a layer of words": small(units={"first": "1"}, ranks={"first": [1]}),
    "a group out of range": small(units={"0": "4"}, ranks={"0": [1]}),
    "a group twice": small(units={"0": "1,1"}, ranks={"0": [1, 1]}),
    "a huge range": small(units={"0": "0-999999999"}, ranks={"0": [1]}),
    "ranks that are a number": small(ranks=8),
    "ranks that are nothing": small(ranks=None),
    "ranks that are a list": small(ranks=[1, 1, 2, 3]),
    "one rank for many": small(ranks={"0": 2, "2": 2}),
    "ranks that are text": small(ranks={"0": "2", "2": "123"}),
    "a rank too few": small(ranks={"0": [2], "2": [1, 2]}),
    "a rank too many": small(ranks={"0": [2], "2": [1, 2, 3, 3]}),
    "a million ranks": small(ranks={"0": [2], "2": [1] * 10**6}),
    "ranks of a layer of none": small(ranks={"0": [2], "1": [2], "2": [1, 2, 3]}),
    "no ranks of a layer": small(ranks={"0": [2]}),
    "ranks of a layer that is not there": small(ranks={"0": [2], "2": [1, 2, 3], "3": []}),
    "a layer of ranks in another writing": small(ranks={"00": [2], "2": [1, 2, 3]}),
    "a rank of nothing": small(ranks={"0": [0], "2": [1, 2, 3]}),
    "a negative rank": small(ranks={"0": [-1], "2": [1, 2, 3]}),
    "a full rank": small(ranks={"0": [4], "2": [1, 2, 3]}),
    "a huge rank": small(ranks={"0": [2**70], "2": [1, 2, 3]}),
    "a rank that is a fraction": small(ranks={"0": [1.0], "2": [1, 2, 3]}),
    "a rank that is a truth": small(ranks={"0": [True], "2": [1, 2, 3]}),
    "a rank that is a text": small(ranks={"0": ["1"], "2": [1, 2, 3]}),
    "a rank that is a list": small(ranks={"0": [[1]], "2": [1, 2, 3]}),
    "units of one channel": edited("layout.parts.o", place_of("o", 1, 1)),
    "the rank of all outputs": edited("layout.parts.o.shape", [3, 16]),
    "other parts": edited("layout.parts", {"q": place_of("q")}),
    "more parts": edited("layout.parts.q", place_of("q")),
    "the other kind": edited("layout.kind", "ffn"),
    "down": edited("layout", {"kind": "ffn", "layers": 3, "groups": 4, "parts": {"down": place_of("down", 1)}}),
    "a tensor that is no weight": edited("layout.parts.o.tensor", "h.{layer}.o.bias"),
    "more groups than fit": edited("layout.groups", 5),
    "absurdly many layers": edited("layout.layers", 2**40),
    "absurdly many groups": edited("layout.groups", 2**40),
    "units beyond reason": many(100_000),
    "a tie of a factored readout": with_ties({"o": place_of("o", 1)}, [2, 3, 1, 0]),
    "a tie to a factored readout": with_ties({"o": place_of("o", 1)}, [1, 3, 0, 0]),
    "a tie to a factored unit": with_ties({"o": place_of("o", 1)}, [1, 3, 0, 1]),
    "ties of the other kind in the readout": with_ties({"up": place_of("o", 1)}, [1, 3, 0, 0], kind="ffn"),
    "a readout of another shape": with_ties({"o": {**place_of("o", 1), "shape": [9, 16]}}, [1, 0, 0, 0]),
    "a readout along another axis": with_ties({"o": {**place_of("o", 0), "shape": [8, 16], "step": 2, "rows": 2}}),
    "a removed unit": with_removed({"2": "1"}),
    "removals of other units": with_removed({"1": "0"}, o=place_of("o", 1) | {"step": 2, "rows": 2}),
    "neurons of the readout": with_removed({"1": "0"}, "ffn", down={**place_of("o", 1), "rows": 1, "step": 1}),
}  # fmt: skip


@pytest.mark.parametrize("plan", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_factored_units_cannot_be_read_from_a_file_or_a_checkpoint(plan: Any) -> None:
    with pytest.raises(PlanError) as found:
        SharePlan.from_json(json.dumps(plan))
    assert len(str(found.value)) < 1000
    assert "\n" not in str(found.value)


def test_what_hostile_plans_are_made_of_is_good() -> None:
    for good in (
        small(),
        with_ties({"o": place_of("o", 1)}),
        with_ties({part: place_of(part) for part in "qkv"}, [2, 1, 0, 1]),
        with_removed({"2": "3", "1": "0-2"}),
        with_removed({"0": "1"}, "ffn"),
        many(1000),
    ):
        plan = SharePlan.from_json(json.dumps(good))
        assert plan.factored[0].layout.parts[Part.O].tensor == "h.{layer}.o.weight"
        assert SharePlan.from_json(plan.to_json()) == plan


def test_a_tie_of_o_beside_factored_units_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"layer 2, group 3 takes .* h\.2\.o\.weight.*Tie q, k and v alone"):
        SharePlan.from_dict(with_ties({"o": place_of("o", 1)}, [2, 3, 1, 0]))
    with pytest.raises(PlanError, match="layer 2, group 1 is both factored and removed"):
        SharePlan.from_dict(with_removed({"2": "1"}))


def test_a_plan_without_factored_units_is_written_as_before_there_were_any() -> None:
    parts = {"q": place_of("q"), "k": place_of("k", rows=2)}
    plan = {key: value for key, value in with_ties(parts, [1, 0, 0, 1]).items() if key != "factored"}
    read = SharePlan.from_dict(plan)
    assert "factored" not in read.model_dump(mode="json")
    assert read.digest == "4dfc29cb33be4c68ad8953f0b6b8052798171a671efde8a144317fc4b768d401"


RANKED = st.dictionaries(st.integers(0, 2), st.dictionaries(st.integers(0, 3), st.integers(1, 3), max_size=4))


@given(RANKED)
def test_factored_units_are_read_as_they_were_written(drawn: dict[int, dict[int, int]]) -> None:
    layout = Layout.model_validate(small()["factored"][0]["layout"])
    ordered = {layer: dict(sorted(ranks.items())) for layer, ranks in drawn.items()}
    factored = LowRankUnits(
        layout=layout,
        units={layer: list(ranks) for layer, ranks in ordered.items()},
        ranks={layer: list(ranks.values()) for layer, ranks in ordered.items()},
    )
    plan = SharePlan(factored=(factored,))
    again = SharePlan.from_json(plan.to_json())
    assert again == plan and again.digest == plan.digest
    assert {layer: dict(factored.ranked(layer)) for layer in range(3) if factored.ranked(layer)} == {
        layer: ranks for layer, ranks in ordered.items() if ranks
    }
    assert factored.count == sum(map(len, drawn.values()))
    for name, tensor in plan.tensors.items():
        layer = int(name.split(".")[1])
        assert tensor.stored_shape == (8, 16 - 4 * len(ordered[layer]))
        extra = plan.added_tensors
        total = sum(ordered[layer].values())
        assert extra[f"h.{layer}.o.factor_in"].shape == (total, 4)
        assert extra[f"h.{layer}.o.factor_out"].shape == (8, total)


@settings(max_examples=50)
@given(st.integers(2, 9), st.integers(2, 9), st.data())
def test_a_matrix_of_a_rank_is_split_and_joined_again(outputs: int, channels: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(outputs, channels) - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    left, right = torch.randn(outputs, rank, generator=generator), torch.randn(rank, channels, generator=generator)
    factor_in, factor_out = split_columns(left @ right, rank)
    assert (factor_in.shape, factor_out.shape) == ((rank, channels), (outputs, rank))
    torch.testing.assert_close(join_columns(factor_in, factor_out), left @ right, rtol=1e-4, atol=1e-4)


def test_only_attention_is_factored() -> None:
    place = Place.model_validate(place_of("down", 1))
    with pytest.raises(PlanError, match="only part o of attention units"):
        LowRankUnits(layout=Layout(kind=Sublayer.FFN, layers=3, groups=4, parts={Part.DOWN: place}), units={}, ranks={})
