"""Orders in which units are given up, and their prices, as values and as JSON."""

from dataclasses import replace
from pathlib import Path as Folder

import pytest

from headshare.architecture.config import text_config
from headshare.architecture.recognition import attention_layout, ffn_layout
from headshare.calibration.costs.actions import FACTORED, GATEUP, QKV, REMOVE
from headshare.calibration.costs.curves import Path, Prices, Step, paths_from_json, paths_to_json
from headshare.errors import PlanError
from headshare.plan.layout import Layout
from headshare.plan.units import HeadUnit, Kind
from support.priced import opened

TIE = Step(QKV, (1,), 0.1, 100, ((HeadUnit(0, 1), 0.1), (HeadUnit(0, 0), 1 / 3)))
GONE = Step(REMOVE, (0,), -1e-300, 100)


def test_paths_come_back_from_json_to_the_last_bit() -> None:
    factored = replace(TIE, action=FACTORED, groups=(2,), rank=8)
    paths = [Path(Kind.ATTENTION, 1, (TIE, GONE, factored)), Path(Kind.FFN, 1, (replace(GONE, groups=(4, 7)),))]
    assert paths_from_json(paths_to_json(paths)) == paths
    assert paths_from_json(paths_to_json([])) == []


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
        ('"form":"qkv"', '"form":"factored"', "has a rank if it is factored"),
        ('"rank":0', '"rank":1', "has a rank if it is factored"),
        ('"rank":0', '"rank":-1', "has a rank if it is factored"),
        ('"rank":0', '"rank":"1"', "0.steps.0.rank"),
    ],
)
def test_json_that_is_not_of_paths_is_refused(old: str, new: str, words: str) -> None:
    text = paths_to_json([Path(Kind.ATTENTION, 1, (TIE, GONE))])
    assert old in text
    with pytest.raises(PlanError, match=words):
        paths_from_json(text.replace(old, new, 1))


def test_prices_that_contradict_their_layouts_cannot_be_made(tmp_path: Folder) -> None:
    checkpoint = opened("llama-gqa", tmp_path)
    config = text_config(checkpoint.config)
    attention, groups = attention_layout(config, checkpoint.shapes), ffn_layout(config, checkpoint.shapes, 2)
    layouts = {Kind.ATTENTION: attention, Kind.FFN: groups}
    neurons = ffn_layout(config, checkpoint.shapes, 48)
    donors = ((HeadUnit(0, 0), 0.1),)

    def make(*paths: Path, neurons: Layout | None = neurons) -> Prices:
        return Prices("llama", layouts, paths, neurons)

    tied = Path(Kind.FFN, 1, (Step(GATEUP, (1,), 0.1, 9, donors),))
    removed = Path(Kind.FFN, 2, (replace(GONE, groups=(40,)),))
    assert make(tied).layout_of(tied) == groups
    assert make(removed).layout_of(removed) == neurons
    several = (tied, replace(tied, steps=(replace(tied.steps[0], groups=(0,)),)))
    assert make(*several).paths == several
    for wrong, words in [
        ((tied, removed), "one or the other"),
        ((tied, replace(removed, layer=1)), "one or the other"),
        ((Path(Kind.ATTENTION, 1, (TIE,)), Path(Kind.ATTENTION, 1, (replace(TIE, groups=(7,)),))), "not of this model"),
        ((Path(Kind.ATTENTION, 4, (TIE,)),), "not of this model"),
        ((Path(Kind.ATTENTION, 1, (replace(GONE, groups=(0, 1)),)),), "keep one"),
    ]:
        with pytest.raises(PlanError, match=words):
            make(*wrong)
    with pytest.raises(PlanError, match="have no layout"):
        make(removed, neurons=None)
    with pytest.raises(PlanError, match="both removes neurons and ties"):
        Path(Kind.FFN, 1, (*tied.steps, *removed.steps))
