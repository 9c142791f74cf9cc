"""Killed and starved runs: commands on tiny models are stopped at random instants, or given too little room, and rerun.

Whatever is then half-written, lost, left behind, or other than what an uninterrupted run writes is a finding. Commands
run in forks of this process, which has imported everything, so that a run takes as long as its work.
"""

import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import transformers

from fuzz.options import Choice, Count, parsed
from fuzz.stopped import MARK, Ended, hidden, run, same_for_all_times
from support import tiny
from support.byte_level import make_writer
from support.folders import contents
from support.texts import a_text, add_tokenizer

TEXT = "--calibration text --calibration-window 16 --calibration-tokens 256"


@dataclass(frozen=True)
class Case:
    """A command, what it writes, and what lies there before. `grows` marks a folder that is added to row by row."""

    words: str
    out: str = ""
    before: str = ""
    grows: bool = False

    @property
    def repeats(self) -> bool:
        """Whether the same command can be given again once its output is whole."""
        return bool(self.before) or self.grows or not self.out


CASES = {
    "share": Case("share model out", "out"),
    "share over": Case("share model out --overwrite", "out", before="shared"),
    "expand": Case("expand shared out", "out"),
    "expand over": Case("expand shared out --overwrite", "out", before="model"),
    "export": Case("export writer out.gguf --dtype q8_0", "out.gguf"),
    "score": Case("score model -o scores.safetensors", "scores.safetensors"),
    "plan": Case(f"plan model -o plan.json --save 3% --allow remove {TEXT}", "plan.json"),
    "share by output": Case(f"share model out --match output --refit {TEXT}", "out"),
    "refit": Case(f"refit shared --out out {TEXT}", "out"),
    "refit in place": Case(f"refit shared {TEXT}", "shared", before="shared"),
    "quantize to 8": Case("quantize shared out --bits 8", "out"),
    "share with bits": Case(f"share model out --to 35% --bits auto --no-probe --refit {TEXT}", "out"),
    "verify": Case("verify shared --against model"),
    "train": Case("train model out --data text --context 16 --held-out 4 --max_steps 6 --eval_steps 2 --use_cpu",
                  "out"),
    "eval": Case("eval model shared --text text --window 16 --out results", "results", grows=True),
    "compare": Case(f"compare model --methods deletion,output+refit --ratios 0.3 --text text --window 16 {TEXT}",
                    "compared", grows=True),
}  # fmt: skip
if find_spec("gptqmodel"):
    CASES["quantize"] = Case(f"quantize model out --group 16 {TEXT}", "out")


@dataclass
class Report:
    """Counts by case, and findings with the words by which they can be made again."""

    killed: Counter[str] = field(default_factory=Counter)
    starved: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def make_good(folder: Path) -> None:
    """A folder with all that the commands read, and a note of its owner's."""
    folder.mkdir()
    add_tokenizer(tiny.make_llama(folder / "model", num_hidden_layers=3))
    make_writer(folder / "writer")
    a_text(folder / "text", words=600)
    (folder / "notes.txt").write_text("months of work")
    (folder / "tmp").mkdir()
    made = run(folder, "share model shared --ratio 0.4")
    assert made.status == 0, made.err


@dataclass(frozen=True)
class Uninterrupted:
    """What an uninterrupted run writes, what it keeps for later runs, and how long it takes."""

    output: dict[str, Any]
    hidden: set[str]
    seconds: float


@dataclass(frozen=True)
class Trial:
    """One command that is stopped, rerun and looked at, in a new folder made from the good one."""

    case: Case
    folder: Path
    good: Path
    wanted: Uninterrupted

    def findings(self, random: Random, report: Report, name: str) -> Iterator[str]:
        """Stop the command once or several times; yield all that is then not as it should be."""
        shutil.copytree(self.good, self.folder)
        out = self.folder / self.case.out
        if self.case.before and self.case.before != self.case.out:
            shutil.copytree(self.good / self.case.before, out)
        if self.case.grows:
            out.mkdir()
            (out / "notes.txt").write_text("more months of work")
        before = self._users()
        old = same_for_all_times(out) if self.case.before else {}
        exchange = random.random() < 0.5
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            ended = self._stopped(random, exchange, report, name)
            if self._users() != before:
                yield "files of the user's were changed or lost"
            if ended.status not in (0, -signal.SIGKILL):
                yield from self._complained(ended)
            # there may be a moment without, where folders cannot be exchanged
            found = same_for_all_times(out) if self.case.out and not self.case.grows else {}
            if found and found not in (old, self.wanted.output):
                yield "a half output"
            if not found and old and exchange:
                yield "the old output is gone"
            if found == self.wanted.output and found != old:
                report.whole[name] += 1
        yield from self._rerun(out)
        if self._users() != before:
            yield "files of the user's were changed or lost by the rerun"

    def _stopped(self, random: Random, exchange: bool, report: Report, name: str) -> Ended:
        """Run the command until it is killed at a random instant, or with less room than its largest file needs."""
        if self.case.out and random.random() < 0.25:
            largest = max((each.stat().st_size for each in (self.good / "model").iterdir()), default=1)
            ended = run(self.folder, self.case.words, room=int(largest ** random.uniform(0.1, 1.0)), exchange=exchange)
            report.starved[name] += 1
            return ended
        ended = run(
            self.folder, self.case.words, kill_after=random.uniform(0, 1.05 * self.wanted.seconds), exchange=exchange
        )
        counts = report.killed if ended.status == -signal.SIGKILL else report.finished
        counts[name] += 1
        return ended

    def _complained(self, ended: Ended) -> Iterator[str]:
        """What is wrong with a run that failed and was not killed: it says more than one line, or left a partial."""
        if ended.status != 1 or "Traceback" in ended.err or "error: " not in ended.err.splitlines()[-1]:
            yield f"status {ended.status}, and says {ended.err[-1500:]!r}"
        if left := [path.name for path in self.folder.rglob("*") if f"{MARK}partial" in path.name]:
            yield f"a run that failed, and was not killed, left {left}"

    def _rerun(self, out: Path) -> Iterator[str]:
        """Give the command again, which must now succeed and write what an uninterrupted run does."""
        whole = self.case.out and same_for_all_times(out) == self.wanted.output and not self.case.repeats
        ended = run(self.folder, self.case.words)
        if whole and (ended.status != 1 or "exists" not in ended.err):
            yield f"an output that is whole is not refused: {ended.status}, {ended.err[-500:]!r}"
        if not whole and ended.status:
            yield f"the rerun fails with {ended.status}: {ended.err[-1500:]!r}"
        if self.case.out and same_for_all_times(out) != self.wanted.output:
            yield f"the rerun writes something else: {self._differences(out)}"
        if left := sorted(hidden(self.folder) - self.wanted.hidden):
            yield f"left behind: {left}"

    def _differences(self, out: Path) -> str:
        found = same_for_all_times(out)
        return str(
            [name for name in {**found, **self.wanted.output} if found.get(name) != self.wanted.output.get(name)]
        )

    def _users(self) -> dict[str, str]:
        """All files that are neither the output nor of headshare's own for a time."""
        return {
            name: content
            for name, content in contents(self.folder).items()
            if MARK not in name
            and not name.startswith("tmp")
            and (name.endswith("notes.txt") or not self.case.out or name.split("/")[0] != self.case.out)
        }


