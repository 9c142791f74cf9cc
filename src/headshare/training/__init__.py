"""Train a model into sharing (PostShare), or a shared model back to quality, with the Hugging Face Trainer."""

from headshare.training.result import Closed, Trained
from headshare.training.run import train
from headshare.training.settings import Learning, Loss, Sharing, TrainingMethod, TrainingText, TrainSettings
from headshare.training.trainer import SharingTrainer

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
