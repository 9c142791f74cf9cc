"""A model's layouts are found in one place, once, and are those of the dense model whatever a plan gave up."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import headshare as hs
from headshare.architecture import model_layouts
from headshare.architecture.config import text_config
from headshare.architecture.model_layouts import ModelLayouts
from headshare.architecture.recognition import attention_layout, ffn_layout
from headshare.checkpoint.layouts import layouts_of
from headshare.errors import ArchitectureError, PlanError
from headshare.evaluation.verify import verify
from headshare.plan.units import Kind, Part, Parts
from support import tiny

FORMAT = Path(__file__).parents[1] / "sharing" / "format"  # shared checkpoints of every kind
SOURCE = Path(hs.__file__).parent


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_each_family_has_the_layouts_that_its_names_and_shapes_say(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    config, found = text_config(dense.config), dense.layouts
    attention = attention_layout(config, dense.shapes)
    assert found.attention == attention
    assert found.units(Kind.ATTENTION, 1) == attention
    assert layouts_of(dense, Parts.parse("qkv")) == (attention,)
    if tiny.FAMILIES[name][2] is None:
        assert found.ffn is found.neurons is None
        assert found.all == (attention,)
        for refused in (found.ffn_in, lambda groups: found.units(Kind.FFN, groups)):
            with pytest.raises(ArchitectureError, match="Experts are left alone"):
                refused(1)
        return
    whole, halves = ffn_layout(config, dense.shapes), ffn_layout(config, dense.shapes, 2)
    assert found.ffn == whole
    assert found.all == (attention, whole)
    assert found.ffn_in(2) == found.units(Kind.FFN, 2) == halves
    assert layouts_of(dense, Parts.parse("qkv+ffn"), 2) == (attention, halves)
    neurons = found.neurons
    assert neurons is not None
    assert neurons.groups == whole.parts[Part.DOWN].rows == 2 * halves.parts[Part.DOWN].rows
    assert {place.rows for place in neurons.parts.values()} == {1}
    with pytest.raises(PlanError, match=f"{neurons.groups} neurons do not divide into 7 equal groups"):
        found.ffn_in(7)


@pytest.mark.parametrize("name", ["ties", "scaled", "factored", "removed", "everything"])
def test_a_shared_model_has_the_layouts_of_its_dense_model(name: str, tmp_path: Path) -> None:
    shared = hs.open_checkpoint(FORMAT / name)
    dense = hs.open_checkpoint(hs.expand(shared, tmp_path / "dense"))
    assert shared.shapes != dense.shapes
    assert shared.dense_shapes == dense.dense_shapes == dense.shapes
    assert shared.layouts == dense.layouts
    assert shared.layouts.all == dense.layouts.all


def test_a_feed_forward_is_found_beside_an_attention_that_is_not_known(llama: Path) -> None:
    dense = hs.open_checkpoint(llama)
    found = ModelLayouts({**text_config(dense.config), "num_attention_heads": None}, dense.shapes)
    assert found.ffn == dense.layouts.ffn is not None
    with pytest.raises(ArchitectureError, match="does not say how many attention heads"):
        _ = found.attention
    with pytest.raises(ArchitectureError, match="does not say how many attention heads"):
        _ = found.all


def test_a_checkpoints_layouts_are_found_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(layout: Callable[..., Any]) -> Callable[..., Any]:
        def find(*given: Any) -> Any:
            calls.append(layout.__name__)
            return layout(*given)

        return find

    for layout in (attention_layout, ffn_layout):
        monkeypatch.setattr(model_layouts, layout.__name__, counted(layout))
    dense = hs.open_checkpoint(llama)
    assert calls == []
    plan = hs.make_plan(hs.score_units(dense), 0.5)
    hs.estimate(dense, 0.5)
    shared = hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "shared"))
    assert verify(shared, dense).ok
    assert calls == ["attention_layout", "ffn_layout"]
    assert dense.layouts is dense.layouts
    assert hs.open_checkpoint(llama).layouts == dense.layouts


def test_layouts_are_found_nowhere_else() -> None:
    calling = re.compile(r"\b(attention|ffn)_layout\(")
    finding = {path.name for path in SOURCE.rglob("*.py") if calling.search(path.read_text())}
    assert finding == {"recognition.py", "model_layouts.py"}
