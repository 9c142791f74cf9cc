"""Rotary positions as llama.cpp computes them: its keys, and the factors by which frequencies are divided."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headshare.architecture.llama_cpp import ENGINE
from headshare.errors import ArchitectureError

# kinds whose frequencies llama.cpp computes from the same settings
_PLAIN = "default"
_LINEAR = "linear"
_YARN = "yarn"
_BY_LENGTH = "llama3"
_YARN_AS_USUAL = {"beta_fast": 32, "beta_slow": 1, "mscale": 0, "mscale_all_dim": 0, "truncate": True}


@dataclass(frozen=True)
class Rotary:
    """Keys of the file below the architecture's name, and one factor for each pair of numbers where there are any."""

    keys: Mapping[str, Any]
    factors: Float[Tensor, " pairs"] | None = field(default=None, compare=False)


def rotary_of(config: Mapping[str, Any], head_dim: int) -> Rotary:
    """The rotary positions of a configuration whose heads have so many numbers.

    Raises:
        ArchitectureError: if llama.cpp does not compute them so.
    """
    settings = config.get("rope_parameters")
    settings = dict(settings) if isinstance(settings, Mapping) else {}
    kind = settings.get("rope_type", _PLAIN)
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ArchitectureError(f"only a part of each head is rotated, and {ENGINE}'s architecture rotates all of it.")
    keys: dict[str, Any] = {
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(settings.get("rope_theta", 10000.0)),
    }
    if kind == _PLAIN:
        return Rotary(keys)
    if kind == _LINEAR:
        return Rotary({**keys, "rope.scaling.type": kind, "rope.scaling.factor": float(settings["factor"])})
    if kind == _YARN:
        return Rotary({**keys, **_yarn(settings, config)})
    if kind == _BY_LENGTH:
        return Rotary(keys, _factors_by_length(settings, keys["rope.freq_base"], head_dim))
    raise ArchitectureError(
        f"positions are of kind {kind!r:.40}; headshare writes {_PLAIN}, {_LINEAR}, {_YARN} and {_BY_LENGTH} to GGUF."
    )


def _yarn(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of YaRN (Peng et al., arXiv 2309.00071). What llama.cpp computes otherwise is refused."""
    for name, usual in _YARN_AS_USUAL.items():
        if settings.get(name) not in (None, usual):
            raise ArchitectureError(
                f"YaRN has {name} {settings[name]!r:.40} here; {ENGINE} computes it as if that were {usual}."
            )
    factor = float(settings["factor"])
    length = settings.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    keys = {"type": _YARN, "factor": factor, "original_context_length": int(length or 0)}
    # llama.cpp multiplies by the usual factor, and by what is left of another
    scale = settings.get("attention_factor")
    keys |= {} if scale is None else {"attn_factor": float(scale) / (0.1 * math.log(factor) + 1.0)}
    return {f"rope.scaling.{name}": value for name, value in keys.items()}


def _factors_by_length(settings: Mapping[str, Any], base: float, head_dim: int) -> Float[Tensor, " pairs"]:
    """The factors of Llama 3.1: long waves are stretched, short ones stay, and those between are in between."""
    factor = settings["factor"]
    length = settings["original_max_position_embeddings"]
    low = settings["low_freq_factor"]
    high = settings["high_freq_factor"]
    frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = length * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors.to(torch.float32)
