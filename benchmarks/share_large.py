"""Share a large checkpoint as a user would, and print its time, its peak anonymous memory and the bytes on disk.

python benchmarks/make_checkpoint.py big --shape llama-2-7b
python benchmarks/share_large.py big [--ratio 0.3] [--parts qkv] [--json]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine

LIMIT_BYTES = 2 * 10**9


def folder_bytes(folder: Path) -> int:
    """Blocks on disk, as the file system counts them."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Run `headshare share` in a process of its own; exit 1 if it took more memory than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ratio", default="0.3")
    parser.add_argument("--parts", default="qkv")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix=".share-large-", dir=arguments.model.absolute().parent))
    command = [sys.executable, "-m", "headshare", "share", str(arguments.model), str(scratch / "out"), "--json"]
    command += ["--ratio", arguments.ratio, "--parts", arguments.parts]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        disk = {"dense_disk_bytes": folder_bytes(arguments.model), "shared_disk_bytes": folder_bytes(scratch / "out")}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    data = {**found, **disk, "limit_bytes": LIMIT_BYTES, "machine": machine()}
    if arguments.json:
        print(json.dumps(data))
    else:
        for name in ("dense_disk_bytes", "shared_disk_bytes", "saved_bytes", "peak_anonymous_bytes", "limit_bytes"):
            print(f"{name:24} {data[name]:>16,}")
        print(f"{'seconds':24} {data['seconds']:>16.1f}")
        print(json.dumps(data["machine"]))
    sys.exit(found["peak_anonymous_bytes"] > LIMIT_BYTES)


if __name__ == "__main__":
    main()
