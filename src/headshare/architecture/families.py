"""Model families as rows of data: where a layer keeps q, k, v, o and its feed-forward, and how they are fused.

To add a family, add a row here and a tiny config to tests/support/tiny.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Separate:
    """Three matrices; unit after unit along the output axis of each."""

    q: str
    k: str
    v: str


@dataclass(frozen=True)
class Stacked:
    """One matrix: all of q, then all of k, then all of v."""

    qkv: str


@dataclass(frozen=True)
class Interleaved:
    """One matrix: unit after unit, each with its own q, k and v."""

    qkv: str


@dataclass(frozen=True)
class Gated:
    """gate and up side by side, then down."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class GatedStacked:
    """One matrix with all of gate and then all of up, then down."""

    gate_up: str
    down: str


@dataclass(frozen=True)
class Plain:
    """up, a nonlinearity, down."""

    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """One row: module paths below one layer. `layer` is the layer's own path, after any prefix.

    `in_out` is true where weights are stored (input, output), as GPT-2's Conv1D does; `post_norm` where each half of
    the layer ends in a norm of its output plus its input, as in BERT.
    """

    name: str
    model_types: tuple[str, ...]
    layer: str
    qkv: Separate | Stacked | Interleaved
    o: str
    ffn: Gated | GatedStacked | Plain
    in_out: bool = False
    post_norm: bool = False


_LLAMA_QKV = Separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA_FFN = Gated("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_BERT_QKV = Separate("attention.self.query", "attention.self.key", "attention.self.value")
_BERT_FFN = Plain("intermediate.dense", "output.dense")
_NEOX_FFN = Plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",
        model_types=(
            *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
            *("gemma", "gemma2", "gemma3", "gemma3_text", "smollm3", "olmo", "olmo2", "granite"),
        ),
        layer="layers.{layer}",
        qkv=_LLAMA_QKV,
        o="self_attn.o_proj",
        ffn=_LLAMA_FFN,
    ),
    Family(
        name="phi3",
        model_types=("phi3",),
        layer="layers.{layer}",
        qkv=Stacked("self_attn.qkv_proj"),
        o="self_attn.o_proj",
        ffn=GatedStacked("mlp.gate_up_proj", "mlp.down_proj"),
    ),
    Family(
        name="baichuan",
        model_types=("baichuan",),
        layer="layers.{layer}",
        qkv=Stacked("self_attn.W_pack"),
        o="self_attn.o_proj",
        ffn=_LLAMA_FFN,
    ),
    Family(
        name="gpt2",
        model_types=("gpt2",),
        layer="h.{layer}",
        qkv=Stacked("attn.c_attn"),
        o="attn.c_proj",
        ffn=Plain("mlp.c_fc", "mlp.c_proj"),
        in_out=True,
    ),
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        layer="layers.{layer}",
        qkv=Interleaved("attention.query_key_value"),
        o="attention.dense",
        ffn=_NEOX_FFN,
    ),
    Family(
        name="falcon",
        model_types=("falcon",),
        layer="h.{layer}",
        qkv=Interleaved("self_attention.query_key_value"),
        o="self_attention.dense",
        ffn=_NEOX_FFN,
    ),
    Family(
        name="opt",
        model_types=("opt",),
        layer="layers.{layer}",
        qkv=_LLAMA_QKV,
        o="self_attn.out_proj",
        ffn=Plain("fc1", "fc2"),
    ),
    Family(
        name="bert",
        model_types=("bert", "roberta", "xlm-roberta"),
        layer="layer.{layer}",
        qkv=_BERT_QKV,
        o="attention.output.dense",
        ffn=_BERT_FFN,
        post_norm=True,
    ),
    Family(
        name="mpnet",
        model_types=("mpnet",),
        layer="layer.{layer}",
        qkv=Separate("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        o="attention.attn.o",
        ffn=_BERT_FFN,
        post_norm=True,
    ),
)


@dataclass(frozen=True)
class Counts:
    """What an attention module counts its heads by, all in proportion to them: attributes of its own, and settings that
    it reads from the model's configuration. Not with `unless`: a setting under which more depends on their number.
    """

    attributes: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    unless: str | None = None


# Model types whose attention works in layers that have fewer heads than others: tests/test_removed_units.py shows it.
# Most reshape by the size of a head, and so count nothing.
ATTENTION_COUNTS: Mapping[str, Counts] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), Counts()),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "smollm3", "olmo", "granite", "gpt_neox"), Counts()),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), Counts()),
    "phi3": Counts(attributes=("num_key_value_heads",), settings=("num_attention_heads",)),
    "gpt2": Counts(attributes=("num_heads", "split_size")),
    "falcon": Counts(attributes=("num_heads", "num_kv_heads"), unless="alibi"),
    "opt": Counts(attributes=("num_heads",)),
}


def family_of(model_type: str) -> Family | None:
    """The row that lists this model type, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


@dataclass(frozen=True)
class Heads:
    """What a configuration says of its attention: counts, and the size of one head (None where it is silent)."""

    layers: int | None
    query_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden: int | None


def heads_of(config: Mapping[str, Any]) -> Heads:
    """Read the head counts from a configuration, whatever names the family gives them."""
    query_heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    return Heads(
        layers=_first(config, "num_hidden_layers", "n_layer", "num_layers"),
        query_heads=query_heads,
        kv_heads=_kv_heads(config, query_heads),
        head_dim=_first(config, "head_dim"),
        hidden=_first(config, "hidden_size", "n_embd", "d_model"),
    )


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _kv_heads(config: Mapping[str, Any], query_heads: int | None) -> int | None:
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else query_heads
    return _first(config, "num_key_value_heads", "num_kv_heads") or query_heads
