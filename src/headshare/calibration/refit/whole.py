"""The last part of a refinement: steps on the whole model, after the refit of all its layers, and their state."""

from collections.abc import Callable
from functools import partial

import torch

from headshare.architecture.config import text_config
from headshare.calibration import processes
from headshare.calibration.refit.refitter import Refitter
from headshare.calibration.refit.result import RefitStep
from headshare.calibration.refit.steps.whole_model import WholeModel, dense_model, takes_whole_steps
from headshare.calibration.refit.steps.whole_steps import Descent, Tokens, begun, descend
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

    name = f"whole-{key}.safetensors"
    with student.narrowed() as (weights, own):
        begin = partial(begun, student, teacher, tokens, weights)
        descent = begin() if workspace is None else _gone_on_with(begin, workspace, name)
        for _ in descend(student, teacher, tokens, descent, own, refinement, seed=refitter.layer_fit.seed):
            if workspace is not None and processes.is_first():
                workspace.write_tensors(name, descent.state())
            processes.wait()
        best = descent.best
        processes.copied(*best.weights.values())

    if best.step and processes.is_first():
        for layer in student.put(best.weights):
            refitter.result.tensors.update(layer)
    steps = f"{refinement.whole} gradient steps on the whole model, {best.in_words()}"
    note = f"{steps}; errors are divergences in nats a token"
    refitter.result.steps.append(RefitStep("model", None, best.error_before, best.error_after, note))


def _gone_on_with(begin: Callable[..., Descent], workspace: Workspace, name: str) -> Descent:
    """The descent of a stopped run, or a new one where there is none.

    Raises:
        HeadshareError: of the workspace, if something is missing in the state.
    """
    state = workspace.read_tensors(name)
    try:
        return begin(state=state)
    except (KeyError, RuntimeError, ValueError) as error:
        if state is None:
            raise
        raise workspace.damaged(name, f"it does not fit the run ({error})") from None
