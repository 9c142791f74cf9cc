"""What vLLM's model classes are known to do with the model types of shared checkpoints.

tests/integrations/test_vllm.py shows for each row that vLLM computes the same.
"""

from collections.abc import Mapping

# its name, in messages
ENGINE = "vLLM"

# model types that vLLM's own classes compute as transformers does. With each, the class that headshare replaces by one
# whose layers have different widths; None where what was removed comes back as zeros
SERVED: Mapping[str, str | None] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": None,
    "qwen3": None,
}

# settings of these types under which vLLM's class has more in a layer than headshare's
UNLESS = ("llama_4_scaling", "ada_rms_norm_t_cond")
