"""The command register."""

from typing import Annotated

import typer

from headshare.cli.options import OTHER, JsonOption, print_result


def register(
    remove: Annotated[
        bool, typer.Option("--remove", rich_help_panel=OTHER, help="Take it away again. Default: register.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Let every program of this Python environment load models of this format, without `headshare run`.

    It writes one line into the environment, which each Python runs as it starts. headshare is imported when a program
    imports transformers, and not before.
    """
    from headshare.integrations.transformers.startup import always

    at, removed = always.place(), False
    if remove:
        removed = always.unregister()
        words = f"{'Removed' if removed else 'There was no'} {at}"
    else:
        always.register()
        words = f"{at}\nPrograms of this environment now load models of this format. Undo: headshare register --remove"
    print_result({"file": str(at), "registered": not remove, "removed": removed}, words, as_json)
