"""The command reproduce. The experiments are imported when it begins, so that other commands do not wait for them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from headshare.cli.bundles import with_bundles
from headshare.cli.evaluate import EvalDtypeName
from headshare.cli.options import CALIBRATE, RUN, WRITE, JsonOption, RevisionOption, listed, print_result
from headshare.cli.share_options import ModelArgument

# panels of `--help`
PAPER = "Of the paper"
MEASURE = "Measure"


@dataclass(frozen=True)
class SmallForm:
    """The texts, and how much of everything is measured on models that are not the paper's."""

    data_dir: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=MEASURE,
            help="Read tasks' files, piqa.jsonl and so on, from this folder. Default: no tasks.",
        ),
    ] = None
    text: Annotated[
        Path | None,
        typer.Option(rich_help_panel=MEASURE, help="Measure losses on this text. Default: one that the model writes."),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=CALIBRATE,
            help="Choose units, refit and train on this text. Default: another that the model writes.",
        ),
    ] = None
    limit: Annotated[
        int,
        typer.Option(
            min=1, rich_help_panel=MEASURE, help="Ask so many questions of each task, and a 25th of it of each subject."
        ),
    ] = 50
    tokens: Annotated[int, typer.Option(min=1, rich_help_panel=MEASURE, help="Measure so many tokens.")] = 16384
    window: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=MEASURE, help="Cut texts into windows of so many tokens. Default: 512, or what it reads."
        ),
    ] = None
    steps: Annotated[int, typer.Option(min=1, rich_help_panel=MEASURE, help="Train PostShare for so many steps.")] = 60
    dtype: Annotated[EvalDtypeName, typer.Option(rich_help_panel=RUN, help="Run in this type; auto: as stored.")] = (
        EvalDtypeName.AUTO
    )
    device: Annotated[str, typer.Option(rich_help_panel=RUN, help="Run on this device: cpu, cuda:0.")] = "cpu"


@with_bundles
def reproduce_command(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option(
            rich_help_panel=WRITE,
            help="Write a folder for each comparison into this one, and report.md and report.html.",
        ),
    ],
    only: Annotated[
        str,
        typer.Option(
            rich_help_panel=PAPER, metavar="NAMES", help="Only these, joined by commas: table-3,figure-4. Default: all."
        ),
    ] = "",
    *,
    small: SmallForm,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel=PAPER, help="Only say what would be run, and why not the rest.")
    ] = False,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Reproduce the paper's tables and figures on a model, and report what becomes of its claims.

    On a model of the paper's the recipes run as published. On any other they run in a small form, which the options
    size. --dry-run lists what would be run, and why the rest does not fit.
    """
    from dataclasses import asdict

    from headshare.checkpoint.opening import open_checkpoint
    from headshare.experiments.report.page import as_html, as_markdown, check_page
    from headshare.experiments.reproduce import MAPS, Wanted, reproduce, steps_for
    from headshare.files.atomic import write_whole
    from headshare.pages import page as pages

    settings = {name: getattr(small, name) for name in small.__dataclass_fields__}
    wanted = Wanted(out, **{**settings, "dtype": small.dtype.value}, only=tuple(listed(only)))
    pages_of = (out / "report.md", out / "report.html")
    with open_checkpoint(model, revision=revision) as dense:
        dense.require_dense("reproduce the paper on it")
        if dry_run:
            steps = steps_for(dense, wanted)
            lines = [step.in_words for step in steps]
            words = "\n".join([*lines, f"{MAPS}: attention maps on both texts"] if wanted.maps else lines)
            print_result({"steps": [{"name": step.name, "why": step.why} for step in steps]}, words, as_json)
            return
        check_page(pages_of[0])
        pages.check_page(pages_of[1])
        report = reproduce(dense, wanted)
    page = as_markdown(report)
    write_whole(pages_of[0], page.encode())
    pages.write_page(pages_of[1], as_html(report))
    data = {"claims": [asdict(one) for one in report.judged], "not_run": [list(each) for each in report.absent]}
    print_result(data, page, as_json, written=pages_of[0])
