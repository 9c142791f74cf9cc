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

    if remove:
        was = always.unregister()
        words = f"{'Removed' if was else 'There was no'} {always.place()}"
        print_result({"file": str(always.place()), "registered": False, "removed": was}, words, as_json)
        return
    at = always.register()
    words = f"{at}\nPrograms of this environment now load models of this format. Undo: headshare register --remove"
    print_result({"file": str(at), "registered": True, "removed": False}, words, as_json)
