"""The commands estimate, score and plan."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from headshare.cli.bundles import with_bundles
from headshare.cli.options import (
    CALIBRATE,
    CHOOSE,
    NEXT,
    WRITE,
    BitsOption,
    CommonOptions,
    Context,
    GroupOption,
    JsonOption,
    OverwriteOption,
    RevisionOption,
    print_result,
    refuse_unused,
)
from headshare.cli.share_options import (
    CALIBRATING,
    EXACT,
    ChoiceOptions,
    DtypeOption,
    EstimateMatchName,
    FfnGroupsOption,
    FfnRatioOption,
    MatchOption,
    ModelArgument,
    PartsOption,
    RatioOption,
    RunOptions,
)
from headshare.errors import OptionError, OutputError, PlanError
from headshare.progress import tell


def estimate(
    context: Context,
    model: ModelArgument,
    ratio: RatioOption = 0.3,
    parts: PartsOption = "qkv",
    match: Annotated[
        EstimateMatchName,
        typer.Option(
            rich_help_panel=CHOOSE,
            help="Match units by the cosine of these parts; or exact: count once what stands several times bit for "
            "bit, for which weights are read.",
        ),
    ] = "qk",
    ffn_groups: FfnGroupsOption = 1,
    ffn_ratio: FfnRatioOption = None,
    dtype: DtypeOption = None,
    bits: BitsOption = None,
    group: GroupOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count exactly what sharing would save, and how large the chosen parts are, before any weight is read.

    With --match exact, count what is stored several times, bit for bit. Only weights tell that, so they are read.

    To make the model smaller, repair it and measure it, use `headshare shrink`.
    """
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.matching.estimate import estimate as estimate_bytes

    exact = match == EXACT
    if exact:
        refuse_unused(context, "what stands several times is all counted once", _OF_A_RATIO)
    checkpoint = open_checkpoint(model, revision=revision, weights=exact)
    if exact:
        size = sum(info.nbytes for info in checkpoint.tensors.values())
        tell(f"only their numbers say which weights are equal, so they are read: {size:,} bytes.")
    estimated = estimate_bytes(
        checkpoint,
        ratio,
        parts=parts,
        match=match,
        ffn_groups=ffn_groups,
        ffn_ratio=ffn_ratio,
        dtype=dtype,
        bits=None if bits is None else int(bits),
        group=group,
    )
    words = f"{estimated.in_words()}\n{NEXT}"
    if exact:
        found = estimated.identical_tensors or estimated.recipients
        words = estimated.lossless() if found else f"Nothing stands twice in {model}, bit for bit."
    print_result(estimated.to_dict(), words, as_json)


# parameters that only an estimate of a ratio uses
_OF_A_RATIO = ("ratio", "parts", "ffn_groups", "ffn_ratio")


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
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.matching.scores import Scores
    from headshare.matching.similarity import score_units

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


@with_bundles
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
    *,
    choice: ChoiceOptions,
    run: RunOptions,
    measure: Annotated[
        bool,
        typer.Option(
            rich_help_panel=CALIBRATE,
            help="Also refit the plan temporarily, and measure the perplexity of both models on held-out windows.",
        ),
    ] = True,
    common: CommonOptions,
) -> None:
    """Choose recipients and donors: from scores, or from a model by the effect of its units on calibration text.

    The plan is JSON that can be read, edited and compared. With --calibration, predictions are printed beside
    measurements. To plan, repair, write and measure in one command, use `headshare shrink`.
    """
    from headshare.plan.describe import picture
    from headshare.plan.plan import SharePlan

    if (model is None) == (from_scores is None):
        raise OptionError("a plan is made for a model or from scores. Give one of MODEL and --from-scores FILE.")
    if from_scores is not None:
        refuse_unused(context, "a plan from scores reads no model and no text", _OF_MODEL)
        from headshare.matching.scores import Scores

        _check_file(output, common.overwrite, SharePlan.load)
        scores = Scores.load(from_scores)
        made = choice.plan_from(scores)
        made.save(output)
        more = dict[str, Any](saved_bytes=None, price=None, price_unit=None, measured=None)
        words = ""
    else:
        assert model is not None
        if run.calibration is None:
            raise OptionError(
                "a plan for a model is chosen on text. Give --calibration FILE; or, to choose by its weights, score it "
                "first and give --from-scores FILE."
            )
        from headshare.calibration.run import plan_calibrated
        from headshare.checkpoint.opening import open_checkpoint

        _check_file(output, common.overwrite, SharePlan.load, model)
        with open_checkpoint(model, revision=common.revision) as dense:
            budget = choice.budget(context, dense)
            calibrated = plan_calibrated(dense, budget, run.settings_on(run.calibration), output, measured=measure)
        made = calibrated.chosen.plan
        more = calibrated.to_dict()
        words = f"{calibrated.in_words()}\n"
    data = {"output": str(output), "ties": made.ties, "plan_digest": made.digest, **more}
    print_result(data, f"{picture(made)}\n{words}{made.ties} ties: {output}\n{NEXT}", common.as_json, written=output)


# parameters that only a plan from a model uses
_OF_MODEL = ("calibration", "ffn_groups", "save", "to", "bits", "allow", "multiple", "target", "revision", *CALIBRATING)


def _check_file(path: Path, overwrite: bool, read: Callable[[Path], object], source: str | None = None) -> None:
    """Refuse an output file that exists, unless it may be overwritten and is of the kind that `read` reads."""
    from headshare.files.folder import is_taken

    if source is not None and Path(os.path.realpath(source)) in Path(os.path.realpath(path)).parents:
        raise OutputError(f"the output {path} is inside the model {source}. Choose a place outside it.")
    if not is_taken(path, overwrite=overwrite):
        return
    try:
        read(path)
    except PlanError as error:
        raise OutputError(f"{path} is not what --overwrite may replace: {error}") from None
