"""The commands share and refit."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from headshare.bench.memory import watched_peak
from headshare.calibration.budget import Budget
from headshare.calibration.outcome import Outcome, ShareRequest
from headshare.calibration.run import Setting, refit_checkpoint, share_calibrated
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_base, open_checkpoint
from headshare.cli.options import (
    CALIBRATE,
    CHOOSE,
    WRITE,
    AnyBaseOption,
    Context,
    JsonOption,
    OverwriteOption,
    RestartOption,
    RevisionOption,
    print_result,
    refuse_unused,
)
from headshare.cli.plan import budget_from, whole_numbers
from headshare.cli.share_options import (
    CALIBRATING,
    CHOOSING,
    OUTPUT,
    AllowOption,
    CalibratedPartsOption,
    CalibrationFieldOption,
    CalibrationOption,
    CalibrationSeedOption,
    CalibrationTokensOption,
    CalibrationWindowOption,
    DeviceOption,
    DtypeOption,
    FfnGroupsOption,
    FfnRatioOption,
    MeasureOption,
    ModelArgument,
    ModeOption,
    NeededCalibrationOption,
    OutArgument,
    ProbeOption,
    ProtectOption,
    RatioOption,
    ReconstructOption,
    RefitFfnOption,
    SaveOption,
    SharedArgument,
    ShareMatchName,
)
from headshare.errors import CalibrationError, CheckpointError, OutputError
from headshare.files.folder import check_output, check_vacant
from headshare.matching.pairing import make_plan
from headshare.matching.similarity import score_units
from headshare.plan.plan import SharePlan
from headshare.sharing.share import share as share_checkpoint
from headshare.text.tokens import TOKENS as CALIBRATION_TOKENS


def _check_share(context: Context, *, planned: bool, by_output: bool, refit: bool, calibrated: bool) -> None:
    """Refuse options that contradict each other or would be ignored."""
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


def _open_dense_of(shared: Checkpoint, given: str | None) -> Checkpoint:
    """Open the dense model that was given, or that a shared checkpoint names."""
    if shared.sharing is None:
        raise CheckpointError(f"{shared.name} is not a shared checkpoint; there is nothing to refit.")
    if given is not None:
        return open_checkpoint(given)
    dense = open_base(shared)
    if dense is None:
        raise CheckpointError(f"{shared.name} does not say which dense model it came from. Name it: --dense MODEL")
    return dense


def share(
    context: Context,
    model: ModelArgument,
    out: OutArgument,
    ratio: RatioOption = 0.3,
    match: Annotated[
        ShareMatchName,
        typer.Option(
            rich_help_panel=CHOOSE,
            help="Match units by the cosine of these parts, or by output: their effect on the calibration text.",
        ),
    ] = "qk",
    parts: CalibratedPartsOption = None,
    mode: ModeOption = "star",
    ffn_groups: FfnGroupsOption = 1,
    ffn_ratio: FfnRatioOption = None,
    protect: ProtectOption = None,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", rich_help_panel=CHOOSE, help="Use this plan; nothing is scored or chosen."),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            rich_help_panel=CALIBRATE,
            help="After sharing, refit each layer's output projections to the calibration text (closed form, no "
            "training).",
        ),
    ] = False,
    refit_ffn: RefitFfnOption = True,
    reconstruct: ReconstructOption = 0,
    calibration: CalibrationOption = None,
    field: CalibrationFieldOption = None,
    calibration_tokens: CalibrationTokensOption = CALIBRATION_TOKENS,
    calibration_window: CalibrationWindowOption = None,
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
    """Score, plan, share, and check what was written: a smaller checkpoint that loads like any other.

    With --calibration the command can also match by output, refit, and choose under a budget. A stopped run goes on
    when the command is given again.
    """
    begun = time.monotonic()
    by_output = plan_file is None and (match == OUTPUT or save is not None or allow is not None)
    _check_share(
        context, planned=plan_file is not None, by_output=by_output, refit=refit, calibrated=calibration is not None
    )
    if by_output and match != OUTPUT:
        refuse_unused(context, "--save and --allow choose by output", ["match"])
    check_vacant(out, overwrite=overwrite)
    with watched_peak() as peak, open_checkpoint(model, revision=revision) as dense:
        check_output(out, dense.path, overwrite=overwrite)
        # what is to be shared: a given plan, a budget to choose by output, or a plan from the weights
        wanted: SharePlan | Budget
        if plan_file is not None:
            wanted = SharePlan.load(plan_file)
        elif by_output:
            wanted = budget_from(context, dense, ratio, save, parts, allow, ffn_groups, protect)
        else:
            scores = score_units(dense, match, parts or "qkv", ffn_groups=ffn_groups)
            numbers = whole_numbers(protect)
            wanted = make_plan(scores, ratio, parts=parts or "qkv", mode=mode, ffn_ratio=ffn_ratio, protect=numbers)
        # with a calibration text the run can be resumed and may refit; without one the plan is written as it is
        if calibration is not None:
            setting = Setting(calibration, calibration_tokens, calibration_window, seed, device, restart, probe, field)
            asked = ShareRequest(wanted, refit=refit, ffn=refit_ffn, steps=reconstruct, measure=measure, dtype=dtype)
            outcome = share_calibrated(dense, asked, setting, out, overwrite=overwrite)
        else:
            assert isinstance(wanted, SharePlan)
            outcome = Outcome(share_checkpoint(dense, wanted, dtype=dtype))
            outcome.shared.save(out, overwrite=overwrite)
        estimated = outcome.shared.estimate
    seconds = time.monotonic() - begun
    data = {
        **estimated.to_dict(),
        **outcome.to_dict(),
        "seconds": seconds,
        "peak_anonymous_bytes": peak.bytes,
        "out": str(out),
    }
    lines = [
        estimated.in_words(),
        *outcome.in_words(),
        f"Written and checked in {seconds:.1f} s: {out}",
        f"Load it after `import headshare` with from_pretrained({str(out)!r}).",
    ]
    print_result(data, "\n".join(lines), as_json, written=out)


def refit(
    shared: SharedArgument,
    calibration: NeededCalibrationOption,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=CALIBRATE,
            help="Refit towards this dense model, from which SHARED came. Default: the one it names.",
        ),
    ] = None,
    any_base: AnyBaseOption = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", rich_help_panel=WRITE, help="Write this folder. Default: replace SHARED when all is done."
        ),
    ] = None,
    refit_ffn: RefitFfnOption = True,
    reconstruct: ReconstructOption = 0,
    field: CalibrationFieldOption = None,
    calibration_tokens: CalibrationTokensOption = CALIBRATION_TOKENS,
    calibration_window: CalibrationWindowOption = None,
    seed: CalibrationSeedOption = 0,
    device: DeviceOption = "auto",
    restart: RestartOption = False,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Refit a shared checkpoint's output projections on a text, without training, to follow its dense model again."""
    begun = time.monotonic()
    if out is None and not Path(shared).is_dir():
        raise OutputError(f"{shared} is no folder here that could be replaced. Say where to write: --out NEW")
    if out is not None:
        check_vacant(out, overwrite=overwrite)
    setting = Setting(calibration, calibration_tokens, calibration_window, seed, device, restart, field=field)
    with (
        open_checkpoint(shared, revision=revision) as checkpoint,
        _open_dense_of(checkpoint, dense) as origin,
    ):
        target = out or Path(os.path.realpath(checkpoint.path))
        record = refit_checkpoint(
            checkpoint,
            origin,
            setting,
            target,
            ffn=refit_ffn,
            steps=reconstruct,
            any_base=any_base,
            overwrite=overwrite,
        )
    seconds = time.monotonic() - begun
    data = {**record.model_dump(mode="json"), "tensors": len(record.tensors), "seconds": seconds, "out": str(target)}
    print_result(
        data, f"{record.in_words()}\nWritten and checked in {seconds:.1f} s: {target}", as_json, written=target
    )
