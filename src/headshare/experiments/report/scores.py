"""Results of several cells on one measure, and the standard errors of weighted sums of them.

What every comparison of cells asks is a weighted sum: one less another, a slope over ratios, a loss that is added less
one that was there. Cells were measured on the same windows, questions or lines, so a sum is taken before its error is.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headshare.evaluation.results import TaskResult
from headshare.experiments.cells import Compared, blocked_error

ACCURACY = "acc"
BLEU = "bleu"
RESAMPLED = 1000
Weights = Sequence[float]


@dataclass(frozen=True)
class Score:
    """A model's score on its tasks (more is better), its standard error, and the score as a table shows it."""

    value: float
    error: float
    shown: str


@dataclass(frozen=True)
class Together:
    """Results of several cells on one measure.

    `worse` has a number for each cell, more of which is worse: a loss in nats, or a score with its sign turned. `error`
    is the standard error of a weighted sum of them. `shown` has the results in words, and `rests` what they rest on.
    """

    worse: tuple[float, ...]
    error: Callable[[Weights], float]
    shown: tuple[str, ...]
    rests: str

    def sum(self, weights: Weights) -> tuple[float, float]:
        """A weighted sum of the results, and its standard error."""
        return math.fsum(weight * value for weight, value in zip(weights, self.worse, strict=True)), self.error(weights)


def together(cells: Sequence[Compared], left_out: Sequence[str] = ()) -> Together | None:
    """The results of these cells on the text; without one, on the tasks that are not left out, or by BLEU.

    None where they have no measure in common.
    """
    if all(cell.losses for cell in cells):
        return _on_windows(cells)
    for name in (ACCURACY, BLEU):
        tasks = [task for task in _scored(cells[0], name) if task not in left_out]
        tasks = [task for task in tasks if all(task in _scored(cell, name) for cell in cells)]
        if tasks:
            return _on_tasks(cells, name, tasks)
    return None


def at_chance(dense: Compared | None) -> list[str]:
    """The tasks on which the dense model is no better than guessing: what is lost there cannot be seen."""
    return [] if dense is None else [row.task for row in dense.results if row.at_chance]


def score(cell: Compared, left_out: Sequence[str] = ()) -> Score | None:
    """The mean accuracy over tasks, or the mean BLEU; None where neither was measured."""
    for name in (ACCURACY, BLEU):
        rows = [row for task, row in _scored(cell, name).items() if task not in left_out]
        if rows:
            known = [row.metrics[name] for row in rows]
            errors = [math.nan if metric.error is None else metric.error for metric in known]
            value = statistics.mean(metric.value or 0.0 for metric in known)
            shown = f"{100 * value:.1f} %" if name == ACCURACY else f"BLEU {value:.1f}"
            return Score(value, math.hypot(*errors) / len(known), shown)
    return None


def _scored(cell: Compared, name: str) -> dict[str, TaskResult]:
    """The results that have this metric, by task."""
    return {row.task: row for row in cell.results if name in row.metrics and row.metrics[name].value is not None}


def _on_windows(cells: Sequence[Compared]) -> Together:
    losses = np.array([cell.losses for cell in cells])

    def error(weights: Weights) -> float:
        return blocked_error((np.array(weights) @ losses).tolist())

    shown = tuple(f"{cell.perplexity:,.4g}" for cell in cells)
    return Together(tuple(losses.mean(axis=1).tolist()), error, shown, f"{losses.shape[1]} windows of text")


def _on_tasks(cells: Sequence[Compared], name: str, tasks: Sequence[str]) -> Together:
    rows = [[_scored(cell, name)[task] for task in tasks] for cell in cells]
    kept = [score(_with(cell, some)) for cell, some in zip(cells, rows, strict=True)]
    scores = [each for each in kept if each is not None]
    paired = all(_same_questions([of[number] for of in rows], name) for number in range(len(tasks)))
    what = ", ".join(tasks) if len(tasks) < 4 else f"{len(tasks)} tasks"
    count = sum(row.questions for row in rows[0])

    def error(weights: Weights) -> float:
        if paired:
            return _bootstrapped(rows, name, weights)
        return math.hypot(*(weight * each.error for weight, each in zip(weights, scores, strict=True)))

    rests = f"{what}: {count} {'lines' if name == BLEU else 'questions'}, {'paired' if paired else 'not paired'}"
    return Together(tuple(-each.value for each in scores), error, tuple(each.shown for each in scores), rests)


def _with(cell: Compared, rows: Sequence[TaskResult]) -> Compared:
    return Compared(cell.key, cell.method, cell.ratio, results=tuple(rows))


def _same_questions(rows: Sequence[TaskResult], name: str) -> bool:
    """Whether the outcome of each question was kept, of the same questions in all these results."""
    outcomes = [row.right if name == ACCURACY else row.lines for row in rows]
    asked = {(row.questions, str(row.settings.get("questions" if name == ACCURACY else "lines"))) for row in rows}
    return len(asked) == 1 and all(len(some) == row.questions for some, row in zip(outcomes, rows, strict=True))


def _bootstrapped(rows: Sequence[Sequence[TaskResult]], name: str, weights: Weights) -> float:
    """The standard error of a weighted sum of mean scores, by a paired bootstrap (Koehn, 2004).

    Questions are drawn again a thousand times, task by task, the same for all cells.
    """
    random = np.random.default_rng(0)
    sums = np.zeros(RESAMPLED)
    for of_task in zip(*rows, strict=True):
        count = of_task[0].questions
        if count < 2:
            return math.nan
        drawn = random.integers(count, size=(RESAMPLED, count))
        for weight, row in zip(weights, of_task, strict=True):
            if weight:
                sums += weight * (_accuracies(row, drawn) if name == ACCURACY else _bleus(row, drawn))
    return float(sums.std(ddof=1)) / len(rows[0])


def _accuracies(row: TaskResult, drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    right = np.array([answer == "1" for answer in row.right], dtype=float)
    return np.asarray(right[drawn].mean(axis=1))


def _bleus(row: TaskResult, drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    compute = _compute_bleu()
    lines = np.array(row.lines)
    totals = [lines[some].sum(axis=0).tolist() for some in drawn]
    return np.array([compute(each[:4], each[4:8], each[8], each[9], smooth_method="exp").score for each in totals])


@cache
def _compute_bleu() -> Any:
    import sacrebleu

    return sacrebleu.BLEU.compute_bleu
