"""Shared checkpoints of several layouts, loaded in any storage beside a stock model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import headshare as hs
from headshare.experiments.controls import overwrite_recipients
from headshare.integrations.transformers.loading import load_model
from headshare.plan.plan import SharePlan
from headshare.plan.ties import Selection
from headshare.storage.owner import OwnerProjection
from headshare.storage.pooled.frozen import FrozenProjection
from headshare.storage.projection import shared_projections
from support import tiny

Q = "model.layers.0.self_attn.q_proj.weight"
PAGED = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": 5, "attention_bias": True}  # 64 rows fill pages


@dataclass(frozen=True)
class Case:
    """A dense checkpoint, what it was shared to, and the plan between them."""

    dense: Path
    shared: Path
    plan: SharePlan

    def load(self, storage: str = "alias", **options: Any) -> Any:
        return load_model(hs.open_checkpoint(self.shared), storage=storage, **options)

    def stock(self, **options: Any) -> Any:
        """A stock model with donors' rows written over recipients': what we did not write, to compare with."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.dense, **options).eval()
        overwrite_recipients(model, self.plan)
        return model


def make_case(folder: Path, dense: Path, parts: str, ratio: float, *, scale: bool = False, **scoring: Any) -> Case:
    checkpoint = hs.open_checkpoint(dense)
    plan = hs.make_plan(hs.score_units(checkpoint, parts=parts, **scoring), ratio, parts=parts)
    if scale:
        selections = tuple(
            Selection(layout=s.layout, ties=s.ties, scale=True, chosen=s.chosen) for s in plan.selections
        )
        plan = SharePlan(model_type=plan.model_type, selections=selections)
    return Case(dense, hs.share(checkpoint, plan).save(folder / "shared"), plan)


def build(kind: str, folder: Path) -> Case:
    if kind == "paged":  # q, k, v are mapped from the checkpoint's own file; o, being columns, stands in the arena
        return make_case(folder, tiny.make_llama(folder / "dense", **PAGED), "qkvo", 0.4)
    if kind == "padded":
        return make_case(folder, tiny.make_llama(folder / "dense"), "qkvo+ffn", 0.5, ffn_groups=2)
    if kind == "scaled":
        return make_case(folder, tiny.make_llama(folder / "dense"), "qkvo", 0.5, scale=True)
    return make_case(folder, tiny.make(kind, folder / "dense"), "qkvo+ffn", 0.5, ffn_groups=2)


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens(), **options).logits


def assert_equal_to_rounding(found: Tensor, expected: Tensor) -> None:
    """Columns of o and down lie otherwise in memory than stock's, and for float16 and float64 some processors then add
    in another order. What is not shared is off by four times this bound at least, in bfloat16, else by thirty."""
    ends = torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * ends)


def kinds_of(model: nn.Module) -> set[str]:
    names = {FrozenProjection: "alias", OwnerProjection: "owner"}
    return {name for _, one in shared_projections(model) for kind, name in names.items() if isinstance(one, kind)}


def stored_bytes(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {name: (t.dtype, t.shape, t.flatten().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}
