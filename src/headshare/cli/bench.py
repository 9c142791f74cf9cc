"""The commands demo and bench."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from headshare.cli.options import CHOOSE, RUN, TEXT, WRITE, AnyBaseOption, FieldOption, JsonOption, print_result
from headshare.cli.share_options import DtypeName, ModelArgument, ModeOption, PartsOption, whole_numbers
from headshare.defaults import DEMO_TOKENS
from headshare.errors import CheckpointError
from headshare.storage.names import AUTO, NAMES

DEMO_MODEL = "./demo-output/smollm2-135m"


def demo(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A local folder, or a hub id. Default: the model that `make demo` made."),
    ] = DEMO_MODEL,
    text: Annotated[
        Path | None,
        typer.Option(rich_help_panel=TEXT, help="Measure on this text. Default: Python's own language reference."),
    ] = None,
    field: FieldOption = None,
    work: Annotated[
        Path, typer.Option(rich_help_panel=WRITE, help="Write the models into this folder, one after the other.")
    ] = Path("demo-output"),
    keep: Annotated[
        bool, typer.Option("--keep", rich_help_panel=WRITE, help="Keep the models. Without it they are removed again.")
    ] = False,
    tokens: Annotated[
        int, typer.Option(rich_help_panel=TEXT, help="Measure on this many tokens of the text, and repair on as many.")
    ] = DEMO_TOKENS,
    mode: ModeOption = "star",
    as_json: JsonOption = False,
) -> None:
    """Shrink a model by 5, 10 and 20 %, and print the results beside 8 bits and the paper's method."""
    from headshare.experiments.demo import in_one_sentence, language_reference, run_demo
    from headshare.experiments.demo_table import demo_table
    from headshare.text.formats import check_field
    from headshare.text.windows import read_text

    if model == DEMO_MODEL and not Path(model).exists():
        raise CheckpointError(
            f"there is no model at {model}. `make demo` makes it; or name a model: headshare demo MODEL"
        )
    check_field(field, text)
    content = read_text(text, field) if text else language_reference()
    rows = list(run_demo(model, work, content, tokens=tokens, keep=keep, mode=str(mode)))
    sentence = in_one_sentence(rows)
    first = rows[0]
    source = (
        f"perplexity on {text or 'the Python language reference'}: {first.tokens} tokens, windows of {first.window}"
    )
    data = {"rows": [row.to_dict() for row in rows], "text": str(text or "pydoc_data.topics"), "sentence": sentence}
    print_result(data, f"{demo_table(rows).markdown(even=True)}\n{source}\n\n{sentence}", as_json, written=work)


def bench(
    model: ModelArgument,
    against: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CHOOSE,
            help="Compare a shared MODEL with this dense one. Default: MODEL, expanded temporarily.",
        ),
    ] = None,
    storage: Annotated[
        str,
        typer.Option(
            rich_help_panel=RUN,
            help=f"Hold the shared model's weights in these ways, joined by commas: {AUTO}, {', '.join(NAMES)}.",
        ),
    ] = AUTO,
    ratio: Annotated[
        float, typer.Option(rich_help_panel=CHOOSE, help="Share a dense MODEL temporarily, at this ratio.")
    ] = 0.3,
    parts: PartsOption = "qkv",
    tokens: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=RUN,
            help="Measure passes of these lengths. Default: 1,16,512, as far as the model can read.",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(rich_help_panel=RUN, help="Run this many passes of each model, by turns.")
    ] = 10,
    loads: Annotated[
        int,
        typer.Option(
            rich_help_panel=RUN, help="Load each model this many times, by turns; each load runs in its own process."
        ),
    ] = 3,
    cold: Annotated[
        bool,
        typer.Option("--cold", rich_help_panel=RUN, help="Load from the disk. Default: from the system's cache of it."),
    ] = False,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(rich_help_panel=RUN, help="Load the models in this type. Default: as they are stored."),
    ] = None,
    any_base: AnyBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure speed, loading and memory of a shared model on this machine, beside its dense model in the same run."""
    from headshare.bench.bench import DENSE, Subject, dense_and_shared
    from headshare.bench.bench import bench as run_bench
    from headshare.bench.tables import bench_table
    from headshare.checkpoint.opening import open_checkpoint

    options = {} if dtype is None else {"dtype": str(dtype)}
    with (
        open_checkpoint(model) as opened,
        nullcontext() if against is None else open_checkpoint(against) as dense,
        dense_and_shared(opened, dense, ratio=ratio, parts=parts, any_base=any_base) as (dense_folder, shared_folder),
    ):
        subjects = [Subject(DENSE, dense_folder), *(Subject(name, shared_folder, name) for name in storage.split(","))]
        results = run_bench(
            subjects, tokens=whole_numbers(tokens) or None, repeats=repeats, loads=loads, cold=cold, **options
        )
    counts = f"{results.repeats} repeats, {results.loads} loads, {results.threads} threads"
    print_result(
        results.to_dict(), f"{bench_table(results)}\n{counts}; ratios are medians of pairs, with quartiles", as_json
    )
