"""The Trainer's arguments: the paper's by default, with those that keeping the best step needs."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from transformers import HfArgumentParser, TrainingArguments

from headshare.errors import TrainingError
from headshare.files.untrusted import foreign
from headshare.training.choices import TrainingMethod
from headshare.training.settings import RECIPE, TrainSettings

# evaluations in a run, unless `eval_steps` is given
EVALUATIONS = 10
# windows that a device evaluates at once, at most, unless that is given
EVAL_BATCH = 8
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def arguments_of(settings: TrainSettings, work: Path, *, held_out: int) -> TrainingArguments:
    """The Trainer's arguments: those that headshare sets, those that were given, and the recipe's for the rest.

    `held_out` is the number of windows that are measured on.

    Raises:
        TrainingError: if one is none of the Trainer's, has a wrong value, or is one that headshare sets.
    """
    given = given_of(settings)
    every = given.get("eval_steps", 1 / EVALUATIONS)
    # keeping the best step, going on after a stop and measuring before the first step depend on these
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
        "save_only_model": False,
        "restore_callback_states_from_checkpoint": True,
        "prediction_loss_only": True,
        "logging_nan_inf_filter": False,
        "label_smoothing_factor": 0.0,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "eval_delay": 0.0,
        "resume_from_checkpoint": None,
    }
    if taken := sorted(own.keys() & given.keys()):
        raise TrainingError(f"{', '.join(taken)} cannot be given: headshare sets it. Leave it out.")
    # the recipe stands where nothing was given
    ours = {**RECIPE, "eval_steps": every, "logging_steps": 10, "save_total_limit": 2}
    for name in COUNTS:
        if given.get(name, 1) < 1:
            raise TrainingError(f"{name} is {given[name]}; use 1 or more.")
    with _taken():
        arguments = TrainingArguments(**{**ours, **given, **own, "push_to_hub": False})
    # the devices are known from here on, and defaults are filled in
    if settings.text.stream and arguments.max_steps < 1:
        raise TrainingError("a stream has no known end: say how long to train, with max_steps.")
    if settings.text.stream and arguments.dataloader_num_workers:
        raise TrainingError("a stream is read by one process: leave dataloader_num_workers out.")
    if arguments.n_gpu > 1:
        raise TrainingError(
            f"there are {arguments.n_gpu} GPUs and one process. Use: accelerate launch -m headshare train ..."
        )
    if "per_device_eval_batch_size" not in given:
        most = min(EVAL_BATCH, arguments.per_device_train_batch_size)
        arguments.per_device_eval_batch_size = _even(held_out, arguments.world_size, most)
    return arguments


def given_of(settings: TrainSettings) -> dict[str, Any]:
    """The given arguments of the Trainer, in their types.

    Raises:
        TrainingError: if one is none of the Trainer's, or has a wrong value.
    """
    return {name: _typed(name, value) for name, value in settings.learning.arguments.items()}


def metric_of(settings: TrainSettings) -> str:
    """The metric of the best step: the loss that sharing would give, where that differs from the model's."""
    return "eval_shared_loss" if settings.method is TrainingMethod.POSTSHARE else "eval_loss"


def _even(windows: int, processes: int, most: int) -> int:
    """The largest batch that leaves no process a part of one: else windows would be repeated and count twice."""
    if processes == 1:
        return most
    return next((size for size in range(most, 1, -1) if windows % (size * processes) == 0), 1)


def _typed(name: str, value: Any) -> Any:
    """A value in the type of its argument; YAML takes some numbers, such as 1e-4, for text."""
    if isinstance(value, str):
        return trainer_arguments([f"--{name}={value}"]).get(name, value)
    if name not in _types():
        raise TrainingError(f"the Trainer has no argument {name!r:.60}. See headshare train --help.")
    kind = _types()[name]
    if not set(get_args(kind) or [kind]) <= {int, float, bool, type(None)}:
        return value  # the Trainer takes more there than it says
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise TrainingError(f"the Trainer does not take {name} {value!r:.60}: {reason}.") from None


@cache
def _types() -> Mapping[str, Any]:
    return get_type_hints(TrainingArguments)


def trainer_arguments(words: Sequence[str]) -> Mapping[str, Any]:
    """The Trainer's arguments among these words, by their names and in their types.

    Raises:
        TrainingError: if a word is none.
    """
    if not words:
        return {}
    parser = HfArgumentParser(TrainingArguments, exit_on_error=False, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # so that what is found is what was given
    with _taken():
        known, left = parser.parse_known_args(list(words))
    if left:
        raise TrainingError(f"neither headshare nor the Trainer has an option {left[0]}. See headshare train --help.")
    given: Mapping[str, Any] = vars(known)
    return given


def _taken() -> AbstractContextManager[None]:
    """The door to the Trainer with arguments that a person gave: whatever it raises becomes one error."""
    return foreign("the Trainer does not take these arguments", TrainingError, "They are written --name value.")
