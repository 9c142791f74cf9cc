"""The refit of a shared model's readouts, layer by layer, and its record."""

from collections.abc import Collection, MutableMapping
from dataclasses import asdict

from torch import Tensor

from headshare.calibration import processes
from headshare.calibration.refit.refinement import Refinement
from headshare.calibration.refit.refitter import Refitter, text_written
from headshare.calibration.refit.result import Refit, RefitStep
from headshare.calibration.refit.whole import take_whole_steps
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.refit_record import RefitRecord
from headshare.files.state_files import Workspace, check_readable, key_of
from headshare.plan.plan import SharePlan
from headshare.progress import track
from headshare.sharing.share import SharedCheckpoint
from headshare.text.tokens import Calibration


def refit(
    shared: SharedCheckpoint,
    calibration: Calibration,
    *,
    ffn: bool = True,
    refine: str | int | Refinement | None = None,
    device: str = "cpu",
    workspace: Workspace | None = None,
) -> SharedCheckpoint:
    """The checkpoint with its output projections refitted to the calibration text: W_o, and with `ffn` W_down.

    They are refitted from the first layer on that gives something up. `refine` gives the refit more text, and then
    changes all weights of those layers by gradient steps: none, text, fast, best, or a number of steps a layer.

    Raises:
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
        OptionError: if there is no such refinement.
    """
    refinement = Refinement.of(refine)
    written = text_written(shared.dense, calibration, refinement, device, workspace)
    refitter = Refitter(
        shared.dense, shared.plan, calibration, ffn=ffn, refinement=refinement, written=written, device=device
    )
    run_refit(refitter, workspace, state_key(shared.plan, ffn, refinement))
    tensors = refitter.result.tensors
    return shared.with_refit(record_of(calibration, tensors, refinement=refinement, written=written), tensors)


def refit_readouts(
    dense: Checkpoint,
    plan: SharePlan,
    calibration: Calibration,
    *,
    ffn: bool = True,
    refine: str | int | Refinement | None = None,
    device: str = "cpu",
) -> Refit:
    """Refit the output projections to make up for a plan's ties: W_o of every layer from the first tie on.

    With `ffn`, W_down is refitted too. With `refine`, a name or a number of gradient steps as `Refinement.of` takes it,
    the refit has more text, and gradient steps then change all weights of each layer, or of all layers together.

    Raises:
        CheckpointError, ArchitectureError: if the model cannot be walked layer by layer.
        PlanError: if the plan is for another model.
        CalibrationError: if the calibration has fewer than two windows.
        OptionError: if there is no such refinement.
    """
    refinement = Refinement.of(refine)
    written = text_written(dense, calibration, refinement, device)
    refitter = Refitter(dense, plan, calibration, ffn=ffn, refinement=refinement, written=written, device=device)
    run_refit(refitter, None, "")
    return refitter.result


def state_key(plan: SharePlan, ffn: bool, refinement: Refinement | None) -> str:
    """The key of a refit's state: all that it depends on, beside what identifies the run."""
    return key_of(plan.digest, ffn, refinement.key() if refinement else 0)


def run_refit(refitter: Refitter, workspace: Workspace | None, key: str) -> None:
    """Run a refit to its end, from where an earlier run of the same key in this workspace was stopped.

    A layer counts as done when its number is written, which is after its tensors and the streams that leave it. Every
    process keeps streams of its own, and the first one all else. Steps on the whole model come last.
    """
    first = 0 if workspace is None else _take_up(refitter, workspace, key)
    for layer in track(refitter.advance(), "refitting", refitter.layers.count - first):
        if workspace is not None:
            workspace.write_tensors(_streams_after(key, layer), refitter.state())
            processes.wait()
            if processes.is_first():
                steps = [asdict(step) for step in refitter.result.steps]
                done = {"layer": layer, "steps": steps, "tensors": sorted(refitter.result.tensors)}
                workspace.write_json(f"refit-{key}.json", done)
            processes.wait()
            workspace.delete(_streams_after(key, layer - 1))
    take_whole_steps(refitter, workspace, key)


def _take_up(refitter: Refitter, workspace: Workspace, key: str) -> int:
    """Resume a refit from the state of a stopped one, if there is any. Returns the layer that is next."""
    tensors: MutableMapping[str, Tensor] = workspace.tensors(f"refit-{key}") if processes.is_first() else {}
    refitter.result.tensors = tensors
    layer, steps = processes.from_first(lambda: _done(workspace, key))
    if layer < 0:
        return 0
    streams = workspace.read_tensors(_streams_after(key, layer))
    if streams is None:
        raise workspace.damaged(_streams_after(key, layer), "it is not there")
    refitter.resume(layer + 1, streams, tensors, steps)
    return layer + 1


def _done(workspace: Workspace, key: str) -> tuple[int, list[RefitStep]]:
    """The last layer that a stopped refit has done, or -1, and its steps so far; its tensors are all there."""
    name = f"refit-{key}.json"
    done = workspace.read_json(name)
    if done is None:
        return -1, []
    tensors = workspace.tensors(f"refit-{key}")
    check_readable(tensors)
    try:
        layer = int(done["layer"])
        steps = [RefitStep(**step) for step in done["steps"]]
        missing = sorted(set(done["tensors"]) - set(tensors))
    except (KeyError, TypeError, ValueError) as error:
        raise workspace.damaged(name, f"it does not say how far it came ({error})") from None
    if missing:
        raise workspace.damaged(f"refit-{key}", f"the refitted {missing[0]} is not there")
    return layer, steps


def _streams_after(key: str, layer: int) -> str:
    """The file of this process's streams that leave a layer."""
    own = f"-{processes.rank()}" if processes.count() > 1 else ""
    return f"refit-{key}-{layer}{own}.safetensors"


def record_of(
    calibration: Calibration,
    tensors: Collection[str],
    before: RefitRecord | None = None,
    *,
    refinement: Refinement | None = None,
    written: Calibration | None = None,
) -> RefitRecord:
    """The record of a refit for the checkpoint, together with the tensors that an earlier refit changed."""
    fitted = {name for name in tensors if not name.endswith(("tie_scale", "factor_in", "factor_out"))}
    return RefitRecord.of(
        fitted | set(before.tensors if before else ()),
        calibration.source,
        calibration.digest,
        windows=tuple(calibration.tokens.shape),
        seed=calibration.seed,
        steps=max(refinement.steps if refinement else 0, before.steps if before else 0),
        step_tokens=max(
            refinement.tokens if refinement and refinement.takes_steps else 0, before.step_tokens if before else 0
        ),
        written=max(written.tokens.numel() if written else 0, before.written if before else 0),
        whole=max(refinement.whole if refinement else 0, before.whole if before else 0),
    )
