"""Measure models on tasks: tasks of lm-evaluation-harness by name, and ours, which run from local files."""

from headshare.evaluating.harness import Settings
from headshare.evaluating.measuring import Text, measure
from headshare.evaluating.results import Measured, Metric, read_results, table_of

__all__ = ["Measured", "Metric", "Settings", "Text", "measure", "read_results", "table_of"]
