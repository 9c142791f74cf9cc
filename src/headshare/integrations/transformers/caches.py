"""The keys and values that a model of transformers takes and gives back."""

import inspect
from typing import Any

# transformers 5.24 renamed the argument and the field of the output
NAMES = ("cache", "past_key_values")


def cache_argument(model: Any) -> str | None:
    """The name of the argument of `model.forward` that takes keys and values, or None if there is none."""
    arguments = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in arguments), None)
