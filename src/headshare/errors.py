"""What can go wrong, as one small tree.

    HeadshareError
    ├── CheckpointError     the files cannot be used: missing, truncated, not safetensors, not finite
    ├── ArchitectureError   the model's layout is unknown, or not what its configuration says
    ├── PlanError           a share plan, or what was asked of one, is not valid
    ├── StorageError        a loaded model's weights cannot be held, moved or changed as was asked
    ├── OutputError         the place to write to is not usable: it exists, is inside the input, is full
    ├── EvaluationError     a text, a tokenizer or a model that cannot be measured
    ├── CalibrationError    no calibration tokens can be had from what was named
    └── TrainingError       a model cannot be trained as was asked, or training went wrong

Every message says what is wrong, what was found, and what to do.
"""


class HeadshareError(Exception):
    """Base of everything headshare raises on purpose. Its text is meant for the person at the keyboard."""


class CheckpointError(HeadshareError):
    """The checkpoint's files cannot be used as they are."""


class ArchitectureError(HeadshareError):
    """The model's layout is unknown, or contradicts its configuration."""


class PlanError(HeadshareError):
    """A share plan, or a request for one, is not valid."""


class StorageError(HeadshareError):
    """A loaded model's weights cannot be held, moved or changed as was asked."""


class OutputError(HeadshareError):
    """The output cannot be written where it was asked for."""


class EvaluationError(HeadshareError):
    """A measurement cannot be made."""


class CalibrationError(HeadshareError):
    """Calibration tokens cannot be had from what was named, or not as many as are needed."""


class TrainingError(HeadshareError):
    """A model cannot be trained as was asked, or training went wrong: what was saved last is kept."""
