"""Train a model into sharing (PostShare), or a shared model back to quality, with the Hugging Face Trainer."""

from typing import TYPE_CHECKING

from headshare.lazy import lazy_names

if TYPE_CHECKING:
    from headshare.training.choices import TrainingMethod
    from headshare.training.result import Closed, Trained
    from headshare.training.run import train
    from headshare.training.settings import Learning, Loss, Sharing, TrainingText, TrainSettings
    from headshare.training.trainer import SharingTrainer
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "headshare.training.choices": "TrainingMethod",
            "headshare.training.result": "Closed Trained",
            "headshare.training.run": "train",
            "headshare.training.settings": "Learning Loss Sharing TrainingText TrainSettings",
            "headshare.training.trainer": "SharingTrainer",
        },
    )

__all__ = [
    "Closed",
    "Learning",
    "Loss",
    "Sharing",
    "SharingTrainer",
    "TrainSettings",
    "Trained",
    "TrainingMethod",
    "TrainingText",
    "train",
]
