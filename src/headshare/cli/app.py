"""The command line: the steps of the Python API under the same words.

Results go to standard output, everything else to standard error. An error is one line and exit status 1.
"""

from contextlib import nullcontext
from typing import Annotated, NoReturn

import typer

from headshare.calibration.processes import is_sent, launched_first
from headshare.cli.bench import bench, demo
from headshare.cli.compare import compare_command, report_command
from headshare.cli.convert import expand, quantize
from headshare.cli.evaluate import evaluate_command, generate_command
from headshare.cli.inspect import inspect, verify
from headshare.cli.options import print_result
from headshare.cli.plan import estimate, plan, score
from headshare.cli.share import refit, share
from headshare.cli.shrinking.command import shrink
from headshare.cli.streams import prepare, unprinted
from headshare.cli.train import train
from headshare.errors import HeadshareError
from headshare.files.failures import in_one_line
from headshare.files.printable import one_line
from headshare.files.untrusted import wants_memory
from headshare.progress import shown, tell

app = typer.Typer(
    help="Make a pre-trained transformer smaller: heads of different layers share one stored copy of their weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# in the order of `--help`
for command in (shrink, estimate, score, plan, share, refit, quantize, inspect, expand, verify, demo, bench):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
app.command("eval")(evaluate_command)
app.command("generate")(generate_command)
app.command("compare")(compare_command)
app.command("report")(report_command)


def _version(value: bool) -> bool:
    if value:
        from importlib.metadata import version

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
