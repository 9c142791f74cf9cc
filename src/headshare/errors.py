"""Errors that headshare raises, as one small tree.

    HeadshareError
    ├── OptionError         an option has a name that does not exist, a value out of its range, or no use here
    ├── CheckpointError     a checkpoint cannot be used: its files, its weights, or what its config.json says of sharing
    ├── ArchitectureError   the model's layout is unknown, or not what its configuration says
    ├── PlanError           a share plan is not valid, does not fit the model, or cannot be made of what was given
    ├── StorageError        a loaded model's weights cannot be held, moved or changed as was asked
    ├── OutputError         the place to write to is not usable: it exists, is inside the input, is full
    ├── EvaluationError     a text, a tokenizer or a model cannot be measured, or compared
    ├── CalibrationError    no calibration tokens can be had from what was named, or a stopped run cannot go on
    └── TrainingError       a model cannot be trained as was asked, or training went wrong

Every message says what is wrong, what was found, and what to do. It is one line, and a terminal can show it.
"""

from headshare.files.printable import one_line


class HeadshareError(Exception):
    """The base of all errors that headshare raises on purpose. Its text is meant for the person at the keyboard.

    What strangers wrote (names of tensors, words of a library) can be in it: control characters become escapes, and
    several lines become one.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class OptionError(HeadshareError):
    """An option has a name that does not exist, a value out of its range, or no use beside the others."""


class CheckpointError(HeadshareError):
    """A checkpoint cannot be used as it is: its files, its weights, or what its config.json says of sharing."""


class ArchitectureError(HeadshareError):
    """The model's layout is unknown, or contradicts its configuration."""


class PlanError(HeadshareError):
    """A share plan is not valid, does not fit the model, or cannot be made of what was given."""


class StorageError(HeadshareError):
    """A loaded model's weights cannot be held, moved or changed as was asked."""


class OutputError(HeadshareError):
    """The output cannot be written where it was asked for."""


class EvaluationError(HeadshareError):
    """A measurement cannot be made."""


class CalibrationError(HeadshareError):
    """Calibration tokens cannot be had from what was named, or the state of a stopped run is not to be gone on from."""


class TrainingError(HeadshareError):
    """A model cannot be trained as was asked, or training went wrong: what was saved last is kept."""
