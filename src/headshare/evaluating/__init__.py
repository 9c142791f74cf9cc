"""Measure models on tasks: tasks of lm-evaluation-harness by name, and ours, which run from local files."""

from headshare.evaluating.generating import Parallel, Writing, continuations, samples_of
from headshare.evaluating.harness import Runner, Settings
from headshare.evaluating.measuring import Text, measure
from headshare.evaluating.results import Measured, Metric, read_results, table_of

__all__ = [
    "Measured",
    "Metric",
    "Parallel",
    "Runner",
    "Settings",
    "Text",
    "Writing",
    "continuations",
    "measure",
    "read_results",
    "samples_of",
    "table_of",
]
