"""The Trainer's folder: its place, and the checkpoints that a run can go on from."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headshare.errors import TrainingError
from headshare.files.resume import ResumableRun, discard_committed, run_folder

RECORD = "training.json"
_STATE = "trainer_state.json"


def work_of(target: Path) -> Path:
    """The Trainer's folder for this output."""
    return run_folder(target, "training")


@contextmanager
def trainer_run(folder: Path, identity: Mapping[str, str], *, restart: bool) -> Iterator[ResumableRun]:
    """The run that has this folder, with the checkpoints that it can go on from and no others.

    A folder in which the Trainer saved nothing yet is made anew.

    Raises:
        TrainingError: if the folder is of another run, naming what differs, or of none.
        OutputError: if the folder cannot be made, or another run is working in it.
    """
    with ResumableRun(folder, identity, refused=TrainingError, restart=restart, has_work=_has_checkpoint) as run:
        remove_useless(folder)
        yield run


def is_trained(out: Path) -> bool:
    """Whether a training run has written this output. States of runs that were stopped after that are removed."""
    discard_committed(out)
    return (out / RECORD).is_file()


def _has_checkpoint(folder: Path) -> bool:
    return any(_read(path / _STATE) for path in folder.glob("checkpoint-*"))


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """The Trainer's checkpoints that a run can go on from, with their steps, the last first.

    A checkpoint is left out if it is not whole, if it was made after the last step, or if patience was at its end.
    """
    folders = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(folders, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        state = _read(path / _STATE)
        if state is not None and int(state["global_step"]) < int(state["max_steps"]) and not _impatient(state):
            yield int(state["global_step"]), path


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
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None
