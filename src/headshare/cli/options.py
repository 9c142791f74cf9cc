"""What several commands have in common: options, and how a result is printed."""

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headshare.errors import HeadshareError, OptionError

if TYPE_CHECKING:
    from typer import Context as Context
else:
    Context = typer.Context.__base__  # what typer hands over is one of these, and no typer.Context

RestartOption = Annotated[
    bool, typer.Option("--restart", help="Throw away the state of a stopped run, which else goes on.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit, for a hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is a checkpoint folder.")]


def is_given(context: Context, name: str) -> bool:
    """Whether the command line says so, and not a default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def refuse_unused(context: Context, why: str, names: Iterable[str], error: type[HeadshareError] = OptionError) -> None:
    """Refuse options that were given and would do nothing.

    Raises:
        OptionError: or another `error`.
    """
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = [options[name] for name in names if is_given(context, name)]
    if given:
        raise error(f"{' and '.join(given)} would not be used: {why}.")


def listed(text: str) -> list[str]:
    """What an option joins by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def print_result(data: dict[str, Any], words: str, as_json: bool) -> None:
    """A command's result on standard output: words for people, or one JSON object."""
    sys.stdout.write((json.dumps(data) if as_json else words.rstrip()) + "\n")
