"""Untrusted files and text: read within limits, printed without control characters."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from headshare.errors import CheckpointError, HeadshareError

MAX_JSON_BYTES = 100_000_000
Record = TypeVar("Record", bound=BaseModel)


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """The JSON object of a file of at most MAX_JSON_BYTES.

    Raises:
        CheckpointError: if it is missing, too large, or not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no {path.name} in {path.parent}. {hint}".rstrip())
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is {path.stat().st_size} bytes, too large for what it should be.")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object, found {type(data).__name__}.")
    return data


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"*{event.anchor} is an alias; write out what it stands for",
                                       problem_mark=event.start_mark)  # fmt: skip
        return super().compose_node(parent, index)


def read_yaml(path: Path, refused: type[HeadshareError]) -> Any:
    """The plain data of a YAML file, without objects and aliases.

    A few aliases can stand for more than fits in memory.

    Raises:
        HeadshareError: of this kind, if it cannot be read.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)  # noqa: S506 - a safe one
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise refused(f"{path} cannot be read as YAML: {' '.join(str(error).split()):.200}") from None


MAX_TEXT = 512
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(lambda text: _printable(text))]


def is_shown(text: str) -> bool:
    """True if a text that somebody else wrote is short and can be printed as it is."""
    return len(text) <= MAX_TEXT and not CONTROL.search(text)


def _printable(text: str) -> str:
    """The text itself, if a terminal shows it without acting on it.

    Raises:
        ValueError: if it holds control characters.
    """
    if CONTROL.search(text):
        raise ValueError("it holds control characters")
    return text


def checked_record(kind: type[Record], data: Any, what: str) -> Record:
    """The record of this kind in JSON data that somebody else wrote; `what` says in words what it is.

    Raises:
        CheckpointError: if it is not valid.
    """
    try:
        return kind.model_validate_json(json.dumps(data))
    except (TypeError, ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise CheckpointError(f"{what} is not valid: {error}.") from None
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])[:MAX_TEXT] or "its top"
        raise CheckpointError(f"{what} is not valid at {where!a}: {first['msg']}.") from None
