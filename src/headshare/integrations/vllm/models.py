"""A model class for layers of different widths, which vLLM's own Llama has not."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from headshare.errors import StorageError
from headshare.integrations.vllm.widths import LayerWidth, layer_width

NO_ADAPTERS = (
    "vLLM cannot add adapters to this model: its layers lost heads or neurons, which an adapter's matrices still have. "
    "Start it without adapters; or give vLLM the stock folder that headshare expand writes, which takes them."
)


class AbsentAttention(nn.Module):
    """Attention of which a plan removed all units: it gives the output projection's bias, or zeros, and caches nothing.

    Its arguments are those of vLLM's attention.
    """

    def __init__(self, *, hidden_size: int, bias_o_proj: bool = False, **_: Any) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size), requires_grad=False) if bias_o_proj else None

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:  # noqa: ARG002 - the signature is vLLM's
        """The bias for each token, or zeros."""
        zeros = torch.zeros_like(hidden_states)
        return zeros if self.bias is None else zeros + self.bias

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take the bias, and pass over matrices without rows."""
        names = set()
        for name, loaded in weights:
            if name == "o_proj.bias" and self.bias is not None:
                self.bias.data.copy_(loaded)
            names.add(name)
        return names


class ReducedDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]  # vLLM is not typed
    """A layer of a Llama-like model with as many units and neurons as its plan leaves it."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        config = config or vllm_config.model_config.hf_config
        dense = LayerWidth(config.num_key_value_heads, config.intermediate_size)
        ranks = get_tensor_model_parallel_world_size()
        width = layer_width(vllm_config.quant_config.entry.plan, extract_layer_index(prefix), dense, ranks)
        heads = config.num_attention_heads
        config = copy.copy(config)
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        config.num_attention_heads = heads // dense.units * width.units
        config.num_key_value_heads = width.units
        config.intermediate_size = width.neurons
        attention = LlamaAttention if width.units else AbsentAttention
        super().__init__(vllm_config, prefix, config, attn_layer_type=attention)


class ReducedForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A Llama-like model whose layers have the widths that its plan says.

    Raises:
        StorageError: if vLLM is to take adapters, whose own matrices would have to lose the same rows.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.lora_config is not None:
            raise StorageError(NO_ADAPTERS)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=ReducedDecoderLayer)
