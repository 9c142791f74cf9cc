"""A Python command, and the environment in which it and the processes that it starts know the format."""

import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from headshare.errors import OptionError

ON_PATH = Path(__file__).parent / "on_path"
# Python ignores these, and a program that it becomes would go on ignoring them
_IGNORED = ("SIGPIPE", "SIGXFSZ")


def become(words: Sequence[str]) -> NoReturn:
    """Become this command, in this very process: its streams, its signals and its exit status are the command's own.

    Raises:
        OptionError: if there is no such command, or it cannot be run.
    """
    command = found(words)
    for name in _IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execve(command[0], command, environment(os.environ))  # noqa: S606 - the person's own command
    except OSError as error:
        raise OptionError(f"{command[0]} cannot be run: {error.strerror}.") from None


def found(words: Sequence[str]) -> list[str]:
    """The command with the path of its program.

    Python itself runs a script (NAME.py) and what begins with an option of Python (-m MODULE). Commands that are
    installed beside headshare go before those of the same name elsewhere.

    Raises:
        OptionError: if nothing has that name.
    """
    if not words:
        raise OptionError("say what to run: headshare run -- lm_eval --model hf --model_args pretrained=OUT.")
    name = words[0]
    if name.startswith("-"):
        return [sys.executable, *words]
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise OptionError(f"there is no file {name}.")
        return [sys.executable, *words]
    beside = str(Path(sys.executable).parent)
    program = shutil.which(name, path=os.pathsep.join((beside, os.environ.get("PATH", os.defpath))))
    if program is None:
        raise OptionError(
            f"there is no command {name!r} beside {sys.executable} or in PATH. Install it, or name a .py."
        )
    return [program, *words[1:]]


def environment(before: Mapping[str, str]) -> dict[str, str]:
    """These variables, with the folder in PYTHONPATH from which each Python learns the format as it starts."""
    paths = [path for path in before.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ON_PATH)]
    return {**before, "PYTHONPATH": os.pathsep.join((str(ON_PATH), *paths))}
