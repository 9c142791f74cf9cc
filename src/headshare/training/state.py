"""The Trainer's folder: its place, and the checkpoints that a run can go on from."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from transformers import Trainer, TrainerCallback

from headshare.errors import CheckpointError, TrainingError
from headshare.files.atomic import write_whole
from headshare.files.digests import SHA256, file_digest
from headshare.files.resume import ResumableRun, discard_committed, run_folder
from headshare.files.untrusted import foreign, is_file, read_json
from headshare.progress import say

RECORD = "training.json"
_STATE = "trainer_state.json"
# in each checkpoint: the digests of its files, as they were written
_DIGESTS = "digests.json"
_RESTART = "Restore it, or pass --restart to throw the state away and begin anew."


def work_of(target: Path) -> Path:
    """The Trainer's folder for this output."""
    return run_folder(target, "training")


@contextmanager
def trainer_run(folder: Path, identity: Mapping[str, str], *, restart: bool) -> Iterator[ResumableRun]:
    """The run that has this folder, with the checkpoints that it can go on from and no others.

    A folder in which the Trainer saved nothing yet is made anew.

    Raises:
        TrainingError: if the folder is of another run, naming what differs, or of none, or all that a run could go on
            from is damaged.
        OutputError: if the folder cannot be made, or another run is working in it.
    """
    with ResumableRun(folder, identity, refused=TrainingError, restart=restart, has_work=_has_checkpoint) as run:
        _remove_damaged(folder)
        remove_useless(folder)
        try:
            yield run
        finally:
            # a half-written one takes room, which may be what was wanting
            for path in folder.glob("checkpoint-*"):
                if not (path / _STATE).exists():
                    shutil.rmtree(path, ignore_errors=True)


def is_trained(out: Path) -> bool:
    """Whether a training run has written this output. States of runs that were stopped after that are removed."""
    discard_committed(out)
    return (out / RECORD).is_file()


def note_digests(checkpoint: Path) -> None:
    """Note the digests of a checkpoint's files in it, so that a run that goes on from it can tell damage."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    digests = {path.relative_to(checkpoint).as_posix(): file_digest(path, SHA256) for path in files}
    write_whole(checkpoint / _DIGESTS, json.dumps(digests).encode())


def _remove_damaged(folder: Path) -> None:
    """Remove the checkpoints whose files are not as they were written, if there is a whole one to go on from.

    Raises:
        TrainingError: if there is none, or the best step so far is damaged.
    """
    damaged = {path: file for path in folder.glob("checkpoint-*") if (file := _damaged_file(path))}
    if not damaged:
        return
    whole = next((path for _, path in checkpoints(folder) if path not in damaged), None)
    best = None if whole is None else Path(str((_read(whole / _STATE) or {}).get("best_model_checkpoint"))).name
    lost = next((path for path in damaged if whole is None or path.name == best), None)
    if lost is not None:
        raise TrainingError(
            f"the state of the run that was stopped is damaged: {lost / damaged[lost]} is not as it was written. "
            f"{_RESTART}"
        )
    for path, file in damaged.items():
        say(f"{path / file} is damaged: that state is thrown away, and training goes on from an earlier one")
        shutil.rmtree(path)


def _damaged_file(checkpoint: Path) -> str | None:
    """A file of a checkpoint that is not as its digest says; None where all are, or a kill came before the digests."""
    if not (checkpoint / _DIGESTS).exists():
        return None
    digests = _read(checkpoint / _DIGESTS)
    if digests is None:
        return _DIGESTS
    files = ((name, checkpoint / name) for name in digests)
    return next((name for name, path in files if not is_file(path) or file_digest(path, SHA256) != digests[name]), None)


def _has_checkpoint(folder: Path) -> bool:
    return any(_read(path / _STATE) or (path / _DIGESTS).exists() for path in folder.glob("checkpoint-*"))


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """The Trainer's checkpoints that a run can go on from, with their steps, the last first.

    A checkpoint is left out if it is not whole, if it was made after the last step, or if patience was at its end.
    """
    folders = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(folders, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        state = _read(path / _STATE)
        if state is not None and (step := _step_to_go_on_from(state)) is not None:
            yield step, path


class _Logged(BaseModel):
    """A row of the Trainer's log, as far as the best step is found by it."""

    step: int
    eval_loss: float | None = None
    eval_shared_loss: float | None = None


class _TrainerState(BaseModel):
    """The Trainer's state, as far as a run that goes on reads it. Anybody may have written it."""

    global_step: int = Field(ge=0)
    max_steps: int
    epoch: float = 0
    num_train_epochs: int = 0
    log_history: list[_Logged] = []
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    train_batch_size: int | None = None
    stateful_callbacks: dict[str, Any] | None = None


def _step_to_go_on_from(state: Mapping[str, Any]) -> int | None:
    """The step of a checkpoint, by its state; None where training was over, or it is not what the Trainer writes."""
    with suppress(TrainingError), foreign("the state is not the Trainer's", TrainingError):
        step = _TrainerState.model_validate(state, strict=True).global_step
        if step < state["max_steps"] and not _impatient(state):
            return step
    return None


@contextmanager
def resumed(trainer: Trainer, folder: Path) -> Iterator[str | None]:
    """The checkpoint that a run goes on from; None where it begins, and then also measures before its first step.

    Raises:
        TrainingError: in place of whatever is raised before the first step after a checkpoint, which is to blame.
    """
    last = next(checkpoints(folder), None)
    # a run that goes on has measured the beginning already
    trainer.args.eval_on_start = last is None
    begun = _Begun()
    trainer.add_callback(begun)
    try:
        yield None if last is None else str(last[1])
    except Exception:
        if last is None or begun.at_all:
            raise
        with foreign(f"the run that was stopped cannot go on from {last[1]}", TrainingError, _RESTART):
            raise


class _Begun(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Whether the Trainer has begun a step."""

    at_all = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.at_all = True


def _impatient(state: Mapping[str, Any]) -> bool:
    """Whether patience was at its end at this checkpoint: so many evaluations were no better."""
    stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    if not isinstance(stopping, dict):
        return False
    waited = stopping["attributes"]["early_stopping_patience_counter"]
    return bool(waited >= stopping["args"]["early_stopping_patience"])


def remove_useless(folder: Path) -> None:
    """Remove the checkpoints that a run cannot go on from.

    The Trainer fails at a half-written checkpoint, and trains beyond the last step from one that was made after it.
    The steps since the last useful checkpoint are taken again.
    """
    useful = {path for _, path in checkpoints(folder)}
    for path in folder.glob("checkpoint-*"):
        if path not in useful:
            shutil.rmtree(path)


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is none, whatever is there in its place."""
    with suppress(CheckpointError):
        return read_json(path)
    return None
