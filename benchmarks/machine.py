"""What a figure was measured on, printed beside every figure; and how exact its products are."""

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def machine() -> dict[str, str | int]:
    """Processor, cores, memory and versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors", "headshare")},
    }


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says, with `--products` among it, which holds from now on."""
    parser.add_argument(
        "--products", choices=["float32", "bfloat16"], default="float32", help="of float32 matrices, CPU"
    )
    args = parser.parse_args()
    if args.products == "bfloat16":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    return args
