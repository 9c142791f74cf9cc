"""Share a large checkpoint as a user would: its time beside that of `cp -r`, its peak anonymous memory, bytes on disk.

python benchmarks/make_checkpoint.py big --shape llama-2-7b
python benchmarks/share_large.py big [--runs 1] [--ratio 0.3] [--parts qkv] [--json]

Both read the same folder and write to the same disk, by turns, with all earlier writes flushed before each. `cp`
returns when its bytes are in memory, and `cp, flushed` when they are on disk; `share` scores, plans, writes, digests,
flushes, reads back and compares. Throughput is the input's bytes by seconds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

LIMIT_BYTES = 2 * 10**9


def folder_bytes(folder: Path) -> int:
    """Blocks on disk, as the file system counts them."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def copy_seconds(model: Path, scratch: Path) -> tuple[float, float]:
    """`cp -r` to the same disk: until it returns, and until all is on disk."""
    os.sync()
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", str(model), str(scratch / "copy")], check=True)
    returned = time.perf_counter() - begun
    os.sync()
    flushed = time.perf_counter() - begun
    shutil.rmtree(scratch / "copy")
    return returned, flushed


def main() -> None:
    """Run `headshare share` in a process of its own; exit 1 if it took more memory than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--ratio", default="0.3")
    parser.add_argument("--parts", default="qkv")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix=".share-large-", dir=arguments.model.absolute().parent))
    command = [sys.executable, "-m", "headshare", "share", str(arguments.model), str(scratch / "out"), "--json"]
    command += ["--ratio", arguments.ratio, "--parts", arguments.parts, "--overwrite"]
    seconds: dict[str, list[float]] = {"cp": [], "cp, flushed": [], "share": []}
    try:
        for _ in range(arguments.runs):
            returned, flushed = copy_seconds(arguments.model, scratch)
            seconds["cp"].append(returned)
            seconds["cp, flushed"].append(flushed)
            os.sync()
            begun = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds["share"].append(time.perf_counter() - begun)
            found = json.loads(done.stdout)
        disk = {"dense_disk_bytes": folder_bytes(arguments.model), "shared_disk_bytes": folder_bytes(scratch / "out")}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: medians[name] / medians["share"] for name in ("cp", "cp, flushed")}
    timed = {"all_seconds": seconds, "throughput_of": ratios, "target_throughput_of_cp": 0.5}
    data = {**found, **disk, **timed, "limit_bytes": LIMIT_BYTES, "machine": machine()}
    if arguments.json:
        print(json.dumps(data))
    else:
        for name in ("dense_disk_bytes", "shared_disk_bytes", "saved_bytes", "peak_anonymous_bytes", "limit_bytes"):
            print(f"{name:24} {data[name]:>16,}")
        for name, values in seconds.items():
            spread = f"({min(values):.1f} to {max(values):.1f}, {len(values)} runs)"
            print(f"{name + ' seconds':24} {statistics.median(values):>16.1f}   {spread}")
        for name, ratio in ratios.items():
            print(f"{'throughput, of ' + name:27} {ratio:>13.2f}   (target: at least 0.5 of cp)")
        print(json.dumps(data["machine"]))
    sys.exit(found["peak_anonymous_bytes"] > LIMIT_BYTES)


if __name__ == "__main__":
    main()
