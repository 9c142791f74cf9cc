"""The last part of a refinement: steps on the whole model, after the refit of all its layers, and their state."""

import torch

from headshare.architecture.config import text_config
from headshare.calibration import processes
from headshare.calibration.refit.refitter import Refitter
from headshare.calibration.refit.result import RefitStep
from headshare.calibration.refit.steps.whole_model import WholeModel, dense_model, takes_whole_steps
from headshare.calibration.refit.steps.whole_steps import NUMBERS, Descent, Tokens, WholeSteps, begun, descend
from headshare.files.state_files import Workspace
from headshare.progress import say

# the size of a vocabulary that config.json does not tell
MANY_WORDS = 2**17


@torch.no_grad()
def take_whole_steps(refitter: Refitter, workspace: Workspace | None, key: str) -> None:
    """Take the refinement's steps on the whole model, if it has any, from where an earlier run was stopped.

    The best weights, as they will be stored, take the place of those in the refit's result.
    """
    refinement = refitter.layer_fit.refinement
    dense = refitter.layers.checkpoint
    if refinement is None or not takes_whole_steps(dense, refinement) or refitter.first == refitter.layers.count:
        return
    say("steps on the whole model, towards the predictions of the dense one")
    found = processes.from_first(lambda: dict(refitter.result.tensors))
    student = WholeModel.of(refitter.layers, refitter.columns, found, ffn=refitter.layer_fit.ffn)
    teacher = dense_model(dense, refitter.layers.device)
    vocabulary = text_config(dense.config).get("vocab_size") or MANY_WORDS
    tokens = Tokens(refitter.tokens, refitter.layer_fit.fitted, vocabulary)
    wanted = WholeSteps(refinement.whole, refinement.tokens, refinement.whole_rate)

    name = f"whole-{key}.safetensors"
    with student.narrowed() as (weights, own):
        descent = begun(student, teacher, tokens, weights, wanted.rate)
        _take_up(descent, workspace, name)
        for _ in descend(student, teacher, tokens, descent, own, wanted, seed=refitter.layer_fit.seed):
            if workspace is not None and processes.is_first():
                tensors, numbers = descent.state()
                kept = torch.tensor([numbers[number] for number in NUMBERS], dtype=torch.float64)
                workspace.write_tensors(name, {**tensors, "numbers": kept})
            processes.wait()
        processes.copied(*descent.best.values())

    if descent.best_step and processes.is_first():
        for layer in student.put(descent.best):
            refitter.result.tensors.update(layer)
    choice = f"best after {descent.best_step}" if descent.best_step else "none was better"
    note = f"{wanted.steps} gradient steps on the whole model, {choice}; errors are divergences in nats a token"
    refitter.result.steps.append(RefitStep("model", None, descent.before, descent.least, note))


def _take_up(descent: Descent, workspace: Workspace | None, name: str) -> None:
    """Go on from the state of a stopped run, if there is any.

    Raises:
        HeadshareError: of the workspace, if something is missing in it.
    """
    kept = None if workspace is None else workspace.read_tensors(name)
    if workspace is None or kept is None:
        return
    try:
        descent.take_up(kept, dict(zip(NUMBERS, kept["numbers"].tolist(), strict=True)))
    except (KeyError, RuntimeError, ValueError) as error:
        raise workspace.damaged(name, f"it does not fit the run ({error})") from None
