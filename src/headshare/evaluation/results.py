"""What was measured, as values: kept in one file, gone on with after a kill, printed as one table."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from headshare.errors import EvaluationError
from headshare.files.atomic import write_whole
from headshare.files.lock import locked

RESULTS, WHAT = "results.json", "results of `headshare eval`"
IRRELEVANT = ("batch_size", "device", "model", "torch", "transformers")
MAIN = ("acc", "exact_match", "perplexity", "bleu")


class Keyed:
    """What is kept under a key, which tells it from all others."""

    key: str


Row = TypeVar("Row", bound=Keyed)


@dataclass(frozen=True)
class Metric:
    """A number, and its standard error where it has one."""

    value: float | None
    error: float | None = None


@dataclass(frozen=True)
class Measured(Keyed):
    """One model on one task. `metrics` are under the harness's names, `chance` the accuracy that guessing gives, and
    `constant`, where all questions have the same options, that of always giving the one that is right most often.

    `key` tells the model, the questions and the settings; of a task of several subjects, `parts` has each one's
    accuracy and number of questions.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str
    task: str
    key: str
    metrics: Annotated[Mapping[str, Metric], Field(min_length=1)]
    questions: int
    chance: float | None = None
    parts: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    constant: float | None = None

    @property
    def main(self) -> tuple[str, Metric]:
        """The metric that tables show, and its name."""
        name = next((one for one in MAIN if one in self.metrics), next(iter(self.metrics)))
        return name, self.metrics[name]

    @property
    def at_chance(self) -> bool:
        """Whether the accuracy is not two standard errors above what guessing gives, or always the same answer."""
        name, metric = self.main
        if self.chance is None or name != "acc" or metric.value is None:
            return False
        return metric.value - max(self.guessed) <= 2 * (math.inf if metric.error is None else metric.error)

    @property
    def guessed(self) -> tuple[float, ...]:
        """The accuracy of guessing, and of always the same answer where that can be given."""
        return tuple(one for one in (self.chance, self.constant) if one is not None)

    @property
    def in_cell(self) -> str:
        """Its main metric as a table shows it: accuracies in percent with their standard errors."""
        name, metric = self.main
        if metric.value is None:
            return "?"
        if name != "acc":
            others = ", ".join(
                f"{one} {found.value:.1f}" + ("" if found.error is None else f" ± {found.error:.1f}")
                for one, found in self.metrics.items()
                if found.value is not None
            )
            return {"perplexity": f"{metric.value:,.3f}", "bleu": others}.get(name, f"{name} {metric.value:.4g}")
        error = "?" if metric.error is None else f"{100 * metric.error:.1f}"
        return f"{'~' if self.at_chance else ''}{100 * metric.value:.1f} ± {error}"


