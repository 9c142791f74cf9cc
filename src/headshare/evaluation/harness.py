"""Run tasks with lm-evaluation-harness: its own by name, and ours, which are given to it as tasks of its kind."""

import difflib
import io
import logging
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import EvaluationError
from headshare.evaluation.perplexity import is_causal, longest_window
from headshare.evaluation.questions import Question
from headshare.evaluation.results import Measured, Metric, key_of, versions
from headshare.evaluation.tasks import TASKS, Part, digest_of
from headshare.files.resume import fingerprint
from headshare.integrations.transformers.loading import load_model, load_tokenizer, quiet

INSTALL = "pip install 'headshare[eval]'"
SCORED = ("acc", "acc_norm")
# what is kept under another rule than this is measured again
RULE = "log-likelihoods in float32"


@dataclass(frozen=True)
class Settings:
    """How tasks are measured: the first `limit` questions of each (of each subject), with `few_shot` examples before
    them (None: as the task says), by a model of this type on this device, so many options at once."""

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
        """Those of them that results depend on."""
        return {"limit": self.limit, "few_shot": self.few_shot, "dtype": self.dtype, "seed": self.seed}


@dataclass(frozen=True)
class Chosen:
    """A task that is to be run, by the name it was asked for. `parts` are the questions of ours; of the harness's it
    has none, and `digest` is its version. `few_shot` goes before the settings'."""

    name: str
    digest: str
    parts: Mapping[str, Part] | None = None
    few_shot: int | None = None

    @property
    def task(self) -> str:
        """The task's own name."""
        return named(self.name)[0]

    def settings(self, settings: Settings) -> Settings:
        """These settings with its own examples."""
        return settings if self.few_shot is None else replace(settings, few_shot=self.few_shot)

    def key(self, model: str, settings: Settings) -> str:
        """Tells this task of this model by these settings."""
        return key_of(model, self.task, self.digest, harness_version(), RULE, self.settings(settings).deciding)

    def run(self, runner: "Runner", key: str) -> Measured:
        """Measure it, as `Runner.run` does."""
        return runner.run(self, key)


def chosen_tasks(names: Sequence[str], data: Path | None) -> list[Chosen]:
    """The tasks of these names, ours from the folder of data, where there is one, before the harness's. NAME:5 shows
    five examples, whatever others show.

    Raises:
        EvaluationError: if there is no such task, or a file of ours cannot be used.
    """
    found = []
    for asked in dict.fromkeys(names):
        name, few_shot = named(asked)
        if name in TASKS and data is not None:
            parts = TASKS[name].parts(data)
            found.append(Chosen(asked, digest_of(parts), parts, few_shot))
        else:
            found.append(Chosen(asked, _version_of(name, data), None, few_shot))
    return found


def named(name: str) -> tuple[str, int | None]:
    """A task's name and how many examples it is to show, where that is said."""
    found = re.fullmatch(r"(.+):([0-9]{1,3})", name)
    return (found[1], int(found[2])) if found else (name, None)


def harness_version() -> str:
    """The harness's version.

    Raises:
        EvaluationError: if it is not installed.
    """
    try:
        with quiet():
            import lm_eval
    except ImportError:
        raise EvaluationError(f"tasks are run by lm-eval, which is not installed. Run: {INSTALL}") from None
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
    """What finds the harness's own tasks by their names, which takes seconds; or finds none."""
    from lm_eval.tasks import TaskManager

    with _hushed():
        return TaskManager(include_defaults=any_at_all)


