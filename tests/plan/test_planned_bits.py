"""The bits of a plan: read from JSON as strangers may have written it, and told in words."""

import json
from typing import Any

import pytest

from headshare.errors import PlanError
from headshare.plan.bits import PlannedBits
from headshare.plan.plan import SharePlan

LAYER = "model.layers.{}.mlp.{}_proj.weight"


def test_bits_travel_in_a_plan_and_leave_plans_without_them_as_they_were() -> None:
    bits = PlannedBits(int8=("wte.weight",), int4=(LAYER.format(0, "up"),), group=32)
    plan = SharePlan(bits=bits)
    assert SharePlan.from_json(plan.to_json()) == plan
    assert "bits" not in json.loads(SharePlan().to_json())
    assert plan.digest != SharePlan().digest


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"int8": ["a"], "int4": ["a"], "group": 8}, "twice"),
        ({"int4": ["a"]}, "group"),
        ({"int8": ["a"], "group": 8}, "group"),
        ({"int4": ["a"], "group": 0}, "bits.group"),
        ({"int8": ["a" * 1000]}, "bits.int8"),
        ({"int8": [5]}, "bits.int8"),
        ({"int3": []}, "bits.int3"),
        (7, "bits"),
    ],
)
def test_bits_that_are_none_are_one_error(data: Any, why: str) -> None:
    with pytest.raises(PlanError, match=why) as refused:
        SharePlan.from_dict({**SharePlan().model_dump(mode="json"), "bits": data})
    assert len(str(refused.value)) < 600


def test_words_count_the_layers_of_each_part() -> None:
    four = tuple(LAYER.format(layer, part) for layer in (0, 1) for part in ("up", "gate"))
    bits = PlannedBits(int8=("model.embed_tokens.weight", LAYER.format(2, "up")), int4=four, group=16)
    assert bits.in_words() == (
        "bits (by count of layers, 4 with a scale for every 16 inputs): model.embed_tokens: 8 in 1; "
        "mlp.up_proj: 4 in 2 and 8 in 1; mlp.gate_proj: 4 in 2; all else stays"
    )
