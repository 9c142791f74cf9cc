"""Errors of the operating system in one line: what could not be done, with which path, and why."""

import errno
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what names of temporary files and folders hold, which nobody should be told about
HIDDEN = ".headshare-"


def explain(error: OSError, path: Path) -> str:
    """The message for an error of the system while this output was written.

    The error may name another file, such as one that could not be read: then it is that file's.
    """
    if error.errno in FULL:
        return f"there is no room left for {path!s:.300} ({_cause_of_full(error, path)}). Free some and run again."
    named = error.filename
    # a hidden name is this output's, for a time
    if isinstance(named, str | bytes) and HIDDEN not in os.fsdecode(named) and os.fspath(path) != os.fsdecode(named):
        return f"{os.fsdecode(named):.300} cannot be used: {error.strerror or error}."
    return f"{path!s:.300} could not be written: {error.strerror or error}."


def in_one_line(error: OSError) -> str:
    """The message for an error of the system that nobody expected: the path that it names, and the cause."""
    cause = " ".join((error.strerror or str(error) or type(error).__name__).split())
    if error.filename is None:
        return f"the system reports: {cause:.300}."
    named = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
    if error.errno in FULL:
        return f"there is no room left for {named!s:.300} ({cause:.300}). Free some and run again."
    return f"{named!s:.300} cannot be used: {cause:.300}."


def _cause_of_full(error: OSError, path: Path) -> str:
    """The system's words, and the fact that names and not bytes are used up, where that is so."""
    cause = error.strerror or str(error)
    try:
        room = os.statvfs(path.absolute().parent)
    except OSError:
        return cause
    return f"{cause}: there can be no more files" if room.f_files and not room.f_favail else cause
