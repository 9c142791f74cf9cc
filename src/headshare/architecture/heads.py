"""The counts of a model's attention, as its configuration gives them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headshare.architecture.families import family_of

# settings under which families give their count of layers
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class Heads:
    """Counts of a model's attention and the size of one head; None where the configuration does not say."""

    layers: int | None
    query_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden: int | None


def heads_of(config: Mapping[str, Any]) -> Heads:
    """The head counts of a configuration, whatever names the family gives them."""
    query_heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    return Heads(
        layers=_first(config, *LAYER_COUNTS),
        query_heads=query_heads,
        kv_heads=_kv_heads(config, query_heads),
        head_dim=_first(config, "head_dim"),
        hidden=_first(config, "hidden_size", "n_embd", "d_model"),
    )


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _kv_heads(config: Mapping[str, Any], query_heads: int | None) -> int | None:
    family = family_of(str(config.get("model_type")))
    multi_query = None if family is None else family.multi_query
    if multi_query is not None and not config.get(multi_query.unless):
        return 1 if config.get(multi_query.setting, True) else query_heads
    return _first(config, "num_key_value_heads", "num_kv_heads") or query_heads
