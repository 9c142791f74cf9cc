"""The command line: the steps of the Python API under the same words.

Results go to standard output, everything else to standard error. An error is one line and exit status 1. A command's
module is imported when the command is asked for, and imports torch when it runs.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from headshare.calibration.launched import is_sent, launched_first
from headshare.cli.streams import prepare, unprinted
from headshare.errors import HeadshareError
from headshare.files.failures import in_one_line
from headshare.files.printable import one_line
from headshare.progress import shown, tell


@dataclass(frozen=True)
class Command:
    """A command: the place of its function, as module:name in this package, and how typer is to take it."""

    home: str
    settings: Mapping[str, Any] | None = None

    def made(self, name: str) -> Any:
        """The command as typer makes it."""
        module, function = self.home.split(":")
        alone = typer.Typer(add_completion=False)
        alone.command(name, context_settings=dict(self.settings) if self.settings else None)(
            getattr(import_module(f"headshare.cli.{module}"), function)
        )
        return typer.main.get_command(alone)


# in the order of `--help`
COMMANDS = {
    "shrink": Command("shrinking.command:shrink"),
    "estimate": Command("plan:estimate"),
    "score": Command("plan:score"),
    "plan": Command("plan:plan"),
    "share": Command("share:share"),
    "refit": Command("share:refit"),
    "quantize": Command("convert:quantize"),
    "inspect": Command("inspect:inspect"),
    "expand": Command("convert:expand"),
    "verify": Command("inspect:verify"),
    "demo": Command("bench:demo"),
    "bench": Command("bench:bench"),
    "train": Command("train:train", {"allow_extra_args": True, "ignore_unknown_options": True}),
    "eval": Command("evaluate:evaluate_command"),
    "generate": Command("evaluate:generate_command"),
    "compare": Command("compare:compare_command"),
    "report": Command("compare:report_command"),
}


class _Made(Mapping[str, Any]):
    """The commands as typer makes them, each when somebody asks for it."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = COMMANDS[name].made(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Group(TyperGroup):
    """The whole of the commands, none of which is imported before it is asked for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": {}})
        self.commands: Any = _Made()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer hands it over
        """The names of the commands, as `--help` lists them."""
        return list(COMMANDS)


app = typer.Typer(
    cls=_Group,
    help="Make a pre-trained transformer smaller: heads of different layers share one stored copy of their weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> bool:
    if value:
        from importlib.metadata import version

        from headshare.cli.options import print_result

        print_result({}, f"headshare {version('headshare')}", as_json=False)
        raise typer.Exit
    return value


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a pre-trained transformer smaller: heads of different layers share one stored copy of their weights."""


def main() -> None:
    """Run the command line; a headshare error, or one of the system, becomes one line and exit status 1."""
    prepare()
    try:
        with shown() if launched_first() else nullcontext():
            status = app(prog_name="headshare", standalone_mode=False)
    except HeadshareError as error:
        _fail("" if is_sent(error) else f"error: {error}")
    except typer.TyperException as error:
        message = one_line(error.format_message())
        _fail(f"error: {message}" if message else "")  # else the help has said it all
    except typer.Abort as stop:
        if isinstance(stop.__cause__, EOFError):  # of a file, for no command asks questions
            _fail(f"error: a file that was read ends too early ({stop.__cause__}). Restore it, or write it again.")
        raise SystemExit(130) from None
    except OSError as error:
        _fail(f"error: {in_one_line(error)}")
    except (MemoryError, RuntimeError) as error:
        from headshare.files.untrusted import wants_memory  # --version has no time for what it imports

        if not wants_memory(error):
            raise
        _fail("error: there is not enough memory for this. Close other programs, or take a smaller model.")
    except KeyboardInterrupt:
        _fail("stopped", 130)
    # what was printed by others, such as the help, may be on its way still
    if (unwritten := unprinted()) is not None and not status:
        _fail(f"error: the result could not be printed: {unwritten.strerror}.")
    raise SystemExit(status if isinstance(status, int) else 0)


def _fail(line: str, status: int = 1) -> NoReturn:
    if line:
        tell(line)
    raise SystemExit(status) from None
