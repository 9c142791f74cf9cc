"""`headshare compare`: methods side by side at equal bytes.

What it needs is imported when it begins: the other commands should not wait for it.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from headshare.calibration import TOKENS, calibration_from
from headshare.checkpoints import open_checkpoint
from headshare.eval_command import EvalDtypeName
from headshare.evaluation import WINDOW
from headshare.options import JsonOption, RestartOption, RevisionOption

LIGHT = "directshare,random-donors,mean-unit,deletion-same,magnitude,magnitude-zeros,int8"


def compare_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder for cells.json, cells.csv and table.md; a stopped grid goes on.")],
    methods: Annotated[
        str, typer.Option(metavar="NAMES", help="Methods, joined by commas; with +refit for a refit: deletion+refit.")
    ] = LIGHT,
    ratios: Annotated[str, typer.Option(metavar="NUMBERS", help="Shares of all units, joined by commas.")] = "0.1,0.3",
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file, for perplexity.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Use at most this many tokens of --text.")] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window of --text.")] = WINDOW,
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
    seed: Annotated[int, typer.Option(help="Seed of random donors, and of what is held out.")] = 0,
    device: Annotated[str, typer.Option(help="Where to calibrate and measure: cpu, cuda:0.")] = "cpu",
    restart: RestartOption = False,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sharing, its controls and other methods side by side, each at the bytes that sharing saves.

    docs/evaluating.md lists the methods. Every cell is kept when it is done.
    """
    from headshare.comparing import Grid, compare
    from headshare.comparing.grid import table, to_dict, verdict
    from headshare.evaluating import Settings, Text

    grid = Grid(
        methods=_words(methods),
        ratios=_numbers(ratios),
        tasks=_words(tasks),
        data=data_dir,
        text=None if text is None else Text(text, window, tokens),
        settings=Settings(limit, few_shot, dtype.value, device, batch_size),
        seed=seed,
    )
    with open_checkpoint(model, revision=revision) as dense:
        given = None
        if calibration is not None:
            given = calibration_from(
                calibration, dense, tokens=calibration_tokens, window=calibration_window, seed=seed, device=device
            )
        cells = compare(dense, grid, out, calibration=given, device=device, restart=restart)
    words = f"{table(cells)}\n\n{verdict(cells)}"
    sys.stdout.write((json.dumps(to_dict(cells)) if as_json else words.rstrip()) + "\n")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of numbers such as 0.1,0.3") from None
