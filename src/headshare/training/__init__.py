"""Train a model into sharing (PostShare), or a shared model back to quality, with the Hugging Face Trainer."""

from headshare.training.run import Trained, train
from headshare.training.settings import Learning, Loss, Method, Sharing, Text, TrainSettings
from headshare.training.trainer import SharingTrainer

__all__ = [
    "Learning",
    "Loss",
    "Method",
    "Sharing",
    "SharingTrainer",
    "Text",
    "TrainSettings",
    "Trained",
    "train",
]
