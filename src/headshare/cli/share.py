"""The commands share and refit."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from headshare.bench.memory import watched_peak
from headshare.calibration.budget import Budget
from headshare.calibration.outcome import Outcome, Wanted
from headshare.calibration.run import Setting, refit_checkpoint, share_calibrated
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
from headshare.cli.options import (
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
    AllowOption,
    CalibratedPartsOption,
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
    ModeName,
    ModeOption,
    NeededCalibrationOption,
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
from headshare.text.windows import WINDOW


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


def _dense_of(shared: Checkpoint, given: str | None) -> str:
    if shared.sharing is None:
        raise CheckpointError(f"{shared.name} is not a shared checkpoint; there is nothing to refit.")
    found = given or shared.sharing.base_model
    if found is None:
        raise CheckpointError(f"{shared.name} does not say which dense model it came from. Name it: --dense MODEL")
    return found


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
    check_vacant(out, overwrite=overwrite)
    with watched_peak() as peak, open_checkpoint(model, revision=revision) as dense:
        check_output(out, dense.path, overwrite=overwrite)
        wanted: SharePlan | Budget
        if plan_file is not None:
            wanted = SharePlan.load(plan_file)
        elif by_output:
            wanted = budget_from(context, dense, ratio, save, parts, allow, ffn_groups, protect)
        else:
            scores = score_units(dense, match, parts or "qkv", ffn_groups=ffn_groups)
            numbers = whole_numbers(protect)
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
