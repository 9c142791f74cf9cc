"""`headshare compare`: methods side by side at equal bytes; its options, over those of a YAML file. And `headshare
report`: a page of what it found.

What it needs is imported when it begins: the other commands should not wait for it.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from headshare.checkpoint.opening import open_checkpoint
from headshare.cli.evaluate import EvalDtypeName
from headshare.cli.options import (
    Context,
    JsonOption,
    RestartOption,
    RevisionOption,
    is_given,
    listed,
    print_result,
    refuse_unused,
)
from headshare.errors import EvaluationError, TrainingError
from headshare.files.atomic import write_whole
from headshare.files.untrusted import read_yaml
from headshare.text.tokens import TOKENS
from headshare.text.windows import WINDOW

LISTS = ("methods", "ratios", "tasks")


def compare_command(
    context: Context,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A dense checkpoint, unless --config names one.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for cells.json, cells.csv and table.md; a stopped grid goes on.")
    ] = Path("compared"),
    config: Annotated[
        Path | None, typer.Option(help="A recipe in YAML; options on the command line override it.")
    ] = None,
    methods: Annotated[
        str, typer.Option(metavar="NAMES", help="Methods, joined by commas; with +refit for a refit: deletion+refit.")
    ] = "",
    ratios: Annotated[str, typer.Option(metavar="NUMBERS", help="Shares of all units, joined by commas.")] = "0.1,0.3",
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file, for perplexity.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Use at most this many tokens of --text.")] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window of --text.")] = WINDOW,
    source: Annotated[Path | None, typer.Option(help="Lines to translate, as of `eval`.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Their translations, line by line.")] = None,
    prompt: Annotated[str, typer.Option(help="What the model is given of a line, {source}.")] = "{source}\n",
    language: Annotated[str | None, typer.Option(help="Language of the translations, as of `eval`.")] = None,
    tasks: Annotated[str, typer.Option(metavar="NAMES", help="Tasks, as of `eval`.")] = "",
    data_dir: Annotated[Path | None, typer.Option(help="The folder of our tasks' files.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many questions of each task, or subject.")] = None,
    few_shot: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    batch_size: Annotated[int, typer.Option(help="Options of questions run at once.")] = 16,
    dtype: Annotated[EvalDtypeName, typer.Option(help="Type to measure in; auto: as stored.")] = EvalDtypeName.AUTO,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE|DATASET|self", help="Text that methods look at and refits are made on.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of it.")] = TOKENS,
    calibration_window: Annotated[int, typer.Option(help="Tokens in a window of it.")] = WINDOW,
    train: Annotated[
        Path | None,
        typer.Option(help="Settings of `headshare train` in YAML (text, learning, ...), for methods that train."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random donors, and of what is held out.")] = 0,
    device: Annotated[str, typer.Option(help="Where to calibrate and measure: cpu, cuda:0.")] = "cpu",
    restart: RestartOption = False,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sharing, its controls and other methods side by side, each at the bytes that sharing saves.

    docs/evaluating.md lists the methods. Every cell is kept when it is done.
    """
    given: dict[str, Any] = {
        "model": model, "methods": methods, "ratios": ratios, "text": text, "tokens": tokens, "window": window,
        "source": source, "reference": reference, "prompt": prompt, "language": language,
        "tasks": tasks, "data_dir": data_dir,
        "limit": limit, "few_shot": few_shot, "batch_size": batch_size, "dtype": dtype.value,
        "calibration": calibration, "calibration_tokens": calibration_tokens,
        "calibration_window": calibration_window, "seed": seed, "device": device,
    }  # fmt: skip
    chosen = {
        name: listed(value) if name in LISTS else value for name, value in given.items() if is_given(context, name)
    }
    from headshare.experiments import Recipe, compare
    from headshare.experiments.report.tables import in_words, to_dict

    if train is not None:
        chosen["train"] = read_yaml(train, TrainingError)

    recipe = Recipe.load(config, chosen)
    for name, words in (("text", ("tokens", "window")), ("tasks", ("data_dir", "few_shot")),
                        ("source", ("prompt", "language")),
                        ("calibration", ("calibration_tokens", "calibration_window"))):  # fmt: skip
        if not getattr(recipe, name) and not (name == "tasks" and recipe.train):
            refuse_unused(context, f"there is no --{name}", words, EvaluationError)
    if not (recipe.tasks or recipe.source or recipe.train):
        refuse_unused(context, "there is no --tasks and no --source", ("limit", "batch_size"), EvaluationError)
    if recipe.model is None:
        raise EvaluationError("there is no model to make smaller: name one, or a --config that does.")
    grid = recipe.grid()
    with open_checkpoint(recipe.model, revision=revision) as dense:
        text_of = recipe.calibration_on(dense)
        cells = compare(
            dense, grid, out, calibration=text_of, device=recipe.device, restart=restart, title=recipe.title
        )
    print_result(to_dict(cells), in_words(cells), as_json)


def report_command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="What `compare --out` wrote, or `eval --out`.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write the page here too, in place of what is there.")] = None,
    paper: Annotated[
        Path | None,
        typer.Option(help="Published figures in YAML, such as recipes/published/2402.11819.yaml, to put beside ours."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw figures into this folder, and show them on the page.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """One page in Markdown from finished comparisons: their tables, and what becomes of the paper's claims. Results of
    `eval` come after them."""
    from headshare.evaluation.results import RESULTS
    from headshare.experiments.about import ABOUT
    from headshare.experiments.report.figures import draw
    from headshare.experiments.report.page import report
    from headshare.experiments.report.sources import Comparison, Evaluated, published

    has_results = {folder: (folder / RESULTS).is_file() for folder in folders}
    compared = {
        folder: Comparison.load(folder) for folder in folders if (folder / ABOUT).is_file() or not has_results[folder]
    }
    loaded = {folder: Evaluated.load(folder) for folder in folders if has_results[folder]}
    evaluated = [one for folder, one in loaded.items() if one.tells_more_than(compared.get(folder))]
    measured = list(compared.values())
    tables, shown = published(paper) if paper else (), []
    if figures is not None:
        start = out.absolute().parent if out else Path.cwd()
        for number, one in enumerate(measured, 1):
            drawn = draw(one.cells, figures, str(number))
            shown.append([(title, os.path.relpath(path, start)) for title, path in drawn])
    page = report(measured, tables, shown, evaluated)
    if out is not None:
        write_whole(out, page.encode())
    data = {"tables": [one.to_dict() for one in measured], "evaluated": [asdict(one) for one in evaluated]}
    print_result(data, page, as_json)
