"""Local questions as tasks of lm-evaluation-harness."""

from collections.abc import Mapping
from typing import Any

from headshare.evaluation.questions import Question
from headshare.evaluation.task_files import TASKS, Part

SCORED = ("acc", "acc_norm")


def as_task(task: str, part: str, kept: Part) -> Any:
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
