"""An error of the system is one line that blames the right path."""

import errno
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from headshare.errors import CheckpointError, OutputError
from headshare.files.atomic import write_whole
from headshare.files.failures import explain, in_one_line
from support import tiny
from support.folders import left_behind, nothing_changes
from support.processes import in_child
from support.shares import share

OUT = Path("/data/out")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "there is no room left for /data/out (No space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x"), "there is no room left for /data/out (Disk quota"),
        (PermissionError(13, "Permission denied", "/data/out"), "/data/out could not be written: Permission denied."),
        (PermissionError(13, "Permission denied", b"/m/a.json"), "/m/a.json cannot be used: Permission denied."),
        (OSError(5, "Input/output error", "/data/.out.headshare-partial-1/a"), "/data/out could not be written: Input"),
        (OSError("several\nlines"), "/data/out could not be written: several"),
    ],
)
def test_the_path_that_is_blamed_is_the_one_that_failed(error: OSError, line: str) -> None:
    assert explain(error, OUT).startswith(line)


def test_a_disk_with_room_and_no_place_for_another_file_is_said_to_be_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = os.statvfs(tmp_path)
    full = os.statvfs_result((*found[:6], 0, 0, *found[8:]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "there can be no more files" in explain(error, tmp_path / "out")


def test_an_error_of_several_lines_is_one() -> None:
    assert in_one_line(OSError("one\ntwo")) == "the system reports: one two."
    assert in_one_line(OSError(9, "Bad file descriptor", 7)) == "7 cannot be used: Bad file descriptor."


def as_nobody(work: object) -> int:
    """Run this in a child of a user who may read and write little; 0 if it ended as it should."""

    def child() -> None:
        os.setgid(65534)
        os.setuid(65534)
        work()  # type: ignore[operator]

    return in_child(child)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_file_that_may_not_be_read_is_blamed_and_the_output_is_not() -> None:
    with TemporaryDirectory() as name:  # pytest's own are private
        folder = Path(name)
        folder.chmod(0o755)
        llama = tiny.make_llama(folder / "llama")
        (llama / "tokenizer.json").write_text("{}")
        for path in llama.iterdir():
            path.chmod(0o600 if path.name == "tokenizer.json" else 0o644)
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)

        def refused() -> None:
            with pytest.raises(CheckpointError, match=r"llama/tokenizer\.json cannot be read: Permission denied"):
                share(llama, folder / "open" / "out")
            with pytest.raises(OutputError, match=r"llama/plan\.json could not be written: Permission denied"):
                write_whole(llama / "plan.json", b"{}")

        with nothing_changes(folder):
            assert as_nobody(refused) == 0
        assert left_behind(folder / "open") == []
