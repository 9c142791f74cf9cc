"""Local questions as tasks of lm-evaluation-harness, and metrics from the samples that it returns."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headshare.errors import EvaluationError
from headshare.evaluation.questions import Question
from headshare.evaluation.results import Metric
from headshare.evaluation.task_files import TASKS, TaskPart

SCORED = ("acc", "acc_norm")


def as_task(task: str, part: str, kept: TaskPart) -> Any:
    """The questions of a subject as a task of the harness's own kind."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    splits = {"test": Dataset.from_list([_document(question) for question in kept.questions])}
    if kept.examples:
        splits["shown"] = Dataset.from_list([_document(question) for question in kept.examples])
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
    """The context; or the number of the right one where there are several, which the harness expects there."""
    contexts = document["contexts"]
    return contexts[0] if len(contexts) == 1 else int(document["answer"])


def _choices(document: Mapping[str, Any]) -> list[str]:
    choices: list[str] = document["endings"] if len(document["contexts"]) == 1 else document["contexts"]
    return choices


def _target(document: Mapping[str, Any]) -> str | int:
    return int(document["answer"]) if len(document["contexts"]) == 1 else document["endings"][0]


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
