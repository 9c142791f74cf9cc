"""Tasks with contexts read once for all their endings, and as lm-evaluation-harness reads them: time, and agreement.

    python benchmarks/likelihoods.py MODEL --data-dir DATA [--tasks piqa,race_middle] [--limit 20] [--pairs 3]

Both score the same requests, in turn, in one process. Prints the median of the ratios of seconds, least and most, and
the largest difference of two log-likelihoods.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

import headshare as hs
from headshare.evaluation.harness import Runner, Settings, chosen_tasks
from machine import machine

Requests = list[tuple[Any, list[int], list[int]]]


def requests_of(runner: Runner, task: str, data: Path) -> Requests:
    """The options of a task, in tokens, as the harness asks for them."""
    model, found = runner._for_harness, Requests()

    def listen(requests: Requests, *_: Any, **__: Any) -> list[tuple[float, bool]]:
        found.extend(requests)
        return [(0.0, False)] * len(requests)

    scored, model._loglikelihood_tokens = model._loglikelihood_tokens, listen
    for one in chosen_tasks([task], data):
        one.run(runner, task)
    model._loglikelihood_tokens = scored
    return found


def timed(model: HFLM, requests: Requests) -> tuple[float, list[float]]:
    """Seconds, and the log-likelihoods."""
    begun = time.perf_counter()
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    return time.perf_counter() - begun, [value for value, _ in found]


def main() -> None:
    """Time pairs of both for each task, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", default="piqa,boolq,openbook_qa,winogrande,race_middle,rte")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    settings = Settings(args.limit, dtype=args.dtype, device=args.device, batch_size=args.batch_size)
    with hs.open_checkpoint(args.model) as checkpoint:
        runner = Runner.of(checkpoint, settings)
    ours, theirs = runner._for_harness, HFLM(
        pretrained=runner.model, tokenizer=runner.tokenizer, batch_size=args.batch_size, max_length=runner.longest,
        softmax_dtype="float32",
    )  # fmt: skip
    lines = [
        "| task | options | harness, s | once, s | harness / once | largest difference |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for task in args.tasks.split(","):
        requests = requests_of(runner, task, args.data_dir)
        pairs = [(timed(theirs, requests), timed(ours, requests)) for _ in range(args.pairs)]
        ratios = [one[0] / other[0] for one, other in pairs]
        seconds = [statistics.median(run[0] for run in kind) for kind in zip(*pairs, strict=True)]
        apart = max(abs(one - other) for one, other in zip(pairs[0][0][1], pairs[0][1][1], strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {task} | {len(requests)} | {seconds[0]:.2f} | {seconds[1]:.2f} | {ratio} | {apart:.2g} |")
        sys.stderr.write(f"{lines[-1]}\n")
    print(json.dumps(machine()))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
