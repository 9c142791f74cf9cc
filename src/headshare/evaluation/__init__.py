"""Measure models on texts, translations and tasks: those of lm-evaluation-harness by name, and ours, from files."""

from headshare.evaluation.generation import Writing, continuations, samples_of
from headshare.evaluation.harness import Runner, Settings
from headshare.evaluation.measuring import EvalText, measure
from headshare.evaluation.results import Metric, TaskResult, read_results, table_of
from headshare.evaluation.translation import Parallel

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
]
