"""Plans of identical tensors: what they say, and what cannot be said."""

from pathlib import Path
from typing import Any

import pytest

import headshare as hs
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError, PlanError
from headshare.plan.describe import describe, picture
from headshare.plan.plan import SharePlan
from support import tiny

K = "model.layers.{}.self_attn.k_proj.weight"
SHAPE = [16, 32]


@pytest.fixture
def dense(tmp_path: Path) -> Checkpoint:
    return hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))


def plan_of(dense: Checkpoint, *copied: Any, **more: Any) -> SharePlan:
    layout = dense.layouts.attention.model_dump(mode="json")
    return SharePlan.from_dict({"format": 1, "identical": [{"layout": layout, "copied": list(copied)}], **more})


def test_it_is_read_as_it_was_written(dense: Checkpoint) -> None:
    plan = plan_of(dense, {"tensor": K.format(1), "shape": SHAPE, "also": [K.format(2), K.format(3)]})
    assert SharePlan.from_json(plan.to_json()) == plan
    assert plan.copies == {K.format(2): K.format(1), K.format(3): K.format(1)}
    assert plan.reduced_tensors == {}
    assert plan.only_ties
    assert plan.first_layer() is None
    assert describe(plan)["identical"][0]["tensors"] == 2
    assert "layer 2  ==  1 tensors of layer 1" in picture(plan)


@pytest.mark.parametrize(
    ("copied", "why"),
    [
        ([{"tensor": K.format(1), "shape": SHAPE, "also": [K.format(1)]}], "stands twice"),
        (
            [
                {"tensor": K.format(1), "shape": SHAPE, "also": [K.format(2)]},
                {"tensor": K.format(2), "shape": SHAPE, "also": [K.format(3)]},
            ],
            "stands twice",
        ),
        ([{"tensor": K.format(1), "shape": SHAPE, "also": []}], "not valid"),
        ([{"tensor": K.format(1), "shape": [], "also": [K.format(2)]}], "not valid"),
        ([{"tensor": K.format(1), "shape": [0, 32], "also": [K.format(2)]}], "not valid"),
        ([{"tensor": K.format(1), "shape": SHAPE, "also": [K.format(2)], "more": 1}], "not valid"),
        ("everything", "a list of at most"),
    ],
)
def test_what_cannot_be_is_refused(copied: Any, why: str, dense: Checkpoint) -> None:
    with pytest.raises(PlanError, match=why):
        plan_of(dense, *copied) if isinstance(copied, list) else SharePlan.from_dict(
            {"format": 1, "identical": [{"layout": dense.layouts.attention.model_dump(mode="json"), "copied": copied}]}
        )


def test_units_are_neither_taken_from_a_copy_nor_from_the_tensor_that_it_is(dense: Checkpoint) -> None:
    copied = {"tensor": K.format(1), "shape": SHAPE, "also": [K.format(2)]}
    layout = dense.layouts.attention.model_dump(mode="json")
    layout["parts"] = {"k": layout["parts"]["k"]}

    def tied(*tie: int) -> dict[str, Any]:
        return {"selections": [{"layout": layout, "ties": [list(tie)]}]}

    with pytest.raises(PlanError, match="Tie it to that one"):
        plan_of(dense, copied, **tied(3, 0, 2, 0))
    with pytest.raises(PlanError, match="claim the same indices"):
        plan_of(dense, copied, **tied(2, 0, 0, 0))
    with pytest.raises(PlanError, match="takes numbers away"):
        plan_of(dense, copied, **tied(1, 0, 0, 0))
    plan = plan_of(dense, copied, **tied(3, 0, 1, 0))
    assert set(plan.reduced_tensors) == {K.format(1), K.format(3)}


def test_another_shape_than_the_models_is_refused(dense: Checkpoint) -> None:
    plan = plan_of(dense, {"tensor": K.format(1), "shape": [32, 32], "also": [K.format(2)]})
    with pytest.raises(PlanError, match="should have shape"):
        hs.share(dense, plan)
    plan = plan_of(dense, {"tensor": K.format(1), "shape": SHAPE, "also": ["model.nowhere"]})
    with pytest.raises(PlanError, match="no such tensor"):
        hs.share(dense, plan)


def test_units_may_be_tied_beside_copies(dense: Checkpoint, tmp_path: Path) -> None:
    copied = {"tensor": K.format(1), "shape": SHAPE, "also": [K.format(2)]}
    layout = dense.layouts.attention.model_dump(mode="json")
    layout["parts"] = {part: layout["parts"][part] for part in ("k", "o")}
    plan = plan_of(dense, copied, selections=[{"layout": layout, "ties": [[3, 1, 1, 0]]}])
    out = hs.share(dense, plan).save(tmp_path / "out")
    report = hs.verify(hs.open_checkpoint(out))
    assert (report.ok, report.max_logit_diff) == (True, 0.0)
    assert "differs from the dense model" in str(hs.verify(hs.open_checkpoint(out), dense).problems)


def test_a_copy_of_another_type_is_refused(dense: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(dense.path / "model.safetensors")
    tensors[K.format(2)] = tensors[K.format(2)].half()
    save_file(tensors, dense.path / "model.safetensors", metadata={"format": "pt"})
    mixed = hs.open_checkpoint(dense.path)
    with pytest.raises(CheckpointError, match="is F16, and is to be"):
        hs.share(mixed, plan_of(mixed, {"tensor": K.format(1), "shape": SHAPE, "also": [K.format(2)]}))
