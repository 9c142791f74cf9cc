"""Run tasks with lm-evaluation-harness: its own by name, and ours, which it is given as tasks of its kind."""

import difflib
import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import headshare.evaluation.tasks  # noqa: F401 - registers our tasks
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.fingerprint import fingerprint
from headshare.errors import EvaluationError
from headshare.evaluation.harness_tasks import (
    as_task,
    averaged,
    check_finite_samples,
    once_a_question,
    reported,
    share_of_constant,
    share_right,
)
from headshare.evaluation.results import TaskResult, key_of_result, versions
from headshare.evaluation.task_files import TASKS, TaskPart, digest_of
from headshare.files.untrusted import foreign
from headshare.installing import install
from headshare.integrations.transformers.loading import load_model, load_tokenizer, quiet
from headshare.progress import say
from headshare.text.windows import is_causal, longest_window, not_causal

# part of the cache key: a result that was kept under another rule is measured again
RULE = "log-likelihoods in float32"
PROMPTS = "prompts are not ended"


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement on tasks.

    The first `limit` questions of each task (of each subject) are asked; None asks all. `few_shot` examples stand
    before a question; None leaves their number to the task. The model runs in `dtype` on `device` and reads
    `batch_size` options at once.
    """

    limit: int | None = None
    few_shot: int | None = None
    dtype: str = "auto"
    device: str = "cpu"
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise EvaluationError(f"a limit of {self.limit} questions leaves nothing to measure; use at least 1.")
        if self.few_shot is not None and self.few_shot < 0:
            raise EvaluationError(f"{self.few_shot} examples cannot be shown; use 0 or more.")
        if self.batch_size < 1:
            raise EvaluationError(f"a batch of {self.batch_size} holds nothing; use at least 1.")

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that change results; part of the cache key."""
        return {"limit": self.limit, "few_shot": self.few_shot, "dtype": self.dtype, "seed": self.seed}


@dataclass(frozen=True)
class Chosen:
    """A task that is to be run, with the name it was asked for by.

    A task of ours has its questions in `parts`, and `digest` changes with them. A task of the harness has no parts, and
    all of those have one digest. `few_shot` takes precedence over that of the settings.
    """

    name: str
    digest: str
    parts: Mapping[str, TaskPart] | None = None
    few_shot: int | None = None

    @property
    def task(self) -> str:
        """The task's own name, without a number of examples."""
        return named(self.name)[0]

    def settings(self, settings: Settings) -> Settings:
        """The settings for this task: with its own number of examples, where it has one."""
        return settings if self.few_shot is None else replace(settings, few_shot=self.few_shot)

    def key(self, model: str, settings: Settings) -> str:
        """Cache key of this task for a model and settings."""
        harness_version()  # installed, or an error
        what = (model, self.task, self.digest, RULE, PROMPTS, self.settings(settings).deciding)
        return key_of_result(*what, packages=("lm_eval",))

    def run(self, runner: "Runner", key: str) -> TaskResult:
        """Measure the model on this task, as `Runner.run` does."""
        return runner.run(self, key)


def chosen_tasks(names: Sequence[str], data: Path | None) -> list[Chosen]:
    """The tasks of these names.

    With a folder `data`, a task of ours goes before one of the harness with its name. NAME:5 shows five examples,
    whatever other tasks show.

    Raises:
        EvaluationError: if there is no such task, or a file of ours cannot be used.
    """
    tasks = []
    for asked in dict.fromkeys(names):
        name, few_shot = named(asked)
        if name in TASKS and data is not None:
            parts = TASKS[name].parts(data)
            tasks.append(Chosen(asked, digest_of(parts), parts, few_shot))
        else:
            tasks.append(Chosen(asked, _version_of(name, data), None, few_shot))
    return tasks


def named(name: str) -> tuple[str, int | None]:
    """A task's name, and the number of examples to show where it is asked for, as in NAME:5."""
    match = re.fullmatch(r"(.+):([0-9]{1,3})", name)
    return (match[1], int(match[2])) if match else (name, None)


def harness_version() -> str:
    """The harness's version.

    Raises:
        EvaluationError: if it is not installed.
    """
    try:
        with quiet():
            import lm_eval
    except ImportError:
        raise EvaluationError(f"tasks are run by lm-eval, which is not installed. Run: {install('eval')}") from None
    return str(lm_eval.__version__)


