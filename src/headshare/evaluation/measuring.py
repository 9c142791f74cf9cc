"""Measure models on texts and tasks. Results that were kept under the same settings are not measured again."""

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
from headshare.evaluation.results import Metric, TaskResult, kept_results, key_of_result
from headshare.evaluation.translation import Parallel
from headshare.files.kept_rows import KeptRows
from headshare.progress import say
from headshare.text.windows import WINDOW, Windows, check_vocabulary, check_window, read_text, window_for, windows_of


@dataclass(frozen=True)
class EvalText:
    """A text whose perplexity is measured.

    It is cut into windows of `window` tokens (None: 512, or as many as all models read if those are fewer); `tokens`
    bounds how much of it is read. `bos` says whether windows begin with the beginning-of-text token (None: where the
    model has one). `text_field` holds the text of a row, in a file of rows.
    """

    path: Path
    window: int | None = None
    tokens: int | None = None
    bos: bool | None = None
    text_field: str | None = None
    content: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", read_text(self.path, self.text_field))

    def sized_for(self, *checkpoints: Checkpoint) -> "EvalText":
        """The text with a length of windows that all these models read, where none was given."""
        return replace(self, window=window_for(self.window, *(checkpoint.config for checkpoint in checkpoints)))

    @property
    def name(self) -> str:
        """The heading of its column."""
        return f"perplexity of {self.path.name}"

    @property
    def digest(self) -> str:
        """The SHA-256 of the content, whatever the file is called."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def key(self, model: str, settings: Settings) -> str:
        """Cache key of this text for a model and settings."""
        return key_of_result(model, self.digest, self.window, self.tokens, self.bos, settings.dtype)

    def run(self, runner: Runner, key: str) -> TaskResult:
        """Measure the model's perplexity on this text.

        Raises:
            EvaluationError: as `perplexity` and `windows_of` do.
        """
        measured = perplexity(runner.model, self.windows(runner)).to_dict()
        value = measured.pop("perplexity")
        settings = {**measured, **runner.circumstances, "text": self.digest[:8]}
        return TaskResult(
            runner.name, self.name, key, {"perplexity": Metric(value)}, measured["tokens"], settings=settings
        )

    def windows(self, runner: Runner) -> Windows:
        """The windows of this text for a model.

        Raises:
            EvaluationError: as `windows_of` does, or if the model cannot read them.
        """
        window = WINDOW if self.window is None else self.window
        windows = windows_of(runner.tokenizer, self.content, window=window, limit=self.tokens, bos=self.bos)
        check_window(window, runner.longest)
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
    """Results of every model, dense or shared, on the text, on every task and on a translation.

    Tasks are ours, from files in the folder `data`, or any of lm-evaluation-harness's by name. `parallel` is the text
    that is translated.

    `out` is a folder whose results.json keeps each result as soon as it is measured. Results of the same model,
    questions and settings are taken from there. So a run that is stopped goes on, and one dense run serves many
    comparisons.

    Raises:
        EvaluationError: if a task, a text or the kept results cannot be used, or a model is not one that predicts.
        CheckpointError: if a model cannot be loaded.
    """
    settings = settings or Settings()
    with ExitStack() as opened:
        # all that can be wrong with what was asked comes out before a model is loaded
        kept = None if out is None else opened.enter_context(kept_results(out))
        chosen = chosen_tasks(tasks, data)
        if not (text or chosen or parallel):
            raise EvaluationError("there is nothing to measure: give --text FILE, or --tasks and --data-dir.")
        checkpoints = [opened.enter_context(open_checkpoint(model, revision=revision)) for model in models]
        sized = None if text is None else text.sized_for(*checkpoints)
        jobs: list[_Job] = [job for job in (sized, *chosen, parallel) if job is not None]
        return [row for checkpoint in checkpoints for row in _measured(checkpoint, jobs, settings, kept)]


def _measured(
    checkpoint: Checkpoint, jobs: Sequence["_Job"], settings: Settings, kept: KeptRows[TaskResult] | None
) -> Iterator[TaskResult]:
    """Results of a model, which is loaded once, and only if one of them is missing."""
    runner: Runner | None = None
    model = fingerprint(checkpoint)
    for job in jobs:
        key = job.key(model, settings)
        result = None if kept is None else kept.find(key)
        if result is None:
            runner = runner or Runner.of(checkpoint, settings)
            result = job.run(runner, key)
            if kept is not None:
                kept.add(result)
            say(f"{checkpoint.name}: {job.name}")
        yield replace(result, model=checkpoint.name, task=job.name)  # it may have been asked for by other names


class _Job(Protocol):
    """A measurement that a model can be put to: on a text, a task or a translation."""

    @property
    def name(self) -> str:
        """The heading of its column."""
        ...

    def key(self, model: str, settings: Settings) -> str:
        """Cache key of this job for a model and settings."""
        ...

    def run(self, runner: Runner, key: str) -> TaskResult:
        """Measure the model by this job."""
        ...


def to_dict(rows: Sequence[TaskResult]) -> dict[str, Any]:
    """Results as `--json` prints them."""
    return {"results": [asdict(row) for row in rows]}
