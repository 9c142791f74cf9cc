"""The commands estimate, score and plan."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from headshare.calibration.budget import Budget
from headshare.calibration.run import Setting, plan_calibrated
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
from headshare.cli.options import (
    CALIBRATE,
    CHOOSE,
    WRITE,
    Context,
    JsonOption,
    OverwriteOption,
    RestartOption,
    RevisionOption,
    is_given,
    print_result,
    refuse_unused,
)
from headshare.cli.share_options import (
    CALIBRATING,
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
    MatchOption,
    ModelArgument,
    ModeOption,
    PartsOption,
    ProbeOption,
    ProtectOption,
    RatioOption,
    SaveOption,
)
from headshare.errors import OptionError, OutputError, PlanError
from headshare.files.folder import is_taken
from headshare.matching.estimate import estimate as estimate_bytes
from headshare.matching.pairing import make_plan
from headshare.matching.scores import Scores
from headshare.matching.similarity import score_units
from headshare.plan.describe import picture
from headshare.plan.plan import SharePlan
from headshare.plan.units import Sublayer
from headshare.text.tokens import TOKENS as CALIBRATION_TOKENS


def _check_budget(context: Context, budget: Budget) -> None:
    """Refuse options that do not apply where units are chosen by output."""
    refuse_unused(context, "units are chosen by output, on the calibration text", ["mode", "ffn_ratio"])
    if is_given(context, "save"):
        refuse_unused(context, "--save says how much is given up", ["ratio"])
    if not any(action.sublayer is Sublayer.FFN for action in budget.actions):
        refuse_unused(context, "no groups of neurons are shared; add gateup to --parts", ["ffn_groups"])


def budget_from(
    context: Context,
    dense: Checkpoint,
    ratio: float,
    save: str | None,
    parts: str | None,
    allow: str | None,
    ffn_groups: int,
    protect: str | None,
) -> Budget:
    """The budget that the options of a command ask for."""
    budget = Budget.parse(
        dense,
        ratio=ratio,
        save=save,
        parts=parts or ("auto" if save or allow else "qkv"),
        allow=[allow] if allow else [],
        ffn_groups=ffn_groups,
        protect=whole_numbers(protect),
    )
    _check_budget(context, budget)
    return budget


def whole_numbers(text: str | None) -> list[int]:
    """The whole numbers in a list such as 1,2,29."""
    try:
        return [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of whole numbers such as 1,2,29") from None


def estimate(
    model: ModelArgument,
    ratio: RatioOption = 0.3,
    parts: PartsOption = "qkv",
    match: MatchOption = "qk",
    ffn_groups: FfnGroupsOption = 1,
    ffn_ratio: FfnRatioOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count exactly what sharing would save, and how large the chosen parts are, before any weight is read."""
    checkpoint = open_checkpoint(model, revision=revision, weights=False)
    estimated = estimate_bytes(
        checkpoint, ratio, parts=parts, match=match, ffn_groups=ffn_groups, ffn_ratio=ffn_ratio, dtype=dtype
    )
    print_result(estimated.to_dict(), estimated.in_words(), as_json)


def score(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", rich_help_panel=WRITE, help="Write the scores to this file.")
    ] = Path("scores.safetensors"),
    match: MatchOption = "qk",
    parts: PartsOption = "qkv",
    ffn_groups: FfnGroupsOption = 1,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score every pair of units once. Plans at any ratio and in any mode come from the same scores."""
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
    print_result(data, f"Scored {units} units in {seconds:.1f} s: {output}", as_json, written=output)


def plan(
    context: Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Plan for this model, on calibration text: a folder or a hub id."),
    ] = None,
    from_scores: Annotated[
        Path | None,
        typer.Option(rich_help_panel=CHOOSE, metavar="FILE", help="Plan from these scores, which `score` wrote."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", rich_help_panel=WRITE, help="Write the plan to this file.")
    ] = Path("share_plan.json"),
    ratio: RatioOption = 0.3,
    parts: CalibratedPartsOption = None,
    mode: ModeOption = "star",
    ffn_groups: FfnGroupsOption = 1,
    ffn_ratio: FfnRatioOption = None,
    protect: ProtectOption = None,
    calibration: CalibrationOption = None,
    field: CalibrationFieldOption = None,
    calibration_tokens: CalibrationTokensOption = CALIBRATION_TOKENS,
    calibration_window: CalibrationWindowOption = None,
    seed: CalibrationSeedOption = 0,
    save: SaveOption = None,
    allow: AllowOption = None,
    measure: Annotated[
        bool,
        typer.Option(
            rich_help_panel=CALIBRATE,
            help="Also refit the plan temporarily, and measure the perplexity of both models on held-out windows.",
        ),
    ] = True,
    device: DeviceOption = "auto",
    probe: ProbeOption = True,
    restart: RestartOption = False,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose recipients and donors: from scores, or from a model by the effect of its units on calibration text.

    The plan is JSON that can be read, edited and compared. With --calibration, predictions are printed beside
    measurements.
    """
    if (model is None) == (from_scores is None):
        raise OptionError("a plan is made for a model or from scores. Give one of MODEL and --from-scores FILE.")
    if from_scores is not None:
        refuse_unused(context, "a plan from scores reads no model and no text", _OF_MODEL)
        _check_file(output, overwrite, SharePlan.load)
        scores = Scores.load(from_scores)
        wanted = parts or "qkv"
        made = make_plan(scores, ratio, parts=wanted, mode=mode, ffn_ratio=ffn_ratio, protect=whole_numbers(protect))
        made.save(output)
        more = dict[str, Any](saved_bytes=None, price=None, price_unit=None, measured=None)
        words = ""
    else:
        assert model is not None
        if calibration is None:
            raise OptionError(
                "a plan for a model is chosen on text. Give --calibration FILE; or, to choose by its weights, score it "
                "first and give --from-scores FILE."
            )
        _check_file(output, overwrite, SharePlan.load, model)
        setting = Setting(calibration, calibration_tokens, calibration_window, seed, device, restart, probe, field)
        with open_checkpoint(model, revision=revision) as dense:
            budget = budget_from(context, dense, ratio, save, parts, allow, ffn_groups, protect)
            calibrated = plan_calibrated(dense, budget, setting, output, measured=measure)
        made = calibrated.chosen.plan
        more = calibrated.to_dict()
        words = f"{calibrated.in_words()}\n"
    data = {"output": str(output), "ties": made.ties, "plan_digest": made.digest, **more}
    print_result(data, f"{picture(made)}\n{words}{made.ties} ties: {output}", as_json, written=output)


# parameters that only a plan from a model uses
_OF_MODEL = ("calibration", "ffn_groups", "save", "allow", "revision", *CALIBRATING)


def _check_file(path: Path, overwrite: bool, read: Callable[[Path], object], source: str | None = None) -> None:
    """Refuse an output file that exists, unless it may be overwritten and is of the kind that `read` reads."""
    if source is not None and Path(os.path.realpath(source)) in Path(os.path.realpath(path)).parents:
        raise OutputError(f"the output {path} is inside the model {source}. Choose a place outside it.")
    if not is_taken(path, overwrite=overwrite):
        return
    try:
        read(path)
    except PlanError as error:
        raise OutputError(f"{path} is not what --overwrite may replace: {error}") from None
