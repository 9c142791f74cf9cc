"""Stock models whose hidden states are seen layer by layer, of more families than are shared in tests."""

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from support import tiny

MORE: dict[str, tuple[type, Any, str | None]] = {
    "granite": (tf.GraniteForCausalLM, tf.GraniteConfig(**tiny.GROUPED, residual_multiplier=0.3), "ffn"),
    "electra": (tf.ElectraModel, tf.ElectraConfig(**tiny.COMMON, embedding_size=32), "ffn"),
    "olmo2": (tf.Olmo2ForCausalLM, tf.Olmo2Config(**tiny.GROUPED), "ffn"),
    "opt-post-norm": (tf.OPTForCausalLM, tf.OPTConfig(**tiny.OPT, do_layer_norm_before=False), "ffn"),
    "stablelm-parallel": (
        tf.StableLmForCausalLM,
        tf.StableLmConfig(**tiny.COMMON, num_key_value_heads=4, use_parallel_residual=True),
        "ffn",
    ),
}
ALL = {**tiny.FAMILIES, **MORE}


def layers_in(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 4)


def hidden_states(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """What enters the model's first layer, and what leaves each."""
    found: list[Tensor] = []

    def enters(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).clone())

    def leaves(_: nn.Module, __: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    layers = layers_in(model)
    handles = [layers[0].register_forward_pre_hook(enters, with_kwargs=True)]
    handles += [layer.register_forward_hook(leaves) for layer in layers]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return [state.reshape(*tokens.shape, -1) for state in found]
