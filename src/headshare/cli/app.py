"""The command line: the same steps under the same words as the Python API.

Results go to standard output, everything else to standard error. Exit status 1 and one line say what was wrong.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from headshare.bench.bench import DENSE, Subject, dense_and_shared
from headshare.bench.bench import bench as run_bench
from headshare.bench.memory import watched_peak
from headshare.calibration.gptq import round_by_gptq
from headshare.calibration.run import (
    Budget,
    Outcome,
    Setting,
    Wanted,
    budget_of,
    device_named,
    plan_calibrated,
    refit_checkpoint,
    share_calibrated,
)
from headshare.checkpoint.checkpoint import Checkpoint, open_checkpoint
from headshare.cli.compare import compare_command, report_command
from headshare.cli.evaluate import evaluate_command, generate_command
from headshare.cli.options import (
    Context,
    JsonOption,
    OverwriteOption,
    RestartOption,
    RevisionOption,
    is_given,
    print_result,
    refuse_unused,
)
from headshare.cli.train import train
from headshare.errors import CalibrationError, CheckpointError, HeadshareError, OutputError, PlanError
from headshare.evaluation.perplexity import WINDOW, read_text
from headshare.evaluation.verify import verify as verify_checkpoint
from headshare.experiments.demo import RATIOS, TOKENS, in_one_sentence, language_reference, run_demo
from headshare.experiments.demo_table import bench_table, demo_table
from headshare.files.resume import settle
from headshare.matching.pairing import make_plan
from headshare.matching.scores import Scores
from headshare.matching.similarity import score_units
from headshare.plan.describe import describe, describe_split, picture, picture_split, plan_of
from headshare.plan.plan import SharePlan
from headshare.plan.units import Kind
from headshare.progress import shown
from headshare.sharing.safetensors_writer import check_output, check_vacant
from headshare.sharing.share import expand as expand_checkpoint
from headshare.sharing.share import share as share_checkpoint
from headshare.sharing.size import estimate as estimate_bytes
from headshare.text.tokens import TOKENS as CALIBRATION_TOKENS
from headshare.text.tokens import calibration_from

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


class ShareMatchName(StrEnum):
    """The same, and `output`: what each unit does to its layer's output on calibration text."""

    QK = "qk"
    Q = "q"
    K = "k"
    V = "v"
    QKV = "qkv"
    SEPARATE = "separate"
    OUTPUT = "output"


class ModeName(StrEnum):
    """The ways to choose ties."""

    STAR = "star"
    ROOT = "root"
    PUBLISHED = "published"


class AllowName(StrEnum):
    """What a calibrated plan may do besides sharing."""

    REMOVE = "remove"


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
CalibratedPartsOption = Annotated[
    str | None,
    typer.Option(
        help="What is shared: qkv (default), qk, qkvo, ffn, gateup, or qkvo+ffn. By output: qk, qkv, qkvo, gateup, "
        "factored (qkv, and o stored as a product), several joined by +, or auto (qkvo+factored), the default with "
        "--save and --allow."
    ),
]
RefitFfnOption = Annotated[bool, typer.Option(help="Refit the feed-forward's readout too, not the attention's alone.")]
ReconstructOption = Annotated[
    int,
    typer.Option(
        metavar="STEPS",
        min=0,
        help="After the refit, so many gradient steps for each layer, on the weights of its attention and feed-forward "
        "that it does not share, towards what the dense layer gives. They take several times as long as the refit.",
    ),
]
MeasureOption = Annotated[
    bool,
    typer.Option(help="Also measure the perplexity of both models on the windows held out of the calibration text."),
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
    str | None,
    typer.Option(help="Layers that give nothing up, such as 1,2,29. (Layer 0 shares nothing; it can lose units.)"),
]
_CALIBRATION = typer.Option(
    metavar="FILE|DATASET|self",
    help="Text to calibrate on: a text file, a .jsonl, hf:NAME[:CONFIG][:SPLIT], or self (the model writes it).",
)
CalibrationOption = Annotated[str | None, _CALIBRATION]
NeededCalibrationOption = Annotated[str, _CALIBRATION]
CalibrationTokensOption = Annotated[int, typer.Option(help="Tokens of that text to use, in whole windows.")]
CalibrationWindowOption = Annotated[int, typer.Option(help="Tokens in a calibration window.")]
CalibrationSeedOption = Annotated[
    int, typer.Option("--seed", help="Seed that chooses the windows, or writes the text.")
]
SaveOption = Annotated[
    str | None,
    typer.Option(help="Instead of --ratio: save this much of the whole model (10%, or bytes), where it costs least."),
]
AllowOption = Annotated[
    AllowName | None,
    typer.Option(help="remove: the plan may also delete units and neurons outright, where that costs less."),
]
DeviceOption = Annotated[str, typer.Option(help="Where to calibrate: cpu, cuda, or auto.")]
ProbeOption = Annotated[
    bool, typer.Option(help="Price what is given up by the measured predictions of the model, not of its layer alone.")
]
DtypeOption = Annotated[DtypeName | None, typer.Option(help="Store all weights as this type. Default: as they are.")]


