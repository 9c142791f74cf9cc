"""Questions with given options, and their files: a JSON object a line, or a CSV file a subject in a folder or zip."""

import csv
import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from headshare.errors import EvaluationError

FILE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Question:
    """A question with options: one context and several endings, or several contexts and one ending.

    `answer` is the number of the right option.

    Raises:
        EvaluationError: if there are fewer than two options or a blank one, or the answer is none of them.
    """

    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        options = max(len(self.contexts), len(self.endings))
        if options < 2 or min(len(self.contexts), len(self.endings)) != 1:
            raise EvaluationError(f"a question needs two options or more; found {options}.")
        if not 0 <= self.answer < options:
            raise EvaluationError(f"the answer is option {self.answer}; options are 0 to {options - 1}.")
        if not all(text.strip() for text in (*self.contexts, *self.endings)):
            raise EvaluationError("an option, or what it follows, is blank; there is nothing to score.")

    @property
    def chance(self) -> float:
        """The share of right answers that guessing gives on average."""
        return 1 / max(len(self.contexts), len(self.endings))


class QuestionRow(BaseModel):
    """A row of a file, in which other fields than the named ones may stand too."""

    model_config = ConfigDict(strict=True, frozen=True)


def json_lines(path: Path, kind: type[QuestionRow], task: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each with the place where it stands, for errors.

    Raises:
        EvaluationError: if the file cannot be read, or a line is no row of this kind.
    """
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, kind.model_validate_json(line)
            except ValidationError as error:
                raise _malformed(error, kind, task, where) from None


def csv_rows(
    path: Path, split: str, kind: type[QuestionRow], task: str, fields: Sequence[str] | None
) -> dict[str, list[tuple[str, Any]]]:
    """The rows of each subject's `SUBJECT_split.csv`, at any depth of the folder or zip.

    It is empty where there is no such file. `fields` names the columns of files that have no heading.

    Raises:
        EvaluationError: if the zip cannot be read, or a line is no row of this kind.
    """
    lines = {}
    for name, text in sorted(_members(path, f"_{split}.csv").items()):
        subject = PurePosixPath(name).name.removesuffix(f"_{split}.csv")
        where = f"{path}, {name}"
        lines[subject] = [(f"{where}, line {number}", row) for number, row in _csv(text, fields, where)]
    return {subject: [(where, _row(kind, row, task, where)) for where, row in rows] for subject, rows in lines.items()}


def _csv(text: str, fields: Sequence[str] | None, where: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), fieldnames=fields, strict=True)
    try:
        yield from ((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise EvaluationError(f"{where}, line {reader.line_num} is no CSV: {error}.") from None


def _row(kind: type[QuestionRow], row: Mapping[str, str], task: str, where: str) -> QuestionRow:
    try:
        return kind.model_validate({name: value for name, value in row.items() if isinstance(name, str)})
    except ValidationError as error:
        raise _malformed(error, kind, task, where) from None


def _malformed(error: ValidationError, kind: type[QuestionRow], task: str, where: str) -> EvaluationError:
    first = error.errors(include_url=False)[0]
    at = ".".join(str(step) for step in first["loc"]) or "the row"
    given = first["input"]
    given = sorted(given) if isinstance(given, dict) else given
    fields = ", ".join(kind.model_fields)
    what = first["msg"].replace(" at line 1 ", " at ")
    return EvaluationError(f"{where} is no row of {task}, which has {fields}. At {at}: {what}; found {given!r:.100}.")


def _members(path: Path, ending: str) -> dict[str, str]:
    """Texts of the files whose names have this ending, at any depth of a folder or in a zip."""
    if path.is_dir():
        return {str(file.relative_to(path)): _text(file) for file in path.rglob(f"*{ending}") if file.is_file()}
    try:
        with zipfile.ZipFile(path) as archive:
            chosen = [file for file in archive.infolist() if file.filename.endswith(ending) and not file.is_dir()]
            if sum(file.file_size for file in chosen) > FILE_BYTES:
                raise EvaluationError(f"{path} unpacks to more than {FILE_BYTES:,} bytes. Name the right file.")
            return {file.filename: archive.read(file).decode("utf-8-sig") for file in chosen}
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise EvaluationError(f"{path} cannot be read as a zip of CSV files: {error}") from None


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > FILE_BYTES:
            raise EvaluationError(f"{path} is larger than {FILE_BYTES:,} bytes. Name the right file.")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as UTF-8 text: {error}") from None
