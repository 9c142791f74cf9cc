"""Options, refusals and output that several commands have in common."""

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

# panels of `--help`; options without one are listed first
CHOOSE = "Choose"
CALIBRATE = "Calibrate"
WRITE = "Write"

RestartOption = Annotated[
    bool, typer.Option("--restart", help="Throw away the state of a stopped run. Default: go on from it.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Read this branch, tag or commit of a hub id. Default: main.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=WRITE, help="Replace an existing output of the same kind.")
]
AnyBaseOption = Annotated[
    bool, typer.Option("--any-base", help="Take this dense model even if it is not the one that SHARED came from.")
]


def is_given(context: Context, name: str) -> bool:
    """Whether a parameter was given on the command line, and is not a default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def refuse_unused(context: Context, why: str, names: Iterable[str], error: type[HeadshareError] = OptionError) -> None:
    """Refuse options that were given and would do nothing.

    Raises:
        OptionError: or the given kind of `error`.
    """
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = [options[name] for name in names if is_given(context, name)]
    if given:
        raise error(f"{' and '.join(given)} would not be used: {why}.")


def listed(text: str) -> list[str]:
    """The words that an option joins by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def print_result(data: dict[str, Any], words: str, as_json: bool) -> None:
    """Print the result of a command on standard output: words for people, or one JSON object."""
    sys.stdout.write((json.dumps(data) if as_json else words.rstrip()) + "\n")
