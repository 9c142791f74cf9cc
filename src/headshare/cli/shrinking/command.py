"""The command shrink."""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headshare.calibration.refit.refinement import NONE
from headshare.cli.bundles import with_bundles
from headshare.cli.options import (
    CALIBRATE,
    RUN,
    SIZE,
    CommonOptions,
    RefineOption,
    RestartOption,
    print_result,
)
from headshare.cli.share_options import (
    CALIBRATION_OR_SELF,
    CalibrationOptions,
    DtypeOption,
    ModelArgument,
    OutArgument,
    whole_numbers,
)
from headshare.cli.shrinking.size import MultipleOption, PlanBitsOption, TargetOption
from headshare.progress import say, tell
from headshare.tables import markdown

if TYPE_CHECKING:
    from headshare.calibration.settings import CalibrationSettings
    from headshare.shrinking.prediction import Prediction
    from headshare.shrinking.result import Shrunk
else:
    CalibrationSettings = Prediction = Shrunk = Any  # they import torch, which only commands that run do


@dataclass(frozen=True)
class SizeOptions:
    """How small the model is to be."""

    save: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT", rich_help_panel=SIZE, help="Save this much of the model's weights: 20%, 120MB, 4GiB."
        ),
    ] = None
    to: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", rich_help_panel=SIZE, help="Leave this much of them: 4GB, 120MB, 60%."),
    ] = None
    bits: PlanBitsOption = "16"
    protect: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS", rich_help_panel=SIZE, help="Take nothing from these layers: 0,1,29. Default: none."
        ),
    ] = None
    multiple: MultipleOption = 1
    target: TargetOption = None


@dataclass(frozen=True)
class ShrinkTextOptions(CalibrationOptions):
    """The texts of a shrinking run, and how it goes about them."""

    calibration: Annotated[str | None, CALIBRATION_OR_SELF] = None
    refine: RefineOption = NONE
    prices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=CALIBRATE,
            help="Keep in this file what giving each part up costs, and read it there for the next size.",
        ),
    ] = None
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=CALIBRATE, help="Also measure the perplexity of both models on this text."
        ),
    ] = None
    restart: RestartOption = False

    def settings_on(self, source: str) -> CalibrationSettings:
        """The settings of a run that is calibrated on this text."""
        return replace(self.settings(source, restart=self.restart), prices=self.prices)


@dataclass(frozen=True)
class AgreementOptions:
    """How far the run goes without being asked."""

    yes: Annotated[
        bool, typer.Option("--yes", "-y", rich_help_panel=RUN, help="Go on even if the predicted loss is large.")
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", rich_help_panel=RUN, help="Stop after the prediction. What was measured for it is kept."
        ),
    ] = False


class _Stop(Exception):  # noqa: N818 - nothing is wrong
    """The end of a run that nothing is wrong with, at its prediction."""

    def __init__(self, predicted: Prediction) -> None:
        self.predicted = predicted
        super().__init__(predicted)  # so that it can be sent to other processes


@with_bundles
def shrink(
    model: ModelArgument,
    out: OutArgument,
    *,
    size: SizeOptions,
    texts: ShrinkTextOptions,
    dtype: DtypeOption = None,
    agreed: AgreementOptions,
    common: CommonOptions,
) -> None:
    """Make a model smaller, repair it, and say what it lost: choose, refit, write, verify, measure.

    What is given up is chosen by its effect on the calibration text. The predicted loss is printed before the long
    part. A stopped run goes on when the command is given again.
    """
    begun = time.monotonic()
    from headshare.checkpoint.opening import open_checkpoint
    from headshare.shrinking.request import ShrinkRequest, calibration_text
    from headshare.shrinking.run import shrink_checkpoint

    protect = whole_numbers(size.protect)
    wanted = ShrinkRequest(size.save, size.to, texts.refine, protect, size.multiple, dtype, size.target, str(size.bits))

    def judge(predicted: Prediction) -> None:
        say(predicted.in_words())
        if agreed.dry_run:
            raise _Stop(predicted)
        if predicted.is_large and not agreed.yes:
            _ask(predicted)

    try:
        with open_checkpoint(model, revision=common.revision) as dense:
            settings = texts.settings_on(calibration_text(texts.calibration, dense))
            shrunk = shrink_checkpoint(dense, out, wanted, settings, judge, text=texts.text, overwrite=common.overwrite)
    except _Stop as stop:
        _print_prediction(stop.predicted, as_json=common.as_json)
        return
    _print_result(shrunk, time.monotonic() - begun, as_json=common.as_json)


def _ask(predicted: Prediction) -> None:
    """Ask whether to go on in spite of a large loss; where nobody can be asked, or the answer is no, end the run."""
    tell(predicted.warning())
    if _is_terminal():
        try:
            if typer.confirm("Go on all the same?", err=True):
                return
        except typer.Abort:
            tell("")
    tell(
        "error: the predicted loss is large, so nothing was written. To go on all the same, give the command again "
        "with --yes: what was measured is kept, for other sizes too."
    )
    raise typer.Exit(1)


def _is_terminal() -> bool:
    """True if somebody can read a question and answer it."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def _print_prediction(predicted: Prediction, *, as_json: bool) -> None:
    words = predicted.in_words() + (f"\n{predicted.warning()}" if predicted.is_large else "")
    kept = "Nothing was written. The same command without --dry-run goes on from here."
    print_result({"dry_run": True, "predicted": predicted.to_dict()}, f"{words}\n{kept}", as_json)


def _print_result(shrunk: Shrunk, seconds: float, *, as_json: bool) -> None:
    data: dict[str, Any] = {"dry_run": False, **shrunk.to_dict(), "seconds": seconds}
    words = ""
    if not as_json:
        note = [] if shrunk.held_out.dense is not None else [shrunk.held_out.in_words()]
        load = "\n".join(f"    {line}" for line in shrunk.how_to_load)
        made = f"Written, verified and measured in {seconds:.0f} s: {shrunk.out}"
        words = "\n".join([markdown(shrunk.rows()), *note, f"Done: {shrunk.done}", made, "To load it:", load])
    print_result(data, words, as_json, written=shrunk.out)
