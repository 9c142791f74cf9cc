"""The registry of tasks that run from local files, and the reading of those files into questions."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from headshare.errors import EvaluationError
from headshare.evaluation.questions import Question, QuestionRow, csv_rows, json_lines

Rows = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class TaskPart:
    """A subject of a task, or all of the task: its questions, and others that are shown with their answers."""

    questions: tuple[Question, ...]
    examples: tuple[Question, ...] = ()
    heading: str = ""


@dataclass(frozen=True)
class Task:
    """A task that runs from a local file.

    `files` are the names that its file may have in the folder of data. `space` stands between a context and its ending.
    """

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], dict[str, TaskPart]]
    space: str = " "

    def parts(self, folder: Path) -> dict[str, TaskPart]:
        """All questions, by subject; a task without subjects has one part, under the task's name.

        Raises:
            EvaluationError: if there is none of the files, or one cannot be used.
        """
        for name in self.files:
            if (folder / name).exists():
                parts = self.read(folder / name)
                if not any(part.questions for part in parts.values()):
                    raise EvaluationError(f"{folder / name} holds no question of {self.name}.")
                return {part or self.name: kept for part, kept in parts.items() if kept.questions}
        raise EvaluationError(
            f"{self.name} is read from {' or '.join(self.files)}, and {folder} holds no such file. Name the folder "
            "that does with --data-dir."
        )


TASKS: dict[str, Task] = {}


def digest_of(parts: Mapping[str, TaskPart]) -> str:
    """A digest of all questions and of the examples in their order."""
    order = ["in their order"] if any(part.examples for part in parts.values()) else []
    kept = [[name, asdict(part)] for name, part in parts.items()]
    return hashlib.sha256(json.dumps([*kept, *order]).encode()).hexdigest()


def read_rows(
    name: str,
    *files: str,
    row: type[QuestionRow],
    together: str | None = None,
    kept: Callable[[Any], bool] = lambda _: True,
    examples: str | None = None,
    space: str = " ",
    mixed: bool = False,
) -> Callable[[Callable[[Sequence[Any]], Question]], Callable[[Sequence[Any]], Question]]:
    """Register a task that is read from a file with a JSON object a line.

    Every line is a question; with `together`, consecutive lines that agree in this field are one. `kept` chooses lines.
    `examples` is the file of questions that are shown with their answers. `mixed` puts questions in the order of their
    digests: those of a file that is sorted by class would begin with one class alone.
    """

    def register(question: Callable[[Sequence[Any]], Question]) -> Callable[[Sequence[Any]], Question]:
        def questions(path: Path) -> tuple[Question, ...]:
            rows = [(where, line) for where, line in json_lines(path, row, name) if kept(line)]
            groups = groupby(rows, key=lambda pair: getattr(pair[1], together) if together else pair[0])
            asked = [_asked(question, list(group)) for _, group in groups]
            return tuple(sorted(asked, key=_mixing) if mixed else asked)

        def read(path: Path) -> dict[str, TaskPart]:
            shown = path.with_name(examples) if examples else path
            return {"": TaskPart(questions(path), questions(shown) if shown != path and shown.is_file() else ())}

        TASKS[name] = Task(name, files or (f"{name}.jsonl",), read, space)
        return question

    return register


def _mixing(question: Question) -> str:
    return hashlib.sha256("\n".join(question.contexts).encode()).hexdigest()


def exam(
    name: str,
    split: str,
    *,
    heading: Callable[[str], str],
    fields: Sequence[str] | None,
    row: type[QuestionRow],
    space: str = " ",
) -> Callable[[Callable[[Any], Question]], Callable[[Any], Question]]:
    """Register a task with a CSV file for each subject, in a folder or zip, and examples in the split `dev`."""

    def register(question: Callable[[Any], Question]) -> Callable[[Any], Question]:
        def read(path: Path) -> dict[str, TaskPart]:
            asked, shown = (csv_rows(path, each, row, name, fields) for each in (split, "dev"))
            if not asked:
                raise EvaluationError(f"{path} holds no file SUBJECT_{split}.csv, which {name} is read from.")
            return {
                subject: TaskPart(
                    tuple(_asked(lambda rows: question(rows[0]), [row]) for row in rows),
                    tuple(_asked(lambda rows: question(rows[0]), [row]) for row in shown.get(subject, ())),
                    heading(subject.replace("_", " ")),
                )
                for subject, rows in asked.items()
            }

        TASKS[name] = Task(name, (name, f"{name}.zip"), read, space)
        return question

    return register


def _asked(question: Callable[[Sequence[Any]], Question], rows: Rows) -> Question:
    try:
        return question([row for _, row in rows])
    except EvaluationError as error:
        raise EvaluationError(f"{rows[-1][0]}: {error}") from None
