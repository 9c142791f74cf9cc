"""Local questions as tasks of lm-evaluation-harness, or as its files, and metrics from the samples that it returns."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import headshare.evaluation.tasks  # noqa: F401 - registers our tasks
from headshare.errors import EvaluationError, OutputError
from headshare.evaluation.questions import Question
from headshare.evaluation.results import Metric
from headshare.evaluation.task_files import TASKS, TaskPart
from headshare.files.failures import explain
from headshare.files.scratch import scratch_folder

SCORED = ("acc", "acc_norm")
# of the names of our tasks in files for the harness, which has some of the same names
PREFIX = "headshare_"


def as_task(task: str, part: str, kept: TaskPart) -> Any:
    """The questions of a subject as a task of the harness's own kind."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    splits = {split: Dataset.from_list([asdict(each) for each in some]) for split, some in _splits(kept).items()}
    return ConfigurableTask(
        config={
            **_settings(task, part, kept),
            "custom_dataset": lambda **_: splits,
            "doc_to_text": _text,
            "doc_to_choice": _choices,
            "doc_to_target": _target,
        }
    )


def _splits(kept: TaskPart) -> dict[str, Sequence[Question]]:
    return {"test": kept.questions, **({"shown": kept.examples} if kept.examples else {})}


def _settings(task: str, part: str, kept: TaskPart) -> dict[str, Any]:
    """What the harness is told of a task, however it is given the questions."""
    return {
        "task": part if part == task else f"{task}_{part}",
        "test_split": "test",
        "fewshot_split": "shown" if kept.examples else "test",
        "fewshot_config": {"sampler": "first_n"} if kept.examples else None,
        "output_type": "multiple_choice",
        "description": kept.heading,
        "target_delimiter": TASKS[task].space,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in SCORED],
    }


def _text(document: Mapping[str, Any]) -> str | int:
    """The context; or the number of the right one where there are several, which the harness expects there."""
    contexts = document["contexts"]
    return contexts[0] if len(contexts) == 1 else int(document["answer"])


def _choices(document: Mapping[str, Any]) -> list[str]:
    choices: list[str] = document["endings"] if len(document["contexts"]) == 1 else document["contexts"]
    return choices


def _target(document: Mapping[str, Any]) -> str | int:
    return int(document["answer"]) if len(document["contexts"]) == 1 else document["endings"][0]


def write_tasks(names: Sequence[str], data: str | Path, out: str | Path) -> list[str]:
    """Write tasks of ours as files for the harness's own command line: `lm_eval --include_path OUT --tasks NAME`.

    The questions are read from the folder `data`. The new folder `out` has a YAML and a JSONL file for each task, or
    for each subject of one that has several, and a YAML for all subjects together. The YAML names the JSONL by its
    absolute path. A task is called as here, with "headshare_" before it. Returns those names.

    Raises:
        EvaluationError: if there is no such task, or one of its files cannot be used.
        OutputError: if `out` exists, or cannot be written.
    """
    import yaml

    folder = Path(out).absolute()
    if unknown := [name for name in names if name not in TASKS]:
        raise EvaluationError(f"there is no task {unknown[0]!r:.100} of ours. There are {', '.join(TASKS)}.")
    if folder.exists():
        raise OutputError(f"{out} exists. Choose another name.")
    files: dict[str, str] = {}
    for name in names:
        parts = TASKS[name].parts(Path(data))
        for part, kept in parts.items():
            config = _in_file(name, part, kept, folder)
            for split, questions in _splits(kept).items():
                lines = (json.dumps(asdict(each), ensure_ascii=False) for each in questions)
                files[Path(config["dataset_kwargs"]["data_files"][split]).name] = "\n".join([*lines, ""])
            files[f"{config['task']}.yaml"] = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
        if len(parts) > 1:
            group = {
                "group": f"{PREFIX}{name}",
                "task": [f"{PREFIX}{name}_{part}" for part in parts],
                "aggregate_metric_list": [{"metric": metric, "weight_by_size": True} for metric in SCORED],
            }
            files[f"{PREFIX}{name}.yaml"] = yaml.safe_dump(group, allow_unicode=True, sort_keys=False)
    try:
        with scratch_folder(folder.parent) as partial:
            for file, text in files.items():
                (partial / file).write_text(text, encoding="utf-8")
            partial.rename(folder)
    except OSError as error:
        raise OutputError(explain(error, folder)) from error
    return [f"{PREFIX}{name}" for name in names]


