"""Write a checkpoint of random weights in the shape of a real model, in shards; for benchmarks only.

python benchmarks/make_checkpoint.py OUT [--shape llama-2-7b] [--seed 0]
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "tiny": {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 512, "vocabulary": 1000},
    "llama-1.1b-mha": {"hidden": 2048, "layers": 20, "heads": 16, "kv_heads": 16, "ffn": 5632, "vocabulary": 32000},
    "llama-2-7b": {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "ffn": 11008, "vocabulary": 32000},
    "llama-3.1-8b": {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocabulary": 128256},
}
SHARD_BYTES = 2 * 2**30


def tensors_of(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama of this size, untied."""
    hidden, ffn, kv = shape["hidden"], shape["ffn"], shape["hidden"] // shape["heads"] * shape["kv_heads"]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocabulary"], hidden)}
    for layer in range(shape["layers"]):
        base = f"model.layers.{layer}."
        tensors |= {f"{base}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qo"}
        tensors |= {f"{base}self_attn.{part}_proj.weight": (kv, hidden) for part in "kv"}
        tensors |= {f"{base}mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
        tensors[f"{base}mlp.down_proj.weight"] = (hidden, ffn)
        tensors |= {f"{base}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return tensors | {"model.norm.weight": (hidden,), "lm_head.weight": (shape["vocabulary"], hidden)}


def config_of(shape: dict[str, int]) -> dict[str, object]:
    """The configuration that goes with them."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": shape["vocabulary"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def shards_of(tensors: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Split the tensors, in order, into shards of about SHARD_BYTES."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensors.items():
        nbytes = 2 * torch.Size(shape).numel()
        if size and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(arguments.seed)
    shards = shards_of(tensors_of(SHAPES[arguments.shape]))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in shard.items()
        }
        save_file(weights, arguments.out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (arguments.out / "model.safetensors.index.json").write_text(json.dumps(index))
    (arguments.out / "config.json").write_text(json.dumps(config_of(SHAPES[arguments.shape]), indent=2))
    print(f"{len(weight_map)} tensors in {len(shards)} shards: {arguments.out}")


if __name__ == "__main__":
    main()
