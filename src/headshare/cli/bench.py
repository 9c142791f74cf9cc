"""The commands demo and bench."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from headshare.bench.bench import DENSE, Subject, dense_and_shared
from headshare.bench.bench import bench as run_bench
from headshare.bench.tables import bench_table
from headshare.checkpoint.opening import open_checkpoint
from headshare.cli.options import JsonOption, print_result
from headshare.cli.plan import whole_numbers
from headshare.cli.share_options import DtypeOption, ModelArgument, PartsOption
from headshare.errors import CheckpointError
from headshare.experiments.demo import RATIOS, TOKENS, in_one_sentence, language_reference, run_demo
from headshare.experiments.demo_table import demo_table
from headshare.storage.registry import AUTO, STORAGES
from headshare.text.windows import read_text

DEMO_MODEL = "./demo-output/smollm2-135m"


def demo(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A local folder, or a hub id. Default: the model that `make demo` made."),
    ] = DEMO_MODEL,
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on. Default: Python's own language reference.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder for the shared models.")] = Path("demo-output"),
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use.")] = TOKENS,
    seed: Annotated[int, typer.Option(help="Seed of the random donors.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Share at 0, 0.1, 0.2 and 0.3, verify each, and print one table of what it saves and what it costs."""
    if model == DEMO_MODEL and not Path(model).exists():
        raise CheckpointError(
            f"there is no model at {model}. `make demo` makes it; or name a model: headshare demo MODEL"
        )
    content = read_text(text) if text else language_reference()
    rows = []
    for row in run_demo(model, work, content, tokens=tokens, seed=seed):
        rows.append(row)
        sys.stderr.write(f"{len(rows)} of {len(RATIOS)}: ratio {row.ratio:g} shared, verified, measured\n")
    sentence = in_one_sentence(rows)
    first = rows[0]
    source = (
        f"perplexity on {text or 'the Python language reference'}: {first.tokens} tokens, windows of {first.window}"
    )
    data = {"rows": [row.to_dict() for row in rows], "text": str(text or "pydoc_data.topics"), "sentence": sentence}
    print_result(data, f"{demo_table(rows)}\n{source}\n\n{sentence}", as_json)


def bench(
    model: ModelArgument,
    against: Annotated[
        str | None,
        typer.Option(help="The dense model of a shared one. Default: the shared one is expanded for the time."),
    ] = None,
    storage: Annotated[
        str,
        typer.Option(
            help=f"How the shared model holds its weights: {AUTO}, {', '.join(STORAGES)}; several with commas between."
        ),
    ] = AUTO,
    ratio: Annotated[float, typer.Option(help="For a dense MODEL: the ratio to share it at, for the time.")] = 0.3,
    parts: PartsOption = "qkv",
    tokens: Annotated[
        str | None,
        typer.Option(help="Tokens of a pass; several, as in 1,16,512, which is the default as far as it fits."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Passes of each model, by turns.")] = 10,
    loads: Annotated[int, typer.Option(help="Loads of each model, by turns, in a process each.")] = 3,
    cold: Annotated[
        bool, typer.Option("--cold", help="Load from the disk, not from the system's cache of it.")
    ] = False,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure speed, loading and memory of a shared model on this machine, beside its dense model in the same run."""
    options = {} if dtype is None else {"dtype": str(dtype)}
    with (
        open_checkpoint(model) as opened,
        nullcontext() if against is None else open_checkpoint(against) as dense,
        dense_and_shared(opened, dense, ratio=ratio, parts=parts) as (dense_folder, shared_folder),
    ):
        subjects = [Subject(DENSE, dense_folder), *(Subject(name, shared_folder, name) for name in storage.split(","))]
        found = run_bench(
            subjects, tokens=whole_numbers(tokens) or None, repeats=repeats, loads=loads, cold=cold, **options
        )
    counts = f"{found.repeats} repeats, {found.loads} loads, {found.threads} threads"
    print_result(
        found.to_dict(), f"{bench_table(found)}\n{counts}; ratios are medians of pairs, with quartiles", as_json
    )
