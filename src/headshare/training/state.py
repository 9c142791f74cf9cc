"""The Trainer's folder: where it lies, when it is worth keeping, and which checkpoint to go on from."""

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
    """The run that has this folder, with the checkpoints that it can go on from and no others. A folder in which the
    Trainer saved nothing yet is made anew.

    Raises:
        TrainingError: if the folder is of another run, naming what differs, or of none.
        OutputError: if the folder cannot be made, or another run is working in it.
    """
    with ResumableRun(folder, identity, refused=TrainingError, restart=restart, has_work=_has_checkpoint) as run:
        remove_useless(folder)
        yield run


def is_trained(out: Path) -> bool:
    """Whether a training run has written this output. What it left when it was stopped then goes."""
    discard_committed(out)
    return (out / RECORD).is_file()


def _has_checkpoint(folder: Path) -> bool:
    return any(_read(path / _STATE) for path in folder.glob("checkpoint-*"))


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """The Trainer's checkpoints to go on from, with their steps, the last first. A checkpoint that is not whole, that
    was made after the last step, or when patience was at its end, is none of them."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda one: -int(one.name.removeprefix("checkpoint-"))):
        state = _read(path / _STATE)
        if state is not None and int(state["global_step"]) < int(state["max_steps"]) and not _impatient(state):
            yield int(state["global_step"]), path


def _impatient(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's measurements had not improved for as long as was to be waited."""
    stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    if not isinstance(stopping, dict):
        return False
    waited = stopping["attributes"]["early_stopping_patience_counter"]
    return bool(waited >= stopping["args"]["early_stopping_patience"])


def remove_useless(folder: Path) -> None:
    """Remove the checkpoints that cannot be gone on from: the Trainer fails at one that is half-written, and trains
    beyond the last step from one that was made after it. The steps before such a one are taken again."""
    useful = {path for _, path in checkpoints(folder)}
    for path in folder.glob("checkpoint-*"):
        if path not in useful:
            shutil.rmtree(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
