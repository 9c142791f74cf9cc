"""CPU seconds until the command line has said its version, its help, a command's help, and what a TAB completes.

    python benchmarks/start_up.py [--runs 5]

Prints the least of the runs, each in a process of its own, beside what a program takes that only imports torch and
transformers, which no command could be faster than if it imported them first.
"""

import argparse
import json
import os
import subprocess
import sys

from machine import machine

PROGRAMS = {
    "headshare --version": ["-m", "headshare", "--version"],
    "headshare --help": ["-m", "headshare", "--help"],
    "headshare share --help": ["-m", "headshare", "share", "--help"],
    "TAB": ["-m", "headshare"],
    "import headshare": ["-c", "import headshare"],
    "import torch, transformers": ["-c", "import torch; from transformers import PreTrainedModel"],
}
COMPLETING = {"_HEADSHARE_COMPLETE": "complete_bash", "COMP_WORDS": "headshare sh", "COMP_CWORD": "1"}


def cpu_seconds(program: str) -> float:
    """The CPU seconds of a program, its children included, user and system."""
    environment = {**os.environ, **(COMPLETING if program == "TAB" else {})}
    with subprocess.Popen(
        [sys.executable, *PROGRAMS[program]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as running:
        _, _, used = os.wait4(running.pid, 0)
        running.returncode = 0  # it was waited for here
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure by turns, and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=5)
    runs = options.parse_args().runs
    seconds = {program: [] for program in PROGRAMS}
    for _ in range(runs + 1):  # the first writes the compiled files
        for program, times in seconds.items():
            times.append(cpu_seconds(program))
    for program, times in seconds.items():
        print(f"{program}: {min(times[1:]):.2f} CPU seconds")
    print(json.dumps(machine()))


if __name__ == "__main__":
    main()
