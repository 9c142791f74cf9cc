"""The door to untrusted files: parsers of strangers' files are entered here, within limits of what they may hold."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from headshare.errors import CheckpointError, HeadshareError
from headshare.files.printable import CONTROL, MAX_TEXT, reason_of

MAX_JSON_BYTES = 100_000_000
MAX_YAML_BYTES = 1_000_000
# values of a JSON text: a plan of 200,000 ties has a million, the index of 300,000 tensors as many as it has tensors
MAX_VALUES = 2_000_000

Record = TypeVar("Record", bound=BaseModel)
Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(lambda text: _printable(text))]


def wants_memory(error: BaseException) -> bool:
    """True if an exception says that memory ran out, by its class or, as torch does on a CPU, only in words."""
    words = ("not enough memory", "can't allocate memory")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, of an accelerator
    return named or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


@contextmanager
def foreign(what: object, refused: type[HeadshareError] = CheckpointError, to_do: str = "") -> Iterator[None]:
    """Enter a library with what somebody else wrote: whatever it raises becomes one error.

    `what` begins the message, such as "model/config.json is not a configuration that transformers can read". `to_do`
    ends it. Libraries raise errors of each other and of languages below, so no list of them is ever whole. Errors of
    headshare pass, and so does what is no fault of the file: memory that ran out, and a person who stops the run.

    Raises:
        HeadshareError: of the kind `refused`.
    """
    try:
        yield
    except HeadshareError:
        raise
    except Exception as error:
        if wants_memory(error):
            raise
        raise refused(f"{what}: {reason_of(error)}. {to_do}".rstrip()) from error


def parse_json(
    data: bytes | str, what: object, refused: type[HeadshareError] = CheckpointError, values: int = MAX_VALUES
) -> Any:
    """The value of a JSON text with at most so many values in it; the smallest takes 3 bytes there and 70 in memory.

    Raises:
        HeadshareError: of the kind `refused`, if it is not JSON or holds more.
    """
    raw = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    held = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if held > values:
        raise refused(f"{what} holds {held:,} values or more; at most {values:,} are read.")
    with foreign(f"{what} is not JSON", refused):
        return json.loads(data)


def is_file(path: Path) -> bool:
    """True if there is such a file; a name that no file can have, too long or with a zero byte, is none."""
    return os.path.isfile(path)  # noqa: PTH113 - pathlib raises for such names


def read_bytes(path: Path, most: int, refused: type[HeadshareError] = CheckpointError) -> bytes:
    """The bytes of a file of at most so many.

    Raises:
        HeadshareError: of the kind `refused`, if it is larger, or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size <= most:
            with path.open("rb") as file:
                return file.read(size)
    except OSError as error:
        raise refused(f"{path} cannot be read: {error.strerror}.") from None
    raise refused(f"{path} is {size:,} bytes, too large for what it should be.")


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """The JSON object of a file of at most MAX_JSON_BYTES.

    Raises:
        CheckpointError: if it is missing, too large, or not a JSON object.
    """
    if not is_file(path):
        raise CheckpointError(f"there is no {path.name} in {path.parent}. {hint}".rstrip())
    data = parse_json(read_bytes(path, MAX_JSON_BYTES), path)
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
    data = read_bytes(path, MAX_YAML_BYTES, refused)
    with foreign(f"{path} cannot be read as YAML", refused):
        return yaml.load(data.decode(), _PlainLoader)  # noqa: S506 - a safe one


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
        where, why = first_error(error)
        raise CheckpointError(f"{what} is not valid at {where[:MAX_TEXT] or 'its top'!a}: {why}.") from None


def first_error(error: ValidationError) -> tuple[str, str]:
    """The place of the first thing that is wrong, its keys joined by dots, and what is wrong there, in words."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(map(str, first["loc"])), first["msg"]
