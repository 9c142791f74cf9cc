"""Where the state of a run lies until its output is written, and whose it is."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from headshare.errors import TrainingError
from headshare.files import write_whole

_WHAT = "run.json"


def work_of(target: Path) -> Path:
    """The Trainer's folder for this output."""
    return target.absolute().parent / f".{target.name}.headshare-training"


def take_up(folder: Path, what: Mapping[str, str], *, restart: bool) -> None:
    """Make the folder of a run that is of this model, plan, text and settings; or take it up, if it is of no other.

    Raises:
        TrainingError: if it is of another run, naming what differs, or of none.
    """
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    file = folder / _WHAT
    if file.is_file():
        try:
            found = json.loads(file.read_bytes())
        except ValueError:
            found = {}
        other = [key for key, value in what.items() if found.get(key) != value]
        if other:
            raise TrainingError(
                f"{folder} holds the state of another run: it had another {' and another '.join(other)}. Go on with "
                "what it had, or throw it away with --restart."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise TrainingError(f"{folder} is in the way and is no state of a run. Move it, or write elsewhere.")
    folder.mkdir(exist_ok=True)
    write_whole(file, json.dumps(what).encode())
