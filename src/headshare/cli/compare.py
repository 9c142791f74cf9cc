"""The commands compare (methods side by side at equal bytes) and report (a page from its results).

Options of `compare` override the settings of its YAML file. The experiments are imported when a command begins, so that
other commands do not wait for them.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from headshare.cli.bundles import given_options, with_bundles
from headshare.cli.evaluate import TaskOptions, TextOptions, TranslationOptions
from headshare.cli.options import (
    CALIBRATE,
    RUN,
    WRITE,
    Context,
    FieldOption,
    JsonOption,
    RestartOption,
    RevisionOption,
    listed,
    print_result,
    refuse_unused,
)
from headshare.cli.share_options import CalibrationOptions, ModeOption
from headshare.errors import EvaluationError, TrainingError

# a panel of `--help`
COMPARE = "Compare"

# parameters whose words are joined by commas
LISTS = ("methods", "ratios", "save", "tasks")


@dataclass(frozen=True)
class GridOptions(CalibrationOptions):
    """What is compared, and the calibration of it, whose seed and device are those of the whole comparison."""

    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A dense checkpoint. Default: the one that --config names.")
    ] = None
    methods: Annotated[
        str,
        typer.Option(
            rich_help_panel=COMPARE,
            metavar="NAMES",
            help="Compare these methods, joined by commas; +refit adds a refit, as in deletion+refit. Default: a set "
            "that needs no calibration text.",
        ),
    ] = ""
    ratios: Annotated[
        str,
        typer.Option(
            rich_help_panel=COMPARE,
            metavar="NUMBERS",
            help="Compare at these fractions of all units, joined by commas.",
        ),
    ] = "0.1,0.3"
    save: Annotated[
        str,
        typer.Option(
            rich_help_panel=COMPARE,
            metavar="SHARES",
            help="Compare where these shares of the model's bytes are saved, joined by commas: 10%,20%. Without "
            "--ratios, at these alone.",
        ),
    ] = ""
    mode: ModeOption = "star"
    calibration: Annotated[
        str | None,
        typer.Option(rich_help_panel=CALIBRATE, metavar="FILE", help="Choose units and refit on this text."),
    ] = None
    field: FieldOption = None
    calibration_window: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=CALIBRATE, help="Cut that text into windows of this many tokens. Default: as --window."
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(rich_help_panel=RUN, help="Draw random donors and held-out windows by this seed.")
    ] = 0
    device: Annotated[
        str,
        typer.Option(metavar="DEVICE", rich_help_panel=RUN, help="Calibrate and measure on this device: cpu, cuda:0."),
    ] = "cpu"


@with_bundles
def compare_command(
    context: Context,
    config: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=COMPARE,
            help="Read settings from this YAML recipe; options on the command line override it.",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            rich_help_panel=WRITE,
            help="Write cells.json, cells.csv and table.md into this folder; a stopped grid goes on.",
        ),
    ] = Path("compared"),
    methods_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=COMPARE,
            help="Also know the methods of this Python file of your own, which is run; name them in --methods.",
        ),
    ] = None,
    *,
    chosen: GridOptions,
    text: TextOptions,
    tasks: TaskOptions,
    translation: TranslationOptions,
    train: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=COMPARE, help="Train by these settings of `headshare train` in YAML (text, learning, ...)."
        ),
    ] = None,
    restart: RestartOption = False,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare sharing, its controls and other methods, each at the bytes that sharing saves.

    docs/comparing.md lists the methods. Every cell is kept when it is done.
    """
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.experiments import Recipe, compare
    from headshare.experiments.case import base_of
    from headshare.experiments.own_methods import methods_from as register
    from headshare.experiments.report.tables import in_words, to_dict
    from headshare.files.untrusted import read_yaml

    # only options that were given override the recipe
    given = given_options(context, chosen, text, tasks, translation)
    given |= {name: listed(value) for name, value in given.items() if name in LISTS}
    if train is not None:
        given["train"] = read_yaml(train, TrainingError)

    own = [] if methods_from is None else register(methods_from)

    # options that nothing in the recipe would use
    recipe = Recipe.load(config, given)
    if own and not {base_of(name) for name in recipe.methods} & set(own):
        refuse_unused(context, f"none of its methods is compared; add to --methods: {', '.join(own)}", ["methods_from"])
    for name, words in (("text", ("tokens", "window")), ("tasks", ("data_dir", "few_shot")),
                        ("source", ("prompt", "language")),
                        ("calibration", ("calibration_tokens", "calibration_window"))):  # fmt: skip
        if not getattr(recipe, name) and not (name == "tasks" and recipe.train):
            refuse_unused(context, f"there is no --{name}", words)
    if not (recipe.tasks or recipe.source or recipe.train):
        refuse_unused(context, "there is no --tasks and no --source", ("limit", "batch_size"))
    if recipe.model is None:
        raise EvaluationError("there is no model to make smaller: name one, or a --config that does.")
    grid = recipe.grid()
    with open_checkpoint(recipe.model, revision=revision) as dense:
        text_of = recipe.calibration_on(dense)
        cells = compare(
            dense, grid, out, calibration=text_of, device=recipe.device, restart=restart, title=recipe.title
        )
    print_result(to_dict(cells), in_words(cells), as_json, written=out)


