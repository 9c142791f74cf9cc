"""What vLLM's model classes are known to do with the model types of shared checkpoints.

A row is written down only where tests/vllm shows that vLLM computes the same.
"""

from collections.abc import Mapping

# its name, in messages
ENGINE = "vLLM"

# model types that vLLM's own classes compute as transformers does: true where headshare has a class for layers of
# different widths, false where what was removed comes back as zeros
SERVED: Mapping[str, bool] = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False}

# settings of these types under which vLLM's class has more in a layer than headshare's
UNLESS = ("llama_4_scaling", "ada_rms_norm_t_cond")
