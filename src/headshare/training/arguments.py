"""The Trainer's arguments: the paper's where nothing was asked, and those that keeping the best step needs."""

from pathlib import Path

from transformers import TrainingArguments

from headshare.errors import TrainingError
from headshare.training.settings import RECIPE, Method, TrainSettings

EVALUATIONS = 10


def arguments_of(settings: TrainSettings, work: Path) -> TrainingArguments:
    """Ours, the recipe's, and those that were given.

    Raises:
        TrainingError: if one is none of the Trainer's, has a wrong value, or is one that headshare sets.
    """
    given = dict(settings.learning.arguments)
    own = {
        "output_dir": str(work),
        "seed": settings.seed,
        "metric_for_best_model": "eval_shared_loss" if settings.method is Method.POSTSHARE else "eval_loss",
        "greater_is_better": False,
        "load_best_model_at_end": True,
        "eval_on_start": True,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    if taken := sorted(own.keys() & given.keys()):
        raise TrainingError(f"{', '.join(taken)} cannot be given: headshare sets it. Leave it out.")
    part = given.get("eval_steps", 1 / EVALUATIONS)
    every = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": part, "save_steps": part}
    steps = {"logging_steps": 10, "save_total_limit": 2, "per_device_eval_batch_size": 8}
    if settings.text.stream and int(given.get("max_steps", -1)) < 1:
        raise TrainingError("a stream has no known end: say how long to train, with max_steps.")
    try:
        return TrainingArguments(**{**RECIPE, **every, **steps, **given, **own})
    except (TypeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).replace("TrainingArguments.__init__() got an", "there is an")
        raise TrainingError(f"the Trainer does not take these arguments: {reason:.300}") from error