def key_of(*what: Any) -> str:
    """Tells one measurement from all others, by what it depends on."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


class Kept(Generic[Row]):
    """The rows that were measured so far, and the file that keeps them, if any, whose folder is made. `what` says in
    errors what the file holds. Several runs may add to one file.

    Raises:
        EvaluationError: if the file is there and holds something else, or there can be no such folder.
    """

    def __init__(self, file: Path | None, kind: type[Row], what: str) -> None:
        self.file, self._kind, self._what = file, kind, what
        if file is not None:
            _make(file.parent)
        self.rows = self._read()

    def _read(self) -> list[Row]:
        return read_rows(self.file, self._kind, self._what) if self.file is not None and self.file.is_file() else []

    def find(self, key: str) -> Row | None:
        """What was measured under this key."""
        return next((row for row in self.rows if row.key == key), None)

    def add(self, row: Row) -> None:
        """Keep a row, in the place of one of the same key, and beside those that other runs added meanwhile."""
        if self.file is None:
            self._put(row)
            return
        with ExitStack() as lock:
            with suppress(OSError):  # the file system has no locks
                lock.enter_context(locked(self.file.parent))
            self.rows = self._read()
            self._put(row)
            write_whole(self.file, TypeAdapter(list[self._kind]).dump_json(self.rows, indent=1))  # type: ignore[name-defined]

    def _put(self, row: Row) -> None:
        self.rows = [*(one for one in self.rows if one.key != row.key), row]


@contextmanager
def not_left_empty(folder: Path | None) -> Iterator[None]:
    """A folder that is made within this block and stays empty, because something was wrong, is gone after it."""
    new = False
    with suppress(OSError):  # there can be no such folder: whoever makes it says so
        new = folder is not None and not folder.exists()
    try:
        yield
    finally:
        if folder is not None and new:
            with suppress(OSError):  # it was not made, or something is in it
                folder.rmdir()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"{folder} cannot be a folder of results: {error.strerror}. Write elsewhere.") from None


def read_rows(file: Path, kind: type[Row], what: str) -> list[Row]:
    """The rows of a file.

    Raises:
        EvaluationError: if it is not there, or holds something else.
    """
    if not file.is_file():
        raise EvaluationError(f"there is no {file}, which would hold {what}.")
    try:
        rows: list[Row] = TypeAdapter(list[kind]).validate_json(file.read_bytes())  # type: ignore[valid-type]
    except (OSError, ValidationError) as error:
        why = str(error).splitlines()[0]
        raise EvaluationError(f"{file} holds no {what} ({why}). Move it, or write elsewhere.") from None
    return rows


def kept_results(folder: Path | None) -> Kept[Measured]:
    """What `headshare eval --out` keeps in this folder, if any.

    Raises:
        EvaluationError: if its file is there and holds something else.
    """
    return Kept(None if folder is None else folder / RESULTS, Measured, WHAT)


def read_results(file: Path) -> list[Measured]:
    """The rows of such a file.

    Raises:
        EvaluationError: if it is not there, or holds something else.
    """
    return read_rows(file, Measured, WHAT)


def table_of(rows: Sequence[Measured]) -> str:
    """Markdown: models down, tasks across, in percent with standard errors; what guessing gives in a row of its own,
    and after a stroke what always the same answer does. A tilde marks what is not two standard errors above both. A
    task that was measured in several ways has a column for each."""
    columns = _columns(rows)
    lines = ["| model | " + " | ".join(columns) + " |", "|---" + "|--:" * len(columns) + "|"]
    if any(row.chance is not None for some in columns.values() for row in some):
        lines.append("| guessing | " + " | ".join(guesses_of(some[0]) for some in columns.values()) + " |")
    for model in dict.fromkeys(row.model for row in rows):
        cells = (next((row.in_cell for row in some if row.model == model), "") for some in columns.values())
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def guesses_of(row: Measured) -> str:
    """What guessing gives, and always the same answer, in percent."""
    return " / ".join(f"{100 * one:.1f}" for one in row.guessed)


def current(rows: Sequence[Measured]) -> list[Measured]:
    """Without what is of another model than the last that was measured under the same name."""
    last = {row.model: row.settings.get("model") for row in rows}
    return [row for row in rows if row.settings.get("model") == last[row.model]]


def versions(*also: str) -> dict[str, str]:
    """Those that numbers may depend on in their last places; also of these packages, as far as they are installed."""
    found = {name: version(name) for name in ("torch", "transformers")}
    for name in also:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _columns(rows: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Rows of one task, measured in one way, under what they are called: the task, its questions, and where it was
    measured in several ways what differs. Of two rows of one model the later comes first."""
    by_way: dict[str, dict[str, list[Measured]]] = {}
    for row in rows:
        way = json.dumps([row.questions, row.chance, _way(row)], sort_keys=True)
        by_way.setdefault(row.task, {}).setdefault(way, []).insert(0, row)
    found = {}
    for task, ways in by_way.items():
        all_of = [_way(some[0]) for some in ways.values()]
        for some in ways.values():
            own = _way(some[0])
            more = [f"{name} {own[name]}" for name in own if any(other.get(name) != own[name] for other in all_of)]
            found[", ".join([f"{task} ({some[0].questions})", *more])] = some
    return found


def _way(row: Measured) -> dict[str, Any]:
    """The settings that a result depends on, in words that can stand in a table."""
    return {
        name: ascii(value).strip("'").replace("|", "/")
        for name, value in row.settings.items()
        if name not in IRRELEVANT
    }
