"""Calibrated runs from a request to files: text, plan under a budget, refit, output, measurement.

The same call goes on with a run that was stopped anywhere.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from headshare.calibration import processes
from headshare.calibration.budget import Budget
from headshare.calibration.choose import plan_on
from headshare.calibration.costs.kept import KeptCurves
from headshare.calibration.costs.measured import predicts
from headshare.calibration.costs.to_plan import Budgeted
from headshare.calibration.layerwise.numbers import check_numbers, enough_memory, solved
from headshare.calibration.measure import HeldOutPerplexity, measure
from headshare.calibration.outcome import Outcome, Planned, ShareRequest
from headshare.calibration.refit.refinement import Refinement
from headshare.calibration.refit.refitter import Refitter, text_written
from headshare.calibration.refit.rounded import is_repaired
from headshare.calibration.refit.run import record_of, refit, run_refit, state_key
from headshare.calibration.refit.steps.whole_model import check_room
from headshare.calibration.settings import CalibrationSettings
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.fingerprint import ANY_BASE, check_origin, fingerprint
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CalibrationError
from headshare.files.folder import check_output
from headshare.files.resume import ResumableRun, run_folder
from headshare.files.state_files import Workspace
from headshare.plan.plan import SharePlan
from headshare.progress import say
from headshare.sharing.fits import fit_plan, open_shared
from headshare.sharing.rewrite import check_written_again, is_own, write_refitted
from headshare.sharing.share import SharedCheckpoint, share
from headshare.text.documents import SELF
from headshare.text.tokens import Calibration

# The name, in a run's identity, of the checkpoint that the run refits and may replace.
_SHARED = "shared model"
# The names of the state files with the text that the model has written, without their endings.
WRITTEN = "text"


@dataclass(frozen=True)
class CalibratedRun:
    """A calibrated run in progress: the dense model, the tokens, the device, and the state to go on from.

    Every process has one. Only the first may write to the state, but for its own streams of hidden states.
    """

    dense: Checkpoint
    calibration: Calibration
    device: str
    resumable: ResumableRun
    probe: bool
    prices: Path | None = None

    def plan(self, budget: Budget) -> Budgeted:
        """The plan for this budget, chosen by `plan_on` on the run's tokens."""
        return plan_on(
            self.dense,
            self.calibration,
            budget,
            probe=self.probe,
            device=self.device,
            workspace=self.resumable.workspace,
            kept=self._kept(budget),
        )

    def _kept(self, budget: Budget) -> KeptCurves | None:
        """The file in which cost curves are kept, with all that decides them but the actions."""
        if self.prices is None:
            return None
        of = {name: self.resumable.identity[name] for name in ("model", "text", "seed")}
        windows, window = self.calibration.tokens.shape
        of["windows"] = f"{windows} x {window}"
        of["unit of cost"] = "nats" if self.probe and predicts(self.dense) else "relative error"
        of["groups of neurons"] = str(budget.ffn_groups)
        of["multiple of neurons"] = str(budget.multiple)
        return KeptCurves(self.prices, of)

    def refit(
        self, shared: SharedCheckpoint, *, ffn: bool = True, refine: str | int | Refinement | None = None
    ) -> SharedCheckpoint:
        """The checkpoint refitted by `refit` to the run's tokens."""
        work = self.resumable.workspace
        return refit(shared, self.calibration, ffn=ffn, refine=refine, device=self.device, workspace=work)

    def measure(self, shared: Path) -> "HeldOutPerplexity":
        """Measure the dense model and the shared one in this folder, on the windows that the fits hold out."""
        return measure(self.dense, shared, self.calibration.split()[1], device=self.device)


