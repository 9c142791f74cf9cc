"""The entry point that vLLM calls in each of its processes."""

from importlib.util import find_spec

# the name by which vLLM finds the class for layers of different widths
REDUCED = "HeadshareReducedForCausalLM"


def register() -> None:
    """Tell vLLM of the format. It may be called again, touches no device, and does nothing where there is no vLLM."""
    if find_spec("vllm") is None:
        return
    from vllm import ModelRegistry

    import headshare.integrations.vllm.quantization  # noqa: F401 - it registers its class

    if REDUCED not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(REDUCED, "headshare.integrations.vllm.models:ReducedForCausalLM")
