"""Matching a large checkpoint, beside the two things it cannot do without: reading q and k, and multiplying them.

    python benchmarks/make_checkpoint.py big --shape llama-2-7b
    python benchmarks/matching_large.py big [--runs 3] [--json]

By turns: reading q and k of all layers once; the product of all units with all at the rate of this machine's product
of bfloat16 numbers with float32 results, and of its float32 product; `score_units`. The target is twice the larger of
reading and product. The product is symmetric, so that half of it would do: the ratio to that half is printed too.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import headshare as hs
from headshare.checkpoint.layouts import layouts_of
from headshare.matching.products import CHUNK_NUMBERS
from headshare.plan.units import Part, Parts
from machine import machine


def read_once(checkpoint: hs.Checkpoint, names: list[str]) -> float:
    """Seconds to read these tensors, piece by piece into one buffer."""
    buffer = torch.empty(32 * 2**20, dtype=torch.uint8).numpy()
    begun = time.perf_counter()
    for name in names:
        info = checkpoint.tensors[name]
        for offset in range(0, info.nbytes, len(buffer)):
            checkpoint.read_into(buffer[: min(len(buffer), info.nbytes - offset)].data, info, offset)
    return time.perf_counter() - begun


def product_seconds(units: int, numbers: int, precision: str) -> float:
    """Seconds for units x units x numbers multiplications, from the rate of one square product that fits the cache."""
    columns = CHUNK_NUMBERS // units
    chunk = torch.randn(units, columns).bfloat16().float()
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        chunk @ chunk.T
        begun = time.perf_counter()
        for _ in range(10):
            chunk @ chunk.T
        return (time.perf_counter() - begun) / 10 * numbers / columns
    finally:
        matmul.fp32_precision = before


def main() -> None:
    """Print seconds and the ratio to the larger of reading and product."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"read": [], "product": [], "product, float32": [], "score_units": []}
    with hs.open_checkpoint(arguments.model) as checkpoint:
        (layout,) = layouts_of(checkpoint, Parts.parse("qk"))
        places = [layout.parts[part] for part in (Part.Q, Part.K)]
        names = [place.name(layer) for place in places for layer in range(layout.layers)]
        numbers = sum(place.numel for place in places)
        for _ in range(arguments.runs):
            seconds["read"].append(read_once(checkpoint, names))
            seconds["product"].append(product_seconds(layout.units, numbers, "bf16"))
            seconds["product, float32"].append(product_seconds(layout.units, numbers, "none"))
            begun = time.perf_counter()
            hs.score_units(checkpoint, "qk")
            seconds["score_units"].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = medians["score_units"]
    data = {
        "units": layout.units,
        "numbers": numbers,
        "seconds": seconds,
        "ratio_to_bound": ours / max(medians["read"], medians["product"]),
        "ratio_to_half_product": ours / max(medians["read"], medians["product"] / 2),
        "target": 2.0,
        "machine": machine(),
    }
    if arguments.json:
        print(json.dumps(data))
        return
    for name, values in seconds.items():
        print(f"{name:18} median {medians[name]:7.3f} s   ({min(values):.3f} to {max(values):.3f}, {len(values)} runs)")
    print(f"score_units takes {data['ratio_to_bound']:.2f} times the larger of read and product (target: at most 2),")
    print(f"and {data['ratio_to_half_product']:.2f} times the larger of read and half the product")
    print(json.dumps(data["machine"]))


if __name__ == "__main__":
    main()