CALIBRATING = ("calibration_tokens", "calibration_window", "seed", "device", "restart", "probe", "measure")
CHOOSING = ("ratio", "match", "parts", "mode", "ffn_groups", "ffn_ratio", "protect", "save", "allow")


def _check_share(context: Context, *, planned: bool, by_output: bool, refit: bool, calibrated: bool) -> None:
    """Refuse what contradicts itself, or would be ignored."""
    if planned:
        refuse_unused(context, "--plan says what is shared", CHOOSING)
    if not calibrated and (by_output or refit):
        what = "a plan by output" if by_output else "a refit"
        raise CalibrationError(f"{what} needs text: give --calibration FILE, a data set (hf:NAME), or self.")
    if calibrated and not (by_output or refit):
        raise CalibrationError("the calibration text would not be used: add --refit or --match output.")
    if not calibrated:
        refuse_unused(context, "there is no --calibration text", CALIBRATING)
    if not refit:
        refuse_unused(context, "nothing is refitted without --refit", ["refit_ffn", "reconstruct"])
    if not by_output:
        refuse_unused(context, "only a plan by output is priced", ["probe"])


def _check_budget(context: Context, budget: Budget) -> None:
    """Refuse what does not apply where units are chosen by output."""
    refuse_unused(context, "units are chosen by output, on the calibration text", ["mode", "ffn_ratio"])
    if is_given(context, "save"):
        refuse_unused(context, "--save says how much is given up", ["ratio"])
    if not any(form.kind is Kind.FFN for form in budget.forms):
        refuse_unused(context, "no groups of neurons are shared; add gateup to --parts", ["ffn_groups"])


def _budget(
    context: Context,
    dense: Checkpoint,
    ratio: float,
    save: str | None,
    parts: str | None,
    allow: AllowName | None,
    ffn_groups: int,
    protect: str | None,
) -> Budget:
    found = budget_of(
        dense,
        ratio=ratio,
        save=save,
        parts=parts or ("auto" if save or allow else "qkv"),
        allow=[allow] if allow else [],
        ffn_groups=ffn_groups,
        protect=_numbers(protect),
    )
    _check_budget(context, found)
    return found


def _dense_of(shared: Checkpoint, given: str | None) -> str:
    if shared.plan is None:
        raise CheckpointError(f"{shared.name} is not a shared checkpoint; there is nothing to refit.")
    found = given or shared.base_model
    if found is None:
        raise CheckpointError(f"{shared.name} does not say which dense model it came from. Name it: --dense MODEL")
    return found


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of whole numbers such as 1,2,29") from None


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
    print_result(found.to_dict(), found.in_words(), as_json)


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
    print_result(data, f"Scored {units} units in {seconds:.1f} s: {output}", as_json)


