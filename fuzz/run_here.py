"""Commands of the console script, run in this process to make what the good folder holds."""

import contextlib
import io
import sys
from pathlib import Path

from headshare.cli.app import main

Words = tuple[str, ...]


def run_here(words: Words, folder: Path, status: int = 0) -> None:
    """Run a command that has to end with this status, in this folder."""
    argv = sys.argv
    sys.argv = ["headshare", *words]
    try:
        quiet = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            main()
    except SystemExit as ended:
        assert (ended.code or 0) == status, (words, ended.code)
    finally:
        sys.argv = argv
