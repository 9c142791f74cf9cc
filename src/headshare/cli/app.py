"""The command line: the steps of the Python API under the same words.

Results go to standard output, everything else to standard error. An error is one line and exit status 1. A command's
module is imported when the command is asked for, and imports torch when it runs.
"""

from contextlib import nullcontext
from typing import Annotated, NoReturn

import typer

from headshare.calibration.launched import is_sent, launched_first
from headshare.cli.catalogue.group import LazyGroup
from headshare.cli.options import print_result
from headshare.cli.streams import prepare, unprinted
from headshare.errors import HeadshareError
from headshare.files.failures import in_one_line
from headshare.files.printable import one_line
from headshare.progress import shown, tell

app = typer.Typer(
    cls=LazyGroup,
    help="Make a pre-trained transformer smaller: heads of different layers share one stored copy of their weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> bool:
    if value:
        from headshare.version import __version__

        print_result({}, f"headshare {__version__}", as_json=False)
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
