"""Sources of a report: measured comparisons and evaluations, and the figures that the paper published."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from headshare.errors import EvaluationError
from headshare.evaluation.results import RESULTS, current, read_results
from headshare.evaluation.results import TaskResult as Row
from headshare.experiments.about import ABOUT, About
from headshare.experiments.cells import CELLS, Compared, read_cells
from headshare.experiments.report.claims import checked
from headshare.files.printable import is_shown
from headshare.files.untrusted import read_yaml

_ABOUT: TypeAdapter[About] = TypeAdapter(About)
MAX_TABLES = 100
Word = Annotated[str, AfterValidator(lambda text: _shown(text))]


def _shown(text: str) -> str:
    """The text, if it can stand in a table and on a terminal."""
    if not is_shown(text) or "|" in text:
        raise ValueError(f"{text!a:.60} cannot be shown in a table")
    return text


def _check_shown(file: Path, *words: str) -> None:
    """Refuse texts that cannot be shown in a table; somebody else may have written them."""
    try:
        for text in words:
            _shown(text)
    except ValueError as error:
        raise EvaluationError(f"{file}: {error}.") from None


def _words_of(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield from (row.task, *row.metrics)


class Published(BaseModel):
    """A table of the paper in percent.

    Each row is a method and its ratio, such as `directshare 0.3`, with one value for each of `tasks` in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    table: Word
    model: Word
    tasks: tuple[Word, ...]
    rows: dict[Word, tuple[float, ...]]


_PUBLISHED: TypeAdapter[list[Published]] = TypeAdapter(Annotated[list[Published], Field(max_length=MAX_TABLES)])


@dataclass(frozen=True)
class Comparison:
    """The comparison in one folder: its description and its cells."""

    about: About
    cells: list[Compared]

    @classmethod
    def load(cls, folder: Path) -> "Comparison":
        """The last comparison in a folder.

        Raises:
            EvaluationError: if `headshare compare` did not finish there.
        """
        try:
            about = _ABOUT.validate_json((folder / ABOUT).read_bytes())
            words = (about.title, about.model, about.text, about.calibration, about.training, about.dtype, about.mode)
            for text in (*words, *about.versions, *about.versions.values()):
                _shown(text)
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"{folder} holds no finished comparison ({' '.join(str(error).split()):.100}). Run headshare compare "
                f"with --out {folder} first."
            ) from None
        # others may have written these files: nothing is shown before it is checked
        by_key = {cell.key: cell for cell in read_cells(folder / CELLS)}
        for cell in by_key.values():
            _check_shown(folder / CELLS, cell.method, cell.note, cell.failed, *_words_of(cell.results))
        if len({len(cell.losses) for cell in by_key.values() if cell.key in about.keys and cell.losses}) > 1:
            raise EvaluationError(
                f"{folder / CELLS} has cells of one text with other numbers of windows. Compare again."
            )
        if missing := [key for key in about.keys if key not in by_key]:
            raise EvaluationError(f"{folder / CELLS} lacks {len(missing)} cells that {ABOUT} names. Compare again.")
        return cls(about, [by_key[key] for key in about.keys])

    def to_dict(self) -> dict[str, Any]:
        """The description and the checked claims as `--json` prints them."""
        return {**asdict(self.about), "claims": [asdict(claim) for claim in checked(self.cells)]}


@dataclass(frozen=True)
class Evaluated:
    """The results of `headshare eval --out` in one folder, with models' names without their folders."""

    title: str
    rows: list[Row]

    def tells_more_than(self, measured: Comparison | None) -> bool:
        """Whether it has results that the comparison in the same folder did not measure of its dense model."""
        known = {row.task for cell in measured.cells for row in cell.results} if measured else set()
        return any(measured is None or row.model != measured.about.model or row.task not in known for row in self.rows)

    @classmethod
    def load(cls, folder: Path) -> "Evaluated":
        """All results of a folder.

        Raises:
            EvaluationError: if it holds something else, or two models of one name.
        """
        rows = current(read_results(folder / RESULTS))
        _check_shown(folder / RESULTS, *_words_of(rows))
        short = {row.model: Path(row.model).name for row in rows}
        if len(set(short.values())) < len(short) or not all(map(is_shown, short.values())):
            raise EvaluationError(f"{folder / RESULTS} has models whose names cannot be told apart: {sorted(short)}.")
        return cls(folder.name, [replace(row, model=short[row.model]) for row in rows])


def published(path: Path) -> list[Published]:
    """The paper's tables, from YAML.

    Raises:
        EvaluationError: if the file cannot be read, or holds none.
    """
    data = read_yaml(path, EvaluationError)
    try:
        tables = _PUBLISHED.validate_python(data)
    except ValueError as error:
        raise EvaluationError(f"{path} holds no tables of figures: {' '.join(str(error).split()):.200}") from None
    for table in tables:
        if wrong := [name for name, values in table.rows.items() if len(values) != len(table.tasks)]:
            raise EvaluationError(
                f"{path}: table {table.table} has {len(table.tasks)} tasks, and another number in {wrong[0]}."
            )
    return tables
