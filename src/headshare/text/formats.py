"""The format of a file of text, which one function tells for every command, and its documents and lines.

A name that tells the format is believed, in small and capital letters. Else the content tells it.
"""

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from enum import StrEnum
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from headshare.errors import CalibrationError
from headshare.files.untrusted import MAX_VALUES, is_file, parse_json
from headshare.text.documents import DATA_SET, MIX, ROW_BYTES, SELF, Where, documents_of, json_rows, text_of

TAKEN = "a UTF-8 text file, documents as .jsonl, .json or .csv"
_ADVICE = f"Give {TAKEN}, or a data set as {DATA_SET}NAME[:CONFIG][:SPLIT]."
# bytes that files of other kinds begin with
_OTHERS = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip",
    b"PAR1": "Parquet", b"ARROW1": "Arrow", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
_BLANK = " \t\r\n"
_PIECE = 2**16


class Format(StrEnum):
    """The formats of files: plain text, and rows with a document each."""

    TEXT = "text"
    LINES = "a JSON object a line"
    ARRAY = "a JSON array of objects"
    COMMAS = "a table with commas"
    TABS = "a table with tabs"


_BY_NAME = {
    ".txt": Format.TEXT, ".text": Format.TEXT, ".md": Format.TEXT, ".jsonl": Format.LINES, ".ndjson": Format.LINES,
    ".csv": Format.COMMAS, ".tsv": Format.TABS,
}  # fmt: skip
_DELIMITERS = {Format.COMMAS: ",", Format.TABS: "\t"}


def format_of(path: Path) -> Format:
    """The format of a file.

    Raises:
        CalibrationError: if it is not there, cannot be read, or holds neither text nor documents.
    """
    try:
        if not is_file(path):
            raise CalibrationError(f"there is no file {str(path)!r:.300}. {_ADVICE}")
        with path.open("rb") as file:
            return _told_by(path, file)
    except OSError as error:
        raise CalibrationError(f"{str(path)!r:.300} cannot be read: {error.strerror or error}.") from None


def _told_by(path: Path, file: BinaryIO) -> Format:
    beginning = file.read(_PIECE)
    other = next((name for mark, name in _OTHERS.items() if beginning.startswith(mark)), None)
    if other is not None:
        raise CalibrationError(f"{path} is no UTF-8 text but {other}. Unpack or convert it. {_ADVICE}")
    suffix = path.suffix.lower()
    if suffix in _BY_NAME:
        return _BY_NAME[suffix]
    text = beginning.removeprefix(BOM_UTF8).lstrip()
    if text.startswith(b"[") and text[1:].lstrip()[:1] == b"{":
        return Format.ARRAY
    if text.startswith(b"{"):
        file.seek(0)
        lines = (line for line in iter(partial(file.readline, ROW_BYTES), b"") if line.removeprefix(BOM_UTF8).strip())
        if _is_object(next(lines, b"")):
            return Format.LINES
    if suffix == ".json" and text:
        raise CalibrationError(f"{path} is neither {Format.ARRAY} nor {Format.LINES}, each a document. {_ADVICE}")
    return Format.TEXT


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line.removeprefix(BOM_UTF8), "a line", CalibrationError), dict)
    except CalibrationError:
        return False


def check_field(field: str | None, *sources: str | Path | None) -> None:
    """Refuse a field that none of the sources has: files of text, text that the model writes, or the mix.

    Raises:
        CalibrationError: if it would not be used, or a source cannot be read.
    """
    given = [source for source in sources if source is not None]
    if field is None or any(str(source).startswith(DATA_SET) for source in given):
        return
    if all(source in (MIX, SELF) or format_of(Path(source)) is Format.TEXT for source in given):
        why = f"{' and '.join(map(str, given))}: plain text, no rows" if given else "no file of rows is read"
        raise CalibrationError(f"there are no fields to take {field!r:.60} from ({why}). Leave --field out.")


def documents_in(path: Path, field: str | None) -> Iterator[str]:
    """The documents of a file of rows, found under `field`, or the whole of a text file, which is one.

    Raises:
        CalibrationError: if the file cannot be read, or a row has no text.
    """
    if format_of(path) is Format.TEXT:
        yield text_of(path, 0, path.stat().st_size)
    else:
        yield from documents_of(rows_in(path), field)


def rows_in(path: Path) -> Iterator[tuple[Where, Any]]:
    """All rows of a file of rows, in their order, each with its name.

    Raises:
        CalibrationError: if one is not what the format says.
    """
    size = path.stat().st_size
    match format_of(path):
        case Format.LINES:
            yield from json_rows(path, 0, size, size)
        case Format.ARRAY:
            yield from _array_rows(path)
        case kind:
            yield from _table_rows(path, _DELIMITERS[kind])


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[Where, dict[str, str]]]:
    """Rows of a table, whose first row names the fields."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        longest = csv.field_size_limit(ROW_BYTES)  # csv's own is shorter than some documents
        try:
            for number, row in enumerate(reader, start=1):
                where = partial("row {} of {}".format, number, path)
                if None in row or None in row.values():
                    raise CalibrationError(
                        f"{where()} has not as many fields as the heading, which names {len(reader.fieldnames or ())}. "
                        "Correct or remove it."
                    )
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise CalibrationError(
                f"{path} cannot be read as a table behind line {reader.line_num}: {error}."
            ) from None
        finally:
            csv.field_size_limit(longest)


def _array_rows(path: Path) -> Iterator[tuple[Where, Any]]:
    """Items of a JSON array, which is decoded one at a time, so that a large file needs no large memory."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        waiting = _Waiting(file)
        waiting.past("[")
        for number in count(1):
            where = partial("row {} of {}".format, number, path)
            try:
                if waiting.past("]"):
                    return
                if number > 1 and not waiting.past(","):
                    raise ValueError("a comma or the array's end should follow the row before")
                yield where, waiting.item(decoder)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{where()} is not JSON: {error}. Correct or remove it.") from None


class _Waiting:
    """Characters of a file that were read and are not used yet."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = ""

    def past(self, mark: str) -> bool:
        """Go past blanks, and past this character if it comes next; whether it does."""
        while not (text := self.text.lstrip(_BLANK)):
            if not (more := self.file.read(_PIECE)):
                break
            self.text = more
        comes = text.startswith(mark)
        self.text = text[len(mark) :] if comes else text
        return comes

    def item(self, decoder: json.JSONDecoder) -> Any:
        """The next item. More is read until it is whole, twice as much each time."""
        self.past("")
        while True:
            try:
                item, end = decoder.raw_decode(self.text)
                # a number at the end of what was read might go on
                if end < len(self.text) or not (more := self.file.read(_PIECE)):
                    self.text = self.text[end:]
                    return item
            except ValueError:
                if sum(map(self.text.count, ",[{")) > MAX_VALUES:
                    raise ValueError(f"it holds more than {MAX_VALUES:,} values") from None
                if len(self.text) > ROW_BYTES or not (more := self.file.read(max(_PIECE, len(self.text)))):
                    raise
            self.text += more


def read_lines(path: str | Path, field: str | None = None) -> list[str]:
    """The lines of a text file, or the documents of a file of rows.

    Lines end at line feeds alone, with or without a carriage return, and not at other characters that part text.

    Raises:
        CalibrationError: as `documents_in` does.
    """
    documents = list(documents_in(Path(path), field))
    if format_of(Path(path)) is not Format.TEXT:
        return documents
    return documents[0].rstrip("\n").split("\n")
