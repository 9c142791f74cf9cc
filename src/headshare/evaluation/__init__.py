"""Measure models on texts, translations and tasks: those of lm-evaluation-harness by name, and ours, from files."""

from typing import TYPE_CHECKING

from headshare.lazy import lazy_names

if TYPE_CHECKING:
    from headshare.evaluation.generation import Writing, continuations, samples_of
    from headshare.evaluation.harness import Runner, Settings
    from headshare.evaluation.harness_tasks import write_tasks
    from headshare.evaluation.measuring import EvalText, measure
    from headshare.evaluation.results import Metric, TaskResult, read_results, table_of
    from headshare.evaluation.translation import Parallel
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "headshare.evaluation.generation": "Writing continuations samples_of",
            "headshare.evaluation.harness": "Runner Settings",
            "headshare.evaluation.harness_tasks": "write_tasks",
            "headshare.evaluation.measuring": "EvalText measure",
            "headshare.evaluation.results": "Metric TaskResult read_results table_of",
            "headshare.evaluation.translation": "Parallel",
        },
    )

__all__ = [
    "EvalText",
    "Metric",
    "Parallel",
    "Runner",
    "Settings",
    "TaskResult",
    "Writing",
    "continuations",
    "measure",
    "read_results",
    "samples_of",
    "table_of",
    "write_tasks",
]
