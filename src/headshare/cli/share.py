"""The commands share and refit."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headshare.cli.bundles import with_bundles
from headshare.cli.options import (
    CALIBRATE,
    CHOOSE,
    WRITE,
    AnyBaseOption,
    CommonOptions,
    Context,
    RefitOptions,
    RepairOptions,
    RestartOption,
    print_written,
    refuse_unused,
)
from headshare.cli.share_options import (
    CALIBRATING,
    CHOOSING,
    EXACT,
    OUTPUT,
    CalibrationOptions,
    ChoiceOptions,
    DtypeOption,
    ModelArgument,
    NeededCalibrationOption,
    OutArgument,
    RunOptions,
    SharedArgument,
    ShareMatchName,
)
from headshare.errors import CalibrationError, CheckpointError, OutputError
from headshare.progress import tell

if TYPE_CHECKING:
    from headshare.calibration.budget import Budget
    from headshare.checkpoint.checkpoint import Checkpoint
else:
    Budget = Checkpoint = Any  # they import torch, which only a command that runs has the time for

# what README's tables show at the ratio that is the default here, of sharing by weights and of a plan with its repair
UNREPAIRED = (
    "note: nothing is repaired after this sharing. At --ratio 0.3 it took SmolLM2-135M from a perplexity of 15 to 202, "
    "to save 3.7 % of its bytes. To save as much at x1.03: headshare shrink MODEL OUT --save 4% --calibration FILE"
)


# parameters that a lossless plan has no use for
_INEXACT = (
    *(name for name in CHOOSING if name != "match"),
    "calibration",
    *CALIBRATING,
    "refit",
    "refit_ffn",
    "refine",
)


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
        refuse_unused(context, "nothing is refitted without --refit", ["refit_ffn", "refine"])
    if not by_output:
        refuse_unused(context, "only a plan by output is priced", ["probe", "multiple", "prices"])


def _open_dense_of(shared: Checkpoint, given: str | None) -> Checkpoint:
    """Open the dense model that was given, or that a shared checkpoint names."""
    from headshare.checkpoint.opening import open_base, open_checkpoint

    if shared.sharing is None:
        raise CheckpointError(f"{shared.name} is not a shared checkpoint; there is nothing to refit.")
    if given is not None:
        return open_checkpoint(given)
    dense = open_base(shared)
    if dense is None:
        raise CheckpointError(f"{shared.name} does not say which dense model it came from. Name it: --dense MODEL")
    return dense


@with_bundles
def share(
    context: Context,
    model: ModelArgument,
    out: OutArgument,
    match: Annotated[
        ShareMatchName,
        typer.Option(
            rich_help_panel=CHOOSE,
            help="Match units by the cosine of these parts; or by output: their effect on the calibration text; or "
            "exact: store once what stands several times bit for bit, without loss.",
        ),
    ] = "qk",
    *,
    choice: ChoiceOptions,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", rich_help_panel=CHOOSE, help="Use this plan; nothing is scored or chosen."),
    ] = None,
    run: RunOptions,
    repair: RepairOptions,
    dtype: DtypeOption = None,
    common: CommonOptions,
) -> None:
    """Score, plan, share, and check what was written: a smaller checkpoint that loads like any other.

    With --calibration the command can also match by output, refit, and choose under a budget. A stopped run goes on
    when the command is given again. To have all of that chosen, repaired and measured, use `headshare shrink`.
    """
    begun = time.monotonic()
    from headshare.bench.memory import watched_peak
    from headshare.calibration.outcome import Outcome, ShareRequest
    from headshare.calibration.run import share_calibrated
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.files.folder import check_output, check_vacant
    from headshare.matching.exact.plan import exact_plan
    from headshare.matching.similarity import score_units
    from headshare.plan.plan import SharePlan
    from headshare.sharing.share import share as share_checkpoint

    exact = plan_file is None and match == EXACT
    if exact:
        refuse_unused(context, "--match exact shares all that is equal, and nothing else", _INEXACT)
    by_output = plan_file is None and (match == OUTPUT or choice.asks_for_output)
    _check_share(
        context,
        planned=plan_file is not None,
        by_output=by_output,
        refit=repair.refit,
        calibrated=run.calibration is not None,
    )
    if by_output and match != OUTPUT:
        refuse_unused(context, "--save, --to, --bits, --allow and --target choose by output", ["match"])
    check_vacant(out, overwrite=common.overwrite)
    with watched_peak() as peak, open_checkpoint(model, revision=common.revision) as dense:
        check_output(out, dense.path, overwrite=common.overwrite)
        # what is to be shared: a given plan, a budget to choose by output, or a plan from the weights
        wanted: SharePlan | Budget
        if plan_file is not None:
            wanted = SharePlan.load(plan_file)
        elif by_output:
            wanted = choice.budget(context, dense, dtype)
        elif exact:
            wanted = exact_plan(dense)
            if not wanted.sections:
                raise CheckpointError(
                    f"nothing stands twice in {model}, bit for bit: sharing it exactly saves nothing."
                )
        else:
            wanted = choice.plan_from(score_units(dense, match, choice.weight_parts, ffn_groups=choice.ffn_groups))
        # with a calibration text the run can be resumed and may refit; without one the plan is written as it is
        if run.calibration is not None:
            asked = ShareRequest(
                wanted,
                refit=repair.refit,
                ffn=repair.refit_ffn,
                refine=repair.refine,
                measure=repair.measure,
                dtype=dtype,
            )
            outcome = share_calibrated(dense, asked, run.settings_on(run.calibration), out, overwrite=common.overwrite)
        else:
            assert isinstance(wanted, SharePlan)
            outcome = Outcome(share_checkpoint(dense, wanted, dtype=dtype))
            if wanted.ties and not exact:
                tell(UNREPAIRED)
            outcome.shared.save(out, overwrite=common.overwrite)
        estimated = outcome.shared.estimate
    seconds = time.monotonic() - begun
    data = {
        **estimated.to_dict(),
        **outcome.to_dict(),
        "seconds": seconds,
        "peak_anonymous_bytes": peak.bytes,
        "out": str(out),
    }
    words = "\n".join([estimated.lossless() if exact else estimated.in_words(), *outcome.in_words()])
    print_written(data, words, out, seconds, as_json=common.as_json)


@with_bundles
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
    *,
    windows: CalibrationOptions,
    repair: RefitOptions,
    restart: RestartOption = False,
    common: CommonOptions,
) -> None:
    """Refit a shared checkpoint's output projections on a text, without training, to follow its dense model again."""
    begun = time.monotonic()
    from headshare.calibration.run import refit_checkpoint
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.files.folder import check_vacant

    if out is None and not Path(shared).is_dir():
        raise OutputError(f"{shared} is no folder here that could be replaced. Say where to write: --out NEW")
    if out is not None:
        check_vacant(out, overwrite=common.overwrite)
    with (
        open_checkpoint(shared, revision=common.revision) as checkpoint,
        _open_dense_of(checkpoint, dense) as origin,
    ):
        target = out or Path(os.path.realpath(checkpoint.path))
        record = refit_checkpoint(
            checkpoint,
            origin,
            windows.settings(calibration, restart=restart),
            target,
            ffn=repair.refit_ffn,
            refine=repair.refine,
            any_base=any_base,
            overwrite=common.overwrite,
        )
    seconds = time.monotonic() - begun
    data = {**record.model_dump(mode="json"), "tensors": len(record.tensors), "seconds": seconds, "out": str(target)}
    print_written(data, record.in_words(), target, seconds, as_json=common.as_json)
