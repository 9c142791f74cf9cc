"""Measure models on a text and on tasks; what was measured before, by the same settings, is not measured again."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.fingerprint import fingerprint
from headshare.checkpoint.opening import open_checkpoint
from headshare.errors import EvaluationError
from headshare.evaluation.harness import Runner, Settings, chosen_tasks
from headshare.evaluation.perplexity import perplexity
from headshare.evaluation.results import Kept, Metric, TaskResult, kept_results, key_of, not_left_empty
from headshare.evaluation.translation import Parallel
from headshare.progress import say
from headshare.text.windows import WINDOW, Windows, check_vocabulary, check_window, read_text, windows_of


@dataclass(frozen=True)
class EvalText:
    """A text whose perplexity is measured: in windows of so many tokens, of at most so many tokens of it."""

    path: Path
    window: int = WINDOW
    tokens: int | None = None
    bos: bool | None = None
    content: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", read_text(self.path))

    @property
    def name(self) -> str:
        """What its column is called."""
        return f"perplexity of {self.path.name}"

    @property
    def digest(self) -> str:
        """Tells this text from others, whatever the file is called."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def key(self, model: str, settings: Settings) -> str:
        """Tells this text on this model by these settings."""
        return key_of(model, self.digest, self.window, self.tokens, self.bos, settings.dtype)

    def run(self, runner: Runner, key: str) -> TaskResult:
        """Measure it.

        Raises:
            EvaluationError: as `perplexity` and `windows_of` do.
        """
        found = perplexity(runner.model, self.windows(runner)).to_dict()
        value = found.pop("perplexity")
        settings = {**found, **runner.circumstances, "text": self.digest[:8]}
        return TaskResult(
            runner.name, self.name, key, {"perplexity": Metric(value)}, found["tokens"], settings=settings
        )

    def windows(self, runner: Runner) -> Windows:
        """Its windows for this model.

        Raises:
            EvaluationError: as `windows_of` does, or if the model cannot read them.
        """
        windows = windows_of(runner.tokenizer, self.content, window=self.window, limit=self.tokens, bos=self.bos)
        check_window(self.window, runner.longest)
        check_vocabulary(runner.model.config.to_dict(), windows.tokens)
        return windows


def measure(
    models: Sequence[str | Path],
    *,
    tasks: Sequence[str] = (),
    data: Path | None = None,
    text: EvalText | None = None,
    parallel: Parallel | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    revision: str | None = None,
) -> list[TaskResult]:
    """Every model, dense or shared, on the text, on every task (ours from files in the folder of data, or any of
    lm-evaluation-harness's by name), and on the translation of a parallel text.

    `out` is a folder whose results.json keeps each result as it is had; what is in it, of the same model, questions and
    settings, is taken from there. So a run that is stopped goes on, and one dense run serves many comparisons.

    Raises:
        EvaluationError: if a task, a text or the kept results cannot be used, or a model is not one that predicts.
        CheckpointError: if a model cannot be loaded.
    """
    settings = settings or Settings()
    with not_left_empty(out), ExitStack() as opened:
        kept, chosen = kept_results(out), chosen_tasks(tasks, data)
        jobs: list[_Job] = [one for one in (text, *chosen, parallel) if one is not None]
        if not jobs:
            raise EvaluationError("there is nothing to measure: give --text FILE, or --tasks and --data-dir.")
        checkpoints = [opened.enter_context(open_checkpoint(model, revision=revision)) for model in models]
        return [row for one in checkpoints for row in _measured(one, jobs, settings, kept)]


def _measured(
    checkpoint: Checkpoint, jobs: Sequence["_Job"], settings: Settings, kept: Kept[TaskResult]
) -> Iterator[TaskResult]:
    """One model's results. It is loaded once, if anything is missing."""
    runner: Runner | None = None
    model = fingerprint(checkpoint)
    for job in jobs:
        key = job.key(model, settings)
        found = kept.find(key)
        if found is None:
            runner = runner or Runner.of(checkpoint, settings)
            found = job.run(runner, key)
            kept.add(found)
            say(f"{checkpoint.name}: {job.name}")
        yield replace(found, model=checkpoint.name, task=job.name)  # it may have been asked for by other names


class _Job(Protocol):
    """What a model can be measured by."""

    @property
    def name(self) -> str:
        """What its column is called."""
        ...

    def key(self, model: str, settings: Settings) -> str:
        """Tells this model on this by these settings."""
        ...

    def run(self, runner: Runner, key: str) -> TaskResult:
        """Measure it."""
        ...


def to_dict(rows: Sequence[TaskResult]) -> dict[str, Any]:
    """The same as `--json` prints it."""
    return {"results": [asdict(row) for row in rows]}
