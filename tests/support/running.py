"""Ways in which a shared model is run: with layers on disk, and compiled."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import transformers

_COMPILED = """
import sys, torch, headshare
model = headshare.load({folder!r}{options})
tokens = torch.arange(5, 15)[None]
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    difference = (compiled(tokens, use_cache=False).logits - model(tokens, use_cache=False).logits).abs().max().item()
sys.exit(difference > 1e-4)
"""


def with_layers_on_disk(folder: Path, offload: Path, *, head: str) -> Any:
    """A tiny Llama of four layers, three of them on disk, its head at this place."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": head}
    places |= {f"model.layers.{layer}": "disk" if layer in (0, 1, 3) else "cpu" for layer in range(4)}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=offload)


def assert_is_one_graph(folder: Path, options: str = "") -> None:
    """torch.compile takes the model, loaded with these options, as one graph that computes the same."""
    code = _COMPILED.format(folder=str(folder), options=options)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
