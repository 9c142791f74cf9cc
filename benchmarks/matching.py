"""Matching against the plain loop of Algorithm 1, in one run, on the same weights: 16 layers x 16 heads x 2048.

    python benchmarks/matching.py [--runs 3] [--layers 16] [--heads 16] [--hidden 2048] [--json]

Both read the same bfloat16 checkpoint. The loop holds all weights in memory in float32 before its clock starts, and
compares pair by pair with torch's own cosine_similarity; ours starts from the files. They alternate, run by run.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import headshare as hs
from headshare.matching.pairing import best_pairs
from machine import machine
from make_checkpoint import config_of, tensors_of


def make(folder: Path, layers: int, heads: int, hidden: int) -> Path:
    """A checkpoint of this size, with a small vocabulary and feed-forward: neither is matched."""
    shape = {"hidden": hidden, "layers": layers, "heads": heads, "kv_heads": heads, "ffn": 256, "vocabulary": 256}
    torch.manual_seed(0)
    weights = {name: torch.randn(size).to(torch.bfloat16) for name, size in tensors_of(shape).items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    return folder


def loop(weights: dict[str, torch.Tensor], layers: int, heads: int) -> dict[int, int]:
    """Algorithm 1 (arXiv 2402.11819): every head against every head of every earlier layer."""
    best: dict[int, int] = {}
    for layer in range(1, layers):
        for head in range(heads):
            ours, top = unit(weights, layer, head, heads), float("-inf")
            for earlier in range(layer):
                for other in range(heads):
                    score = functional.cosine_similarity(ours, unit(weights, earlier, other, heads), dim=0).item()
                    if score > top:
                        top, best[layer * heads + head] = score, earlier * heads + other
    return best


def unit(weights: dict[str, torch.Tensor], layer: int, head: int, heads: int) -> torch.Tensor:
    """W_q || W_k of one head, flattened."""
    parts = [weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"].chunk(heads)[head] for part in "qk"]
    return torch.cat(parts).flatten()


def main() -> None:
    """Time both, check that they agree, print the ratio of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    size = (arguments.layers, arguments.heads, arguments.hidden)
    times: dict[str, list[float]] = {"loop": [], "headshare": []}
    with tempfile.TemporaryDirectory() as name:
        folder = make(Path(name), *size)
        weights = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
        for _ in range(arguments.runs):
            begun = time.perf_counter()
            expected = loop(weights, arguments.layers, arguments.heads)
            times["loop"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            with hs.open_checkpoint(folder) as checkpoint:
                (table,) = hs.score_units(checkpoint, "qk").tables
            times["headshare"].append(time.perf_counter() - begun)
            found = best_pairs(table.layout, table.scores, len(expected))
            assert found == expected, "the two disagree"
    medians = {name: statistics.median(values) for name, values in times.items()}
    data = {
        "layers_heads_hidden": size,
        "seconds": times,
        "ratio_of_medians": medians["loop"] / medians["headshare"],
        "machine": machine(),
    }
    if arguments.json:
        print(json.dumps(data))
        return
    for name, values in times.items():
        spread = f"min {min(values):.3f}, max {max(values):.3f}"
        print(f"{name:10} median {medians[name]:8.3f} s   ({spread}, {len(values)} runs)")
    print(f"headshare is {data['ratio_of_medians']:.1f} times as fast; both find the same {len(found)} best donors")
    print(json.dumps(data["machine"]))


if __name__ == "__main__":
    main()
