"""Task files: local data read into questions. The registry of tasks that run from them."""

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
    """A subject of a task, or all of it: its questions, and others to be shown as examples, with their answers."""

    questions: tuple[Question, ...]
    examples: tuple[Question, ...] = ()
    heading: str = ""


@dataclass(frozen=True)
class Task:
    """A task of ours. `files` are the names it may be read from, in the folder of data; `space` is what stands between
    a context and its ending."""

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], dict[str, TaskPart]]
    space: str = " "

    def parts(self, folder: Path) -> dict[str, TaskPart]:
        """All questions, by subject; where there is one part alone, it is the task's own name.

        Raises:
            EvaluationError: if there is none of the files, or one cannot be used.
        """
        for name in self.files:
            if (folder / name).exists():
                found = self.read(folder / name)
                if not any(part.questions for part in found.values()):
                    raise EvaluationError(f"{folder / name} holds no question of {self.name}.")
                return {part or self.name: kept for part, kept in found.items() if kept.questions}
        raise EvaluationError(
            f"{self.name} is read from {' or '.join(self.files)}, and {folder} holds no such file. Name the folder "
            "that does with --data-dir."
        )


TASKS: dict[str, Task] = {}


def digest_of(parts: Mapping[str, TaskPart]) -> str:
    """What changes with any question, and with which examples are shown first."""
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
    """Register a task of which every line is a question, or all lines that agree in the field `together` are one;
    `kept` says of which lines, and `examples` is the file of those that are shown. `mixed` puts the questions in the
    order of their digests: those of a file that goes class by class would begin with one class alone."""

    def register(question: Callable[[Sequence[Any]], Question]) -> Callable[[Sequence[Any]], Question]:
        def questions(path: Path) -> tuple[Question, ...]:
            rows = [(where, one) for where, one in json_lines(path, row, name) if kept(one)]
            groups = groupby(rows, key=lambda pair: getattr(pair[1], together) if together else pair[0])
            found = [_asked(question, list(group)) for _, group in groups]
            return tuple(sorted(found, key=_mixing) if mixed else found)

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
    """Register a task of one CSV a subject, in a folder or a zip; examples are those of the split `dev`."""

    def register(question: Callable[[Any], Question]) -> Callable[[Any], Question]:
        def read(path: Path) -> dict[str, TaskPart]:
            asked, shown = (csv_rows(path, one, row, name, fields) for one in (split, "dev"))
            if not asked:
                raise EvaluationError(f"{path} holds no file SUBJECT_{split}.csv, which {name} is read from.")
            return {
                subject: TaskPart(
                    tuple(_asked(lambda rows: question(rows[0]), [one]) for one in rows),
                    tuple(_asked(lambda rows: question(rows[0]), [one]) for one in shown.get(subject, ())),
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
