"""Documents of files and of data sets, one after the other. Errors name the line or the row."""

import codecs
import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from headshare.errors import CalibrationError
from headshare.files.untrusted import foreign, parse_json
from headshare.installing import install

DATA_SET = "hf:"
SELF = "self"
MIX = "mix"
# the documents of the mix, which comes with the package; docs/calibration.md says where they are from
MIX_FILE = Path(__file__).with_name("mix.jsonl")
SOURCES = (
    "a UTF-8 text file, a .jsonl, .json or .csv file of documents, 'self' (text that the model itself writes), 'mix' "
    "(texts of several kinds that come with headshare), or hf:NAME[:CONFIG][:SPLIT] (a Hugging Face data set)"
)
ROW_BYTES = 64 * 2**20

# The name of a row. Counting lines takes time, so only an error asks for it.
Where = Callable[[], str]


def text_of(path: Path, start: int, stop: int) -> str:
    """The characters that lie whole between these two bytes of a file."""
    with path.open("rb") as file:
        file.seek(start)
        raw = file.read(stop - start)
        ends = not file.read(1)
    # At the beginning of a file may stand a mark of its encoding, which is no text; elsewhere continuation bytes, which
    # are the rest of a character that began before.
    raw = raw.lstrip(bytes(range(0x80, 0xC0))) if start else raw.removeprefix(codecs.BOM_UTF8)
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    try:
        return decoder.decode(raw, final=ends)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: {error.reason}. Convert it, or give another file.") from None


def json_rows(path: Path, start: int, stop: int, end: int) -> Iterator[tuple[Where, Any]]:
    """The rows of a .jsonl file that begin between these two bytes.

    Where none does, it is the first row that begins before `end`.
    """
    with path.open("rb") as file:
        file.seek(max(start - 1, 0))
        if start:
            # The rest of a row that began before belongs to the stretch before.
            _line(file, partial(_line_name, path, start - 1))
        while (place := file.tell()) < end:
            where = partial(_line_name, path, place)
            if not (line := _line(file, where)):
                return  # the file has become shorter
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            yield where, _row(line, where)
            # Once a row was found, only those of the stretch itself follow.
            end = stop


def _row(line: bytes, where: Where) -> Any:
    try:
        return parse_json(line.removeprefix(codecs.BOM_UTF8), "a line", CalibrationError)
    except CalibrationError as error:  # only now are lines counted
        raise CalibrationError(f"{where()}: {error} Correct or remove the line.") from None


def _line(file: BinaryIO, where: Where) -> bytes:
    line = file.readline(ROW_BYTES)
    if len(line) == ROW_BYTES and not line.endswith(b"\n"):
        raise CalibrationError(f"{where()} is longer than {ROW_BYTES:,} bytes. Split it into documents, one a line.")
    return line


def _line_name(path: Path, place: int) -> str:
    """The name of the line that this byte is in: its number and its file."""
    number = 1
    with path.open("rb") as file:
        while place > 0 and (block := file.read(min(place, 2**20))):
            number += block.count(b"\n")
            place -= len(block)
    return f"line {number} of {path}"


def data_set_rows(source: str) -> Iterator[tuple[Where, Any]]:
    """Rows of a Hugging Face data set, in its order, each with its name."""
    name, config, split, *rest = *source.removeprefix(DATA_SET).split(":"), "", ""
    if not name or any(rest):
        raise CalibrationError(f"{source!r:.300} names no data set; write hf:NAME, hf:NAME:CONFIG or hf:NAME::SPLIT.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"{source} is read with the datasets library, which is not installed. Run: {install('data')}"
        ) from None
    form = "It is written hf:NAME[:CONFIG][:SPLIT], a split alone hf:NAME::SPLIT."
    with foreign(f"{source} cannot be read", CalibrationError, form):
        rows = load_dataset(name, config or None, split=split or "train", streaming=True, trust_remote_code=False)
        for number, row in enumerate(rows):
            yield partial("row {} of {}".format, number, source), row


def documents_of(rows: Iterable[tuple[Where, Any]], field: str | None) -> Iterator[str]:
    """The text of each row, found under `field`, or else under the only field that can hold it.

    Raises:
        CalibrationError: if a row has no text; the error names the row.
    """
    for where, row in rows:
        if not isinstance(row, dict):
            raise CalibrationError(f"{where()} is no object but {row!r:.60}; a row is an object, its text in a field.")
        field = field or _text_field(row, where)
        text = row.get(field)
        if not isinstance(text, str):
            value = f"{text!r:.60} under" if field in row else "no field"
            raise CalibrationError(f"{where()} has {value} {field!r} and no text there; its fields are {_names(row)}.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise CalibrationError(f"{where()} holds half a character (a lone surrogate). Remove the line.") from None
        yield text


def _text_field(row: dict[str, Any], where: Where) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row or len(strings) == 1:
        return "text" if "text" in row else strings[0]
    raise CalibrationError(
        f"{where()} does not say which field is the text: none is called 'text', and {len(strings)} of {_names(row)} "
        "are strings. Name one: --field NAME."
    )


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row))[:200] or "none"
