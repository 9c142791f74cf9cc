"""The command line: the same steps under the same words as the Python API.

Results go to standard output, everything else to standard error. Exit status 1 and one line say what was wrong.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from headshare.accounting import estimate as estimate_bytes
from headshare.benching import DENSE, Subject, dense_and_shared
from headshare.benching import bench as run_bench
from headshare.checkpoints import open_checkpoint
from headshare.demo import RATIOS, TOKENS, in_one_sentence, language_reference, run_demo
from headshare.errors import CheckpointError, HeadshareError, OutputError, PlanError
from headshare.evaluation import WINDOW, Agreement, evaluate, read_text
from headshare.inspection import describe, describe_split, picture, picture_split, plan_of
from headshare.memory import watched_peak
from headshare.planning import make_plan
from headshare.plans import SharePlan
from headshare.progress import shown
from headshare.scores import Scores
from headshare.sharing import expand as expand_checkpoint
from headshare.sharing import share as share_checkpoint
from headshare.similarity import score_units
from headshare.table import bench_table, demo_table
from headshare.units import Parts
from headshare.verification import verify as verify_checkpoint
from headshare.writing import check_output, check_vacant

app = typer.Typer(
    help="Make a pre-trained transformer smaller: heads of different layers share one stored copy of their weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


DEMO_MODEL = "./demo-output/smollm2-135m"


class MatchName(StrEnum):
    """The match functions for attention, as the command line offers them."""

    QK = "qk"
    Q = "q"
    K = "k"
    V = "v"
    QKV = "qkv"
    SEPARATE = "separate"


class ModeName(StrEnum):
    """The ways to choose ties."""

    STAR = "star"
    ROOT = "root"
    PUBLISHED = "published"


class DtypeName(StrEnum):
    """The types weights can be stored as."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, or a model id on the hub.")]
