"""The reference of the command line: a page for each command, made from what `--help` prints from."""

import re
from typing import Any

import typer
from typer.core import TyperArgument, TyperOption

from headshare.cli.app import app
from headshare.cli.catalogue.commands import COMMANDS

HOME = "reference/commands"


def navigation() -> list[Any]:
    """The entries of the navigation."""
    return [f"{HOME}/index.md", *({name: f"{HOME}/{name}.md"} for name in COMMANDS)]


def pages() -> dict[str, str]:
    """The pages, under their addresses."""
    group = typer.main.get_command(app)
    context = group.make_context("headshare", [], resilient_parsing=True)
    made = {name: group.get_command(context, name) for name in COMMANDS}
    found = {f"{HOME}/{name}.md": _page(name, command) for name, command in made.items()}
    return {f"{HOME}/index.md": _index(made)} | found


def _index(commands: dict[str, Any]) -> str:
    lines = ["# Command line", "", "`headshare COMMAND --help` prints what stands on these pages.", ""]
    for panel in dict.fromkeys(command.panel for command in COMMANDS.values()):
        lines += [f"## {panel}", "", "| command | what it does |", "|---|---|"]
        for name, command in COMMANDS.items():
            if command.panel == panel:
                lines.append(f"| [`{name}`]({name}.md) | {_cell(_first(commands[name].help))} |")
        lines.append("")
    return "\n".join(lines)


def _page(name: str, command: Any) -> str:
    arguments = [one for one in command.params if isinstance(one, TyperArgument)]
    options = [one for one in command.params if isinstance(one, TyperOption) and not one.hidden]
    usage = [one.metavar if one.required else f"[{one.metavar}]" for one in arguments]
    lines = [f"# headshare {name}", "", _prose(command.help), ""]
    lines += ["    " + " ".join(["headshare", name, *usage, "[OPTIONS]"]), ""]
    lines += ["## Examples", "", *(f"    {example}" for example in COMMANDS[name].examples), ""]
    lines += ["## Arguments", "", "| argument | what it is |", "|---|---|"]
    lines += [f"| `{one.metavar}` | {_cell(one.help)} |" for one in arguments]
    lines.append("")
    for panel in dict.fromkeys(map(_panel, options)):
        lines += [f"## {panel}", "", "| option | what it does | default |", "|---|---|---|"]
        lines += [_row(one) for one in options if _panel(one) == panel]
        lines.append("")
    return "\n".join(lines)


def _panel(option: Any) -> str:
    return getattr(option, "rich_help_panel", None) or "Options"


def _row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    value = option.metavar or ""
    return f"| {names} {value} | {_cell(option.help)} | {_default(option)} |".replace("  ", " ")


def _default(option: Any) -> str:
    default = option.default
    if default is None or callable(default) or default is False or default == []:
        return ""
    if default is True:
        return "yes" if option.secondary_opts else ""
    return f"`{getattr(default, 'value', default)}`"


def _first(text: str | None) -> str:
    return re.split(r"(?<=[.])\s", _prose(text), maxsplit=1)[0]


def _prose(text: str | None) -> str:
    """The text of a help without typer's marks."""
    return (text or "").replace("\f", "").replace("\b", "").strip()


def _cell(text: str | None) -> str:
    return " ".join(_prose(text).split()).translate({ord(mark): f"\\{mark}" for mark in "|[]<>*_"})
