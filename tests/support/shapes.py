"""Types and shapes of every call in a test: checked by jaxtyping and beartype, without what readies their messages.

jaxtyping's own decorator binds each call's arguments to names and goes through them twice, so that an error can name
every size. Here an argument and a result are checked once, by the same rules.
"""

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

SIZES_OF_ONE_CALL = jaxtyped("context")
# what does not fit is a TypeError, as it is by jaxtyping's own decorator
_checks = beartype(conf=BeartypeConf(violation_type=TypeError))


def checked(*, typechecker: object) -> Callable[[Any], Any]:
    """Stands in for `jaxtyping.jaxtyped`, which pytest's option `--jaxtyping-packages` puts at all that is defined."""
    return _checked


def _checked(made: Any) -> Any:
    if inspect.isclass(made):
        if is_dataclass(made) and "__init__" in vars(made):
            made.__init__ = _checked(made.__init__)  # type: ignore[misc]
        return made
    if inspect.isgeneratorfunction(made):  # beartype would check its arguments when its first value is asked for
        return jaxtyped(made, typechecker=beartype)
    written = made.__annotations__
    made.__annotations__ = {name: _read(annotation, made.__globals__) for name, annotation in written.items()}
    sizes = "jaxtyping." in repr(made.__annotations__)
    quick = _checks(made)
    made.__annotations__ = quick.__annotations__ = written
    if not sizes:
        return quick

    @wraps(made)
    def with_sizes(*arguments: Any, **options: Any) -> Any:
        with SIZES_OF_ONE_CALL:
            return quick(*arguments, **options)

    return with_sizes


def _read(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation stands for; anything, where it is the name of something that is not there yet."""
    try:
        return eval(annotation, names) if isinstance(annotation, str) else annotation
    except (NameError, TypeError):
        return Any
