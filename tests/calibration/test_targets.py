"""Budgets for a format: only what it keeps is given up, and neurons go in its blocks."""

from pathlib import Path

import pytest

import headshare as hs
from headshare.calibration.budget import Budget
from headshare.calibration.run import plan_calibrated
from headshare.calibration.settings import CalibrationSettings
from headshare.calibration.targets import TARGETS
from headshare.defaults import TARGET_NAMES
from headshare.errors import ArchitectureError, OptionError
from headshare.plan.units import Sublayer
from headshare.shrinking.request import ShrinkRequest
from support import tiny
from support.gguf_models import TEXTS, make


def test_a_budget_for_gguf_removes_units_and_sublayers_and_neurons_in_blocks(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "model", intermediate_size=96))
    budget = Budget.parse(dense, save="10%", target="gguf")
    assert ([action.name for action in budget.actions], budget.multiple) == (["remove", "sublayers"], 32)
    assert Budget.parse(dense, save="10%", target="gguf", multiple=48).multiple == 48
    assert [a.name for a in Budget.parse(dense, save="10%", target="gguf", allow=["remove"]).actions] == ["remove"]
    assert Budget.parse(dense, ratio=0.3, target="gguf").saved_bytes == Budget.parse(dense, parts="auto").saved_bytes
    assert ShrinkRequest(save="10%", target="gguf").budget(dense).actions == budget.actions
    narrower = hs.open_checkpoint(tiny.make_llama(tmp_path / "narrower"))
    assert Budget.parse(narrower, save="10%", target="gguf").multiple == 16  # of 48 neurons


def test_what_a_target_does_not_keep_is_refused(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "model"))
    with pytest.raises(OptionError, match="'narrow_values' saves nothing in gguf, which keeps remove, sublayers"):
        Budget.parse(dense, save="10%", target="gguf", allow=["remove", "narrow_values"])
    with pytest.raises(OptionError, match="what is shared saves nothing in gguf"):
        Budget.parse(dense, save="10%", target="gguf", parts="qkv")
    with pytest.raises(OptionError, match=r"there is no target 'onnx'\. There are: gguf"):
        Budget.parse(dense, save="10%", target="onnx")
    phi = hs.open_checkpoint(tiny.make("phi3", tmp_path / "phi"))
    with pytest.raises(ArchitectureError, match="is a 'phi3' model"):
        Budget.parse(phi, save="10%", target="gguf")
    assert tuple(TARGETS) == TARGET_NAMES


def test_what_is_planned_for_gguf_is_kept_there_to_the_byte(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(make("llama", tmp_path / "model"))
    (tmp_path / "text").write_text(" ".join(TEXTS * 12))
    settings = CalibrationSettings(str(tmp_path / "text"), 512, 32)
    budget = Budget.parse(dense, save="15%", target="gguf")
    plan = plan_calibrated(dense, budget, settings, tmp_path / "plan.json", measured=False).chosen.plan
    kinds = {removal.layout.kind: removal for removal in plan.removals}
    assert (plan.ties, plan.factored, plan.narrow_values) == (0, (), None)
    assert all(len(kinds[Sublayer.FFN].indices(layer)) % 32 == 0 for layer in kinds[Sublayer.FFN].removed)
    shared = hs.share(dense, plan)
    with hs.open_checkpoint(shared.save(tmp_path / "out")) as checkpoint:
        made = hs.export_gguf(checkpoint, tmp_path / "out.gguf", dtype="f32")
    assert made.dense_bytes - made.tensor_bytes == shared.estimate.saved_bytes - made.given_back.all
    assert made.given_back.all <= 4 * 32 * 3 * 64 * 4  # zeros of layers without neurons, if there are any
