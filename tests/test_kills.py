"""A few commands killed at random instants; and the harness tells what it is to tell."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fuzz.kills import CASES, Report, try_kills


def tried(name: str, tmp_path: Path, kills: int = 12, *, first: bool = False) -> Report:
    return try_kills([name], kills, seed=1, kept=tmp_path / "kept", minutes=1, first=first)


@pytest.mark.parametrize("name", ["share over", "score"])
def test_killed_commands_leave_nothing_half_and_write_the_same_when_given_again(name: str, tmp_path: Path) -> None:
    report = tried(name, tmp_path, kills=4)
    assert report.findings == []
    assert report.killed[name] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_command_is_killed_without_loss(name: str, tmp_path: Path) -> None:
    assert tried(name, tmp_path).findings == []


def test_a_half_output_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def in_its_place(out: Path, **_: object) -> Iterator[Path]:
        out.mkdir()
        yield out

    monkeypatch.setattr("headshare.sharing.writer.whole_folder", in_its_place)
    assert "a half output" in tried("share", tmp_path, 100, first=True).findings[0]


def test_what_is_left_behind_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("scratch", "folder"):
        monkeypatch.setattr(f"headshare.files.{place}.remove_dead", lambda *_: None)
    findings = tried("share", tmp_path, 100, first=True).findings
    assert any("left behind" in found for found in findings)  # a run that had no room may be found first
