"""Settings of what is calibrated: the text and its windows, the device, and how a run goes about it."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from headshare.calibration import processes
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.defaults import TOKENS
from headshare.errors import CalibrationError
from headshare.text.tokens import Calibration


@dataclass(frozen=True)
class CalibrationSettings:
    """The settings that everything calibrated has in common.

    `source` is a text as `Calibration.load` takes it. With `restart` the state of a stopped run is thrown away. With
    `probe` costs are measured on predictions. `field` holds the text of a row, where the source has rows. A `window` of
    None is that of `Calibration.load`. Cost curves are kept in the file `prices`, where one is named.
    """

    source: str
    tokens: int = TOKENS
    window: int | None = None
    seed: int = 0
    device: str = "auto"
    restart: bool = False
    probe: bool = True
    field: str | None = None
    prices: Path | None = None

    @property
    def device_name(self) -> str:
        """The name of a device that this machine has; `auto` is the GPU, where there is one.

        Each of several processes on a machine has a GPU of its own.

        Raises:
            CalibrationError: if there is no such device.
        """
        own = processes.own_gpu()
        if self.device in ("auto", "cuda") and torch.cuda.is_available() and own is not None:
            if own >= torch.cuda.device_count():
                raise CalibrationError(
                    f"there are more processes than the {torch.cuda.device_count()} GPUs here, and each needs one. "
                    "Start fewer, or use --device cpu."
                )
            return f"cuda:{own}"
        if own is not None and self.device.startswith("cuda:"):
            raise CalibrationError(
                f"each of several processes takes a GPU of its own, and all were given {self.device:.40}. Use auto."
            )
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        numbered = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", self.device)
        if numbered is None or (self.device != "cpu" and int(numbered[1] or 0) >= torch.cuda.device_count()):
            raise CalibrationError(
                f"there is no device {self.device!r:.40} here to calibrate on. Use cpu, cuda, or auto."
            )
        return self.device

    def load(self, checkpoint: Checkpoint) -> Calibration:
        """The calibration tokens of the text for this model.

        Raises:
            CalibrationError: as `Calibration.load` does, or if there is no such device.
        """
        return Calibration.load(
            self.source,
            checkpoint,
            tokens=self.tokens,
            window=self.window,
            seed=self.seed,
            field=self.field,
            device=self.device_name,
        )
