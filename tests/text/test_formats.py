"""One format for one file, in every command: told from its name, or else from its content."""

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pandas
import pytest

import headshare as hs
from headshare.errors import CalibrationError, EvaluationError
from headshare.integrations.transformers.loading import load_tokenizer
from headshare.text import formats
from headshare.text.documents import documents_of
from headshare.text.formats import Format, check_field, documents_in, format_of, read_lines, rows_in
from headshare.text.tokens import Calibration
from headshare.text.windows import read_text, windows_of
from support.command_line import Run
from support.texts import WORDS, a_text, add_tokenizer

ROWS = [
    {"id": n, "meta": {"url": f"http://{n}"}, "text": " ".join(random.Random(n).choices(WORDS, k=20))}
    for n in range(40)
]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)


def a_table(delimiter: str = ",") -> str:
    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter)
    writer.writerows([["id", "text"], *([row["id"], row["text"]] for row in ROWS)])
    return table.getvalue()


FILES = {
    "a.jsonl": (LINES, Format.LINES),
    "a.JSONL": (LINES, Format.LINES),
    "a.ndjson": (LINES, Format.LINES),
    "lines.json": (LINES, Format.LINES),
    "lines": (LINES, Format.LINES),
    "train.00": ("\n\n" + LINES, Format.LINES),
    "array.json": (json.dumps(ROWS), Format.ARRAY),
    "indented.JSON": (json.dumps(ROWS, indent=2), Format.ARRAY),
    "array": (json.dumps(ROWS), Format.ARRAY),
    "a.csv": (a_table(), Format.COMMAS),
    "a.CSV": (a_table(), Format.COMMAS),
    "a.tsv": (a_table("\t"), Format.TABS),
    "lines.txt": (LINES, Format.TEXT),
    "wiki.txt": ("[[w5]] {w6} w7", Format.TEXT),
    "wiki": ("[[w5]] w6 w7", Format.TEXT),
    "braces.log": ("{w5} w6 w7", Format.TEXT),
    "a.md": ("# w5\n", Format.TEXT),
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", FILES)
def test_a_files_format_is_told_from_its_name_or_else_its_content(name: str, mark: bytes, tmp_path: Path) -> None:
    content, wanted = FILES[name]
    path = tmp_path / name
    path.write_bytes(mark + content.encode())
    assert format_of(path) is wanted
    assert list(documents_in(path, None)) == ([content] if wanted is Format.TEXT else TEXTS)


@pytest.mark.parametrize("name", [name for name, (_, kind) in FILES.items() if kind is not Format.TEXT])
def test_every_command_reads_the_same_documents(name: str, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(FILES[name][0])
    (tmp_path / "stock.jsonl").write_text(LINES)
    model = hs.open_checkpoint(add_tokenizer(llama))
    options = {"tokens": 16 * 60, "window": 16}
    found = Calibration.load(path, model, **options)
    assert found.digest == Calibration.load(tmp_path / "stock.jsonl", model, **options).digest
    assert read_text(path) == "\n\n".join(TEXTS)
    assert read_lines(path) == TEXTS


def test_a_table_is_what_pandas_reads(tmp_path: Path) -> None:
    odd = ['w5, w6 "w7"', "w8\nw9", "", "  w10", "é漢", "w11 " * 50_000]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([["n", "text"], *enumerate(odd)])
        stock = pandas.read_csv(tmp_path / name, sep=delimiter, keep_default_na=False)
        assert list(documents_of(rows_in(tmp_path / name), "text")) == list(stock["text"]) == odd
    assert csv.field_size_limit() == 131_072


def test_an_array_of_any_layout_is_what_json_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "w5 " * length, "n": [1.5, -2e3, {"a": "]},{"}]} for length in (0, 1, 30, 400)]
    for indent in (None, 1, 7):
        path = tmp_path / f"{indent}.json"
        path.write_text(" \n" + json.dumps(rows, indent=indent) + "\n")
        for piece in (1, 2, 7, 64, 2**16):  # characters that are read at a time
            monkeypatch.setattr("headshare.text.formats._PIECE", piece)
            assert [row for _, row in formats._array_rows(path)] == rows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{\"text\": \"w5\"}, {\"text\": ", r"row 2 of .* is not JSON"),
        ("[{\"text\": \"w5\"} {\"text\": \"w6\"}]", r"row 2 of .* a comma or the array's end should follow"),
        ("[{\"text\": \"w5\"}, 5]", r"row 2 of .* is no object but 5"),
        ("[{\"text\": \"w5\"}", r"row 2 of .* is not JSON"),
        ("{\n \"text\": \"w5\"\n}", r"neither a JSON array of objects nor a JSON object a line"),
        ("[\"w5\", \"w6\"]", r"neither a JSON array of objects nor a JSON object a line"),
    ],
)  # fmt: skip
def test_json_that_is_cut_or_holds_something_else_is_refused_by_its_row(
    content: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CalibrationError, match=said):
        list(documents_in(tmp_path / "a.json", None))


