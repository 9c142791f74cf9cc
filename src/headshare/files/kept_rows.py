"""Rows of results in one file that any number of runs add to, at once or after one another.

A run of the same work goes on by taking the rows that are there: each row has a key, the digest of all that it depends
on. Unlike the state of a `ResumableRun`, which one run has for itself and removes, the file is the result.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from pydantic import TypeAdapter

from headshare.errors import HeadshareError
from headshare.files.atomic import write_whole
from headshare.files.lock import locked
from headshare.files.scratch import remove_dead
from headshare.files.untrusted import foreign, is_file, parse_json, read_bytes

MAX_BYTES = 256 * 2**20


class Keyed:
    """A row that is kept under a key, which no other row has."""

    key: str


Row = TypeVar("Row", bound=Keyed)


class KeptRows(Generic[Row]):
    """The rows of one kind that a file keeps.

        with KeptRows(file, Row, "rows of `command`", refused=EvaluationError) as kept:
            row = kept.find(key)
            if row is None:
                kept.add(measured(key))

    Entering makes the file's folder, and removes what a killed run left half-written. Only reading and adding lock the
    folder, so that several runs share it. Leaving removes the folder if it was made for nothing. `content` is the
    word for what the file holds, in errors.

    Raises:
        HeadshareError: of the kind `refused`, on entering, if the file holds something else, or there can be no such
            folder.
        OutputError: on adding, if the file cannot be written.
    """

    def __init__(self, file: Path, kind: type[Row], content: str, *, refused: type[HeadshareError]) -> None:
        self.file = file
        self.rows: list[Row]
        self._kind = kind
        self._content = content
        self._refused = refused
        self._held = ExitStack()

    def __enter__(self) -> "KeptRows[Row]":
        with ExitStack() as held:
            held.enter_context(_made(self.file.parent, self._refused))
            with self._alone():
                self.rows = self._read()
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def find(self, key: str) -> Row | None:
        """The row of this key, if there is one."""
        return next((row for row in self.rows if row.key == key), None)

    def add(self, row: Row) -> None:
        """Keep a row beside those that other runs added meanwhile. It replaces the row of its key."""
        with self._alone():
            self.rows = [*(other for other in self._read() if other.key != row.key), row]
            write_whole(self.file, TypeAdapter(list[self._kind]).dump_json(self.rows, indent=1))  # type: ignore[name-defined]

    def _read(self) -> list[Row]:
        """The rows that are in the file now."""
        if not self.file.is_file():
            return []
        return read_rows(self.file, self._kind, self._content, refused=self._refused)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A block in which no other run reads or adds."""
        with ExitStack() as lock:
            with suppress(OSError):  # the file system has no locks
                lock.enter_context(locked(self.file.parent))
            remove_dead(self.file.parent)
            yield


@contextmanager
def _made(folder: Path, refused: type[HeadshareError]) -> Iterator[None]:
    """A folder that is there within this block, and is removed after it if it was made for nothing."""
    try:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(f"{folder} cannot be a folder of results: {error.strerror}. Write elsewhere.") from None
    try:
        yield
    finally:
        if new:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def read_rows(file: Path, kind: type[Row], content: str, *, refused: type[HeadshareError]) -> list[Row]:
    """The rows of this kind in a file.

    Raises:
        HeadshareError: of the kind `refused`, if it is not there, or holds something else.
    """
    if not is_file(file):
        raise refused(f"there is no {file}, which would hold {content}.")
    # values are counted first; then pydantic reads, for which JSON has lists where rows have tuples
    data = read_bytes(file, MAX_BYTES, refused)
    parse_json(data, f"{file} holds no {content}: it", refused)
    with foreign(f"{file} holds no {content}", refused, "Move it, or write elsewhere."):
        rows: list[Row] = TypeAdapter(list[kind]).validate_json(data)  # type: ignore[valid-type]
    return rows
