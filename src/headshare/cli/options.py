"""Options, refusals and output that several commands have in common."""

import errno
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headshare.calibration.launched import launched_first
from headshare.calibration.refit.refinement import BEST, FAST, NONE, Refinement
from headshare.cli.streams import unprinted
from headshare.errors import HeadshareError, OptionError
from headshare.files.printable import shown
from headshare.progress import tell
from headshare.tables import drawn

if TYPE_CHECKING:
    from typer import Context as Context
else:
    Context = typer.Context.__base__  # what typer hands over is one of these, and no typer.Context

# columns of a terminal that does not say how many it has
WIDTH = 100

# panels of `--help`, in the order of the options that are in them
CHOOSE = "Choose"
SIZE = "Reach a size"
CALIBRATE = "Calibrate"
REPAIR = "Repair"
WRITE = "Write"
TEXT = "Text"
TASKS = "Tasks"
TRANSLATION = "Translation"
SHOW = "Show"
CHECK = "Check"
RUN = "Run"
OTHER = "Other"

RestartOption = Annotated[
    bool,
    typer.Option(
        "--restart", rich_help_panel=RUN, help="Throw away the state of a stopped run. Default: go on from it."
    ),
]
RanksOption = Annotated[
    int,
    typer.Option(
        rich_help_panel=CHOOSE,
        help="Keep donors on the rank of their recipients, when so many ranks share each layer's heads.",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(rich_help_panel=OTHER, help="Read this branch, tag or commit of a hub id. Default: main.")
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=OTHER, help="Print one JSON object on standard output and nothing else."),
]
FieldOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=TEXT,
        help="Read the text of a row from this field, in .jsonl, .json, .csv and data sets. Default: the one that it "
        "can be.",
    ),
]
if TYPE_CHECKING:
    BitsName = str
    EmbeddingBits = str
else:
    BitsName = StrEnum("BitsName", {name: name for name in ("8", "4")})
    EmbeddingBits = StrEnum("EmbeddingBits", {name: name for name in ("8", "16")})

BitsOption = Annotated[
    BitsName | None,
    typer.Option(rich_help_panel=WRITE, help="Count matrices as rounded to this many bits, embeddings too."),
]
GroupOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=WRITE,
        help="Give so many inputs of a row one scale. Default: in 8 bits the whole row; in 4 bits the largest of 128, "
        "64, 32... that fits.",
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=WRITE, help="Replace an existing output of the same kind.")
]
AnyBaseOption = Annotated[
    bool,
    typer.Option(
        "--any-base",
        rich_help_panel=OTHER,
        help="Take this dense model even if it is not the one that SHARED came from.",
    ),
]


# the last line of commands that count or choose for people who have not made the model yet
NEXT = "To make the model smaller, repaired and measured, in one command: headshare shrink --help"

REFINE_HELP = (
    "Repair further. text: refit on as much text again, which the dense model writes after the calibration text. "
    f"fast: the same, and {FAST.steps} gradient steps on each layer. best: the same as text, and {BEST.whole} steps on "
    "the whole model, which must fit in memory. A number: so many steps on each layer, and no more text."
)


def a_refinement(word: str) -> str:
    """A word for how far a model is refined, if it is one."""
    try:
        Refinement.of(word)
    except OptionError as error:
        raise typer.BadParameter(str(error)) from None
    return word


RefineOption = Annotated[
    str,
    typer.Option(metavar="WORD", callback=a_refinement, rich_help_panel=REPAIR, help=REFINE_HELP),
]


@dataclass(frozen=True)
class RefitOptions:
    """How a model is repaired after sharing."""

    refit_ffn: Annotated[
        bool, typer.Option(rich_help_panel=REPAIR, help="Also refit the feed-forward's output projection.")
    ] = True
    refine: RefineOption = NONE


@dataclass(frozen=True)
class RepairOptions(RefitOptions):
    """Whether a model is repaired after sharing, how, and whether it is measured then."""

    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            rich_help_panel=REPAIR,
            help="After sharing, refit each layer's output projections to the calibration text (closed form, no "
            "training).",
        ),
    ] = False
    measure: Annotated[
        bool,
        typer.Option(
            rich_help_panel=REPAIR,
            help="Also measure the perplexity of both models on held-out windows of the calibration text.",
        ),
    ] = False


@dataclass(frozen=True)
class CommonOptions:
    """Options of every command that reads a checkpoint and writes something."""

    revision: RevisionOption = None
    overwrite: OverwriteOption = False
    as_json: JsonOption = False


def is_given(context: Context, name: str) -> bool:
    """Whether a parameter was given on the command line, and is not a default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def refuse_unused(context: Context, why: str, names: Iterable[str]) -> None:
    """Refuse options that were given and would do nothing.

    Raises:
        OptionError: naming them and the reason.
    """
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = [options[name] for name in names if is_given(context, name)]
    if given:
        raise OptionError(f"{' and '.join(given)} would not be used: {why}.")


def listed(text: str) -> list[str]:
    """The words that an option joins by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def print_result(data: dict[str, Any], words: str, as_json: bool, *, written: Path | None = None) -> None:
    """Print the result of a command on standard output: words for people, or one JSON object.

    Tables are drawn on a terminal and are Markdown elsewhere. What strangers wrote (names, texts of a model) is shown
    without what a terminal would act on. `written` is the
    output that the command wrote. Where printing fails, the output is there all the same, and the command has done what
    it was to do. Without one, the command fails. Of several processes the first one prints.
    """
    if not launched_first():
        return
    text = json.dumps(data, default=str) if as_json else _as_read(shown(words.rstrip()))
    error = unprinted(f"{text}\n")
    if error is None:
        return
    if written is not None:
        tell(f"the result could not be printed ({error.strerror}). What was written is whole: {written}")
        raise typer.Exit(0)
    if error.errno != errno.EPIPE:  # its reader needs no more of it
        tell(f"error: the result could not be printed: {error.strerror}.")
    raise typer.Exit(1)


def _as_read(words: str) -> str:
    """The words as standard output shows them best: with tables drawn, if a person reads them on a terminal."""
    if sys.stdout is None or sys.stdout.closed or not sys.stdout.isatty():
        return words
    encoding = (sys.stdout.encoding or "").lower()
    return drawn(words, shutil.get_terminal_size((WIDTH, 24)).columns, plain=not encoding.startswith("utf"))


def print_written(data: dict[str, Any], words: str, out: Path, seconds: float, *, as_json: bool) -> None:
    """Print the result of a command that wrote a checkpoint, and for people how to load it."""
    if not launched_first():  # what the first one writes may not be there yet
        return
    print_result(data, words if as_json else f"{words}\n{_how_to_load(out, seconds)}", as_json, written=out)


def _how_to_load(out: Path, seconds: float) -> str:
    """What was written, and the command that loads it, which is tried before it is printed, without the numbers."""
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.integrations.transformers.loading import load_model

    try:
        with open_checkpoint(out) as written:
            name = type(load_model(written, device_map="meta")).__name__
            first = "" if written.sharing is None else "after `import headshare` "
    except HeadshareError as error:
        return f"Written in {seconds:.1f} s: {out}\nIts numbers are checked, but it cannot be loaded here: {error}"
    command = f"transformers.{name}.from_pretrained({str(out)!r})"
    return f"Written and checked in {seconds:.1f} s: {out}\nLoad it {first}with {command}."
