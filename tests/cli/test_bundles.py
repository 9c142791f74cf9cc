"""Bundles of options: what typer makes of them, and what a command gets."""

import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command

from headshare.calibration.settings import CalibrationSettings
from headshare.cli.app import app
from headshare.cli.bundles import given_options, with_bundles
from headshare.cli.options import Context
from headshare.cli.share_options import CalibrationOptions

BUNDLED = ("plan", "share", "refit", "quantize", "compare")


@dataclass(frozen=True)
class SizeOptions:
    """A bundle."""

    width: Annotated[int, typer.Option(help="Be this wide.")]
    height: Annotated[int, typer.Option("--tall", help="Be this tall.")] = 2


@dataclass(frozen=True)
class BoxOptions(SizeOptions):
    """A bundle that has more, and another default."""

    height: Annotated[int, typer.Option("--tall", help="Be taller.")] = 5
    depth: Annotated[int, typer.Option(help="Be this deep.")] = 3


def made(bundle: type) -> tuple[typer.Typer, list[Any]]:
    """A command with this bundle, and the list of what it gets."""
    got: list[Any] = []

    def command(context: Context, name: str, *, size: Any, loud: bool = False) -> None:
        got.append((name, size, loud, given_options(context, size)))

    command.__annotations__["size"] = bundle
    one = typer.Typer()
    one.command()(with_bundles(command))
    return one, got


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "--width", "1"], ("a", SizeOptions(1, 2), False, {"width": 1})),
        (
            ["--tall", "2", "a", "--loud", "--width", "4"],
            ("a", SizeOptions(4, 2), True, {"width": 4, "height": 2}),
        ),
    ],
)
def test_a_command_gets_the_bundles_value_and_can_tell_what_was_given(words: list[str], expected: Any) -> None:
    one, got = made(SizeOptions)
    one(words, standalone_mode=False)
    assert got == [expected]


def test_a_bundle_that_extends_another_has_its_own_options_first_and_its_own_defaults() -> None:
    one, got = made(BoxOptions)
    one(["a", "--width", "1"], standalone_mode=False)
    assert got == [("a", BoxOptions(1, 5, 3), False, {"width": 1})]
    names = [parameter.name for parameter in get_command(one).params]
    assert [name for name in names if name in ("width", "height", "depth")] == ["height", "depth", "width"]


def test_an_option_without_a_default_must_be_given() -> None:
    one, got = made(SizeOptions)
    with pytest.raises(typer.TyperException, match="width"):
        one(["a"], standalone_mode=False)
    assert got == []


def test_all_that_is_calibrated_has_the_same_options_of_calibration() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name in BUNDLED:
        options = {parameter.name: parameter for parameter in commands[name].params}
        for field in ("calibration", "field", "calibration_tokens", "calibration_window", "seed", "device"):
            assert field in options, (name, field)
        assert options["calibration_tokens"].default == CalibrationSettings("").tokens
        assert options["calibration_window"].default == CalibrationSettings("").window


def test_no_command_has_more_than_a_dozen_parameters_of_its_own() -> None:
    """Options that belong together are a bundle."""
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        callback = inspect.unwrap(command.callback)
        assert len(inspect.signature(callback).parameters) <= 12, name


def test_the_options_of_calibration_are_the_settings_of_it() -> None:
    options = CalibrationOptions("text", 64, 16, 3, "cpu")
    assert options.settings("words", restart=True, probe=False) == CalibrationSettings(
        "words", 64, 16, 3, "cpu", restart=True, probe=False, field="text"
    )
