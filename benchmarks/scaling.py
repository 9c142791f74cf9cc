"""How the cost grows: `share` with the bytes of a checkpoint, matching with the number of units; four sizes of each.

    python benchmarks/scaling.py [--runs 3] [--json]

Bytes: the same layer, 4 to 32 times, shared at 0.3 and written, scores given. Units: layers of heads of one size, 128
to 1024 units, scored. Fitted by least squares over all runs: seconds = a + b x bytes; seconds = a + b x units +
c x units^2, where b is reading and c the product. The exponent is the slope between the two largest sizes on
logarithmic axes.
"""

import argparse
import json
import statistics
import tempfile
import time
from math import log
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import headshare as hs
from headshare.matching.scores import Scores
from machine import machine
from make_checkpoint import config_of, tensors_of

LAYERS = (4, 8, 16, 32)
UNITS = (128, 256, 512, 1024)


def make(folder: Path, shape: dict[str, int]) -> Path:
    """A checkpoint of random bfloat16 weights."""
    folder.mkdir()
    weights = {name: torch.randn(size).to(torch.bfloat16) for name, size in tensors_of(shape).items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    return folder


def share_seconds(folder: Path, out: Path, scores: Scores) -> float:
    """Plan, write, flush and check."""
    begun = time.perf_counter()
    with hs.open_checkpoint(folder) as dense:
        hs.share(dense, hs.make_plan(scores, 0.3)).save(out, overwrite=True)
    return time.perf_counter() - begun


def score_seconds(folder: Path) -> float:
    """All pairs."""
    begun = time.perf_counter()
    with hs.open_checkpoint(folder) as dense:
        hs.score_units(dense, "qk")
    return time.perf_counter() - begun


def fit(sizes: list[float], seconds: list[list[float]], degree: int) -> dict[str, object]:
    """Least squares over all runs, how much of the variance it explains, and the last slope on logarithmic axes."""
    x = np.repeat(sizes, [len(values) for values in seconds])
    y = np.concatenate(seconds)
    powers = np.vander(x, degree + 1, increasing=True)
    coefficients, *_ = np.linalg.lstsq(powers, y, rcond=None)
    explained = 1 - ((y - powers @ coefficients) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    medians = [statistics.median(values) for values in seconds]
    exponent = log(medians[-1] / medians[-2]) / log(sizes[-1] / sizes[-2])
    return {
        "sizes": sizes, "medians_s": medians, "runs_s": seconds, "coefficients": coefficients.tolist(),
        "explained": float(explained), "last_exponent": exponent,
    }  # fmt: skip


def main() -> None:
    """Measure both; print the sizes, the medians and the fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(dir=".") as name:
        work = Path(name)
        base = {"hidden": 2048, "heads": 16, "kv_heads": 16, "vocabulary": 1000}
        folders = [make(work / f"layers-{n}", {**base, "ffn": 5632, "layers": n}) for n in LAYERS]
        scores = [hs.score_units(hs.open_checkpoint(folder)) for folder in folders]
        seconds: list[list[float]] = [[] for _ in folders]
        for run in range(arguments.runs + 1):
            for folder, one, values in zip(folders, scores, seconds, strict=True):
                taken = share_seconds(folder, work / "out", one)
                values += [taken] if run else []
        sizes = [float((folder / "model.safetensors").stat().st_size) for folder in folders]
        found["share, by bytes"] = fit(sizes, seconds, 1)
        folders = [make(work / f"units-{n}", {**base, "ffn": 64, "layers": n // 16}) for n in UNITS]
        seconds = [[] for _ in folders]
        for run in range(arguments.runs + 1):
            for folder, values in zip(folders, seconds, strict=True):
                taken = score_seconds(folder)
                values += [taken] if run else []
        found["score, by units"] = fit([float(n) for n in UNITS], seconds, 2)
    if arguments.json:
        print(json.dumps({**found, "machine": machine()}))
        return
    for what, one in found.items():
        for size, values in zip(one["sizes"], one["runs_s"], strict=True):
            spread = f"{min(values):.3f} to {max(values):.3f}"
            print(f"{what}: {size:>15,.0f}  median {statistics.median(values):7.3f} s  ({spread})")
        terms = " + ".join(f"{value:.3g} x^{power}" for power, value in enumerate(one["coefficients"]))
        print(f"  seconds = {terms}; explains {one['explained']:.4f}; exponent at the end {one['last_exponent']:.2f}")
    print(json.dumps(machine()))


if __name__ == "__main__":
    main()
