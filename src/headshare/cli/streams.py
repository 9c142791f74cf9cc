"""Standard streams as a command finds them: closed, full, left by their reader, or in an encoding of few letters."""

import errno
import io
import os
import sys
from contextlib import suppress


def prepare() -> None:
    """Make the standard streams ones that can be written to whatever is said.

    Letters that their encoding lacks are written as escapes. The descriptors of closed streams are taken by nothing
    that is opened later, into which others would then write.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # its descriptor is not what it was when the stream was made
                stream.reconfigure(errors="backslashreplace")


def unprinted(text: str = "") -> OSError | None:
    """Write to standard output, with all that was written before. Returns why that failed; None where it did not."""
    if sys.stdout is None:
        return OSError(errno.EBADF, "standard output is closed") if text else None
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _give_up()
        return error
    except ValueError:
        return OSError(errno.EBADF, "standard output is closed")
    return None


def _give_up() -> None:
    """Send what is still to be written nowhere, so that Python does not try it again when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
