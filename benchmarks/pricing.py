"""What pricing costs: seconds for each layer and for each earlier layer with donors, and so for a whole model.

    python benchmarks/pricing.py [--shape 7b] [--tokens 16384] [--priced 4]

A model of this shape with random weights and a few layers is priced on random tokens. A layer costs a fixed part (the
dense model's pass, its fit, removals, ties along them) and a part for each earlier layer (its features on this layer's
input, and what all its units would do for all of this layer's). Both parts are fitted to the layers' times; a whole
model of L layers takes L times the first and L (L - 1) / 2 times the second.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import headshare as hs
from headshare.calibration.costs.actions import AUTO_ACTIONS
from headshare.calibration.costs.curves import Path as PricedPath
from headshare.calibration.costs.local import price_units
from headshare.text.tokens import Calibration
from machine import machine
from make_checkpoint import config_of, tensors_of

SHAPES = {
    "tiny": ({"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128}, 4),
    "135m": ({"hidden": 576, "heads": 9, "kv_heads": 3, "ffn": 1536}, 30),
    "1b": ({"hidden": 2048, "heads": 32, "kv_heads": 4, "ffn": 5632}, 22),
    "7b": ({"hidden": 4096, "heads": 32, "kv_heads": 32, "ffn": 11008}, 32),
    "70b": ({"hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672}, 80),
}


class Clock(dict[int, list[PricedPath]]):
    """When each layer's prices were done."""

    def __init__(self) -> None:
        super().__init__()
        self.at = [time.perf_counter()]

    def __setitem__(self, layer: int, paths: list[PricedPath]) -> None:
        super().__setitem__(layer, paths)
        self.at.append(time.perf_counter())

    def seconds(self) -> Iterator[float]:
        """Of each layer."""
        yield from np.diff(self.at)


def make(folder: Path, shape: dict[str, int], layers: int) -> hs.Checkpoint:
    """A checkpoint of this shape, with a small vocabulary."""
    whole = {**shape, "layers": layers, "vocabulary": 1024}
    torch.manual_seed(0)
    weights = {name: (torch.randn(size) * 0.02).to(torch.bfloat16) for name, size in tensors_of(whole).items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(whole)))
    return hs.open_checkpoint(folder)


def main() -> None:
    """Time the layers, fit both parts, print what whole models would take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--priced", type=int, default=4, help="layers of the model that is priced")
    args = parser.parse_args()
    shape, layers = SHAPES[args.shape]
    tokens = torch.randint(0, 1024, (args.tokens // args.window, args.window))
    with tempfile.TemporaryDirectory() as folder:
        dense, clock = make(Path(folder), shape, args.priced), Clock()
        price_units(dense, Calibration(tokens, False, "random", 0), AUTO_ACTIONS,
                    tokens=args.tokens, done=clock)  # fmt: skip
    seconds = np.array(list(clock.seconds()))[1:]  # layer 0 ties nothing
    each, fixed = np.polyfit(np.arange(1, args.priced), seconds, 1)
    pairs, hours = layers * (layers - 1) // 2, (layers * fixed + layers * (layers - 1) / 2 * each) / 3600
    print(json.dumps(machine()))
    print(f"{args.shape}, {args.tokens} tokens: layers 1 to {args.priced - 1} took {seconds.round(1).tolist()} s")
    unit = each / shape["kv_heads"] ** 2
    print(f"a layer {fixed:.1f} s, and {each:.2f} s for each earlier one: {unit:.4f} s a pair of units")
    print(f"{layers} layers, {pairs} pairs of layers: {hours:.2f} h")


if __name__ == "__main__":
    main()
