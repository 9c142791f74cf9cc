"""The commands as typer makes them, each when somebody asks for it, and the form of their help.

An option's type is one short word, and the values that it can have stand in its help. `--help` is in the last panel.
Examples stand at the end.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import OptionInfo

from headshare.calibration.launched import launched_first
from headshare.cli.catalogue.commands import COMMANDS, Command
from headshare.cli.options import OTHER
from headshare.progress import tell

GOES_ON = "stopped. Run the same command to go on."
STARTS_OVER = "stopped. The same command starts over."

# the words for types in the help of an option; a flag takes no value
WORDS = {int: "N", float: "X", Path: "PATH", str: "TEXT", bool: ""}


class HelpedCommand(TyperCommand):
    """A command whose `--help` stands in the last panel of its help."""

    def get_params(self, ctx: Any) -> Any:
        """The parameters, that of `--help` included."""
        parameters = super().get_params(ctx)
        for parameter in parameters:
            if "--help" in parameter.opts:
                parameter.metavar = ""
                vars(parameter)["rich_help_panel"] = OTHER  # which options have, and parameters in general do not
        return parameters


def made(name: str, command: Command) -> Any:
    """The command as typer makes it."""
    module, function_name = command.home.split(":")
    function = getattr(import_module(f"headshare.cli.{module}"), function_name)
    name_types(function)
    function = _stopped_in_words(function, goes_on=command.goes_on)
    alone = typer.Typer(add_completion=False)
    alone.command(
        name,
        cls=HelpedCommand,
        context_settings=dict(command.settings) or None,
        help=_in_paragraphs(inspect.getdoc(function) or ""),
        epilog="Examples:\n" + "\n".join(f"  {example}" for example in command.examples),
        rich_help_panel=command.panel,
    )(function)
    return typer.main.get_command(alone)


def _stopped_in_words(function: Callable[..., None], *, goes_on: bool) -> Callable[..., None]:
    """The command, which says in one line what to do when a person stops it, and ends with status 130."""

    @wraps(function)
    def run(*given: Any, **options: Any) -> None:
        try:
            function(*given, **options)
        except KeyboardInterrupt:
            if launched_first():
                tell(GOES_ON if goes_on else STARTS_OVER)
            raise typer.Exit(130) from None

    return run


def name_types(function: Callable[..., Any]) -> None:
    """Give each option of a command a short word for its type, and its help the values that it can have."""
    for name, parameter in inspect.signature(function).parameters.items():
        if get_origin(parameter.annotation) is not Annotated:
            continue
        kind, *more = get_args(parameter.annotation)
        for option in more:
            if isinstance(option, OptionInfo) and option.metavar is None:
                _name_type(option, name, _alone(kind))


def _name_type(option: OptionInfo, name: str, kind: Any) -> None:
    if isinstance(kind, type) and issubclass(kind, Enum):
        option.metavar = name.upper()
        values = [str(value.value) for value in kind]
        help_text = option.help or ""
        if not all(f"{value}:" in help_text for value in values):
            option.help = f"{help_text} One of: {', '.join(values)}."
    else:
        option.metavar = WORDS.get(kind)


def _alone(kind: Any) -> Any:
    """The type without None, and the type of a list's values."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(one for one in get_args(kind) if one is not NoneType)
    return get_args(kind)[0] if get_origin(kind) is list else kind


def _in_paragraphs(text: str) -> str:
    """The text with its paragraphs in one line each, so that a terminal breaks them."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


class _Made(Mapping[str, Any]):
    """The commands as typer makes them, by name."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = made(name, COMMANDS[name])
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class LazyGroup(TyperGroup):
    """The whole of the commands, none of which is imported before it is asked for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": {}})
        self.commands: Any = _Made()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer hands it over
        """The names of the commands, as `--help` lists them."""
        return list(COMMANDS)
