"""Progress: in a notebook and an interpreter without being asked for, in a script only where it is."""

import sys
from collections.abc import Callable, Iterator

import pytest

from headshare.progress import say, shown, track


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What was written on standard error since it was asked for last."""
    monkeypatch.setattr("headshare.progress.PLAIN_INTERVAL_S", 0.0)
    monkeypatch.setattr("headshare.progress.NOTEBOOK_INTERVAL_S", 0.0)
    return lambda: capsys.readouterr().err


def counted() -> Iterator[int]:
    yield from track(range(3), "layers", 3)


def test_a_script_shows_progress_only_where_it_is_asked_for(told: Callable[[], str]) -> None:
    assert list(counted()) == [0, 1, 2]
    say("done")
    assert told() == ""
    with shown():
        list(counted())
        say("done")
    lines = told()
    assert "layers: 2 of 3" in lines
    assert lines.endswith("done\n")


def test_an_interpreter_shows_it_unless_nobody_wants_it(
    told: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with shown(False):
        list(counted())
    assert told() == ""
    list(counted())
    assert "layers: 2 of 3" in told()


def test_a_notebook_shows_one_line_that_changes_and_is_gone_in_the_end(
    told: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel.kernelapp", sys)
    assert list(counted()) == [0, 1, 2]
    text = told()
    lines = text.split("\r")[1:]
    assert lines[0] == "layers: 0 of 3"
    assert lines[2].startswith("layers: 2 of 3, about ")
    assert (lines[-2].strip(), lines[-1]) == ("", "")
    assert "\n" not in text
    stopped = track(range(3), "layers", 3)
    next(stopped)
    del stopped  # whoever stops leaves no line behind
    assert told().endswith("\r")
