"""Runs that can be stopped at any moment, even killed, and resumed.

The state of a run lies in a folder of its own beside the output, until the output is in place. The folder's header says
which run the state belongs to. Before the output is put in its place, the header also records which output that is. So
a later run can tell a state that is still needed from one that was left behind.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from headshare.errors import HeadshareError, OutputError
from headshare.files.atomic import flush_folder, is_partial, remove_partials
from headshare.files.lock import claimed, inode_of
from headshare.files.state_files import Workspace
from headshare.progress import say

NAME_BYTES = 100
HEADER = "run.json"
# the header of a state that is being removed: its first step is to rename the header, its last to delete it
DISCARDED = "discarded.json"


class ResumableRun:
    """A run that resumes where the last run of the same identity was stopped.

        with ResumableRun(run_folder(out, "training"), identity, refused=TrainingError) as run:
            ...                         # read and write state files in run.workspace
            run.mark_committing(out)
            save(out)

    Entering locks the folder, removes the state of a run whose output is already in place, and compares identities.
    `committed` is then the identity of that removed run. The state is removed when the block ends, unless it is `kept`
    for other runs. If the block fails, the state stays if it holds work. `has_work` tells that from the folder; by
    default any file beside the header is work. `restart` throws away the state that is there, of whichever run.

    Raises:
        HeadshareError: of the kind `refused`, on entering, if the state belongs to another run (it names what
            differs), is damaged, or is none.
        OutputError: on entering, if the folder cannot be made, or another run is working in it.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        *,
        refused: type[HeadshareError],
        restart: bool = False,
        kept: bool = False,
        has_work: Callable[[Path], bool] | None = None,
    ) -> None:
        self.workspace = Workspace(folder, refused)
        self.identity = dict(identity)
        self.committed: dict[str, str] | None = None
        self._restart = restart
        self._kept = kept
        self._has_work = has_work or _has_files
        self._held = ExitStack()

    def __enter__(self) -> "ResumableRun":
        with ExitStack() as held:
            held.enter_context(claimed(self.workspace.folder))
            held.callback(self._leave)
            self.committed = _discard_if_committed(self.workspace)
            if self.committed is not None:
                say("the last run was stopped when its output was whole; what was left of its state is removed")
            self._take_up()
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            if kind is None and not self._kept:
                _empty(self.workspace.folder)

    def mark_committing(self, out: Path, *, holds: str = "") -> None:
        """Note in the header that all is done but to put this output in its place.

        It is in place once something new is at its path and holds a file of the name `holds`. The output must lie
        beside the folder of the state.
        """
        place = out.absolute()
        committing = {"output": place.name, "before": inode_of(place), "holds": holds}
        self.workspace.write_json(HEADER, {"identity": self.identity, "committing": committing})

    def _take_up(self) -> None:
        """Begin a state, or resume the one that is there."""
        files = self.workspace
        if not (files.folder / HEADER).exists() and not _is_vacant(files.folder):
            raise files.refused(f"{files.folder} is in the way and is no state of a run. Move it, or write elsewhere.")
        if self._restart:
            _empty(files.folder)
        # another run's state is refused if it holds work, and replaced if it does not
        header = files.read_json(HEADER)
        identity = {} if header is None else header["identity"]
        differs = [key for key in {**self.identity, **identity} if identity.get(key) != self.identity.get(key)]
        if header and differs and self._has_work(files.folder):
            raise files.refused(
                f"{files.folder} holds the state of another run: it had another {' and another '.join(differs)}. "
                "Go on with what it had, or throw it away with --restart."
            )
        if header is None or differs:
            _empty(files.folder)
            files.write_json(HEADER, {"identity": self.identity})
        remove_partials(files.folder)

    def _leave(self) -> None:
        """Remove a state in which nothing was done yet."""
        folder = self.workspace.folder
        if (folder / HEADER).exists() and not self._has_work(folder):
            _empty(folder)
        with suppress(OSError):  # something is in it
            folder.rmdir()


def run_folder(out: Path, kind: str) -> Path:
    """The folder for the state of a run of this kind to this output: a hidden sibling of the output."""
    place = out.absolute()
    raw = os.fsencode(place.name)
    name = place.name
    if len(raw) > NAME_BYTES:  # a name can be too long with more added to it
        name = f"{os.fsdecode(raw[:NAME_BYTES])}-{hashlib.sha256(raw).hexdigest()[:16]}"
    return place.parent / f".{name}.headshare-{kind}"


def discard_committed(out: Path) -> bool:
    """Remove the states of runs that were stopped after this output was in place. Return False if there are none.

    Runs of every kind count. A state that is still needed, is damaged, or is in use by another run stays.
    """
    committed = False
    for folder in _run_folders(out):
        with suppress(OutputError, OSError), claimed(folder):
            committed |= _discard_if_committed(Workspace(folder, OutputError)) is not None
            if _is_vacant(folder):
                _empty(folder)
                folder.rmdir()
    return committed


def _run_folders(out: Path) -> Iterator[Path]:
    """The folders of runs of any kind to this output."""
    prefix = run_folder(out, "")
    with suppress(OSError):
        for path in prefix.parent.iterdir():
            kind = path.name.removeprefix(prefix.name)
            if kind != path.name and kind.isalpha():
                yield path


def _discard_if_committed(state: Workspace) -> dict[str, str] | None:
    """Remove a state whose output is in place, and return the identity of its run.

    A damaged state is left to the run that takes it up.
    """
    try:
        header = state.read_json(HEADER) or state.read_json(DISCARDED)
    except state.refused:
        return None
    if header is None or not _is_in_place(state.folder, header):
        return None
    _empty(state.folder)
    return dict(header["identity"])


def _is_in_place(folder: Path, header: Mapping[str, Any]) -> bool:
    """True if the output that a header names is in its place."""
    committing = header.get("committing")
    if committing is None:
        return False
    return was_replaced(folder.parent / committing["output"], committing["before"], committing["holds"])


def _is_vacant(folder: Path) -> bool:
    """True if the folder is what a run leaves that was killed while it began or removed a state."""
    names = [path.name for path in folder.iterdir()]
    return HEADER not in names and (DISCARDED in names or all(is_partial(name) for name in names))


def _has_files(folder: Path) -> bool:
    """True if a state has any file but its header."""
    return any(path.is_file() and path.name != HEADER for path in folder.rglob("*"))


def _empty(folder: Path) -> None:
    """Remove all files of a state. Killed at any moment, this leaves a state or a folder that `_is_vacant`."""
    with suppress(FileNotFoundError):
        (folder / HEADER).rename(folder / DISCARDED)
    flush_folder(folder)
    rest = [path for path in folder.iterdir() if path.name != DISCARDED]
    for path in rest:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if not any(path.exists() for path in rest):
        (folder / DISCARDED).unlink(missing_ok=True)


def standing(out: Path) -> str:
    """A word for what stands at this path, which differs once something else is put there; empty where nothing is."""
    return inode_of(out)


def was_replaced(out: Path, before: str, holds: str) -> bool:
    """True if something else stands at this path than did `before`, and holds a file of this name."""
    return standing(out) != before and (out / holds).exists()
