"""The norm before a layer's attention, whose scale multiplies what its queries and keys read.

Rows here go with those of the families' table, by their names. A model that no row lists is taken for one of the family
whose tensors' names it has, as it is for its layout.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headshare.architecture.families import FAMILIES, Family, family_of
from headshare.plan.layout import Layout
from headshare.plan.units import Part

# modules of a layer that are that norm, the first that it has; families without an entry have none in the layer
_NORMS: Mapping[str, tuple[str, ...]] = {
    "llama": ("input_layernorm",),
    "phi3": ("input_layernorm",),
    "baichuan": ("input_layernorm",),
    "gpt2": ("ln_1",),
    "gpt_neox": ("input_layernorm",),
    "falcon": ("input_layernorm", "ln_attn"),
    "opt": ("self_attn_layer_norm",),
}
# a setting that is false where the norm stands behind the attention
_BEFORE = "do_layer_norm_before"
# model types that add one to the scale of a norm
_PLUS_ONE = frozenset(("gemma", "gemma2", "gemma3", "gemma3_text"))


@dataclass(frozen=True)
class InputNorm:
    """The norm before the attention: the name of its scale, with `{layer}` for the layer's number, and what the model
    adds to that scale."""

    scale: str
    offset: float = 0.0

    def name(self, layer: int) -> str:
        """The name of the scale in that layer."""
        return self.scale.replace("{layer}", str(layer))


def input_norm(config: Mapping[str, Any], layout: Layout, tensors: Iterable[str]) -> InputNorm | None:
    """The norm before the attention of a model with this (text) configuration, attention layout and tensors' names.

    None where there is no norm in the layer before its attention (BERT, OLMo 2), or it has no scale (OLMo).
    """
    if config.get(_BEFORE) is False:
        return None
    model_type = str(config.get("model_type"))
    family = family_of(model_type) or _alike(layout)
    names = frozenset(tensors)
    prefix = layout.parts[Part.Q].tensor.partition("{layer}")[0]
    norms = [InputNorm(f"{prefix}{{layer}}.{path}.weight") for path in _NORMS.get(family.name, ())]
    found = next((norm for norm in norms if norm.name(0) in names), None)
    return InputNorm(found.scale, 1.0) if found is not None and model_type in _PLUS_ONE else found


def _alike(layout: Layout) -> Family:
    """The first family whose layers are called as those of this layout."""
    end = layout.parts[Part.O].tensor
    return next(family for family in FAMILIES if end.endswith(f"{family.layer}.{family.o}.weight"))
