"""Calibration, plans and stock models that refits are given and compared with."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import headshare as hs
from headshare.architecture.config import text_config
from headshare.architecture.modules import module_path
from headshare.architecture.recognition import attention_layout, ffn_layout
from headshare.calibration.refit.result import Refit
from headshare.experiments.controls import overwrite_recipients
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.ties import Selection
from headshare.plan.units import Part, Sublayer
from headshare.text.tokens import Calibration
from support import tiny
from support.walks import ALL, hidden_states

WINDOWS, WINDOW = 32, 20


def calibration(windows: int = WINDOWS, window: int = WINDOW, seed: int = 3) -> Calibration:
    ids = torch.randint(5, tiny.VOCABULARY, (windows, window), generator=torch.Generator().manual_seed(seed))
    return Calibration(ids, False, "drawn", 0)


def dense_of(name: str, tmp_path: Path) -> hs.Checkpoint:
    return hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))


def plan_of(dense: hs.Checkpoint, kind: str) -> SharePlan:
    """Ties of layers 1 to 3 (a third to a half of their units) or removals in them."""
    if kind.startswith("removed"):
        return removing(dense, Sublayer.ATTENTION if kind.endswith("attention") else Sublayer.FFN)
    parts = kind.removeprefix("scaled ")
    if parts in ("ffn", "gateup", "down"):
        parts = "up" if parts == "gateup" and "gate" not in _gated(dense) else parts
        return hs.make_plan(hs.score_units(dense, parts=parts, ffn_groups=4), 0.3, parts=parts)
    plan = hs.make_plan(hs.score_units(dense, parts=parts), 0.4, parts=parts)
    selections = tuple(
        Selection(layout=one.layout, ties=one.ties, scale=kind.startswith("scaled")) for one in plan.selections
    )
    return SharePlan(model_type=plan.model_type, selections=selections)


def _gated(dense: hs.Checkpoint) -> set[str]:
    return {str(part) for part in ffn_layout(text_config(dense.config), dense.shapes).parts}


def removing(dense: hs.Checkpoint, kind: Sublayer) -> SharePlan:
    config = text_config(dense.config)
    layout = attention_layout(config, dense.shapes)
    if kind is Sublayer.FFN:
        place = ffn_layout(config, dense.shapes).parts[Part.DOWN]
        layout = ffn_layout(config, dense.shapes, place.shape[place.axis])
    most = max(1, layout.groups // 3)
    removed = {layer: random.Random(layer).sample(range(layout.groups), most) for layer in (1, 3)}
    return SharePlan(model_type=str(dense.config["model_type"]), removals=(Removal(layout=layout, removed=removed),))


def stock(dense: hs.Checkpoint, plan: SharePlan | None = None, found: Refit | None = None) -> Any:
    """The stock model in float32; with what a plan overwrites; and with refitted tensors."""
    name = next(key for key, (_, config, _) in ALL.items() if config.model_type == dense.config["model_type"])
    model = ALL[name][0].from_pretrained(dense.path, dtype=torch.float32).eval()
    if plan is not None:
        overwrite_recipients(model, plan)
    return model if found is None else refitted(model, found)


def refitted(model: Any, found: Refit) -> Any:
    """The model, with these tensors copied into it."""
    for key, tensor in found.tensors.items():
        if not key.endswith(("tie_scale", "factor_in", "factor_out")):
            stem, _, leaf = key.rpartition(".")
            getattr(model.get_submodule(module_path(model, f"{stem}.weight")), leaf).data.copy_(tensor)
    return model


def last_states(model: Any, tokens: Tensor) -> Tensor:
    """What leaves the last layer."""
    return hidden_states(model, tokens)[-1]


def missed(found: Tensor, wanted: Tensor) -> float:
    """Mean over tokens of the squared difference, relative to the token's size."""
    return float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


def same(first: Refit, second: Refit) -> bool:
    return (
        first.steps == second.steps
        and first.tensors.keys() == second.tensors.keys()
        and all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    )