@contextmanager
def calibrated_run(dense: Checkpoint, out: Path, settings: CalibrationSettings, **more: str) -> Iterator[CalibratedRun]:
    """A calibrated run to this output, as a block; of all processes that were launched together, if they all enter it.

    The state of the run is removed when the block ends, and stays when the block fails. The next run to this output
    must then have the same model, text, settings and `more`, or it is refused.

    Raises:
        CalibrationError: if the text cannot be read or split, there is no such device or not enough memory, the state
            is of another run, or another process has ended.
        CheckpointError: if the model is not dense, or its numbers are not finite.
        OutputError: if the state cannot be kept, or another run has this output.
    """
    # A model, a device or a text that cannot be used is refused before anything is kept.
    dense.require_dense("calibrate it")
    device = settings.device_name
    with processes.together(), enough_memory(device), solved():
        # Text that the model writes takes long, so it is state: what decides it takes its place in the identity.
        own = settings.source == SELF
        text = None if own else processes.from_first(lambda: _checked_text(dense, settings))

        # A stopped run is only gone on with where nothing that its state depends on has changed. The windows of each
        # process depend on how many there are.
        identity = {
            "headshare": version("headshare"),
            "model": fingerprint(dense),
            "text": f"self, {settings.tokens} tokens, {settings.window}" if text is None else text.digest,
            "seed": str(settings.seed),  # it also chooses the windows held out, which are no part of the text's digest
            "device": device,
            "number of processes": str(processes.count()),
            **more,
        }
        folder = run_folder(out, "calibrating")
        resumable = ResumableRun(folder, identity, refused=CalibrationError, restart=settings.restart)
        with ExitStack() as held:
            processes.from_first(lambda: _enter(held, resumable))
            if text is None:
                text = processes.from_first(lambda: _text_of_its_own(dense, settings, resumable.workspace))
            yield CalibratedRun(dense, text, device, resumable, settings.probe, settings.prices)


def _enter(held: ExitStack, resumable: ResumableRun) -> None:
    held.enter_context(resumable)


def _text_of_its_own(dense: Checkpoint, settings: CalibrationSettings, workspace: Workspace) -> Calibration:
    """The text that the model writes, from the state of a stopped run where it is whole there."""
    kept = workspace.read_tensors(f"{WRITTEN}.safetensors")
    told = workspace.read_json(f"{WRITTEN}.json")
    if kept is not None and told is not None and {"bos", "source"} <= told.keys() and "tokens" in kept:
        return Calibration(kept["tokens"], bool(told["bos"]), str(told["source"]), settings.seed)
    text = _checked_text(dense, settings)
    workspace.write_json(f"{WRITTEN}.json", {"bos": text.bos, "source": text.source})
    workspace.write_tensors(f"{WRITTEN}.safetensors", {"tokens": text.tokens})
    return text


def _checked_text(dense: Checkpoint, settings: CalibrationSettings) -> Calibration:
    """The tokens of the text, if they can be split, and if the model makes finite numbers of them."""
    text = settings.load(dense)
    text.split()
    check_numbers(dense, text.tokens, settings.device_name)
    return text


def plan_calibrated(
    dense: Checkpoint, budget: Budget, settings: CalibrationSettings, out: Path, *, measured: bool = True
) -> Planned:
    """Choose a plan by output and save it as a file.

    With `measured`, the plan's model is also refitted and measured. It is written among the state files for that time.

    Raises:
        HeadshareError: if a step fails; the state stays.
    """
    with calibrated_run(dense, out, settings) as run:
        chosen = run.plan(budget)
        perplexities = _measured_for_a_time(run, chosen.plan) if measured else None
        if processes.is_first():
            run.resumable.mark_committing(out)
            chosen.plan.save(out)
    return Planned(chosen, perplexities)


