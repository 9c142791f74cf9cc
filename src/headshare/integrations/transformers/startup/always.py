"""A line in this environment by which every Python of it knows the format, whatever starts it."""

import sysconfig
from pathlib import Path

from headshare.errors import OutputError
from headshare.files.atomic import write_whole
from headshare.files.failures import explain

HOOK = Path(__file__).with_name("hook.py")
NAME = "headshare-format.pth"

# What the line runs. Once headshare is uninstalled there is no hook, and it says nothing.
_RUN = (
    "with open(hook, encoding='utf-8') as file: "
    "exec(compile(file.read(), hook, 'exec'), {'__name__': 'headshare_hook'})"
)


def place() -> Path:
    """The file that `register` writes: Python runs the lines of such files as it starts."""
    return Path(sysconfig.get_path("purelib")) / NAME


def line() -> str:
    """The line, in ASCII, as Python reads such files in whatever encoding the system has."""
    hook = ascii(str(HOOK.resolve()))
    return f"import os; hook = {hook}; os.path.isfile(hook) and exec({_RUN!r}, {{'hook': hook}})\n"


def register() -> Path:
    """Write the line into this environment; return its file.

    Raises:
        OutputError: if the environment's folder of packages cannot be written to.
    """
    write_whole(place(), line().encode())
    return place()


def unregister() -> bool:
    """Take the line away; whether it was there.

    Raises:
        OutputError: if it cannot be removed.
    """
    try:
        place().unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise OutputError(explain(error, place())) from None
    return True