def _in_file(task: str, part: str, kept: TaskPart, folder: Path) -> dict[str, Any]:
    """A subject of a task as a YAML file says it: functions are templates and names of fields there."""
    settings = _settings(task, part, kept)
    name = f"{PREFIX}{settings['task']}"
    several = {len(question.contexts) > 1 for question in kept.questions}
    # all questions of a task are of one kind: several endings of a context, or several contexts of an ending
    fields = ("answer", "contexts", "{{endings[0]}}") if several == {True} else ("{{contexts[0]}}", "endings", "answer")
    return {
        **{key: value for key, value in settings.items() if value is not None},
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(folder / f"{name}.{split}.jsonl") for split in _splits(kept)}},
        **dict(zip(("doc_to_text", "doc_to_choice", "doc_to_target"), fields, strict=True)),
    }


def once_a_question(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first sample of each question, where the harness took its answer from the text in several ways."""
    by_question: dict[Any, dict[str, Any]] = {}
    for sample in samples:
        by_question.setdefault(sample["doc_id"], sample)
    return list(by_question.values())


def share_right(samples: Sequence[Mapping[str, Any]]) -> float:
    """The share of questions that were answered correctly."""
    return float(sum(sample["acc"] for sample in samples)) / len(samples)


def share_of_constant(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of questions that the best constant answer gets right: the option that is right most often.

    None where the questions do not all have the same options.
    """
    options = {tuple(ending for _, ending in sample["arguments"]) for sample in samples}
    targets = Counter(sample["target"] for sample in samples if isinstance(sample["target"], int))
    if len(options) != 1 or len(next(iter(options))) < 2 or targets.total() != len(samples):
        return None
    return targets.most_common(1)[0][1] / len(samples)


def averaged(samples: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """Accuracies over all questions, whatever their subject, with their standard errors.

    An error is the sample's standard deviation over sqrt(n). For answers that are right or wrong that is
    sqrt(p (1 - p) / (n - 1)).
    """
    metrics = {}
    for name in SCORED:
        if all(name in sample for sample in samples):
            values = [float(sample[name]) for sample in samples]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            metrics[name] = Metric(statistics.mean(values), error)
    return metrics


def reported(output: Mapping[str, Any], name: str) -> dict[str, Metric]:
    """Metrics that the harness reports for a task that does not choose among options."""
    row = output["results"].get(name)
    if row is None:
        raise EvaluationError(
            f"{name} is several tasks, and has no figure of its own. Name them: {', '.join(sorted(output['results']))}."
        )
    metrics = dict(_metrics(row))
    if not metrics:
        raise EvaluationError(f"lm-eval found no finite figure for {name}.")
    return metrics


def _metrics(row: Mapping[str, Any]) -> Iterator[tuple[str, Metric]]:
    """Metrics in a row of the harness's results, under their names.

    Where answers were taken from the text in several ways, the name also says in which.
    """
    keys = [key for key in row if "," in key and "_stderr" not in key and _number(row[key]) is not None]
    names = Counter(key.partition(",")[0] for key in keys)
    for key in keys:
        name = key.partition(",")[0]
        metric = Metric(_number(row[key]), _number(row.get(key.replace(",", "_stderr,", 1))))
        yield (name if names[name] == 1 else key), metric


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def check_finite_samples(samples: Sequence[Mapping[str, Any]], name: str) -> None:
    """Refuse samples in which a likelihood is NaN or infinite.

    Raises:
        EvaluationError: if there is one.
    """
    for sample in samples:
        for answer in sample["filtered_resps"]:
            value = answer[0] if isinstance(answer, list | tuple) else answer
            if isinstance(value, float) and not math.isfinite(value):
                raise EvaluationError(
                    f"a likelihood on {name} is {value}; the model's weights are damaged or overflow this dtype."
                )
