"""The harness of hostile inputs tells what a command may do from what it may not."""

import sys
import time
from collections.abc import Callable
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import Any

import pytest

from fuzz import watched
from fuzz.inputs import try_inputs
from fuzz.kinds import KINDS
from fuzz.watched import Limits, in_forks, run_command

LIMITS = Limits(cpu_s=0.3, wall_s=30, memory=50 * 2**20)


def ending(act: Callable[[], Any]) -> Callable[[], None]:
    def main() -> None:
        act()
        raise SystemExit(1)

    return main


def raises() -> None:
    raise KeyError("model_type")


def works_for_ever() -> None:
    while True:
        pass


def fills_memory() -> None:
    with mmap(-1, 60 * 2**20) as fresh:  # memory that the process has never had, unlike what malloc may give
        for page in range(0, len(fresh), PAGESIZE):
            fresh[page] = 1
    sys.stderr.write("error: no\n")


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "an exception": (raises, "KeyError"),
    "an endless loop": (works_for_ever, "CPU seconds"),
    "a flood of memory": (fills_memory, "MiB"),
    "nothing said": (lambda: None, "several lines"),
    "two lines": (lambda: sys.stderr.write("error: one\ntwo\n"), "several lines"),
    "an escape of a terminal": (lambda: sys.stderr.write("error: \x1b[2J\n"), "control characters"),
    "output before an error": (lambda: sys.stdout.write("done") and sys.stderr.write("error: no\n"), "output before"),
}


@pytest.mark.parametrize(("act", "place"), BAD.values(), ids=BAD.keys())
def test_what_a_command_may_not_do_is_found(
    act: Callable[[], Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "main", ending(act))
    found = run_command(("share",), LIMITS)
    assert place in found.place


def test_one_line_of_error_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "main", ending(lambda: sys.stderr.write("error: there is no folder\n")))
    assert run_command(("share",), LIMITS).trouble == ""


def test_a_death_and_a_standstill_are_found_and_the_rest_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(number: int) -> list[watched.Outcome]:
        if number == 1:
            raise SystemExit  # the child ends without an answer
        if number == 2:
            time.sleep(60)
        return [watched.Outcome((), 0, "", "", 0.0, 0)]

    found = dict(in_forks(job, range(4), Limits(wall_s=1)))
    assert [bool(found[number][0].trouble) for number in range(4)] == [False, True, True, False]


def test_hostile_inputs_end_in_success_or_in_one_line_of_error(tmp_path: Path) -> None:
    limits = Limits(cpu_s=60, wall_s=300)  # as wide as can be: no machine is too slow
    report = try_inputs(list(KINDS), range(6), 0, limits=limits, kept=tmp_path, minutes=30, families=("llama-gqa",))
    assert report.inputs == dict.fromkeys(KINDS, 6)
    assert not report.findings
