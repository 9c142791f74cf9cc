"""A model shrunk from beginning to end. The same call goes on with a run that was stopped anywhere."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headshare.calibration import processes
from headshare.calibration.budget import Budget
from headshare.calibration.costs.measured import predicts
from headshare.calibration.costs.to_plan import Budgeted
from headshare.calibration.refit.refinement import Refinement
from headshare.calibration.refit.rounded import is_repaired
from headshare.calibration.refit.steps.whole_model import check_room
from headshare.calibration.run import CalibratedRun, calibrated_run
from headshare.calibration.settings import CalibrationSettings
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.opening import open_checkpoint
from headshare.defaults import OUTPUT_DTYPES, TOKENS
from headshare.errors import CheckpointError, OptionError, PlanError
from headshare.evaluation.perplexity import Perplexity, evaluate
from headshare.evaluation.verify import Verification, verify
from headshare.files.folder import MANIFEST, check_output
from headshare.files.resume import run_folder, standing, was_replaced
from headshare.files.state_files import Workspace, key_of
from headshare.progress import say
from headshare.sharing.card import add_measured, model_class
from headshare.sharing.share import share
from headshare.shrinking.prediction import Prediction
from headshare.shrinking.request import ShrinkRequest, calibration_text
from headshare.shrinking.result import Shrunk, Size, TextPerplexity
from headshare.text.documents import MIX, SELF
from headshare.text.windows import read_text

# What is calibrated on where there is no text of its owner's.
STAND_INS = {
    SELF: "text that the model writes",
    MIX: "the mix of texts that comes with headshare",
}
# Looks at a prediction before the long part of the work, and raises what ends the run where it must not go on.
Judge = Callable[[Prediction], None]


def shrink(
    model: str | Path | Checkpoint,
    out: str | Path,
    *,
    save: str | None = None,
    to: str | None = None,
    calibration: str | None = None,
    text: str | Path | None = None,
    yes: bool = False,
    overwrite: bool = False,
    refine: str | int | Refinement | None = None,
    dtype: str | None = None,
    **more: Any,
) -> Shrunk:
    """Make a model smaller: choose what to give up on calibration text, repair, write, verify and measure.

    `save` is what the model is to lose, such as "20%", or `to` what is to be left, such as "4GB". The result says what
    came of it: its bytes, its perplexity beside the dense model's, and what was done. A stopped call goes on when it is
    made again. `calibration` is a text as `Calibration.load` takes it; by default the model writes one, and a model
    that writes none has the mix of texts that comes with headshare. `text` is a file to measure perplexity on, besides
    the calibration text that is held out. `more` has `protect`, `multiple`, `target` and `bits` of `ShrinkRequest`, and
    fields of `CalibrationSettings`, such as `tokens` and `device`.

    Raises:
        PlanError: if the predicted loss is large and `yes` is false, or the model cannot be made so small.
        OptionError: if neither or both of `save` and `to` are given, or a word is not known.
        HeadshareError: if a step fails; the state stays, and the same call goes on from there.
    """
    chosen = {name: more.pop(name) for name in ("protect", "multiple", "target", "bits") if name in more}
    wanted = ShrinkRequest(save, to, refine, dtype=dtype, **chosen)
    if more.get("prices") is not None:
        more["prices"] = Path(more["prices"])

    def judge(predicted: Prediction) -> None:
        say(predicted.in_words())
        if predicted.is_large and not yes:
            raise PlanError(f"{predicted.in_words()}: {predicted.warning()} To go on all the same: yes=True")

    # one that the caller opened stays open
    with nullcontext(model) if isinstance(model, Checkpoint) else open_checkpoint(model) as dense:
        settings = CalibrationSettings(calibration_text(calibration, dense), **more)
        return shrink_checkpoint(dense, Path(out), wanted, settings, judge, text=text, overwrite=overwrite)


def shrink_checkpoint(
    dense: Checkpoint,
    out: Path,
    wanted: ShrinkRequest,
    settings: CalibrationSettings,
    judge: Judge,
    *,
    text: str | Path | None = None,
    overwrite: bool = False,
) -> Shrunk:
    """Shrink an opened checkpoint by `shrink`. `judge` is shown the prediction, and may end the run by raising.

    Of several processes the first one judges, writes, verifies and measures.

    Raises:
        HeadshareError: if a step fails; the state stays, as it does where `judge` raises.
    """
    # all that can be refused is refused before hours of work
    dense.require_dense("shrink it")
    budget = wanted.budget(dense)
    check_room(dense, Refinement.of(wanted.refine), settings.device_name)
    other = None if text is None else _read(dense, text)
    if not run_folder(out, "calibrating").exists():
        check_output(out, dense.path, overwrite=overwrite)
    if settings.source in STAND_INS:
        say(
            f"calibrated on {STAND_INS[settings.source]}: text like what the model is for keeps more of it "
            "(--calibration FILE)"
        )
    with calibrated_run(dense, out, settings) as run:
        stage = _Written(run.resumable.workspace, out, key_of(*_key(wanted)))
        is_written = processes.from_first(lambda: stage.is_reached)
        if not is_written:
            check_output(out, dense.path, overwrite=overwrite)
        say("1 of 4: what each layer could give up, and what that would cost")
        chosen = run.plan(budget)
        shared = share(dense, chosen.plan, dtype=wanted.dtype)
        predicted = Prediction.of(
            chosen,
            shared.estimate,
            less=_half(run, budget, chosen),
            float32=_writes_float32(dense, wanted.dtype),
            refined=Refinement.of(wanted.refine) is not None,
        )
        if not is_written:
            processes.from_first(lambda: judge(predicted))
            say("2 of 4: repair")
            shared = run.refit(shared, refine=wanted.refine) if is_repaired(chosen.plan) else shared

        def finished() -> Shrunk:
            if not is_written:
                stage.begin()
                shared.save(out, overwrite=overwrite)
            with open_checkpoint(out) as written:
                say("3 of 4: verify what was written")
                verified = _verified(written, dense)
                say("4 of 4: measure")
                shrunk = Shrunk(
                    out=out,
                    before=Size.of(dense),
                    after=Size.of(written),
                    predicted=predicted,
                    plan=chosen.plan,
                    refit=written.require_sharing().refit,
                    verified=verified,
                    held_out=run.measure(out),
                    other=None if other is None else _perplexities(dense, written, other, settings.device_name),
                    model_class=model_class(written.config),
                )
            add_measured(out, shrunk.card())
            return shrunk

        return processes.from_first(finished)


def _key(wanted: ShrinkRequest) -> list[Any]:
    """All that what is written depends on, besides the identity of a calibrated run."""
    refinement = Refinement.of(wanted.refine)
    steps = None if refinement is None else refinement.key()
    key = [wanted.save, wanted.to, steps, sorted(wanted.protect), wanted.multiple, wanted.dtype]
    key += [] if wanted.target is None else [wanted.target]
    return key if wanted.bits == "16" else [*key, wanted.bits]


@dataclass(frozen=True)
class _Written:
    """The stage of a run at which its output is in place. It is kept in the run's state until the run has ended."""

    work: Workspace
    out: Path
    key: str

    @property
    def is_reached(self) -> bool:
        """True if this request's output is in place."""
        noted = self.work.read_json(self._file)
        return noted is not None and was_replaced(self.out, noted["before"], MANIFEST)

    def begin(self) -> None:
        """Note what is at the output's place before it is put there."""
        self.work.write_json(self._file, {"before": standing(self.out)})

    @property
    def _file(self) -> str:
        return f"written-{self.key}.json"


