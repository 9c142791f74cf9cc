"""A whole sublayer has a cost curve of one step, which a plan under a budget follows."""

import json
from pathlib import Path

import pytest
import torch

import headshare as hs
from headshare.calibration.budget import Budget
from headshare.calibration.choose import plan_on, prices_on
from headshare.calibration.costs.actions import AUTO_ACTIONS, NARROW_VALUES, QKV, REMOVE, SUBLAYERS
from headshare.calibration.costs.local import price_units
from headshare.calibration.costs.measured import EVERY
from headshare.calibration.refit.run import refit
from headshare.errors import OptionError
from headshare.evaluation.verify import verify
from headshare.integrations.transformers.loading import load_model
from headshare.plan.units import Sublayer
from support import tiny
from support.priced import calibration, opened

WHOLE = {Sublayer.ATTENTION: "self_attn.o_proj", Sublayer.FFN: "mlp.down_proj"}


def test_the_step_costs_what_the_sublayer_gives_and_saves_all_of_it(tmp_path: Path) -> None:
    dense = opened("llama-gqa", tmp_path)
    text = calibration()
    prices = price_units(dense, text, [SUBLAYERS], tokens=text.tokens.numel(), held_out=0.0)
    assert [(curve.kind, curve.layer) for curve in prices.curves] == [
        (kind, layer)
        for layer in range(4)
        for kind in (Sublayer.ATTENTION, Sublayer.FFN)
        if (kind, layer) != (Sublayer.ATTENTION, 0)
    ]
    model = load_model(dense)
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "post_attention_layernorm")):
            module.register_forward_hook(
                lambda _, args, out, name=name: outputs.update({name: out, f"{name}.in": args[0]})
            )
    with torch.no_grad():
        hidden = model(input_ids=text.mixed().tokens, output_hidden_states=True).hidden_states
    for curve in prices.curves:
        at = f"model.layers.{curve.layer}"
        given = outputs[f"{at}.{WHOLE[curve.kind]}"]
        # the last layer's hidden states are given after the final norm
        before_norm = outputs[f"{at}.post_attention_layernorm.in"]
        after = before_norm if curve.kind is Sublayer.ATTENTION else before_norm + given
        share = (given.square().sum(-1) / after.square().sum(-1)).mean()
        (step,) = curve.steps
        assert step.price == pytest.approx(float(share), rel=1e-4)
        assert len(step.groups) == prices.layout_of(curve).groups
    assert len(hidden) == 5


def test_the_measured_cost_is_what_a_stock_model_loses_without_the_sublayer(tmp_path: Path) -> None:
    dense = opened("llama-gqa", tmp_path)
    text = calibration()
    windows = text.mixed().tokens[-2:]
    for curve in prices_on(dense, text, (SUBLAYERS,)).curves:
        expected, found = load_model(dense), load_model(dense)
        with torch.no_grad():
            found.get_submodule(f"model.layers.{curve.layer}.{WHOLE[curve.kind]}").weight.zero_()
            p, q = (one(input_ids=windows).logits[:, ::EVERY].log_softmax(-1) for one in (expected, found))
        lost = (p.exp() * (p - q)).sum(-1).mean()
        assert curve.steps[0].price == pytest.approx(float(lost), rel=1e-2, abs=1e-7)


def test_a_plan_of_such_steps_saves_their_bytes_and_verifies(tmp_path: Path) -> None:
    dense = opened("llama-gqa", tmp_path)
    chosen = plan_on(dense, calibration(), Budget.parse(dense, save="15%", parts="none", allow=["sublayers"]))
    assert chosen.plan.removals
    assert all(len(each.whole_layers) == len(each.removed) for each in chosen.plan.removals)
    shared = refit(hs.share(dense, chosen.plan), calibration())
    assert shared.estimate.saved_bytes == chosen.saved_bytes
    assert verify(hs.open_checkpoint(shared.save(tmp_path / "shared")), dense).ok


def test_the_first_attention_of_each_kind_stays(tmp_path: Path) -> None:
    folder = tiny.make("gemma3", tmp_path / "gemma3")
    config = json.loads((folder / "config.json").read_text())
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": kinds}))
    dense = hs.open_checkpoint(folder)
    curves = price_units(dense, calibration(), [SUBLAYERS]).curves
    gone = {curve.layer for curve in curves if curve.kind is Sublayer.ATTENTION}
    assert gone == {2, 3}


def test_attention_that_cannot_lose_single_units_can_go_whole(tmp_path: Path) -> None:
    dense = opened("llama-mqa", tmp_path)
    curves = price_units(dense, calibration(), [REMOVE, SUBLAYERS]).curves
    actions = {action for curve in curves if curve.kind is Sublayer.ATTENTION for action in curve.actions}
    assert actions == {SUBLAYERS}


def test_nothing_to_share_and_nothing_allowed_is_refused(tmp_path: Path) -> None:
    dense = opened("llama-gqa", tmp_path)
    with pytest.raises(OptionError, match="nothing is shared and nothing else is allowed"):
        Budget.parse(dense, save="10%", parts="none", allow=[])
    assert Budget.parse(dense, save="10%", parts="none", allow=["remove"]).actions == (REMOVE,)
    assert Budget.parse(dense, save="10%", parts="qkv", allow=[]).actions == (QKV,)


def test_bytes_are_saved_without_ties_unless_they_are_asked_for(tmp_path: Path) -> None:
    dense = opened("llama-gqa", tmp_path)
    assert Budget.parse(dense, save="10%").actions == (REMOVE, SUBLAYERS, NARROW_VALUES)
    assert Budget.parse(dense, save="10%", allow=["remove"]).actions == (REMOVE,)
    assert Budget.parse(dense, save="10%", allow=[]).actions == AUTO_ACTIONS
    assert Budget.parse(dense, save="10%", parts="auto", allow=["remove"]).actions == (*AUTO_ACTIONS, REMOVE)
    assert Budget.parse(dense, ratio=0.3, allow=["remove"]).actions == (*AUTO_ACTIONS, REMOVE)
