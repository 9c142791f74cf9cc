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
    CalibrationOption,
    CalibrationSeedOption,
    CalibrationTokensOption,
    CalibrationWindowOption,
    DeviceOption,
    DtypeOption,
    FfnGroupsOption,
    FfnRatioOption,
    MatchName,
    MatchOption,
    ModelArgument,
    ModeName,
    ModeOption,
    PartsOption,
    ProbeOption,
    ProtectOption,
    RatioOption,
    SaveOption,
)
from headshare.errors import OutputError, PlanError
from headshare.files.folder import is_taken
from headshare.matching.estimate import estimate as estimate_bytes
from headshare.matching.pairing import make_plan
from headshare.matching.scores import Scores
from headshare.matching.similarity import score_units
from headshare.plan.describe import picture
from headshare.plan.plan import SharePlan
from headshare.plan.units import Kind
from headshare.text.tokens import TOKENS as CALIBRATION_TOKENS
from headshare.text.windows import WINDOW


def _check_budget(context: Context, budget: Budget) -> None:
    """Refuse what does not apply where units are chosen by output."""
    refuse_unused(context, "units are chosen by output, on the calibration text", ["mode", "ffn_ratio"])
    if is_given(context, "save"):
        refuse_unused(context, "--save says how much is given up", ["ratio"])
    if not any(action.sublayer is Kind.FFN for action in budget.actions):
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
    found = Budget.parse(
        dense,
        ratio=ratio,
        save=save,
        parts=parts or ("auto" if save or allow else "qkv"),
        allow=[allow] if allow else [],
        ffn_groups=ffn_groups,
        protect=whole_numbers(protect),
    )
    _check_budget(context, found)
    return found


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
        made = make_plan(scores, ratio, parts=wanted, mode=mode, ffn_ratio=ffn_ratio, protect=whole_numbers(protect))
        made.save(output)
        more, words = dict[str, Any](saved_bytes=None, price=None, price_unit=None, measured=None), ""
    else:
        _check_file(output, overwrite, SharePlan.load, source)
        setting = Setting(calibration, calibration_tokens, calibration_window, seed, device, restart, probe)
        with open_checkpoint(source, revision=revision) as dense:
            budget = budget_from(context, dense, ratio, save, parts, allow, ffn_groups, protect)
            found = plan_calibrated(dense, budget, setting, output, measured=measure)
        made, more, words = found.chosen.plan, found.to_dict(), f"{found.in_words()}\n"
    data = {"output": str(output), "ties": made.ties, "plan_digest": made.digest, **more}
    print_result(data, f"{picture(made)}\n{words}{made.ties} ties: {output}", as_json)


_OF_MODEL = ("ffn_groups", "save", "allow", "revision", *CALIBRATING)


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