SharedArgument = Annotated[str, typer.Argument(metavar="SHARED", help="A folder that `share` wrote, or a hub id.")]
RatioOption = Annotated[
    float, typer.Option(help="Share of all units that give up their weights; int(ratio x units) of them.")
]
PartsOption = Annotated[
    str,
    typer.Option(help="What is shared: qkv (the paper), qk, qkvo (the authors' release), ffn, gateup, or qkvo+ffn."),
]
MatchOption = Annotated[
    MatchName, typer.Option(help="Match function: cosine of these parts; separate matches each by itself.")
]
ModeOption = Annotated[
    ModeName,
    typer.Option(
        help="star: donors only among kept units. root: the paper's pairs, chains followed. published: as released."
    ),
]
FfnGroupsOption = Annotated[
    int, typer.Option(help="Feed-forward units a layer: 1 shares whole layers, G equal groups of neurons.")
]
FfnRatioOption = Annotated[
    float | None, typer.Option(help="The feed-forward's own ratio, where it differs from --ratio.")
]
ProtectOption = Annotated[
    str | None, typer.Option(help="Layers that give nothing up, such as 1,2,29. (Layer 0 never does.)")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit, for a hub id.")]
DtypeOption = Annotated[DtypeName | None, typer.Option(help="Store all weights as this type. Default: as they are.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is a checkpoint folder.")]


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of whole numbers such as 1,2,29") from None


def _print(data: dict[str, Any], words: str, as_json: bool) -> None:
    sys.stdout.write((json.dumps(data) if as_json else words.rstrip()) + "\n")


@app.command()
def estimate(
    model: ModelArgument,
    ratio: RatioOption = 0.3,
    parts: PartsOption = "qkv",
    match: MatchOption = MatchName.QK,
    ffn_groups: FfnGroupsOption = 1,
    ffn_ratio: FfnRatioOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Exact bytes before any weight is read: what sharing would save, and how much was at stake."""
    checkpoint = open_checkpoint(model, revision=revision, weights=False)
    found = estimate_bytes(
        checkpoint, ratio, parts=parts, match=match, ffn_groups=ffn_groups, ffn_ratio=ffn_ratio, dtype=dtype
    )
    _print(found.to_dict(), found.in_words(), as_json)


@app.command()
def score(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the scores.")] = Path(
        "scores.safetensors"
    ),
    match: MatchOption = MatchName.QK,
    parts: PartsOption = "qkv",
    ffn_groups: FfnGroupsOption = 1,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score every pair of units, once. Plans at any ratio and in any mode come from the same scores."""
    _check_file(output, overwrite, Scores.load, model)
    begun = time.monotonic()
    with open_checkpoint(model, revision=revision) as checkpoint:
        scores = score_units(checkpoint, match, parts, ffn_groups=ffn_groups)
    scores.save(output)
    seconds = time.monotonic() - begun
    units = sum(table.layout.units for table in scores.tables)
    data = {
        "output": str(output),
        "units": units,
        "tables": len(scores.tables),
        "digest": scores.digest,
        "seconds": seconds,
    }
    _print(data, f"Scored {units} units in {seconds:.1f} s: {output}", as_json)


@app.command()
def plan(
    scores_file: Annotated[Path, typer.Argument(metavar="SCORES", help="What `score` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("share_plan.json"),
    ratio: RatioOption = 0.3,
    parts: PartsOption = "qkv",
    mode: ModeOption = ModeName.STAR,
    ffn_ratio: FfnRatioOption = None,
    protect: ProtectOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose recipients and donors from scores. The plan is JSON that can be read, edited and compared."""
    _check_file(output, overwrite, SharePlan.load)
    made = make_plan(
        Scores.load(scores_file), ratio, parts=parts, mode=mode, ffn_ratio=ffn_ratio, protect=_numbers(protect)
    )
    made.save(output)
    data = {"output": str(output), "ties": made.ties, "plan_digest": made.digest}
    _print(data, f"{picture(made)}\n{made.ties} ties: {output}", as_json)


@app.command()
def share(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    ratio: RatioOption = 0.3,
    match: MatchOption = MatchName.QK,
    parts: PartsOption = "qkv",
    mode: ModeOption = ModeName.STAR,
    ffn_groups: FfnGroupsOption = 1,
    ffn_ratio: FfnRatioOption = None,
    protect: ProtectOption = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Use this plan; nothing is scored or chosen.")
    ] = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score, plan, share and verify: a checkpoint goes in, a smaller one comes out and loads like any other."""
    begun = time.monotonic()
    check_vacant(out, overwrite=overwrite)
    with watched_peak() as peak, open_checkpoint(model, revision=revision) as dense:
        check_output(out, dense.path, overwrite=overwrite)
        if plan_file is not None:
            made = SharePlan.load(plan_file)
        else:
            wanted = Parts.parse(parts)
            scores = score_units(dense, match, wanted, ffn_groups=ffn_groups)
            made = make_plan(scores, ratio, parts=wanted, mode=mode, ffn_ratio=ffn_ratio, protect=_numbers(protect))
        shared = share_checkpoint(dense, made, dtype=dtype)
        shared.save(out, overwrite=overwrite)
        found = shared.estimate
    seconds = time.monotonic() - begun
    data = {
        **found.to_dict(),
        "seconds": seconds,
        "peak_anonymous_bytes": peak.bytes,
        "plan_digest": made.digest,
        "out": str(out),
    }
    lines = [
        found.in_words(),
        f"Written and checked in {seconds:.1f} s: {out}",
        f"Load it after `import headshare` with from_pretrained({str(out)!r}).",
    ]
    _print(data, "\n".join(lines), as_json)


@app.command()
def inspect(
    shared: Annotated[str, typer.Argument(metavar="SHARED", help="A shared checkpoint, or a share_plan.json.")],
    split: Annotated[
        int | None,
        typer.Option(help="Also say what is held more than once when the layers are split over this many devices."),
    ] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is tied to what, layer by layer."""
    if shared.endswith(".json"):
        if split is not None:
            raise typer.BadParameter("--split counts bytes, which a plan does not know: give it a shared checkpoint")
        made = SharePlan.load(shared)
        _print(describe(made), picture(made), as_json)
        return
    checkpoint = open_checkpoint(shared, revision=revision, weights=False)
    made = plan_of(checkpoint)
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    data = {**describe(made), "stored_bytes": stored}
    words = f"{picture(made)}\n{stored:,} bytes of weights stored in {shared}"
    if split is not None:
        data["split"] = describe_split(checkpoint, split)
        words += f"\n{picture_split(data['split'])}"
    _print(data, words, as_json)


@app.command()
def verify(
    shared: SharedArgument,
    against: Annotated[str | None, typer.Option(help="The dense model it came from: compare every number too.")] = None,
    logits: Annotated[bool, typer.Option(help="Also run both models and compare their logits.")] = True,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Open everything again: digests, map, numbers, and logits against a stock model with donors' rows written in."""
    checkpoint = open_checkpoint(shared, revision=revision)
    found = verify_checkpoint(checkpoint, None if against is None else open_checkpoint(against), logits=logits)
    lines = [
        f"{'ok' if found.ok else 'NOT ok'}: {found.files_checked} files, {found.parameter_bytes:,} parameter bytes"
    ]
    if found.tensors_checked:
        lines.append(f"{found.tensors_checked} tensors compared with {against}")
    if found.max_logit_diff is not None:
        lines.append(f"largest difference of a logit from the stock model: {found.max_logit_diff}")
    _print(found.to_dict(), "\n".join([*lines, *found.notes, *found.problems]), as_json)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def expand(
    shared: SharedArgument,
    dense: Annotated[Path, typer.Argument(metavar="DENSE", help="The folder to write; it must not exist.")],
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a stock folder, donors' rows in place, that any tool loads without headshare."""
    check_vacant(dense, overwrite=overwrite)
    with open_checkpoint(shared, revision=revision) as checkpoint:
        expand_checkpoint(checkpoint, dense, overwrite=overwrite)
    size = sum(info.nbytes for info in open_checkpoint(dense).tensors.values())
    _print({"out": str(dense), "bytes": size}, f"{size:,} bytes of weights in {dense}", as_json)


@app.command("eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_SHARED", help="A dense or a shared checkpoint.")],
    text: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    window: Annotated[int, typer.Option(help="Tokens in a window; windows do not overlap.")] = WINDOW,
    limit: Annotated[int | None, typer.Option(help="Use at most this many tokens of the text.")] = None,
    bos: Annotated[
        bool | None,
        typer.Option(help="Open each window with the beginning-of-text token. Default: if the model has one."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="For encoders: the dense model, to compare embeddings with.")
    ] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a text in windows; for encoders, agreement of their embeddings with the dense model's."""
    content = read_text(text)
    other = None if against is None else open_checkpoint(against)
    found = evaluate(
        open_checkpoint(model, revision=revision), content, against=other, window=window, limit=limit, bos=bos
    )
    if isinstance(found, Agreement):
        words = (
            f"mean cosine with {against}: {found.cosine:.6f} over {found.tokens} tokens in windows of {found.window}"
        )
    else:
        words = f"perplexity {found.perplexity:,.3f} over {found.tokens} tokens in windows of {found.window}"
    _print(found.to_dict(), words, as_json)


@app.command()
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
    _print(data, f"{demo_table(rows)}\n{source}\n\n{sentence}", as_json)


@app.command()
def bench(
    model: ModelArgument,
    against: Annotated[
        str | None,
        typer.Option(help="The dense model of a shared one. Default: the shared one is expanded for the time."),
    ] = None,
    storage: Annotated[
        str, typer.Option(help="How the shared model holds its weights; several, as in alias,owner.")
    ] = "auto",
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
        found = run_bench(subjects, tokens=_numbers(tokens) or None, repeats=repeats, loads=loads, cold=cold, **options)
    counts = f"{found.repeats} repeats, {found.loads} loads, {found.threads} threads"
    _print(found.to_dict(), f"{bench_table(found)}\n{counts}; ratios are medians of pairs, with quartiles", as_json)


def _check_file(path: Path, overwrite: bool, read: Callable[[Path], object], source: str | None = None) -> None:
    """Refuse an output file that exists, unless it may be overwritten and is of the kind that `read` reads."""
    if not os.path.isdir(path.absolute().parent):  # noqa: PTH112 - unlike Path's, it takes any name for an answer
        raise OutputError(f"there is no folder {path.absolute().parent} to write {path.name} in.")
    if source is not None and Path(os.path.realpath(source)) in Path(os.path.realpath(path)).parents:
        raise OutputError(f"the output {path} is inside the model {source}. Choose a place outside it.")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputError(f"{path} exists. Choose another name, or pass --overwrite.")
    try:
        read(path)
    except PlanError as error:
        raise OutputError(f"{path} is not what --overwrite may replace: {error}") from None


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
