"""The command run."""

from typing import Annotated

import typer


def run(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND...", help="A Python command: NAME, NAME.py or -m MODULE, and its words."),
    ],
) -> None:
    """Run a Python command that then loads models of this format, though it never imports headshare.

    So do the processes that it starts. Write `--` before the command.
    """
    from headshare.integrations.transformers.startup.command import become

    become(command)
