"""The command line: the steps of the Python API under the same words.

Results go to standard output, everything else to standard error. An error is one line and exit status 1.
"""

import sys
from typing import Annotated

import typer

from headshare.cli.bench import bench, demo
from headshare.cli.compare import compare_command, report_command
from headshare.cli.convert import expand, quantize
from headshare.cli.evaluate import evaluate_command, generate_command
from headshare.cli.inspect import inspect, verify
from headshare.cli.plan import estimate, plan, score
from headshare.cli.share import refit, share
from headshare.cli.train import train
from headshare.errors import HeadshareError
from headshare.progress import shown

app = typer.Typer(
    help="Make a pre-trained transformer smaller: heads of different layers share one stored copy of their weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# in the order of `--help`
for command in (estimate, score, plan, share, refit, quantize, inspect, expand, verify, demo, bench):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
app.command("eval")(evaluate_command)
app.command("generate")(generate_command)
app.command("compare")(compare_command)
app.command("report")(report_command)


def _version(value: bool) -> bool:
    if value:
        from importlib.metadata import version

        sys.stdout.write(f"headshare {version('headshare')}\n")
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
    """Run the command line; a headshare error becomes one line and exit status 1."""
    try:
        with shown():
            status = app(prog_name="headshare", standalone_mode=False)
    except HeadshareError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    except typer.TyperException as error:
        message = error.format_message()
        sys.stderr.write(f"error: {message}\n" if message else "")  # without any command, the help has said it all
        raise SystemExit(1) from None
    except typer.Abort:
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        raise SystemExit(130) from None
    raise SystemExit(status if isinstance(status, int) else 0)