def try_kills(
    names: Sequence[str], kills: int, seed: int, *, kept: Path, minutes: float, only: int | None = None,
    first: bool = False,
) -> Report:  # fmt: skip
    """Stop each of these commands in turn until so many runs were killed, or the minutes are over, or one is found."""
    report = Report()
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="headshare-kills-") as scratch:
        place = Path(scratch)
        make_good(place / "good")
        references = {name: _reference(CASES[name], place / "good", place / f"whole {number}")
                      for number, name in enumerate(names)}  # fmt: skip
        number = 0 if only is None else only
        while report.killed.total() < kills and time.monotonic() < end:
            for name in names:
                folder = place / f"{number}"
                trial = Trial(CASES[name], folder, place / "good", references[name])
                again = f"--cases '{name}' --seed {seed} --only {number}"
                for finding in trial.findings(Random(f"{seed}/{name}/{number}"), report, name):
                    report.findings.append(f"{name}: {finding}\n  again: {again}")
                    print(f"FOUND {report.findings[-1]}", flush=True)
                    shutil.copytree(folder, kept / f"{name}-{seed}-{number}", dirs_exist_ok=True, symlinks=True)
                shutil.rmtree(folder, ignore_errors=True)
            number += 1
            if only is not None or (first and report.findings):
                break
    return report


def _reference(case: Case, good: Path, folder: Path) -> Uninterrupted:
    """Run a command to its end, where nothing stops it."""
    shutil.copytree(good, folder)
    if case.before and case.before != case.out:
        shutil.copytree(good / case.before, folder / case.out)
    if case.grows:
        (folder / case.out).mkdir()
        (folder / case.out / "notes.txt").write_text("more months of work")
    ended = run(folder, case.words)
    assert ended.status == 0, f"{case.words} fails by itself: {ended.err}"
    print(f"{case.words}: {ended.seconds:.2f} s", flush=True)
    wanted = same_for_all_times(folder / case.out) if case.out else {}
    return Uninterrupted(wanted, hidden(folder), ended.seconds)


def import_all(warm: Callable[[], object] | None = None) -> None:
    """Import what commands import when they begin, so that forks need not."""
    import headshare.evaluation.harness
    import headshare.experiments
    import headshare.training.run  # noqa: F401

    for name in ("AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast", "AutoModel", "Trainer"):
        getattr(transformers, name)
    if warm is not None:
        warm()


def _gptq() -> None:
    with contextlib.suppress(ImportError):
        import gptqmodel  # noqa: F401


def main() -> int:
    """Stop as many runs as the command line asks for; print what was found and how much was tried."""
    count = Count("--kills", 200, "runs to kill in all, by turns")
    options = parsed("fuzz.kills", __doc__, count, Choice("--cases", CASES, "commands"), "trial")
    names = options.cases.split(",")
    import_all(_gptq if "quantize" in names else None)
    begun = time.monotonic()
    report = try_kills(
        names, options.kills, options.seed, kept=options.kept.absolute(), minutes=options.minutes, only=options.only
    )
    print("case                killed  starved  ended before  output whole when stopped")
    for name in names:
        counts = (report.killed[name], report.starved[name], report.finished[name], report.whole[name])
        print(f"{name:18s}" + "".join(f"{count:9d}" for count in counts))
    print(
        f"{report.killed.total()} kills, {report.starved.total()} starved runs, {len(report.findings)} findings, "
        f"{(time.monotonic() - begun) / 60:.1f} minutes"
    )
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
