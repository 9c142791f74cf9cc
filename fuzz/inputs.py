"""Hostile inputs: files of tiny models, changed at random, are given to the commands that read them.

Whatever is neither success nor one line of error, or takes too long or too much memory, is a finding. Each is printed
with its seed and number, by which it can be made again, and its folder is kept.
"""

import contextlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz.kinds import FAMILIES, KINDS, good_folder, linked, make_good
from fuzz.options import Choice, Count, parsed
from fuzz.watched import Limits, Outcome, in_forks, run_command

EXAMPLES = 2


@dataclass
class Report:
    """What was tried and found: counts of inputs and of commands by kind, and findings by place."""

    inputs: Counter[str] = field(default_factory=Counter)
    succeeded: Counter[str] = field(default_factory=Counter)
    findings: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    slowest: float = 0.0
    largest: int = 0

    @property
    def found(self) -> int:
        """The number of commands that ended as none should."""
        return sum(map(len, self.findings.values()))

    def add(self, kind: str, outcomes: Iterable[Outcome], again: str) -> bool:
        """Take the outcomes of one input, and tell whether one of them is a finding of a new place."""
        self.inputs[kind] += 1
        new = False
        for outcome in outcomes:
            self.succeeded[kind] += outcome.status == 0
            self.slowest = max(self.slowest, outcome.seconds)
            self.largest = max(self.largest, outcome.peak)
            if outcome.trouble:
                seen = self.findings.setdefault((kind, outcome.place), [])
                seen.append(again)
                if len(seen) <= EXAMPLES:
                    new = True
                    print(f"FOUND {kind}: {' '.join(outcome.words)}\n  again: {again}\n  {outcome.place}")
                    print("  " + outcome.trouble.replace("\n", "\n  ")[-2500:])
                    print(f"  stderr: {outcome.err[-400:]!r}", flush=True)
        return new


def one_input(kind: str, random: Random, start: Path, folder: Path, limits: Limits) -> list[Outcome]:
    """Make an input in a new folder, from the good one, and run one or two of the commands that read it."""
    for _ in linked(start, folder):
        pass
    commands = KINDS[kind](random, folder)
    chosen = random.sample(commands, min(len(commands), 2))
    with contextlib.chdir(folder):
        return [run_command(words, limits) for words in chosen]


def try_inputs(
    kinds: Sequence[str],
    numbers: Sequence[int],
    seed: int,
    *,
    limits: Limits,
    kept: Path,
    minutes: float,
    families: Sequence[str] = FAMILIES,
) -> Report:
    """Try inputs of these kinds by their numbers, until the minutes are over. Folders of findings go to `kept`."""
    report = Report()
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="headshare-fuzz-") as scratch:
        good = Path(scratch) / "good"
        make_good(good, families)
        plan = [(kind, number) for number in numbers for kind in kinds]

        def job(index: int) -> list[Outcome]:
            kind, number = plan[index]
            folder = Path(scratch) / str(index)
            folder.mkdir()
            random = Random(f"{seed}/{kind}/{number}")
            return one_input(kind, random, good_folder(kind, random, good, families), folder, limits)

        for index, outcomes in in_forks(job, range(len(plan)), limits):
            kind, number = plan[index]
            again = f"--kinds {kind} --seed {seed} --only {number}"
            folder = Path(scratch) / str(index)
            if report.add(kind, outcomes, again):
                shutil.copytree(folder, kept / f"{kind}-{seed}-{number}", dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            if time.monotonic() > end:
                break
    return report


def main() -> int:
    """Run as many inputs as the command line asks for; print what was found and how much was tried."""
    count = Count("--count", 2000, "inputs in all, spread over the kinds")
    options = parsed("fuzz.inputs", __doc__, count, Choice("--kinds", KINDS, "kinds of input"), "input")
    kinds = options.kinds.split(",")
    numbers = range(-(-options.count // len(kinds))) if options.only is None else [options.only]
    begun = time.monotonic()
    print(f"inputs: --kinds {options.kinds} --count {options.count} --seed {options.seed}", flush=True)
    report = try_inputs(kinds, numbers, options.seed, limits=Limits(), kept=options.kept, minutes=options.minutes)
    for (kind, place), seen in sorted(report.findings.items(), key=lambda pair: -len(pair[1])):
        print(f"{len(seen):5d} x {kind}: {place}   {seen[0]}")
    for kind, count in report.inputs.items():
        found = sum(len(seen) for (of, _), seen in report.findings.items() if of == kind)
        print(f"{kind:15s} {count:6d} inputs, {report.succeeded[kind]:6d} commands succeeded, {found:5d} findings")
    print(
        f"{sum(report.inputs.values())} inputs, {report.found} findings in {len(report.findings)} places, "
        f"{(time.monotonic() - begun) / 60:.1f} minutes; longest command {report.slowest:.1f} CPU s, "
        f"largest {report.largest / 2**20:.0f} MiB"
    )
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
