"""What a long calibration has done so far, in a folder: killed at any moment, the next run goes on from there.

Every file is written whole or not at all and ends with the SHA-256 of the rest; a damaged one is refused. One run at a
time works in a folder, which it locks. A folder made for another model, text or setting is refused, not used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from headshare.errors import CalibrationError
from headshare.files.atomic import flush_folder
from headshare.files.lock import identity_of, locked
from headshare.files.state_files import FolderTensors, damaged, read_state, read_tensors, write_state, write_tensors

NAME_BYTES = 100
_WHAT = "what.json"
_WRITING = "writing.json"
_PARTIAL = ".headshare-partial-*"


class Workspace:
    """A folder with the state of one calibrated run, locked until it is closed. `what` says what it belongs to; without
    it, the state is looked at and not taken up.

    Raises:
        CalibrationError: if the folder is of a run that differs in any of these (it names which), or is damaged.
        OutputError: if it cannot be made, or another run is working in it.
    """

    def __init__(self, folder: Path, what: Mapping[str, str] | None = None, *, restart: bool = False) -> None:
        self.folder = folder
        self._lock = locked(folder)
        try:
            if restart:
                self._empty()
            if what is not None:
                self._begin(what)
        except BaseException:
            self.close()
            raise

    def _begin(self, what: Mapping[str, str]) -> None:
        """Take up what is there; `what` is the first file of a state and the last to stay, so without it all goes."""
        found = self.read_json(_WHAT)
        if found is None:
            self._empty()
            self.write_json(_WHAT, dict(what))
            return
        changed = [name for name in {**found, **what} if found.get(name) != what.get(name)]
        if changed:
            raise CalibrationError(
                f"{self.folder} holds the state of a run with another {', '.join(changed)}. "
                "Run that one again to go on with it, or pass --restart to throw its state away."
            )
        for partial in self.folder.rglob(_PARTIAL):
            partial.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        write_state(self.folder / name, data)

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if it is not there.

        Raises:
            CalibrationError: if they are not as they were written.
        """
        return read_state(self.folder / name)

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON object."""
        self.write(name, json.dumps(data).encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None if it is not there."""
        data = self.read(name)
        try:
            found = None if data is None else json.loads(data)
        except ValueError as error:
            raise damaged(self.folder / name, str(error)) from None
        if not isinstance(found, dict | None):
            raise damaged(self.folder / name, "it holds no JSON object")
        return found

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as one safetensors file, whole or not at all."""
        write_tensors(self.folder / name, tensors)

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of such a file; None if it is not there."""
        return read_tensors(self.folder / name)

    def tensors(self, name: str) -> "FolderTensors":
        """A subfolder that holds one tensor a file."""
        return FolderTensors(self.folder / name)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def note_writing(self, out: Path) -> None:
        """Note that all is done but to put this output in its place; `settle` then tells whether it came there."""
        self.write_json(_WRITING, {"before": identity_of(out)})

    def remove(self) -> None:
        """Throw the state away: the run is done."""
        self._empty()
        with suppress(OSError):
            self.folder.rmdir()

    def _empty(self) -> None:
        """Remove all that is in the folder, first what would make the rest look like a state."""
        self.delete(_WHAT)
        flush_folder(self.folder)
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let other runs in. A state in which nothing was done yet is not kept."""
        files = {path.name for path in self.folder.rglob("*") if path.is_file()}
        if files == {_WHAT}:
            self.remove()
        os.close(self._lock)


@contextmanager
def workspace(folder: Path, what: Mapping[str, str], *, restart: bool = False) -> Iterator[Workspace]:
    """A workspace that is removed when the block ends, and kept for the next run when the block fails.

    Raises:
        CalibrationError, OutputError: as `Workspace` does.
    """
    work = Workspace(folder, what, restart=restart)
    try:
        yield work
        work.remove()
    finally:
        work.close()


def workspace_of(out: Path, what: str = "calibrating") -> Path:
    """Where the state of a calibrated run to this output, or of another kind of run, is kept until it is done."""
    place = out.absolute()
    raw = os.fsencode(place.name)
    name = place.name
    if len(raw) > NAME_BYTES:  # a name can be too long with more added to it
        name = f"{os.fsdecode(raw[:NAME_BYTES])}-{hashlib.sha256(raw).hexdigest()[:16]}"
    return place.parent / f".{name}.headshare-{what}"


def settle(out: Path) -> dict[str, Any] | None:
    """Throw away the state of a run that was stopped after its output was in place, and say what it belonged to; None,
    and nothing happens, where there is no such state.

    Raises:
        OutputError: if another run is working in it.
    """
    folder = workspace_of(out)
    if not folder.is_dir():
        return None
    try:
        work = Workspace(folder)
    except CalibrationError:  # whoever takes the state up says so
        return None
    try:
        what, writing = work.read_json(_WHAT), work.read_json(_WRITING)
        if what is not None and (writing is None or identity_of(out) in ("", writing.get("before"))):
            return None
        work.remove()
    except CalibrationError:
        return None
    finally:
        work.close()
    return what


def check_readable(saved: Mapping[Any, object]) -> None:
    """Read all that was saved once, so that damage is found before hours of work and not after."""
    for _ in saved.values():
        pass


def joint_digest(*what: object) -> str:
    """A short digest of several values together, by their representations."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
