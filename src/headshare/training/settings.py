"""What a training run is asked for, as one value: from Python, from YAML, or from the command line."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headshare.errors import TrainingError
from headshare.files.untrusted import read_yaml
from headshare.training.penalty import Distance

RECIPE: Mapping[str, Any] = {
    "learning_rate": 5e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 0.5,
    "lr_scheduler_type": "cosine",
    "report_to": "none",
}
"""What the Trainer's own arguments are unless they are given: the paper's, but for the batch, which is one device's."""


class TrainingMethod(StrEnum):
    """postshare: pull the pairs of a dense model together, then share it. recover: train a model that is shared. both:
    share first, then train, in one run. dense: train a dense model as it is, which is what the others are held against,
    and what can be shared afterwards."""

    POSTSHARE = "postshare"
    RECOVER = "recover"
    BOTH = "both"
    DENSE = "dense"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sharing(_Settings):
    """The plan: a file, or how to choose one by the weights."""

    plan: Path | None = None
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.3
    match: str = "qk"
    parts: str = "qkv"
    mode: str = "star"


class TrainingText(_Settings):
    """What is trained on: files or data sets, packed to windows of `context` tokens; and what is held out of it.

    `held_out` windows are taken from the end (of a stream, from the beginning), unless `held_out_data` names another
    text. `limit` bounds the windows that are trained on. `stream` reads while training, and needs `max_steps`.
    """

    data: str
    held_out_data: str | None = None
    field: str | None = None
    context: Annotated[int, Field(ge=2)] = 1024
    held_out: Annotated[int, Field(ge=1)] = 64
    limit: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False


class Loss(_Settings):
    """What is minimised: lm x language-model loss + gamma x distance of the tied pairs (equation 5 of the paper, where
    lm is 1; the authors' code has 0.5 and 0.5).

    With `distill`, that part of the language-model loss is the divergence from the dense model's predictions, at
    `temperature`. The dense model is the one that is trained or that the shared one names, unless `teacher` does.
    """

    gamma: Annotated[float, Field(ge=0)] = 0.5
    lm: Annotated[float, Field(gt=0)] = 1.0
    distance: Distance = Distance.FROBENIUS
    distill: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    teacher: str | None = None


class Learning(_Settings):
    """How it is minimised: the Trainer's arguments by their names, the rank of LoRA (of shared models; 0: in full), and
    after how many evaluations without a better one training stops."""

    arguments: Mapping[str, Any] = {}
    lora: Annotated[int, Field(ge=0)] = 0
    patience: Annotated[int, Field(ge=1)] | None = None


class Tasks(_Settings):
    """What is measured beside the loss, each time: tasks of `headshare eval` by their names, ours from files in the
    folder `data_dir`, the first `limit` questions of each (None: all)."""

    names: tuple[str, ...] = ()
    data_dir: Path | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class TrainSettings(_Settings):
    """One training run, but for the model and the place to write to."""

    method: TrainingMethod
    text: TrainingText
    sharing: Sharing = Sharing()
    loss: Loss = Loss()
    learning: Learning = Learning()
    tasks: Tasks = Tasks()
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    @classmethod
    def load(cls, path: str | Path) -> "TrainSettings":
        """Settings from a YAML file.

        Raises:
            TrainingError: if it cannot be read, or says what no setting is.
        """
        return cls.made(read_yaml(Path(path), TrainingError), str(path))

    @classmethod
    def made(cls, data: Any, where: str = "the settings") -> "TrainSettings":
        """Settings from what JSON or YAML holds.

        Raises:
            TrainingError: if that is not what settings are.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(step) for step in first["loc"]) or "the top"
            raise TrainingError(f"{where}: {first['msg']} at {place}; found {first['input']!r:.100}.") from None