def report_command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Folders that --out of `compare`, `eval` or `attention` wrote."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(rich_help_panel=WRITE, help="Also write the page to this file, in place of what is there."),
    ] = None,
    paper: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WRITE,
            help="Put the figures of this YAML file beside ours, such as recipes/published/2402.11819.yaml.",
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WRITE, metavar="DIR", help="Draw figures into this folder, and show them on the page."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WRITE,
            help="Also write the page, with its figures, to this HTML file, which needs no other.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one page from finished comparisons: their tables and figures, and what became of the paper's claims.

    The page is Markdown; `--html` writes it for a browser too. Results of `eval` and of `attention` come after the
    comparisons.
    """
    from headshare.attention.page import Attended
    from headshare.attention.result import FILE, AttentionResult
    from headshare.evaluation.results import RESULTS
    from headshare.experiments.about import ABOUT
    from headshare.experiments.report.content import report_of
    from headshare.experiments.report.page import as_html, as_markdown, check_page
    from headshare.experiments.report.sources import Comparison, Evaluated, published
    from headshare.files.atomic import write_whole
    from headshare.files.untrusted import is_file
    from headshare.pages import page as pages
    from headshare.pages.figures import save_figures

    if out is not None:
        check_page(out)
    if html is not None:
        pages.check_page(html)
    looked = [folder for folder in folders if is_file(folder / FILE)]
    attended = [Attended.of(AttentionResult.load(folder)) for folder in looked]
    folders = [folder for folder in folders if folder not in looked]
    has_results = {folder: is_file(folder / RESULTS) for folder in folders}
    compared = {
        folder: Comparison.load(folder) for folder in folders if is_file(folder / ABOUT) or not has_results[folder]
    }
    loaded = {folder: Evaluated.load(folder) for folder in folders if has_results[folder]}
    # an evaluation beside a comparison is shown only if it has more than that
    evaluated = [results for folder, results in loaded.items() if results.tells_more_than(compared.get(folder))]
    measured = list(compared.values())
    report = report_of(measured, published(paper) if paper else (), evaluated, attended)
    shown = []
    if figures is not None:
        start = out.absolute().parent if out else Path.cwd()
        for number, comparison in enumerate(report.comparisons, 1):
            drawn = save_figures(comparison.figures, figures, str(number))
            shown.append([(title, os.path.relpath(path, start)) for title, path in drawn])
        for number, one in enumerate(attended, 1):
            drawn = save_figures(one.figures, figures, f"attention-{number}")
            shown.append([(title, os.path.relpath(path, start)) for title, path in drawn])
    page = as_markdown(report, shown)
    if out is not None:
        write_whole(out, page.encode())
    if html is not None:
        pages.write_page(html, as_html(report))
    data = {
        "tables": [comparison.to_dict() for comparison in measured],
        "evaluated": [asdict(results) for results in evaluated],
    }
    print_result(data, page, as_json, written=out or html)