def test_an_item_that_holds_more_than_can_be_meant_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MAX_VALUES", 1000)
    (tmp_path / "a.json").write_text('[{"text": "w5", "more": [' + "{}," * 40_000 + "{}]}]")
    with pytest.raises(CalibrationError, match=r"row 1 of .* holds more than 1,000 values"):
        list(documents_in(tmp_path / "a.json", None))


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "missing"])
def test_a_name_that_no_file_can_have_is_no_file(name: str) -> None:
    for read in (format_of, read_text):
        with pytest.raises((CalibrationError, EvaluationError), match="there is no file"):
            read(Path(name))


@pytest.mark.parametrize(
    ("row", "said"),
    [("1,w5,w6", "row 2 of .* has not as many fields as the heading"), ("1", "row 2 of .* has not as many fields"),
     ('1,"w5', "cannot be read as a table")],
)  # fmt: skip
def test_a_table_that_is_cut_is_refused_by_its_row(row: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"id,text\n0,w5\n{row}\n")
    with pytest.raises(CalibrationError, match=said):
        list(documents_in(tmp_path / "a.csv", None))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl", "a.txt", "a"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [(gzip.compress(b"w5 w6", mtime=0), "gzip"), (b"PAR1 and more", "Parquet"), ("w5 w6".encode("utf-16"), "UTF-16")],
)
def test_what_is_packed_or_in_another_encoding_is_refused_whatever_its_name(
    name: str, content: bytes, kind: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (format_of, read_text):
        with pytest.raises((CalibrationError, EvaluationError), match=f"is no UTF-8 text but {kind}"):
            read(tmp_path / name)


def test_a_field_is_refused_only_where_no_source_has_any(tmp_path: Path) -> None:
    text = a_text(tmp_path / "text.txt")
    (tmp_path / "a.csv").write_text(a_table())
    check_field("id", text, tmp_path / "a.csv", None)
    check_field("id", text, "hf:name")
    check_field(None, text)
    for sources in ((text,), (text, None), (), ("self",)):
        with pytest.raises(CalibrationError, match=r"no fields to take 'id' from"):
            check_field("id", *sources)


# ---- marks and lines


def test_a_mark_of_the_encoding_is_no_text(llama: Path, tmp_path: Path) -> None:
    model = add_tokenizer(llama)
    text = a_text(tmp_path / "text.txt")
    (tmp_path / "marked.txt").write_text(text.read_text(), encoding="utf-8-sig")
    assert read_text(tmp_path / "marked.txt") == read_text(text)
    found = [
        Calibration.load(tmp_path / name, hs.open_checkpoint(model), tokens=64, window=16)
        for name in ("text.txt", "marked.txt")
    ]
    assert found[0].digest == found[1].digest


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes("one\u2028prompt\x0chere\r\n\ntwo\x85too\n".encode())
    assert read_lines(tmp_path / "lines.txt") == ["one\u2028prompt\x0chere", "", "two\x85too"]


def test_prompts_and_texts_of_rows_are_read_by_commands(llama: Path, tmp_path: Path, run: Run) -> None:
    model = str(add_tokenizer(llama))
    (tmp_path / "prompts.txt").write_text("w5\u2028w6 w7\n")
    (tmp_path / "rows.csv").write_text("id,one,two\n1,w5 w6,w7 w8\n2,w9,w10 w11\n")
    written = json.loads(run("generate", model, "--prompts", "prompts.txt", "--tokens", "2", "--json").out)
    assert written["prompts"] == ["w5\u2028w6 w7"]
    words = ("--field", "two", "--tokens", "2", "--json")
    assert json.loads(run("generate", model, "--prompts", "rows.csv", *words).out)["prompts"] == ["w7 w8", "w10 w11"]
    assert "Name one: --field NAME" in run("generate", model, "--prompts", "rows.csv").err
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    found = json.loads(run("eval", model, "--text", "a.json", "--field", "text", "--window", "16", "--json").out)
    tokenizer = load_tokenizer(hs.open_checkpoint(model))
    wanted = windows_of(tokenizer, "\n\n".join(TEXTS), window=16)
    assert found["tokens"] == wanted.tokens[:, 1:].numel()
    assert "no fields to take" in run("eval", model, "--text", "prompts.txt", "--field", "text").err
