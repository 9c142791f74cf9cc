"""The form of the help: panels, short words for types, the values that an option can have, and examples that hold."""

import shlex
from typing import Any

import pytest
import typer

from headshare.calibration.budget import BY_DEFAULT
from headshare.cli.app import app
from headshare.cli.catalogue.commands import COMMANDS
from headshare.matching.functions import MATCH_FUNCTIONS
from headshare.matching.modes import MODES
from headshare.storage.registry import AUTO, STORAGES
from support.command_line import Run

GROUP: Any = typer.main.get_command(app)


def options_of(command: str) -> dict[str, Any]:
    return {name: option for option in GROUP.commands[command].params for name in option.opts if name.startswith("-")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_in_a_panel_with_a_short_word_for_its_type(command: str) -> None:
    for name, option in options_of(command).items():
        assert option.rich_help_panel, name
        assert option.metavar is not None, name
        assert len(option.metavar) <= len("DISTANCE"), name
        assert option.help, name


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_end_the_help_and_have_options_that_exist(command: str, run: Run) -> None:
    examples = COMMANDS[command].examples
    assert examples
    end = run(command, "--help").out.rpartition("Examples:")[2]
    assert [line.strip() for line in end.strip().split("\n")] == list(examples)
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["headshare", command]
        assert len(example) < 78
        own = words[: words.index("--")] if "--" in words else words  # those after it are another command's
        given = [word for word in own if word.startswith("--")]
        assert all(word in options_of(command) or command == "train" for word in given)


def test_the_help_of_share_can_be_read_on_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    lines = run("share", "--help").out.split("\n")
    assert max(map(len, lines)) <= 80
    assert len(lines) < 160
    panels = [line.strip("╭─╮ ") for line in lines if line.startswith("╭")]
    assert panels == ["Arguments", "Choose", "Reach a size", "Calibrate", "Run", "Repair", "Write", "Other"]
    assert not any("…" in line for line in lines)  # nothing is cut off


def test_choices_are_those_of_the_registries() -> None:
    share = options_of("share")
    assert all(f"{mode}:" in share["--mode"].help for mode in MODES)
    attention = [name for name, function in MATCH_FUNCTIONS.items() if function.kind == "attention"]
    assert f"One of: {', '.join(attention)}, output, exact." in share["--match"].help
    assert all(f"({name})" in share["--allow"].help for name in BY_DEFAULT)
    assert f"{AUTO}, {', '.join(STORAGES)}." in options_of("bench")["--storage"].help