def _half(run: CalibratedRun, budget: Budget, chosen: Budgeted) -> float | None:
    """The predicted divergence where half as much is saved, from the same cost curves."""
    rounded = budget.rounded is not None
    if rounded or not chosen.in_nats or budget.saved_bytes is None or budget.saved_bytes < 2:
        return None
    return run.plan(replace(budget, saved_bytes=budget.saved_bytes // 2)).price


def _writes_float32(dense: Checkpoint, dtype: str | None) -> bool:
    """True if most of the weights are written as 32-bit numbers."""
    if dtype is not None:
        return dtype == "float32"
    large = max(dense.tensors.values(), key=lambda info: info.nbytes)
    return large.dtype == OUTPUT_DTYPES["float32"]


def _verified(written: Checkpoint, dense: Checkpoint) -> Verification:
    """What `verify` says of the output, if all is well.

    Raises:
        CheckpointError: if something is not.
    """
    found = verify(written, dense)
    if not found.ok:
        raise CheckpointError(f"{written.name} is not as it should be: {found.problems[0]}. Do not use it.")
    return found


def _read(dense: Checkpoint, text: str | Path) -> tuple[str, str]:
    """The name and the content of a text to measure on.

    Raises:
        OptionError: if the model has no perplexity.
        EvaluationError: if the text cannot be read.
    """
    if not predicts(dense):
        raise OptionError("--text would not be used: this model predicts no text, so it has no perplexity.")
    return str(text), read_text(Path(text))


def _perplexities(dense: Checkpoint, written: Checkpoint, text: tuple[str, str], device: str) -> TextPerplexity:
    """The perplexities of both models on the beginning of a text."""
    name, content = text
    options: dict[str, Any] = {} if device == "cpu" else {"device_map": device}
    first, second = (evaluate(model, content, limit=TOKENS, **options) for model in (dense, written))
    assert isinstance(first, Perplexity)
    assert isinstance(second, Perplexity)
    return TextPerplexity(name, first.perplexity, second.perplexity, first.tokens, first.window)
