"""Printing may fail: standard output is full, closed, left by its reader, or in an encoding without some letters."""

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from headshare.cli.app import main
from headshare.cli.options import print_result
from headshare.errors import HeadshareError
from headshare.progress import say, shown
from support.command_line import Run
from support.folders import contents, left_behind
from support.processes import in_child
from support.shares import share


class Ended(NamedTuple):
    """How a command ended whose standard output and error were these."""

    status: int
    err: str


@contextmanager
def _output(kind: str) -> Iterator[int | None]:
    """The descriptor of a standard output of this kind; None for one that is closed."""
    if kind == "closed":
        yield None
        return
    if kind == "left":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    yield writing
    os.close(writing)


def ended(words: list[object], kind: str, folder: Path) -> Ended:
    """Run a command in a child with such a standard output."""
    said = folder / "said"

    def child() -> None:
        with _output(kind) as out:
            if out is None:
                os.close(1)
                sys.stdout = None  # as Python has it where it starts without one
            else:
                os.dup2(out, 1)
                sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stderr = said.open("w", encoding="utf-8")
            sys.argv = ["headshare", *map(str, words)]
            try:
                main()
            except SystemExit as end:
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else 98)

    status = in_child(child)
    text = said.read_text(encoding="utf-8")
    said.unlink()
    return Ended(status, text)


KINDS = pytest.mark.parametrize("kind", ["full", "closed", "left"])


@KINDS
def test_a_command_that_wrote_its_output_has_succeeded_and_says_where_it_is(
    kind: str, llama: Path, tmp_path: Path
) -> None:
    whole = contents(share(llama, tmp_path / "reference", 0.3))
    found = ended(["share", llama, tmp_path / "out", "--ratio", "0.3"], kind, tmp_path)
    assert found.status == 0
    assert found.err.splitlines()[-1].endswith(f"What was written is whole: {tmp_path / 'out'}")
    assert contents(tmp_path / "out") == whole
    assert left_behind(tmp_path) == []


@KINDS
def test_a_command_whose_result_is_what_it_prints_fails_in_one_line(kind: str, llama: Path, tmp_path: Path) -> None:
    for words in (["estimate", llama], ["estimate", llama, "--json"], ["--version"]):
        found = ended(words, kind, tmp_path)
        assert found.status == 1
        if kind == "left":  # its reader has what it wanted
            assert "Traceback" not in found.err
        else:
            assert found.err.count("\n") == 1
            assert found.err.startswith("error: ")


def test_letters_that_the_encoding_lacks_are_printed_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    monkeypatch.setattr(sys, "argv", ["headshare", "--version"])
    with pytest.raises(SystemExit):
        main()
    print_result({"text": "漢字"}, "é 漢字 \udcff", as_json=False)
    print_result({"text": "漢字"}, "", as_json=True)
    _, words, data = raw.getvalue().decode("latin-1").splitlines()
    assert words == r"é \u6f22\u5b57 \udcff"
    assert json.loads(data) == {"text": "漢字"}


def test_nothing_that_is_opened_later_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """Whoever prints would write into a checkpoint."""

    def child() -> None:
        os.close(1)
        sys.stdout = None
        sys.argv = ["headshare", "--version"]
        try:
            main()
        except SystemExit:
            os._exit(os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY))

    assert in_child(child) > 2


def test_no_work_fails_for_a_standard_error_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        with shown():
            say("half done")
        with pytest.raises(OSError, match="No space"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(13, "Permission denied", "/data/model"),
            "error: /data/model cannot be used: Permission denied.",
        ),
        (OSError(28, "No space left on device", "/data/x"), "error: there is no room left for /data/x (No space left"),
        (OSError(5, "Input/output error"), "error: the system reports: Input/output error."),
        (EOFError("Ran out of input"), "error: a file that was read ends too early (Ran out of input)."),
        (HeadshareError("as it was"), "error: as it was"),
    ],
)
def test_whatever_the_system_reports_is_one_line_with_its_path_and_its_cause(
    error: Exception, line: str, llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> object:
        raise error

    monkeypatch.setattr("headshare.checkpoint.opening.open_checkpoint", fail)
    found = run("estimate", llama)
    assert found.status == 1
    assert found.err.strip().count("\n") == 0
    assert line in found.err


def test_a_stream_whose_descriptor_is_another_by_now_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that a daemon put a pipe in the place of: Python takes it for one that it can seek in."""
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        reading, writing = os.pipe()
        os.dup2(writing, log.fileno())
        monkeypatch.setattr(sys, "stderr", log)
        monkeypatch.setattr(sys, "argv", ["headshare", "nonsense"])
        with pytest.raises(SystemExit):
            main()
        log.flush()
        assert b"No such command" in os.read(reading, 1000)
        os.close(writing)
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())