def _version_of(name: str, data: Path | None) -> str:
    harness_version()
    known = set(tasks_of_harness().all_tasks)
    if name in known:
        return "harness"
    if name in TASKS and data is None:
        raise EvaluationError(
            f"{name} is read from {TASKS[name].files[0]}. Name the folder it lies in with --data-dir."
        )
    near = difflib.get_close_matches(name, sorted(known | set(TASKS)), n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise EvaluationError(
        f"there is no task {name!r:.100}.{hint} There are {', '.join(TASKS)}, from files, and all of lm-eval's."
    )


@cache
def tasks_of_harness(*, any_at_all: bool = True) -> Any:
    """The harness's manager of tasks, which finds them by name.

    It takes seconds to make, unless it is one without any tasks.
    """
    from lm_eval.tasks import TaskManager

    with _hushed():
        return TaskManager(include_defaults=any_at_all)


@dataclass(frozen=True)
class Runner:
    """A model that texts and tasks can be run on, with its name, tokenizer and settings."""

    name: str
    model: Any
    tokenizer: Any
    longest: int | None
    settings: Settings
    digest: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, settings: Settings, *, name: str | None = None) -> "Runner":
        """The runner of a checkpoint, its model loaded.

        Raises:
            EvaluationError: if it predicts no next token, or has no tokenizer.
            CheckpointError: if it cannot be loaded, or there is no such device.
        """
        tokenizer = load_tokenizer(checkpoint)
        model = load_model(checkpoint, dtype=settings.dtype, device_map=settings.device)
        if not is_causal(model):
            raise EvaluationError(f"{not_causal(model)}, so it cannot choose a text.")
        longest = longest_window(checkpoint.config)
        digest = fingerprint(checkpoint)
        return cls(name or checkpoint.name, model, tokenizer, longest, settings, digest)

    @cached_property
    def _for_harness(self) -> Any:
        with _hushed():
            from headshare.evaluation.likelihoods import ContextsOnce

            size = {"batch_size": self.settings.batch_size, "max_length": self.longest}
            model = ContextsOnce(pretrained=self.model, tokenizer=self.tokenizer, softmax_dtype="float32", **size)
        if not model.keeps_contexts:
            say(f"{type(self.model).__name__} cannot go on from a context: it reads one again for each ending")
        return model

    def run(self, task: Chosen, key: str) -> TaskResult:
        """Measure the model on one task.

        Raises:
            EvaluationError: if the harness cannot run it, or a likelihood is not finite.
        """
        import lm_eval

        settings = task.settings(self.settings)
        with _explained(task.name):
            model = self._for_harness
        with _explained(task.name), _hushed(), _only_results():
            parts = None if task.parts is None else task.parts.items()
            given = [task.task] if parts is None else [as_task(task.task, *part) for part in parts]
            # errors of metrics are computed below, so the harness need not bootstrap them
            output = lm_eval.simple_evaluate(
                model=model,
                tasks=given,
                task_manager=tasks_of_harness(any_at_all=parts is None),
                num_fewshot=settings.few_shot,
                limit=self.settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=self.settings.seed,
                numpy_random_seed=self.settings.seed,
                torch_random_seed=self.settings.seed,
                fewshot_random_seed=self.settings.seed,
            )
        # samples by subject, each question once
        by_part: dict[str, list[dict[str, Any]]] = output["samples"]
        by_part = {name: once_a_question(some) for name, some in by_part.items()}
        samples = [sample for some in by_part.values() for sample in some]
        check_finite_samples(samples, task.name)
        # subjects and chances are for tasks that choose among options; others report their own metrics
        options = [len(sample["arguments"]) for sample in samples]
        shares = {name: (share_right(some), len(some)) for name, some in by_part.items() if some and "acc" in some[0]}
        scored = all("acc" in sample for sample in samples)
        chosen = all(sample.get("acc") in (0, 1) for sample in samples)
        return TaskResult(
            model=self.name,
            task=task.name,
            key=key,
            metrics=averaged(samples) if scored else reported(output, task.task),
            questions=len(samples),
            chance=sum(1 / count for count in options) / len(options) if chosen and min(options) > 1 else None,
            constant=share_of_constant(samples) if chosen else None,
            parts=shares if len(shares) > 1 else {},
            right="".join(str(int(sample["acc"])) for sample in samples) if chosen else "",
            settings={
                **settings.deciding,
                **self.circumstances,
                "batch_size": self.settings.batch_size,
                "lm_eval": harness_version(),
                "questions": task.digest[:8],
                "rule": RULE,
            },
        )

    @property
    def circumstances(self) -> dict[str, str]:
        """Facts that a result is kept with: the model, its dtype and device, and the versions of packages."""
        model = {} if self.digest is None else {"model": self.digest[:16]}
        return {**model, "dtype": self.settings.dtype, "device": self.settings.device, **versions()}


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn any exception of the harness into one error, as it lets through those of the libraries below it."""
    with foreign(f"lm-eval cannot run {name}", EvaluationError):
        yield


@contextmanager
def _hushed() -> Iterator[None]:
    """Silence the harness: its bars, which are for terminals, and its log, which is for those who write tasks."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _only_results() -> Iterator[None]:
    """Keep the harness from asking git and the machine what its own reports say of them, which nobody reads here.

    What the machine has takes seconds for each task: all installed packages are listed, and compilers are started.
    Outside a repository git complains on standard error, where the harness does not catch it.
    """
    from lm_eval import evaluator

    asks = {
        name: getattr(evaluator, name) for name in ("get_git_commit_hash", "add_env_info") if name in vars(evaluator)
    }
    for name in asks:  # a version that does not ask there has none
        setattr(evaluator, name, lambda *_: None)
    try:
        yield
    finally:
        for name, asked in asks.items():
            setattr(evaluator, name, asked)
