"""Tasks measured while a model is trained: accuracy against steps, the paper's table 11."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.evaluation.harness import Chosen, Runner, Settings, chosen_tasks
from headshare.integrations.transformers.loading import load_tokenizer
from headshare.text.windows import longest_window
from headshare.training.settings import Tasks


@dataclass(frozen=True)
class MeasuredTasks:
    """Tasks that a model is measured on while it is trained, as `headshare eval` measures them."""

    name: str
    tokenizer: Any
    longest: int | None
    tasks: tuple[Chosen, ...]
    settings: Settings

    @classmethod
    def of(cls, source: Checkpoint, asked: Tasks) -> "MeasuredTasks":
        """The tasks that are asked for, found before anything is trained.

        Raises:
            EvaluationError: if there is no such task, or a file of ours cannot be used.
        """
        tasks = tuple(chosen_tasks(asked.names, asked.data_dir))
        longest = longest_window(source.config)
        return cls(source.name, load_tokenizer(source), longest, tasks, Settings(limit=asked.limit))

    def __call__(self, model: Any) -> dict[str, float]:
        """Metrics and their standard errors, by task. Random draws after it are as they would have been without it.

        Raises:
            EvaluationError: if the harness cannot run a task, or a likelihood is not finite.
        """
        runner = Runner(self.name, model, self.tokenizer, self.longest, self.settings)
        metrics = {}
        with _same_draws():
            for task in self.tasks:
                for name, metric in runner.run(task, key="").metrics.items():
                    if metric.value is None:
                        continue
                    metrics[f"{task.name}_{name}"] = metric.value
                    if metric.error is not None:
                        metrics[f"{task.name}_{name}_error"] = metric.error
        return metrics


@contextmanager
def _same_draws() -> Iterator[None]:
    """Put every random generator back after this block, as the harness seeds them all."""
    python = random.getstate()
    numbers = np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
