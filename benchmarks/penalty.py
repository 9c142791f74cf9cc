"""What the penalty adds to a training step: time, in pairs of steps, and peak memory, in processes of their own.

    python benchmarks/penalty.py MODEL [--ratio 0.3] [--batch 8] [--window 256] [--pairs 10]

Steps with and without the penalty alternate in one process: forward, backward and AdamW. Peaks are of the anonymous
memory of two processes that take the same few steps. Prints the median of the ratios with quartiles.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

import headshare as hs
from headshare.bench.memory import watched_peak
from headshare.integrations.transformers.loading import load_model
from headshare.training.penalty import TiePenalty
from machine import machine


class Steps:
    """A model in training on random tokens."""

    def __init__(self, args: argparse.Namespace) -> None:
        dense = hs.open_checkpoint(args.model)
        plan = hs.make_plan(hs.score_units(dense), args.ratio)
        self.model = load_model(dense, dtype=torch.float32).train()
        self.model.config.use_cache = False
        self.penalty = TiePenalty(self.model, plan)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.tokens = torch.randint(0, self.model.config.vocab_size, (args.batch, args.window))

    def take(self, *, pulled: bool) -> float:
        """Seconds of one step."""
        begun = time.perf_counter()
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        if pulled:
            loss = loss + 0.5 * self.penalty()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begun


def main() -> None:
    """Time pairs, measure peaks, print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--peak", choices=["with", "without"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.peak:
        with watched_peak() as peak:
            steps = Steps(args)
            for _ in range(3):
                steps.take(pulled=args.peak == "with")
        sys.stdout.write(f"{peak.bytes}\n")
        return
    peaks = {
        kind: int(subprocess.run([sys.executable, *sys.argv, "--peak", kind], check=True, capture_output=True).stdout)
        for kind in ("without", "with")
    }
    steps = Steps(args)
    steps.take(pulled=True)
    pairs = [(steps.take(pulled=False), steps.take(pulled=True)) for _ in range(args.pairs)]
    ratios = [pulled / plain for plain, pulled in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(json.dumps(machine()))
    typical = statistics.median(plain for plain, _ in pairs)
    print(f"{len(steps.penalty.ties)} ties, {args.batch} x {args.window} tokens, median step {typical:.2f} s")
    print(f"step with the penalty / without: {middle:.4f} (quartiles {low:.4f} to {high:.4f}, {len(pairs)} pairs)")
    print(f"peak anonymous memory with / without: {peaks['with'] / peaks['without']:.4f} "
          f"({peaks['with'] / 2**20:.0f} and {peaks['without'] / 2**20:.0f} MiB)")  # fmt: skip


if __name__ == "__main__":
    main()
