"""What llama.cpp calls the model types that it can run as they are: architectures, tensors, and where it differs.

A row is written down only where tests/integrations/test_gguf_runs.py shows that llama.cpp computes the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from headshare.plan.units import FFN_PARTS, Part

# its name, in messages
ENGINE = "llama.cpp"


@dataclass(frozen=True)
class FileArchitecture:
    """An architecture of llama.cpp, by the name that a GGUF file gives it.

    Attributes:
        name: of the architecture, and so the beginning of its keys.
        pairs: the two numbers of a head that are rotated together lie side by side, as rows of q and k. Elsewhere, and
            in transformers, they are half a head apart.
        biases: the parts that may have a bias.
        square: all heads together are as wide as the hidden state.
        varied: layers may have different counts of heads and of neurons.
    """

    name: str
    pairs: bool
    biases: frozenset[Part]
    square: bool = False
    varied: bool = False


_ALL = frozenset((Part.Q, Part.K, Part.V, Part.O, *FFN_PARTS))

# model types whose layers are all alike, by the name in `config.json`
ALIKE: Mapping[str, FileArchitecture] = {
    "llama": FileArchitecture("llama", pairs=True, biases=_ALL),
    "mistral": FileArchitecture("llama", pairs=True, biases=_ALL),
    "qwen2": FileArchitecture("qwen2", pairs=False, biases=frozenset((Part.Q, Part.K, Part.V)), square=True),
}
# the same model types where layers differ, or are not as wide as the hidden state though they should be
VARIED = FileArchitecture("deci", pairs=True, biases=_ALL, varied=True)

# modules of a layer, of the whole and of the parts, as the file calls them
PART_NAMES: Mapping[Part, str] = {
    Part.Q: "attn_q",
    Part.K: "attn_k",
    Part.V: "attn_v",
    Part.O: "attn_output",
    Part.GATE: "ffn_gate",
    Part.UP: "ffn_up",
    Part.DOWN: "ffn_down",
}
ATTENTION_NORM = ("input_layernorm", "attn_norm")
FFN_NORM = ("post_attention_layernorm", "ffn_norm")
LAST_NORM = ("norm", "output_norm")
EMBEDDING = "token_embd"
OUTPUT = "output"
ROTARY_FACTORS = "rope_freqs.weight"


def runs_as(model_type: str) -> FileArchitecture | None:
    """The architecture of a model of this type whose layers are all alike; None where there is no row for it."""
    return ALIKE.get(model_type)
