"""Tiny checkpoints of every kind of plan, to be rounded."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import headshare as hs
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.plan.low_rank import LowRankUnits
from headshare.plan.narrow_values import NarrowValues
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.section import Section
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Tie
from support import tiny

MODEL = "model.safetensors"


def tie(*four: int) -> Tie:
    return Tie(HeadUnit(*four[:2]), HeadUnit(*four[2:]))


def of_kind(dense: Checkpoint, kind: str) -> SharePlan:
    """A plan of each kind: one that ties in the first layers, one that removes, one that makes and narrows."""
    units, neurons = dense.layouts.attention, dense.layouts.neurons
    assert neurons is not None
    some = {layer: random.Random(layer).sample(range(neurons.groups), 15) for layer in (0, 2)}
    last = units.groups - 1
    ranks = {1: [3], 2: [2] * units.groups}
    sections: dict[str, Callable[[], list[Section]]] = {
        "nothing": list,
        "ties": lambda: [
            Selection(layout=units.only((Part.Q, Part.K, Part.V)), ties=(tie(2, 0, 0, last), tie(3, last, 0, last))),
            Selection(layout=units.only((Part.O,)), ties=(tie(1, last, 0, 0), tie(3, 0, 0, 0)), scale=True),
            Selection(layout=dense.layouts.ffn_in(2), ties=(tie(3, 1, 1, 0),)),
        ],
        "removals": lambda: [
            Removal(layout=units, removed={0: [last], 3: range(units.groups)}),
            Removal(layout=neurons, removed={**some, 3: range(neurons.groups)}),
        ],
        "low_rank": lambda: [
            LowRankUnits(layout=units.only((Part.O,)), units={1: [0], 2: range(units.groups)}, ranks=ranks),
        ],
        "narrow_values": lambda: [
            NarrowValues(layout=units.only((Part.V, Part.O)), widths={0: 5, 2: 3}),
            Removal(layout=units, removed={0: [last]}),
            Removal(layout=neurons, removed=some),
        ],
    }
    return SharePlan.of_sections(sections[kind](), str(dense.config["model_type"]))


def shared_by(kind: str, name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A shared checkpoint of a tiny model by a plan of this kind. Scales of ties are not all one."""
    dense = hs.open_checkpoint(tiny.make(name, folder / "dense", dtype=dtype))
    out = hs.share(dense, of_kind(dense, kind)).save(folder / "shared")
    tensors = load_file(out / MODEL)
    for key in [key for key in tensors if key.endswith("tie_scale")]:
        tensors[key] = torch.linspace(0.5, 2, tensors[key].numel()).to(tensors[key])
    save_file(tensors, out / MODEL, metadata={"format": "pt"})
    (out / "headshare.json").unlink()
    return hs.open_checkpoint(out)


@torch.no_grad()
def outputs(model: Any, tokens: Tensor | None = None) -> Tensor:
    found = model(input_ids=tiny.tokens(2, 10) if tokens is None else tokens)
    logits: Tensor = found.logits if hasattr(found, "logits") else found[0]
    return logits
