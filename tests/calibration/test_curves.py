"""Orders in which units are given up, and their prices, as values and as JSON."""

from dataclasses import replace
from pathlib import Path as Folder

import pytest

from headshare.architecture.config import text_config
from headshare.architecture.recognition import attention_layout, ffn_layout
from headshare.calibration.costs.actions import GATEUP, LOW_RANK, QKV, REMOVE
from headshare.calibration.costs.curves import CostCurve, CostCurves, CurveStep, curves_from_json, curves_to_json
from headshare.errors import PlanError
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit, Sublayer
from support.priced import opened

TIE = CurveStep(QKV, (1,), 0.1, 100, ((HeadUnit(0, 1), 0.1), (HeadUnit(0, 0), 1 / 3)))
GONE = CurveStep(REMOVE, (0,), -1e-300, 100)


def test_paths_come_back_from_json_to_the_last_bit() -> None:
    factored = replace(TIE, action=LOW_RANK, groups=(2,), rank=8)
    paths = [
        CostCurve(Sublayer.ATTENTION, 1, (TIE, GONE, factored)),
        CostCurve(Sublayer.FFN, 1, (replace(GONE, groups=(4, 7)),)),
    ]
    assert curves_from_json(curves_to_json(paths)) == paths
    assert curves_from_json(curves_to_json([])) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{", "", "Invalid JSON"),
        ('"qkv"', '"qqq"', "0.steps.0.form"),
        ('"steps"', '"stops"', "0.steps: Field required"),
        ('"layer":1', '"layer":"1"', "0.layer"),
        ("0.1", "null", "0.steps.0.price"),
        ("[0,1]", "[0,1,2]", "donors.0.0"),
        ("[0,1]", "[1,1]", "no earlier layer"),
        ("[1]", "[1,1]", "several different ones"),
        ("[1]", "[0]", "gives a unit up twice"),
        ("[1]", "[-1]", "several different ones"),
        ('"saved_bytes":100', '"saved_bytes":0', "saves bytes"),
        ('"price":0.1', '"price":1e999', "finite"),
        ('"kind":"attention"', '"kind":"ffn"', "other half"),
        ('"layer":1', '"layer":-1', "no layer -1"),
        ('"form":"qkv"', '"form":"remove"', "no donors"),
        ('"form":"remove"', '"form":"qk"', "at least one donor"),
        ('"form":"qkv"', '"form":"low_rank"', "has a rank if it is factored"),
        ('"rank":0', '"rank":1', "has a rank if it is factored"),
        ('"rank":0', '"rank":-1', "has a rank if it is factored"),
        ('"rank":0', '"rank":"1"', "0.steps.0.rank"),
    ],
)
def test_json_that_is_not_of_paths_is_refused(old: str, new: str, words: str) -> None:
    text = curves_to_json([CostCurve(Sublayer.ATTENTION, 1, (TIE, GONE))])
    assert old in text
    with pytest.raises(PlanError, match=words):
        curves_from_json(text.replace(old, new, 1))


def test_prices_that_contradict_their_layouts_cannot_be_made(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    config = text_config(checkpoint.config)
    attention, groups = attention_layout(config, checkpoint.shapes), ffn_layout(config, checkpoint.shapes, 2)
    layouts = {Sublayer.ATTENTION: attention, Sublayer.FFN: groups}
    neurons = ffn_layout(config, checkpoint.shapes, 48)
    donors = ((HeadUnit(0, 0), 0.1),)

    def make(*paths: CostCurve, neurons: Layout | None = neurons) -> CostCurves:
        return CostCurves("llama", layouts, paths, neurons)

    tied = CostCurve(Sublayer.FFN, 1, (CurveStep(GATEUP, (1,), 0.1, 9, donors),))
    removed = CostCurve(Sublayer.FFN, 2, (replace(GONE, groups=(40,)),))
    assert make(tied).layout_of(tied) == groups
    assert make(removed).layout_of(removed) == neurons
    several = (tied, replace(tied, steps=(replace(tied.steps[0], groups=(0,)),)))
    assert make(*several).curves == several
    for wrong, words in [
        ((tied, removed), "one or the other"),
        ((tied, replace(removed, layer=1)), "one or the other"),
        (
            (CostCurve(Sublayer.ATTENTION, 1, (TIE,)), CostCurve(Sublayer.ATTENTION, 1, (replace(TIE, groups=(7,)),))),
            "not of this model",
        ),
        ((CostCurve(Sublayer.ATTENTION, 4, (TIE,)),), "not of this model"),
    ]:
        with pytest.raises(PlanError, match=words):
            make(*wrong)
    with pytest.raises(PlanError, match="have no layout"):
        make(removed, neurons=None)
    whole = CostCurve(Sublayer.ATTENTION, 1, (replace(GONE, groups=(0, 1)),))
    assert make(whole).curves == (whole,)
    with pytest.raises(PlanError, match="both removes neurons and ties"):
        CostCurve(Sublayer.FFN, 1, (*tied.steps, *removed.steps))
