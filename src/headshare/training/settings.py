"""Settings of a training run as one value, from Python, from YAML, or from the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headshare.errors import TrainingError
from headshare.files.untrusted import read_yaml
from headshare.training.choices import Distance, TrainingMethod

# the Trainer's arguments unless they are given: the paper's, but for the batch, which is that of one device
RECIPE: Mapping[str, Any] = {
    "learning_rate": 5e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 0.5,
    "lr_scheduler_type": "cosine",
    "report_to": "none",
}


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sharing(_Settings):
    """The plan: a file, or settings by which one is chosen from the weights."""

    plan: Path | None = None
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.3
    match: str = "qk"
    parts: str = "qkv"
    mode: str = "star"


class TrainingText(_Settings):
    """The text to train on, packed to windows of `context` tokens, and the text held out to measure on.

    Without a `context`, windows have 1,024 tokens, or as many as the model reads at once if those are fewer.

    `data` names a file or a data set. `held_out` windows are taken from its end (of a stream, from its beginning),
    unless `held_out_data` names another text. `limit` bounds the windows that are trained on. `stream` reads the text
    while training, and needs `max_steps`.
    """

    data: str
    held_out_data: str | None = None
    field: str | None = None
    context: Annotated[int, Field(ge=2)] | None = None
    held_out: Annotated[int, Field(ge=1)] = 64
    limit: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False


class Loss(_Settings):
    """The loss: lm x language-model loss + gamma x distance of the tied pairs.

    This is equation 5 of the paper, where lm is 1; the authors' code has 0.5 and 0.5.

    `distill` is the part of the language-model loss that is replaced by the divergence from the dense model's
    predictions, at `temperature`. `teacher` names the dense model. Without it, that is the model that is trained, or
    the model that a shared one came from.
    """

    gamma: Annotated[float, Field(ge=0)] = 0.5
    lm: Annotated[float, Field(gt=0)] = 1.0
    distance: Distance = Distance.FROBENIUS
    distill: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    teacher: str | None = None


class Learning(_Settings):
    """Settings of learning: the Trainer's arguments by their names, adapters, and when to stop.

    `lora` is the rank of LoRA, for shared models; 0 trains in full. Training stops after `patience` evaluations without
    a better one.
    """

    arguments: Mapping[str, Any] = {}
    lora: Annotated[int, Field(ge=0)] = 0
    patience: Annotated[int, Field(ge=1)] | None = None


class Tasks(_Settings):
    """Tasks of `headshare eval`, by their names, that every evaluation measures beside the loss.

    Tasks of ours are read from files in the folder `data_dir`. The first `limit` questions of each are asked; None asks
    all.
    """

    names: tuple[str, ...] = ()
    data_dir: Path | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class TrainSettings(_Settings):
    """Settings of a training run: all but the model and the place to write to."""

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
            TrainingError: if it cannot be read, or holds what is no setting.
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
