"""Bundles: options that belong together, as one value of a command instead of a parameter each.

A bundle is a frozen dataclass. Its fields, annotated as for typer, are options of every command that takes the bundle.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

from headshare.cli.options import Context, is_given


def with_bundles(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of each bundle in the place of the parameter that takes the bundle."""
    hints = get_type_hints(command, include_extras=True)
    bundles: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in bundles:
            options = get_type_hints(bundles[name], include_extras=True)
            parameters += [_parameter(field, options[field.name]) for field in _in_order(bundles[name])]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def flat(**given: Any) -> None:
        values = {
            name: bundle(**{field.name: given.pop(field.name) for field in fields(bundle)})
            for name, bundle in bundles.items()
        }
        command(**given, **values)

    # typer reads these two, and not the function's own
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _in_order(bundle: Any) -> list[Field[Any]]:
    """The options of a bundle as `--help` lists them: its own before those of the bundle that it extends."""
    own = list(vars(bundle)["__annotations__"])
    return sorted(fields(bundle), key=lambda field: own.index(field.name) if field.name in own else len(own))


def _parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def given_options(context: Context, *bundles: Any) -> dict[str, Any]:
    """The options of these bundles that were given on the command line, by the names of their fields."""
    return {
        field.name: getattr(bundle, field.name)
        for bundle in bundles
        for field in fields(bundle)
        if is_given(context, field.name)
    }
