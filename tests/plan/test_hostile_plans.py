"""Hostile plans, and plans of other models, are neither read nor applied nor loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import headshare as hs
from headshare.errors import CheckpointError, PlanError
from headshare.evaluation.verify import verify
from support import tiny
from support.folders import MANIFEST, unseal
from support.shares import a_plan, share


def edited(plan: hs.SharePlan, **changes: Any) -> dict[str, Any]:
    """The plan as data, with some things of its first selection, or (`layout_`, `q_`) of its layout, changed."""
    data = plan.model_dump(mode="json")
    selection = data["selections"][0]
    for key, value in changes.items():
        where, _, field = key.partition("_")
        if where == "layout":
            selection["layout"][field] = value
        elif where in selection["layout"]["parts"]:
            selection["layout"]["parts"][where][field] = value
        else:
            selection[key] = value
    return data


def place_of_q(plan: hs.SharePlan) -> dict[str, Any]:
    place: dict[str, Any] = edited(plan)["selections"][0]["layout"]["parts"]["q"]
    return place


K, Q = "model.layers.{layer}.self_attn.k_proj.weight", "model.layers.{layer}.self_attn.q_proj.weight"


def overlapping_selections(plan: hs.SharePlan) -> dict[str, Any]:
    """q and k in two selections, and both say that they are the rows of q_proj: a chain through the back door."""
    data, other = edited(plan), edited(plan)
    first, second = data["selections"][0], other["selections"][0]
    place = first["layout"]["parts"]["q"]
    first["layout"]["parts"], second["layout"]["parts"] = {"q": place}, {"k": place}
    first["ties"], second["ties"] = [[1, 0, 0, 0]], [[2, 0, 1, 0]]
    return {**data, "selections": [first, second]}


def colliding_templates(plan: hs.SharePlan) -> dict[str, Any]:
    """Two names that differ as templates and are one tensor in layer 11."""
    data = edited(plan, layout_layers=12, ties=[[11, 0, 0, 0]])
    places = data["selections"][0]["layout"]["parts"]
    places["q"]["tensor"], places["k"] = "h.{layer}1.w", {**places["q"], "tensor": "h.1{layer}.w"}
    return data


# what is wrong with the plan: the plan of a tiny Llama, 4 layers x 2 groups, made so
INVALID: dict[str, Callable[[hs.SharePlan], Any]] = {
    "nothing at all": lambda plan: None,
    "a list": lambda plan: [],
    "text": lambda plan: "a plan",
    "an empty object": lambda plan: {},
    "no format": lambda plan: {"selections": []},
    "a later format": lambda plan: {**edited(plan), "format": 2},
    "a format that is text": lambda plan: {**edited(plan), "format": "1"},
    "a key of its own": lambda plan: {**edited(plan), "code": "import os"},
    "selections that are no list": lambda plan: {**edited(plan), "selections": 7},
    "a hundred selections": lambda plan: {**edited(plan), "selections": edited(plan)["selections"] * 100},
    "the same part twice": lambda plan: {**edited(plan), "selections": edited(plan)["selections"] * 2},
    "a long name": lambda plan: {**edited(plan), "model_type": "x" * 10_000},
    "a tie to itself": lambda plan: edited(plan, ties=[[1, 0, 1, 0]]),
    "a cycle of two": lambda plan: edited(plan, ties=[[1, 0, 2, 0], [2, 0, 1, 0]]),
    "a cycle within a layer": lambda plan: edited(plan, ties=[[1, 0, 1, 1], [1, 1, 1, 0]]),
    "a cycle of three": lambda plan: edited(plan, ties=[[1, 0, 2, 0], [2, 0, 3, 0], [3, 0, 1, 0]]),
    "a chain": lambda plan: edited(plan, ties=[[1, 0, 0, 0], [2, 0, 1, 0]]),
    "a later donor": lambda plan: edited(plan, ties=[[1, 0, 3, 0]]),
    "a recipient in layer 0": lambda plan: edited(plan, ties=[[0, 0, 0, 1]]),
    "a recipient tied twice": lambda plan: edited(plan, ties=[[2, 0, 0, 0], [2, 0, 1, 1]]),
    "the same tie twice": lambda plan: edited(plan, ties=[[2, 0, 0, 0], [2, 0, 0, 0]]),
    "a layer out of range": lambda plan: edited(plan, ties=[[4, 0, 0, 0]]),
    "a group out of range": lambda plan: edited(plan, ties=[[1, 2, 0, 0]]),
    "a donor out of range": lambda plan: edited(plan, ties=[[1, 0, 0, 2]]),
    "negative numbers": lambda plan: edited(plan, ties=[[1, 0, -1, 0]]),
    "a huge number": lambda plan: edited(plan, ties=[[2**70, 0, 0, 0]]),
    "ties of three numbers": lambda plan: edited(plan, ties=[[1, 0, 0]]),
    "ties of text": lambda plan: edited(plan, ties=["1000"]),
    "ties of fractions": lambda plan: edited(plan, ties=[[1.0, 0, 0, 0]]),
    "ties of truths": lambda plan: edited(plan, ties=[[True, False, False, False]]),
    "ties that are an object": lambda plan: edited(plan, ties={"1": 0}),
    # They are counted before they are read.
    "a million entries": lambda plan: edited(plan, ties=[[1, 0, 0, 0]] * 1_000_000),
    "a kind unheard of": lambda plan: edited(plan, kind="states"),
    "a scale without o": lambda plan: edited(plan, scale=True),
    "no layers": lambda plan: edited(plan, layout_layers=0, ties=[]),
    "absurdly many layers": lambda plan: edited(plan, layout_layers=2**40),
    "absurdly many groups": lambda plan: edited(plan, layout_groups=2**40),
    "more groups than fit": lambda plan: edited(plan, layout_groups=3),
    "layers that are NaN": lambda plan: edited(plan, layout_layers=float("nan")),
    "an unknown part": lambda plan: edited(plan, layout_parts={"x": place_of_q(plan)}),
    "an axis of two": lambda plan: edited(plan, q_axis=2),
    "a negative start": lambda plan: edited(plan, q_start=-8),
    "a start out of range": lambda plan: edited(plan, q_start=8),
    "groups that overlap": lambda plan: edited(plan, q_step=8),
    "a step of nothing": lambda plan: edited(plan, q_step=0),
    "rows of nothing": lambda plan: edited(plan, q_rows=0),
    "a shape of three": lambda plan: edited(plan, q_shape=[32, 32, 1]),
    "a negative shape": lambda plan: edited(plan, q_shape=[-32, 32]),
    "a shape that is too small": lambda plan: edited(plan, q_shape=[31, 32]),
    "a tensor without its layer": lambda plan: edited(plan, q_tensor="lm_head.weight"),
    "a tensor with two layers": lambda plan: edited(plan, q_tensor="{layer}.{layer}.weight"),
    "a tensor of a long name": lambda plan: edited(plan, q_tensor="{layer}" + "x" * 1000),
    "two parts in one place": lambda plan: edited(plan, k_tensor=Q, k_shape=[32, 32]),
    # Through the next two, ties of different selections could chain and gaps overlap.
    "two selections in one place": overlapping_selections,
    "two templates for one tensor": colliding_templates,
}  # fmt: skip


@pytest.mark.parametrize("spoilt", INVALID.values(), ids=INVALID.keys())
def test_a_hostile_plan_cannot_be_read_from_a_file_or_a_checkpoint(
    spoilt: Callable[[hs.SharePlan], Any], llama: Path, tmp_path: Path
) -> None:
    data = spoilt(a_plan(llama))
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError) as found:
        hs.SharePlan.load(tmp_path / "plan.json")
    assert len(str(found.value)) < 1000
    assert "\n" not in str(found.value)
    put_plan(llama, data)
    with pytest.raises(CheckpointError):
        hs.open_checkpoint(llama)


def put_plan(folder: Path, plan: Any) -> None:
    """Let config.json say that this is a checkpoint shared by this plan."""
    config = json.loads((folder / "config.json").read_text())
    entry = {"quant_method": "headshare", "format": 1, "plan": plan}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))


@pytest.mark.parametrize("name", [name for name in INVALID if "million" not in name])  # it copies those for seconds
def test_transformers_does_not_load_a_checkpoint_with_a_hostile_plan(name: str, llama: Path, tmp_path: Path) -> None:
    shared = share(llama, tmp_path / "shared")
    put_plan(shared, INVALID[name](a_plan(llama)))
    with pytest.raises(CheckpointError):
        transformers.AutoModelForCausalLM.from_pretrained(shared)


def test_a_plan_of_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "plan.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(PlanError, match="1,000,000,000 bytes"):
        hs.SharePlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("text", [b"", b"\xff", b"[" * 100_000, b"{", b"9" * 10_000], ids=len)
def test_a_plan_that_is_no_json_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(text)
    with pytest.raises(PlanError, match="the plan"):
        hs.SharePlan.load(tmp_path / "plan.json")


def another_models_plan(folder: Path, **changes: object) -> dict[str, Any]:
    return a_plan(tiny.make_llama(folder / "another", **changes)).model_dump(mode="json")


# plans that are right by themselves, and wrong for a tiny Llama
FOREIGN: dict[str, Callable[[Path, hs.SharePlan], dict[str, Any]]] = {
    "a deeper model's": lambda folder, plan: another_models_plan(folder, num_hidden_layers=6),
    "a wider model's": lambda folder, plan: another_models_plan(folder, hidden_size=64),
    "a model's with as many heads as queries": lambda folder, plan: another_models_plan(folder, num_key_value_heads=4),
    "another family's": lambda folder, plan: a_plan(tiny.make("gpt2", folder / "another")).model_dump(mode="json"),
    "one that names other tensors": lambda folder, plan: edited(plan, q_tensor="transformer.h.{layer}.q.weight"),
    "one that names a tensor of another shape": lambda folder, plan: edited(plan, q_tensor=K, k_tensor=Q),
    "one that lies about a shape": lambda folder, plan: edited(plan, q_shape=[64, 32]),
    "one that transposes": lambda folder, plan: edited(plan, k_axis=1),
    "one that shares norms": lambda folder, plan: edited(plan, q_tensor="model.layers.{layer}.input_layernorm.weight"),
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN.keys())
def test_another_models_plan_is_neither_applied_nor_loaded(
    foreign: Callable[[Path, hs.SharePlan], dict[str, Any]], llama: Path, tmp_path: Path
) -> None:
    data = foreign(tmp_path, a_plan(llama))
    plan = hs.SharePlan.from_dict(data)
    shared = share(llama, tmp_path / "shared")
    put_plan(shared, data)
    unseal(shared)
    (shared / MANIFEST).unlink()
    with pytest.raises(
        (CheckpointError, PlanError, RuntimeError, ValueError)
    ):  # transformers names mismatched shapes by itself
        transformers.AutoModelForCausalLM.from_pretrained(shared)
    assert not verify(hs.open_checkpoint(shared)).ok
    with pytest.raises(CheckpointError, match="does not hold what its plan says"):
        hs.expand(hs.open_checkpoint(shared), tmp_path / "expanded")
    if data != edited(a_plan(llama), k_axis=1):  # a plan may take columns where ours take rows; its tensors fit
        with pytest.raises(PlanError, match="the plan is for another model"):
            hs.share(hs.open_checkpoint(llama), plan)


def test_ties_to_other_donors_than_were_shared_do_not_verify(llama: Path, tmp_path: Path) -> None:
    """They fit every shape, so nothing but digests can tell: that of the plan in the weights, or of config.json."""
    shared = share(llama, tmp_path / "shared")
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    recipient, donor = plan.selections[0].ties[0]
    ties = [[*recipient, 0, 1 - donor.group if donor.layer == 0 else 0]]
    put_plan(shared, edited(plan, ties=[*ties, *([*t.recipient, *t.donor] for t in plan.selections[0].ties[1:])]))
    with pytest.raises(CheckpointError, match=r"does not hold the plan by which model\.safetensors was written"):
        hs.open_checkpoint(shared)
    manifest = (shared / MANIFEST).read_bytes()
    unseal(shared)
    (shared / MANIFEST).write_bytes(manifest)
    assert hs.open_checkpoint(shared).plan != plan
    found = verify(hs.open_checkpoint(shared))
    assert not found.ok
    assert "config.json" in found.problems[0]