@app.command()
def plan(
    context: Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SCORES|MODEL", help="What `score` wrote; or with --calibration a model's folder or hub id."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("share_plan.json"),
    ratio: RatioOption = 0.3,
    parts: CalibratedPartsOption = None,
    mode: ModeOption = ModeName.STAR,
    ffn_groups: FfnGroupsOption = 1,
    ffn_ratio: FfnRatioOption = None,
    protect: ProtectOption = None,
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = CALIBRATION_TOKENS,
    calibration_window: CalibrationWindowOption = WINDOW,
    seed: CalibrationSeedOption = 0,
    save: SaveOption = None,
    allow: AllowOption = None,
    measure: Annotated[
        bool,
        typer.Option(help="Also refit the plan for a time, and measure both models' perplexity on held-out windows."),
    ] = True,
    device: DeviceOption = "auto",
    probe: ProbeOption = True,
    restart: RestartOption = False,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose recipients and donors: from scores, or from a model by what its units do on calibration text.

    The plan is JSON that can be read, edited and compared. With --calibration, predicted stands beside measured.
    """
    if calibration is None:
        refuse_unused(context, "a plan from scores reads no model and no text", _OF_MODEL)
        _check_file(output, overwrite, SharePlan.load)
        scores = Scores.load(Path(source))
        wanted = parts or "qkv"
        made = make_plan(scores, ratio, parts=wanted, mode=mode, ffn_ratio=ffn_ratio, protect=_numbers(protect))
        made.save(output)
        more, words = dict[str, Any](saved_bytes=None, price=None, price_unit=None, measured=None), ""
    else:
        settle(output)
        _check_file(output, overwrite, SharePlan.load, source)
        setting = Setting(calibration, calibration_tokens, calibration_window, seed, device, restart, probe)
        with open_checkpoint(source, revision=revision) as dense:
            budget = _budget(context, dense, ratio, save, parts, allow, ffn_groups, protect)
            found = plan_calibrated(dense, budget, setting, output, measured=measure)
        made, more, words = found.chosen.plan, found.to_dict(), f"{found.in_words()}\n"
    data = {"output": str(output), "ties": made.ties, "plan_digest": made.digest, **more}
    print_result(data, f"{picture(made)}\n{words}{made.ties} ties: {output}", as_json)


_OF_MODEL = ("ffn_groups", "save", "allow", "revision", *CALIBRATING)


@app.command()
def share(
    context: Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    ratio: RatioOption = 0.3,
    match: Annotated[
        ShareMatchName,
        typer.Option(help="Match function: cosine of these parts; or output, measured on the calibration text."),
    ] = ShareMatchName.QK,
    parts: CalibratedPartsOption = None,
    mode: ModeOption = ModeName.STAR,
    ffn_groups: FfnGroupsOption = 1,
    ffn_ratio: FfnRatioOption = None,
    protect: ProtectOption = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Use this plan; nothing is scored or chosen.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Refit what reads the shared parts out, on the calibration text.")
    ] = False,
    refit_ffn: RefitFfnOption = True,
    reconstruct: ReconstructOption = 0,
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = CALIBRATION_TOKENS,
    calibration_window: CalibrationWindowOption = WINDOW,
    seed: CalibrationSeedOption = 0,
    save: SaveOption = None,
    allow: AllowOption = None,
    measure: MeasureOption = False,
    device: DeviceOption = "auto",
    probe: ProbeOption = True,
    restart: RestartOption = False,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score, plan, share and verify: a checkpoint goes in, a smaller one comes out and loads like any other.

    With --calibration it can also match by output, refit, and choose under a budget. Stopped, it goes on from there.
    """
    begun = time.monotonic()
    by_output = plan_file is None and (match is ShareMatchName.OUTPUT or save is not None or allow is not None)
    _check_share(
        context, planned=plan_file is not None, by_output=by_output, refit=refit, calibrated=calibration is not None
    )
    if by_output and match is not ShareMatchName.OUTPUT:
        refuse_unused(context, "--save and --allow choose by output", ["match"])
    settle(out)
    check_vacant(out, overwrite=overwrite)
    with watched_peak() as peak, open_checkpoint(model, revision=revision) as dense:
        check_output(out, dense.path, overwrite=overwrite)
        wanted: SharePlan | Budget
        if plan_file is not None:
            wanted = SharePlan.load(plan_file)
        elif by_output:
            wanted = _budget(context, dense, ratio, save, parts, allow, ffn_groups, protect)
        else:
            scores = score_units(dense, match, parts or "qkv", ffn_groups=ffn_groups)
            numbers = _numbers(protect)
            wanted = make_plan(scores, ratio, parts=parts or "qkv", mode=mode, ffn_ratio=ffn_ratio, protect=numbers)
        if calibration is not None:
            setting = Setting(calibration, calibration_tokens, calibration_window, seed, device, restart, probe)
            asked = Wanted(wanted, refit=refit, ffn=refit_ffn, steps=reconstruct, measure=measure, dtype=dtype)
            found = share_calibrated(dense, asked, setting, out, overwrite=overwrite)
        else:
            assert isinstance(wanted, SharePlan)
            found = Outcome(share_checkpoint(dense, wanted, dtype=dtype))
            found.shared.save(out, overwrite=overwrite)
        estimated = found.shared.estimate
    seconds = time.monotonic() - begun
    data = {
        **estimated.to_dict(),
        **found.to_dict(),
        "seconds": seconds,
        "peak_anonymous_bytes": peak.bytes,
        "out": str(out),
    }
    lines = [
        estimated.in_words(),
        *found.in_words(),
        f"Written and checked in {seconds:.1f} s: {out}",
        f"Load it after `import headshare` with from_pretrained({str(out)!r}).",
    ]
    print_result(data, "\n".join(lines), as_json)


@app.command()
def refit(
    shared: SharedArgument,
    calibration: NeededCalibrationOption,
    dense: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model it came from. Default: the one it names.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write here. Default: replace SHARED, once all is done.")
    ] = None,
    refit_ffn: RefitFfnOption = True,
    reconstruct: ReconstructOption = 0,
    calibration_tokens: CalibrationTokensOption = CALIBRATION_TOKENS,
    calibration_window: CalibrationWindowOption = WINDOW,
    seed: CalibrationSeedOption = 0,
    device: DeviceOption = "auto",
    restart: RestartOption = False,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Refit a shared checkpoint's readouts on a text, so that it follows its dense model again. No training."""
    begun = time.monotonic()
    if out is None and not Path(shared).is_dir():
        raise OutputError(f"{shared} is no folder here that could be replaced. Say where to write: --out NEW")
    if out is not None:
        settle(out)
        check_vacant(out, overwrite=overwrite)
    setting = Setting(calibration, calibration_tokens, calibration_window, seed, device, restart)
    with (
        open_checkpoint(shared, revision=revision) as checkpoint,
        open_checkpoint(_dense_of(checkpoint, dense)) as origin,
    ):
        target = out or Path(os.path.realpath(checkpoint.path))
        record = refit_checkpoint(
            checkpoint, origin, setting, target, ffn=refit_ffn, steps=reconstruct, overwrite=overwrite
        )
    seconds = time.monotonic() - begun
    data = {**record.model_dump(mode="json"), "tensors": len(record.tensors), "seconds": seconds, "out": str(target)}
    print_result(data, f"{record.in_words()}\nWritten and checked in {seconds:.1f} s: {target}", as_json)


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
        print_result(describe(made), picture(made), as_json)
        return
    checkpoint = open_checkpoint(shared, revision=revision, weights=False)
    made = plan_of(checkpoint)
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    record = checkpoint.refit
    data = {
        **describe(made),
        "stored_bytes": stored,
        "refit": None if record is None else {**record.model_dump(mode="json"), "tensors": len(record.tensors)},
        "base_model": checkpoint.base_model,
        "quantization_config": None if checkpoint.packing is None else checkpoint.packing.to_dict(),
    }
    words = f"{picture(made)}\n{stored:,} bytes of weights stored in {shared}"
    words += "" if checkpoint.packing is None else f"\n{checkpoint.packing.in_words()}"
    words += "" if record is None else f"\n{record.in_words()}"
    if split is not None:
        data["split"] = describe_split(checkpoint, split)
        words += f"\n{picture_split(data['split'])}"
    print_result(data, words, as_json)


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
    print_result(found.to_dict(), "\n".join([*lines, *found.notes, *found.problems]), as_json)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A shared checkpoint, or a dense one.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
    calibration: NeededCalibrationOption,
    group: Annotated[
        int | None, typer.Option(help="Inputs that have one scale. Default: the largest of 128, 64, 32... that fits.")
    ] = None,
    calibration_tokens: CalibrationTokensOption = CALIBRATION_TOKENS,
    calibration_window: CalibrationWindowOption = WINDOW,
    seed: CalibrationSeedOption = 0,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Round the layers' matrices to 4 bits by GPTQ (gptqmodel), each shared unit once, on what all its users give it.

    Ties must be of q, k and v (or of gate and up). What comes out loads like any shared checkpoint.
    """
    begun = time.monotonic()
    check_vacant(out, overwrite=overwrite)
    with open_checkpoint(model, revision=revision) as source:
        check_output(out, source.path, overwrite=overwrite)
        text = calibration_from(
            calibration,
            source,
            tokens=calibration_tokens,
            window=calibration_window,
            seed=seed,
            device=device_named(device),
        )
        found = round_by_gptq(source, text, group=group, device=device_named(device))
        found.save(out, overwrite=overwrite)
        before = sum(info.nbytes for info in source.tensors.values())
    after = sum(info.nbytes for info in open_checkpoint(out).tensors.values())
    seconds = time.monotonic() - begun
    data = {
        "matrices": len(found.matrices), "group": found.packing.group, "bytes_before": before, "bytes": after,
        "seconds": seconds, "out": str(out),
    }  # fmt: skip
    words = (
        f"{len(found.matrices)} matrices rounded to 4 bits in groups of {found.packing.group}: {before:,} bytes of "
        f"weights before, {after:,} now ({1 - after / before:.1%} less)\nWritten and checked in {seconds:.1f} s: {out}"
    )
    print_result(data, words, as_json)


@app.command()
def expand(
    shared: SharedArgument,
    dense: Annotated[Path, typer.Argument(metavar="DENSE", help="The folder to write; it must not exist.")],
    unpack: Annotated[
        bool, typer.Option("--unpack", help="Write matrices of 4 bits as ordinary ones, not as compressed-tensors.")
    ] = False,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a stock folder, donors' rows in place, that any tool loads without headshare."""
    check_vacant(dense, overwrite=overwrite)
    with open_checkpoint(shared, revision=revision) as checkpoint:
        expand_checkpoint(checkpoint, dense, overwrite=overwrite, unpacked=unpack)
    size = sum(info.nbytes for info in open_checkpoint(dense).tensors.values())
    print_result({"out": str(dense), "bytes": size}, f"{size:,} bytes of weights in {dense}", as_json)


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
    print_result(data, f"{demo_table(rows)}\n{source}\n\n{sentence}", as_json)


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
    print_result(
        found.to_dict(), f"{bench_table(found)}\n{counts}; ratios are medians of pairs, with quartiles", as_json
    )


app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
app.command("eval")(evaluate_command)
app.command("generate")(generate_command)
app.command("compare")(compare_command)
app.command("report")(report_command)


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
