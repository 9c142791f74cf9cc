"""The command line, run in this process."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headshare.bench.bench import load_once
from headshare.cli.app import main


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """Standard output as the one JSON object it is to be, by the letter of RFC 8259 (no NaN, no Infinity)."""
        assert self.status in (0, 1), self.err
        assert self.out.count("\n") == 1
        assert self.out.endswith("\n")
        found = json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert isinstance(found, dict)
        return found


Run = Callable[..., Outcome]


def load_here(subjects: Any, loads: int, options: Any, cold: bool = False) -> Any:
    """Loading measured in this process; in one of its own, as in tests/bench/test_bench.py, each load takes seconds."""
    return {one.name: [load_once(one, options, 1, cold) for _ in range(loads)] for one in subjects}


def run_in(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Commands run in this process, in this folder, as the console script runs them."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    monkeypatch.setattr("headshare.bench.bench.measure_loading", load_here)

    def command(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["headshare", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            status: Any = 0
        except SystemExit as ended:
            status = ended.code or 0
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return command


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Commands run in this process, wherever it is; each gives its status and what it wrote."""

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["headshare", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return command


def assert_one_error_line(found: Outcome) -> None:
    assert "Traceback" not in found.err
    assert (found.status, found.out) == (1, "")
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert len(found.err) < 1000
