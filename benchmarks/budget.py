"""CPU seconds of each stage of a plan under a budget: price, measure, choose, refit; beside another commit's.

    python benchmarks/budget.py MODEL --calibration TEXT [--save 0.2] [--tokens 32768] [--against OTHER/src]
    python benchmarks/budget.py --random 22,2048,5632 [--tokens 8192] [--processes 2]

With `--against`, the same stages run with the package in that folder, in a process of their own before ours. `--random`
makes a Llama of that many layers, that width and so many neurons, with random weights and 64 channels a head, to see
how the stages grow. With `--processes`, one process and so many that share the windows are compared, each with one
thread: the CPU seconds of the busiest one, and the seconds that go by. Removal of units and neurons is priced, which
every budget may use.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

STAGES = ("price", "measure", "choose", "refit")


def random_model(folder: Path, layers: int, hidden: int, ffn: int) -> Path:
    """A Llama of this size with random weights and a small vocabulary."""
    import torch
    from safetensors.torch import save_file

    from make_checkpoint import config_of, tensors_of

    heads = hidden // 64
    shape = {"hidden": hidden, "heads": heads, "kv_heads": max(1, heads // 4), "ffn": ffn, "layers": layers}
    whole = {**shape, "vocabulary": 1024}
    torch.manual_seed(0)
    weights = {name: (torch.randn(size) * 0.02).to(torch.bfloat16) for name, size in tensors_of(whole).items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(whole)))
    return folder


def stages(model: str, text: str, save: float, tokens: int) -> dict[str, tuple[float, float]]:
    """The CPU seconds of each stage and the seconds that go by, with the package that this process imports."""
    import torch

    import headshare as hs
    from headshare.calibration.allocate import plan_for_bytes
    from headshare.calibration.costs.actions import ACTIONS
    from headshare.calibration.costs.local import price_units
    from headshare.calibration.costs.measured import probe_prices
    from headshare.calibration.refit.run import refit_readouts
    from headshare.sharing.size import parameter_infos
    from headshare.text.tokens import Calibration

    dense = hs.open_checkpoint(model)
    if text:
        calibration = Calibration.load(text, dense, tokens=tokens, window=512, seed=0)
    else:
        torch.manual_seed(0)
        calibration = Calibration(torch.randint(0, 1024, (tokens // 512, 512)), False, "random", 0)
    whole = sum(info.nbytes for info in parameter_infos(dense).values())
    # An option that older commits lack: costs in nats already where they are priced.
    more: dict[str, Any] = {"sensitive": True} if "sensitive" in inspect.signature(price_units).parameters else {}
    marks = [_now()]
    # What a budget of bytes may take; older commits remove units and neurons alone.
    actions = [ACTIONS[name] for name in ("remove", "sublayers", "narrow_values") if name in ACTIONS]
    prices = price_units(dense, calibration, actions, **more)
    marks.append(_now())
    prices = probe_prices(dense, calibration, prices)
    marks.append(_now())
    plan = plan_for_bytes(prices, int(whole * save)).plan
    marks.append(_now())
    refit_readouts(dense, plan, calibration)
    marks.append(_now())
    spent = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(marks)]
    return dict(zip(STAGES, spent, strict=True))


def _now() -> tuple[float, float]:
    """CPU seconds of this process so far, and the time."""
    return time.process_time(), time.monotonic()


def shared_stages(*given: Any) -> dict[str, tuple[float, float]]:
    """The stages, with the windows of this process among those that were launched together."""
    from headshare.calibration.processes import together

    with together():
        return stages(*given)


def apart(
    args: argparse.Namespace, model: str, source: str | None, processes: int = 1
) -> dict[str, tuple[float, float]]:
    """The stages in processes of their own, with the package in this folder: what the busiest process takes."""
    environment = {**os.environ, **({"PYTHONPATH": source} if source else {})}
    if args.processes > 1:
        environment["OMP_NUM_THREADS"] = "1"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    words = ["--stages", "--calibration", args.calibration, "--save", str(args.save), "--tokens", str(args.tokens)]
    done = subprocess.run(
        [sys.executable, *launch, __file__, model, *words],
        env=environment, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    each = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {stage: (max(one[stage][0] for one in each), max(one[stage][1] for one in each)) for stage in STAGES}


def main() -> None:
    """Run the stages and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="", help="a model's folder")
    parser.add_argument("--calibration", default="", help="the text to calibrate on; random tokens without one")
    parser.add_argument("--save", type=float, default=0.2, help="the share of the model's bytes to save")
    parser.add_argument("--tokens", type=int, default=32_768, help="the number of calibration tokens")
    parser.add_argument("--against", help="the src folder of another commit")
    parser.add_argument("--random", help="layers, width and neurons of a random model instead of MODEL")
    parser.add_argument("--processes", type=int, default=1, help="the number of processes to compare one with")
    parser.add_argument("--stages", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stages:
        shared = shared_stages if "WORLD_SIZE" in os.environ else stages
        found = json.dumps(shared(args.model, args.calibration, args.save, args.tokens))
        sys.stdout.write(f"{found}\n")  # in one piece, as several processes may print
        return
    from machine import machine

    print(json.dumps(machine()))
    with tempfile.TemporaryDirectory() as folder:
        size = [int(number) for number in args.random.split(",")] if args.random else []
        model = str(random_model(Path(folder), *size)) if size else args.model
        columns = {"before": apart(args, model, args.against)} if args.against else {}
        columns["now"] = apart(args, model, None)
        if args.processes > 1:
            columns[f"{args.processes} processes"] = apart(args, model, None, args.processes)
    for number, what in enumerate(("CPU seconds", "seconds")[: 1 + (args.processes > 1)]):
        print(f"| {what} | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
        for stage in STAGES:
            print(f"| {stage} | {' | '.join(f'{found[stage][number]:.1f}' for found in columns.values())} |")
        sums = [sum(found[stage][number] for stage in STAGES) for found in columns.values()]
        print(f"| in all | {' | '.join(f'{each:.1f}' for each in sums)} |")


if __name__ == "__main__":
    main()
