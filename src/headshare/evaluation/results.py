"""Results as values: kept in one file, and printed as one table."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from headshare.errors import EvaluationError
from headshare.files.kept_rows import KeptRows, Keyed, read_rows
from headshare.files.state_files import key_of
from headshare.short import short, tail
from headshare.tables import Table

RESULTS = "results.json"
# the content of that file, as errors say it
CONTENT = "results of `headshare eval`"
# settings that may differ between rows of one column
IRRELEVANT = ("batch_size", "device", "model", "torch", "transformers")
# metrics that tables show, the first that a result has
MAIN = ("acc", "exact_match", "perplexity", "bleu")

CountsOfLine = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=10, max_length=10)]


@dataclass(frozen=True)
class Metric:
    """A metric's value, and its standard error where it has one."""

    value: float | None
    error: float | None = None


@dataclass(frozen=True)
class TaskResult(Keyed):
    """The result of a model on a task.

    `metrics` are under the harness's names. `chance` is the accuracy of guessing. `constant` is the accuracy of always
    giving the option that is right most often, where all questions have the same options.

    `key` stands for the model, the questions and the settings. `parts` has the accuracy and the number of questions of
    each subject, for a task of several.

    What became of each question is kept, so that models can be compared question by question: `right` has "1" or "0"
    for each that was answered right or wrong. `lines` has the counts of each translated line that BLEU adds up: n-grams
    of 1 to 4 words that match, all of them, and the lengths of the translation and of the reference.
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
    right: Annotated[str, Field(pattern="^[01]*$")] = ""
    lines: tuple[CountsOfLine, ...] = ()

    def __repr__(self) -> str:
        return short(self, tail(self.model), self.task, f"{self.questions} questions", self.in_cell)

    @property
    def main(self) -> tuple[str, Metric]:
        """The name and value of the metric that tables show."""
        name = next((metric for metric in MAIN if metric in self.metrics), next(iter(self.metrics)))
        return name, self.metrics[name]

    @property
    def at_chance(self) -> bool:
        """Whether the accuracy is at most two standard errors above that of guessing or of a constant answer."""
        name, metric = self.main
        if self.chance is None or name != "acc" or metric.value is None:
            return False
        return metric.value - max(self.guessed) <= 2 * (math.inf if metric.error is None else metric.error)

    @property
    def guessed(self) -> tuple[float, ...]:
        """The accuracy of guessing, and that of a constant answer where all questions have the same options."""
        return tuple(share for share in (self.chance, self.constant) if share is not None)

    @property
    def in_cell(self) -> str:
        """The main metric as a table shows it: accuracies in percent with their standard errors."""
        name, metric = self.main
        if metric.value is None:
            return "?"
        if name != "acc":
            others = ", ".join(
                f"{other} {score.value:.1f}" + ("" if score.error is None else f" ± {score.error:.1f}")
                for other, score in self.metrics.items()
                if score.value is not None
            )
            return {"perplexity": f"{metric.value:,.3f}", "bleu": others}.get(name, f"{name} {metric.value:.4g}")
        error = "?" if metric.error is None else f"{100 * metric.error:.1f}"
        return f"{'~' if self.at_chance else ''}{100 * metric.value:.1f} ± {error}"


def kept_results(folder: Path) -> KeptRows[TaskResult]:
    """The results that `headshare eval --out` keeps in this folder."""
    return KeptRows(folder / RESULTS, TaskResult, CONTENT, refused=EvaluationError)


def key_of_result(*what: Any, packages: Sequence[str] = ()) -> str:
    """The key of a measurement: a digest of all that it depends on.

    Versions of torch, of transformers and of its tokenizers always decide. `packages` names more that do.
    """
    return key_of(versions("tokenizers", *packages), *what)


def read_results(file: Path) -> list[TaskResult]:
    """The results in a file of `headshare eval --out`.

    Raises:
        EvaluationError: if it is not there, or holds something else.
    """
    return read_rows(file, TaskResult, CONTENT, refused=EvaluationError)


def results_table(rows: Sequence[TaskResult]) -> Table:
    """A table of results: a row for each model, a column for each task.

    Accuracies are in percent with standard errors. The row of guessing has, after a stroke, the accuracy of a constant
    answer. A tilde marks accuracies that are not more than two standard errors above both. A task that was measured
    in several ways has a column for each.
    """
    columns = _columns(rows)
    lines = []
    if any(row.chance is not None for some in columns.values() for row in some):
        lines.append(["guessing", *(guesses_of(some[0]) for some in columns.values())])
    for model in dict.fromkeys(row.model for row in rows):
        cells = (next((row.in_cell for row in some if row.model == model), "") for some in columns.values())
        lines.append([model, *cells])
    return Table(["model", *columns], lines)


def table_of(rows: Sequence[TaskResult]) -> str:
    """The table of results in Markdown."""
    return results_table(rows).markdown()


def guesses_of(row: TaskResult) -> str:
    """The accuracies of guessing and of a constant answer, in percent, as a table shows them."""
    return " / ".join(f"{100 * accuracy:.1f}" for accuracy in row.guessed)


def current(rows: Sequence[TaskResult]) -> list[TaskResult]:
    """The rows of current models: of several models with one name, the last that was measured."""
    last = {row.model: row.settings.get("model") for row in rows}
    return [row for row in rows if row.settings.get("model") == last[row.model]]


def versions(*also: str) -> dict[str, str]:
    """Versions of the packages that numbers may depend on in their last places.

    `also` names more packages, which are left out where they are not installed.
    """
    installed = {name: version(name) for name in ("torch", "transformers")}
    for name in also:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def _columns(rows: Sequence[TaskResult]) -> dict[str, list[TaskResult]]:
    """Columns of a table: rows of one task that were measured in one way, by heading.

    A heading has the task, its number of questions, and the settings that differ where the task was measured in several
    ways. Of two rows of one model the later comes first.
    """
    by_way: dict[str, dict[str, list[TaskResult]]] = {}
    for row in rows:
        way = json.dumps([row.questions, row.chance, _way(row)], sort_keys=True)
        by_way.setdefault(row.task, {}).setdefault(way, []).insert(0, row)
    columns = {}
    for task, ways in by_way.items():
        all_of = [_way(some[0]) for some in ways.values()]
        for some in ways.values():
            own = _way(some[0])
            more = [f"{name} {own[name]}" for name in own if any(other.get(name) != own[name] for other in all_of)]
            columns[", ".join([f"{task} ({some[0].questions})", *more])] = some
    return columns


def _way(row: TaskResult) -> dict[str, Any]:
    """The settings that a result depends on, as text."""
    return {name: ascii(value).strip("'") for name, value in row.settings.items() if name not in IRRELEVANT}
