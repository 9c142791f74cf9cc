"""Where the state of a run lies until its output is written, whose it is, and where to go on from."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from headshare.errors import OutputError, TrainingError
from headshare.files.atomic import write_whole
from headshare.files.lock import identity_of, locked
from headshare.files.resume import workspace_of

_WHAT = "run.json"
RECORD = "training.json"
_STATE = "trainer_state.json"
_WRITING = "writing.json"


def work_of(target: Path) -> Path:
    """The Trainer's folder for this output."""
    return workspace_of(target, "training")


@contextmanager
def taken_up(folder: Path, what: Mapping[str, str], *, restart: bool) -> Iterator[None]:
    """The folder of a run that is of this model, plan, text and settings, locked: made, or taken up. One in which
    nothing was saved yet is made anew.

    Raises:
        TrainingError: if it is of another run, naming what differs, or of none.
        OutputError: if it cannot be made, or another run is working in it.
    """
    lock = locked(folder)
    try:
        _check(folder, what, restart=restart)
        yield
    finally:
        os.close(lock)


def note_writing(folder: Path, out: Path) -> None:
    """Note that all is done but to put this output in its place; `settle` then tells whether it came there."""
    write_whole(folder / _WRITING, json.dumps({"before": identity_of(out)}).encode())


def settle(out: Path) -> bool:
    """Throw away the state of a run that was stopped after its output was in place; False where there is none."""
    folder = work_of(out)
    writing = _read(folder / _WRITING)
    if writing is None or writing.get("before") == identity_of(out) or not (out / RECORD).is_file():
        return False
    with suppress(OutputError):  # another process of this run is doing it
        lock = locked(folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
    return True


def _check(folder: Path, what: Mapping[str, str], *, restart: bool) -> None:
    others = [path for path in folder.iterdir() if not path.name.startswith(".headshare-partial")]
    if others and not (folder / _WHAT).is_file():
        raise TrainingError(f"{folder} is in the way and is no state of a run. Move it, or write elsewhere.")
    found = _read(folder / _WHAT) or {}
    differs = [key for key in {**what, **found} if found.get(key) != what.get(key)]
    if differs and not restart and any(_read(path / _STATE) for path in folder.glob("checkpoint-*")):
        raise TrainingError(
            f"{folder} holds the state of another run: it had another {' and another '.join(differs)}. Go on with "
            "what it had, or throw it away with --restart."
        )
    if restart or differs:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_whole(folder / _WHAT, json.dumps(what).encode())
    remove_useless(folder)


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """The Trainer's checkpoints that are whole and that there is something to do after, by step, the last first: none
    that was made after the last step, or when patience was at its end."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda one: -int(one.name.removeprefix("checkpoint-"))):
        state = _read(path / _STATE)
        if state is not None and int(state["global_step"]) < int(state["max_steps"]) and not _impatient(state):
            yield int(state["global_step"]), path


def _impatient(state: Mapping[str, Any]) -> bool:
    stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    if not isinstance(stopping, dict):
        return False
    waited = stopping["attributes"]["early_stopping_patience_counter"]
    return bool(waited >= stopping["args"]["early_stopping_patience"])


def remove_useless(folder: Path) -> None:
    """Remove checkpoints that a kill left half-written; and one made after the last step, which the Trainer would train
    beyond: the steps before it are taken again."""
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
