"""Products with matrices of 8 bits on a CPU: each way beside torch's product with numbers of 16 or 32 bits.

    python benchmarks/int8.py [--threads N]

A row for each size, type and count of tokens, the best of many repeats, in microseconds. *converted* puts all whole
numbers into the inputs' type at each call, *some rows at a time* a million of them, *int8pack* is torch's own product
for few tokens, and *headshare* is what a loaded model does (`headshare.storage.products`). The last column is bytes of
the matrix over those of 16 bits.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from headshare.checkpoint.rounding.numbers import to_nearest
from headshare.storage import products

SIZES = ((1536, 576), (576, 1536), (4096, 4096))
TOKENS = (1, 4, 16, 64, 512)


def best(run: Callable[[], object], seconds: float = 0.4) -> float:
    """Microseconds of the fastest call."""
    run()
    times = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(times) < 3:
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times) * 1e6


def some_rows(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    """The product without torch's own for few tokens."""
    few, products.FEW_TOKENS = products.FEW_TOKENS, 0
    try:
        return products.on_cpu(x, numbers, scale)
    finally:
        products.FEW_TOKENS = few


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    draw = torch.Generator().manual_seed(0)
    print("| outputs x inputs | type | tokens | 16/32 bits | converted | some rows | int8pack | headshare | bytes |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for rows, inputs in SIZES:
        matrix = torch.randn(rows, inputs, generator=draw)
        for dtype in (torch.bfloat16, torch.float32):
            numbers, scales = to_nearest(matrix, 8, None, dtype)
            scale = scales[:, 0].contiguous()
            whole = matrix.to(dtype)
            for tokens in TOKENS:
                x = torch.randn(tokens, inputs, generator=draw).to(dtype)
                slow = dtype == torch.float32 or tokens > 64  # seconds a call
                found = [
                    best(partial(linear, x, whole)),
                    best(partial(products.converted, x, numbers, scale)),
                    best(partial(some_rows, x, numbers, scale)),
                    None if slow else best(partial(torch._weight_int8pack_mm, x, numbers, scale)),
                    best(partial(products.product, x, numbers, scale)),
                ]
                words = " | ".join("-" if each is None else f"{each:,.0f}" for each in found)
                share = (numbers.nbytes + scales.nbytes) / (2 * matrix.numel())
                name = str(dtype).removeprefix("torch.")
                print(f"| {rows} x {inputs} | {name} | {tokens} | {words} | {share:.3f} |", flush=True)


if __name__ == "__main__":
    main()