def _measured_for_a_time(run: CalibratedRun, plan: SharePlan) -> HeldOutPerplexity | None:
    """Measure a plan's refitted model, which is written among the state files until it is measured.

    The first process measures it alone.
    """
    folder = run.resumable.workspace.folder / "measured"
    shared = share(run.dense, plan)
    refitted = run.refit(shared) if is_repaired(plan) else shared
    if not processes.is_first():
        return None
    shutil.rmtree(folder, ignore_errors=True)
    refitted.save(folder)
    try:
        return run.measure(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def share_calibrated(
    dense: Checkpoint, wanted: ShareRequest, settings: CalibrationSettings, out: Path, *, overwrite: bool = False
) -> Outcome:
    """Share a model by calibration: choose a plan unless one is given, share, refit, write and measure.

    Of several processes the first writes and measures.

    Raises:
        HeadshareError: if a step fails; the state stays, so that the same call goes on from there.
    """
    if isinstance(wanted.plan, SharePlan):
        share(dense, wanted.plan)  # a plan of another model is refused before anything is kept
    if wanted.refit:
        check_room(dense, Refinement.of(wanted.refine), settings.device_name)
    with calibrated_run(dense, out, settings) as run:
        # Each stage keeps its state, so a run that is stopped loses little.
        chosen = run.plan(wanted.plan) if isinstance(wanted.plan, Budget) else None
        plan = wanted.plan if isinstance(wanted.plan, SharePlan) else chosen.plan  # type: ignore[union-attr]
        shared = share(dense, plan, dtype=wanted.dtype)
        if wanted.refit and is_repaired(plan):
            shared = run.refit(shared, ffn=wanted.ffn, refine=wanted.refine)
        first = processes.is_first()
        if first:
            run.resumable.mark_committing(out)
            shared.save(out, overwrite=overwrite)
    return Outcome(shared, chosen, run.measure(out) if wanted.measure and first else None)


def refit_checkpoint(
    shared: Checkpoint,
    dense: Checkpoint,
    settings: CalibrationSettings,
    out: Path,
    *,
    ffn: bool = True,
    refine: str | int | Refinement | None = None,
    any_base: bool = False,
    overwrite: bool = False,
) -> RefitRecord:
    """Refit a shared checkpoint, whose other weights may have been trained since, and write it to `out`.

    The output may be the checkpoint's own folder, which is replaced when the new one is whole. With `any_base` the
    dense model may be another than the one that the checkpoint came from.

    Raises:
        OptionError: if there is no such refinement.
        PlanError: if the dense model is not one that the plan is for.
        CheckpointError, ArchitectureError: if either cannot be used, or the dense model is another.
        OutputError: if it cannot be written.
    """
    # What cannot be refitted or written is refused before hours of work.
    refinement = Refinement.of(refine)
    check_room(dense, refinement, settings.device_name)
    files = open_shared(shared)
    plan = files.plan
    entry = files.entry
    dense.require_dense("refit to")
    target = dense.named_as(shared)
    fit_plan(plan, target)
    if note := check_origin(shared, dense, None if any_base else ANY_BASE):
        say(note)
    check_written_again(shared, out, overwrite=overwrite)
    check_output(out, dense.path, overwrite=True, in_place=is_own(shared, out))

    # The shared model is part of the identity: layers that were fitted to other weights are of no use.
    more = {_SHARED: fingerprint(shared), "--refit-ffn": str(ffn), "--refine": str(refinement and refinement.key())}
    with calibrated_run(target, out, settings, **more) as run:
        if entry.refit and processes.from_first(lambda: _has_replaced(run.resumable)):
            return entry.refit  # a second refit would start from the first one's weights

        # The record keeps what an earlier refit changed, as those tensors are in the checkpoint too.
        written = text_written(target, run.calibration, refinement, run.device, run.resumable.workspace)
        refitter = Refitter(
            target,
            plan,
            run.calibration,
            ffn=ffn,
            refinement=refinement,
            written=written,
            device=run.device,
            shared=shared,
        )
        run_refit(refitter, run.resumable.workspace, state_key(plan, ffn, refinement))
        record = record_of(
            run.calibration, refitter.result.tensors, entry.refit, refinement=refinement, written=written
        )
        if processes.is_first():
            run.resumable.mark_committing(out)
            write_refitted(files, record, refitter.result.tensors, out, dense=dense, overwrite=overwrite)
    return record


def _has_replaced(run: ResumableRun) -> bool:
    """True if a stopped run has replaced this folder already: its identity differs in the shared model at most."""
    return run.committed is not None and {**run.committed, _SHARED: ""} == {**run.identity, _SHARED: ""}