@dataclass(frozen=True)
class Runner:
    """A model that texts and tasks can be run on, and what it is called."""

    name: str
    model: Any
    tokenizer: Any
    longest: int | None
    settings: Settings
    digest: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, settings: Settings, *, name: str | None = None) -> "Runner":
        """A checkpoint's model, loaded.

        Raises:
            EvaluationError: if it predicts no next token, or has no tokenizer.
            CheckpointError: if it cannot be loaded, or there is no such device.
        """
        tokenizer = load_tokenizer(checkpoint)
        model = load_model(checkpoint, dtype=settings.dtype, device_map=settings.device)
        if not is_causal(model):
            raise EvaluationError(
                f"{type(model).__name__} does not predict the next token, so it cannot choose a text."
            )
        longest, digest = longest_window(checkpoint.config), fingerprint(checkpoint)
        return cls(name or checkpoint.name, model, tokenizer, longest, settings, digest)

    @cached_property
    def _for_harness(self) -> Any:
        from headshare.evaluation.likelihoods import ContextsOnce

        return ContextsOnce(
            pretrained=self.model,
            tokenizer=self.tokenizer,
            batch_size=self.settings.batch_size,
            max_length=self.longest,
            softmax_dtype="float32",
        )

    def run(self, task: Chosen, key: str) -> Measured:
        """Measure one task.

        Raises:
            EvaluationError: if the harness cannot run it, or a likelihood is not finite.
        """
        import lm_eval
        from lm_eval import evaluator

        settings = task.settings(self.settings)
        # outside a repository git would complain past the harness, on standard error
        no_commit = patch.object(evaluator, "get_git_commit_hash", return_value=None, create=True)
        with _explained(task.name), _hushed(), no_commit:
            parts = None if task.parts is None else task.parts.items()
            given = [task.task] if parts is None else [_as_task(task.task, *part) for part in parts]
            found = lm_eval.simple_evaluate(
                model=self._for_harness,
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
        by_part: dict[str, list[dict[str, Any]]] = found["samples"]
        by_part = {name: _once(some) for name, some in by_part.items()}
        samples = [sample for some in by_part.values() for sample in some]
        _check_finite(samples, task.name)
        options = [len(sample["arguments"]) for sample in samples]
        shares = {name: (_share(some), len(some)) for name, some in by_part.items() if some and "acc" in some[0]}
        scored = all("acc" in sample for sample in samples)
        chosen = all(sample.get("acc") in (0, 1) for sample in samples)
        return Measured(
            model=self.name,
            task=task.name,
            key=key,
            metrics=_averaged(samples) if scored else _reported(found, task.task),
            questions=len(samples),
            chance=sum(1 / count for count in options) / len(options) if chosen and min(options) > 1 else None,
            constant=_constant(samples) if chosen else None,
            parts=shares if len(shares) > 1 else {},
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
        """What else a result is kept with: the model, the type and device it was run in and on, and versions."""
        model = {} if self.digest is None else {"model": self.digest[:16]}
        return {**model, "dtype": self.settings.dtype, "device": self.settings.device, **versions()}


def _once(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One sample a question, where the harness took its answer from the text in several ways."""
    by_question: dict[Any, dict[str, Any]] = {}
    for sample in samples:
        by_question.setdefault(sample["doc_id"], sample)
    return list(by_question.values())


def _share(samples: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(sample["acc"] for sample in samples)) / len(samples)


def _constant(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of the option that is right most often, where all questions have the same ones."""
    options = {tuple(ending for _, ending in sample["arguments"]) for sample in samples}
    targets = Counter(sample["target"] for sample in samples if isinstance(sample["target"], int))
    if len(options) != 1 or len(next(iter(options))) < 2 or targets.total() != len(samples):
        return None
    return targets.most_common(1)[0][1] / len(samples)


def _averaged(samples: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """Accuracies over all questions, whatever their subject, with the standard deviation over sqrt(n): of answers that
    are right or wrong, sqrt(p (1 - p) / (n - 1))."""
    found = {}
    for name in SCORED:
        if all(name in sample for sample in samples):
            values = [float(sample[name]) for sample in samples]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            found[name] = Metric(statistics.mean(values), error)
    return found


def _reported(found: Mapping[str, Any], name: str) -> dict[str, Metric]:
    """What the harness says of a task that is not one of choosing."""
    row = found["results"].get(name)
    if row is None:
        raise EvaluationError(
            f"{name} is several tasks, and has no figure of its own. Name them: {', '.join(sorted(found['results']))}."
        )
    metrics = dict(_metrics(row))
    if not metrics:
        raise EvaluationError(f"lm-eval found no finite figure for {name}.")
    return metrics


def _metrics(row: Mapping[str, Any]) -> Iterator[tuple[str, Metric]]:
    """Under their names; where answers were taken from the text in several ways, under those too."""
    keys = [key for key in row if "," in key and "_stderr" not in key and _number(row[key]) is not None]
    names = Counter(key.partition(",")[0] for key in keys)
    for key in keys:
        name = key.partition(",")[0]
        found = Metric(_number(row[key]), _number(row.get(key.replace(",", "_stderr,", 1))))
        yield (name if names[name] == 1 else key), found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _check_finite(samples: Sequence[Mapping[str, Any]], name: str) -> None:
    for sample in samples:
        for answer in sample["filtered_resps"]:
            value = answer[0] if isinstance(answer, list | tuple) else answer
            if isinstance(value, float) and not math.isfinite(value):
                raise EvaluationError(
                    f"a likelihood on {name} is {value}; the model's weights are damaged or overflow this dtype."
                )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What the harness raises is one error: it raises whatever what it is built on does."""
    try:
        yield
    except EvaluationError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvaluationError(f"lm-eval cannot run {name}: {reason:.300}") from error


@contextmanager
def _hushed() -> Iterator[None]:
    """The harness's bars are for terminals, and what it logs is for those who write tasks."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


# ---- ours as the harness's


def _as_task(task: str, part: str, kept: Part) -> Any:
    """A subject as a task of the harness's own kind."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    splits = {"test": Dataset.from_list([_document(one) for one in kept.questions])}
    if kept.examples:
        splits["shown"] = Dataset.from_list([_document(one) for one in kept.examples])
    return ConfigurableTask(
        config={
            "task": part if part == task else f"{task}_{part}",
            "custom_dataset": lambda **_: splits,
            "test_split": "test",
            "fewshot_split": "shown" if kept.examples else "test",
            "fewshot_config": {"sampler": "first_n"} if kept.examples else None,
            "output_type": "multiple_choice",
            "description": kept.heading,
            "doc_to_text": _text,
            "doc_to_choice": _choices,
            "doc_to_target": _target,
            "target_delimiter": TASKS[task].space,
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in SCORED],
        }
    )


def _document(question: Question) -> dict[str, Any]:
    return {"contexts": list(question.contexts), "endings": list(question.endings), "answer": question.answer}


def _text(document: Mapping[str, Any]) -> str | int:
    """The context; or, of several, which is right, as the harness has it."""
    contexts = document["contexts"]
    return contexts[0] if len(contexts) == 1 else int(document["answer"])


def _choices(document: Mapping[str, Any]) -> list[str]:
    found: list[str] = document["endings"] if len(document["contexts"]) == 1 else document["contexts"]
    return found


def _target(document: Mapping[str, Any]) -> str | int:
    return int(document["answer"]) if len(document["contexts"]) == 1 else document["endings"][0]
