"""The Trainer's arguments: the paper's where nothing was asked, and those that keeping the best step needs."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from headshare.errors import TrainingError
from headshare.training.settings import RECIPE, Method, TrainSettings

EVALUATIONS = 10
EVAL_BATCH = 8


def arguments_of(settings: TrainSettings, work: Path, *, held_out: int) -> TrainingArguments:
    """Ours, the recipe's, and those that were given. `held_out` windows are measured on.

    Raises:
        TrainingError: if one is none of the Trainer's, has a wrong value, or is one that headshare sets.
    """
    given = {name: _typed(name, value) for name, value in settings.learning.arguments.items()}
    every = given.get("eval_steps", 1 / EVALUATIONS)
    own = {
        "output_dir": str(work),
        "seed": settings.seed,
        "metric_for_best_model": metric_of(settings),
        "greater_is_better": False,
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_steps": every,
        "eval_on_start": True,
        "restore_callback_states_from_checkpoint": True,
        "prediction_loss_only": True,
        "logging_nan_inf_filter": False,
        "label_smoothing_factor": 0.0,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    if taken := sorted(own.keys() & given.keys()):
        raise TrainingError(f"{', '.join(taken)} cannot be given: headshare sets it. Leave it out.")
    ours = {**RECIPE, "eval_steps": every, "logging_steps": 10, "save_total_limit": 2}
    try:
        found = TrainingArguments(**{**ours, **given, **own})
    except (TypeError, ValueError, ImportError) as error:
        raise _refused(error) from error
    if settings.text.stream and found.max_steps < 1:
        raise TrainingError("a stream has no known end: say how long to train, with max_steps.")
    if settings.text.stream and found.dataloader_num_workers:
        raise TrainingError("a stream is read by one process: leave dataloader_num_workers out.")
    if found.n_gpu > 1:
        raise TrainingError(
            f"there are {found.n_gpu} GPUs and one process. Use: accelerate launch -m headshare train ..."
        )
    if "per_device_eval_batch_size" not in given:
        found.per_device_eval_batch_size = _even(held_out, found.world_size)
    return found


def metric_of(settings: TrainSettings) -> str:
    """What the best step is best in: the loss as sharing would give it, where that is another."""
    return "eval_shared_loss" if settings.method is Method.POSTSHARE else "eval_loss"


def _even(windows: int, processes: int) -> int:
    """The largest batch that leaves all processes whole ones: else windows would be repeated, and count twice."""
    if processes == 1:
        return EVAL_BATCH
    return next((size for size in range(EVAL_BATCH, 1, -1) if windows % (size * processes) == 0), 1)


def _typed(name: str, value: Any) -> Any:
    """A value that YAML took for text, such as 1e-4, as the Trainer means it."""
    return trainer_arguments([f"--{name}={value}"]).get(name, value) if isinstance(value, str) else value


def trainer_arguments(words: Sequence[str]) -> Mapping[str, Any]:
    """The Trainer's arguments among these words, by their names and in their types.

    Raises:
        TrainingError: if a word is none.
    """
    if not words:
        return {}
    parser = HfArgumentParser(TrainingArguments, exit_on_error=False, allow_abbrev=False)
    try:
        found, left = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise _refused(error) from None
    if left:
        raise TrainingError(f"neither headshare nor the Trainer has an option {left[0]}. See headshare train --help.")
    named = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return {name: value for name, value in vars(found).items() if name in named}


def _refused(error: Exception) -> TrainingError:
    reason = " ".join(str(error).split()).replace("TrainingArguments.__init__() got an", "there is an")
    return TrainingError(f"the Trainer does not take these arguments: {reason:.300}. They are written --name value.")
