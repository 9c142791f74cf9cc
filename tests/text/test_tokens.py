"""Calibration tokens: whole windows of what was named, the same for a seed, and one line where there are none."""

import hashlib
import json
import logging
import random
import struct
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

import headshare as hs
from headshare import precision
from headshare.errors import CalibrationError
from headshare.installing import install
from headshare.progress import shown
from headshare.text import documents, written
from headshare.text import tokens as calibration
from headshare.text.tokens import BYTES_PER_TOKEN, Calibration
from support import tiny
from support.texts import WORDS, a_text, add_tokenizer

WINDOW = 16
BOS, EOS = 1, 2


@pytest.fixture
def model(llama: Path) -> hs.Checkpoint:
    """A tiny Llama with a tokenizer: 4 layers x 2 groups, 64 positions."""
    return hs.open_checkpoint(add_tokenizer(llama))


def without_ends(folder: Path) -> hs.Checkpoint:
    """A model whose tokenizer has no token for a text's beginning or its end, and one (4) for a line's end."""
    words = {"<pad>": 0, "<unk>": 3, "\n": 4} | {f"w{n}": n for n in range(5, tiny.VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(" ", "removed")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return hs.open_checkpoint(folder)


def numbers(text: str) -> list[int]:
    """The tokens of a text of words, as the words say."""
    return [int(word.removeprefix("w")) for word in text.split()]


def windows(ids: list[int], window: int, *first: int) -> list[list[int]]:
    body = window - len(first)
    return [[*first, *ids[at : at + body]] for at in range(0, len(ids) - body + 1, body)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def refusal(source: Any, checkpoint: hs.Checkpoint, **options: Any) -> str:
    """What the person at the keyboard is told, in one line."""
    with pytest.raises(CalibrationError) as caught:
        Calibration.load(source, checkpoint, **{"tokens": 64, "window": WINDOW, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- windows


def test_a_text_with_as_many_windows_as_asked_gives_them_all_as_they_stand(
    model: hs.Checkpoint, tmp_path: Path
) -> None:
    text = a_text(tmp_path / "text.txt", words=15 * 8 + 7)
    found = Calibration.load(text, model, tokens=16 * 8 + 15, window=WINDOW)
    assert found.tokens.tolist() == windows(numbers(text.read_text()), WINDOW, BOS)
    assert (found.tokens.dtype, found.bos, found.source, found.seed) == (torch.int64, True, str(text), 0)


def test_windows_are_chosen_at_random_without_replacement_and_stay_in_order(
    model: hs.Checkpoint, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{4 + i // 12}" for i in range(15 * 70)))
    every = windows(numbers(text.read_text()), WINDOW, BOS)
    found = [Calibration.load(text, model, tokens=512, window=WINDOW, seed=seed).tokens.tolist() for seed in range(6)]
    for one in found:
        places = [every.index(row) for row in one]
        assert len(places) == 512 // WINDOW
        assert places == sorted(set(places))
        assert places != list(range(len(places)))
    assert len({str(one) for one in found}) == 6


def test_one_seed_gives_one_digest_and_another_seed_another(model: hs.Checkpoint, tmp_path: Path) -> None:
    text = a_text(tmp_path / "text.txt", words=900)
    torch.manual_seed(1)
    one = Calibration.load(text, model, tokens=64, window=WINDOW, seed=3)
    torch.manual_seed(2)
    again = Calibration.load(text, model, tokens=64, window=WINDOW, seed=3)
    other = Calibration.load(text, model, tokens=64, window=WINDOW, seed=4)
    assert one.digest == again.digest != other.digest


@pytest.mark.parametrize("bos", [None, True, False])
def test_windows_are_opened_where_the_model_has_an_opening_token_or_as_asked(
    bos: bool | None, model: hs.Checkpoint, tmp_path: Path
) -> None:
    text = a_text(tmp_path / "text.txt", words=120)
    found = Calibration.load(text, model, tokens=128, window=WINDOW, bos=bos)
    first = () if bos is False else (BOS,)
    assert found.bos is (bos is not False)
    assert found.tokens.tolist() == windows(numbers(text.read_text()), WINDOW, *first)[:8]


def test_a_model_without_an_opening_token_has_windows_of_text_alone(llama: Path, tmp_path: Path) -> None:
    text = a_text(tmp_path / "text.txt", words=120)
    model = hs.open_checkpoint(add_tokenizer(llama, bos=False))
    found = Calibration.load(text, model, tokens=112, window=WINDOW)
    assert not found.bos
    assert found.tokens.tolist() == windows(numbers(text.read_text()), WINDOW)
    assert "no beginning-of-text token" in refusal(text, model, bos=True)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_an_encoder_is_calibrated_on_a_text_like_any_model(name: str, tmp_path: Path) -> None:
    text = a_text(tmp_path / "text.txt", words=120)
    model = hs.open_checkpoint(add_tokenizer(tiny.make(name, tmp_path / name)))
    found = Calibration.load(text, model, tokens=128, window=WINDOW)
    assert found.tokens.tolist() == windows(numbers(text.read_text()), WINDOW, BOS)


def test_fewer_windows_than_asked_are_all_used_and_the_log_says_how_many(
    model: hs.Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    text = a_text(tmp_path / "text.txt", words=15 * 3)
    with caplog.at_level(logging.WARNING, logger="headshare"):
        found = Calibration.load(text, model, tokens=10 * WINDOW, window=WINDOW)
    assert found.tokens.shape == (3, WINDOW)
    (note,) = caplog.messages
    assert "3 windows of 16 tokens (48 tokens)" in note
    assert "10 windows were asked for" in note
    assert capsys.readouterr().out == ""


def test_a_text_shorter_than_one_window_is_refused(model: hs.Checkpoint, tmp_path: Path) -> None:
    said = refusal(a_text(tmp_path / "text.txt", words=14), model)
    assert "14 tokens, less than one window of 16" in said
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("")
        assert "0 tokens, less than one window of 16" in refusal(tmp_path / name, model)


def test_a_window_longer_than_the_model_reads_is_refused_before_anything_is_read(model: hs.Checkpoint) -> None:
    assert "65 tokens are longer than the model's 64" in refusal("nowhere", model, window=65)
    assert "1 tokens predicts nothing" in refusal("nowhere", model, window=1)
    assert "15 tokens are less than one window of 16" in refusal("nowhere", model, tokens=15)


def test_positions_that_an_encoder_keeps_for_padding_are_not_counted(tmp_path: Path) -> None:
    model = hs.open_checkpoint(add_tokenizer(tiny.make("roberta", tmp_path / "roberta")))
    text = a_text(tmp_path / "text.txt", words=120)
    assert "longer than the model's 63" in refusal(text, model, window=64)
    assert Calibration.load(text, model, tokens=63, window=63).tokens.shape == (1, 63)


def test_a_tokenizer_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    model = hs.open_checkpoint(add_tokenizer(llama, extra=5))
    (tmp_path / "text.txt").write_text(f"w{tiny.VOCABULARY} " * 100)
    assert "belongs to another model" in refusal(tmp_path / "text.txt", model)


def test_a_model_without_a_tokenizer_is_refused(llama: Path, tmp_path: Path) -> None:
    said = refusal(a_text(tmp_path / "text.txt"), hs.open_checkpoint(llama))
    assert "has no tokenizer" in said


def test_a_name_that_is_nothing_known_is_told_what_there_is(
    model: hs.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal("wikitext", model)
    assert all(word in said for word in ("'wikitext'", "UTF-8", ".jsonl", "'self'", "hf:NAME", "hf:wikitext"))
    assert "hf:missing.txt" not in refusal(Path("missing.txt"), model)
    assert "there is no file 'self'" in refusal(Path("self"), model)  # a path is a path
    assert "there is no file" in refusal(tmp_path, model)
    assert "name too long" in refusal("x" * 5000, model)


# ---- a text file


def test_a_file_that_is_not_utf_8_is_refused(model: hs.Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("w4 é ".encode("latin-1") * 40)
    assert "not UTF-8" in refusal(tmp_path / "latin.txt", model)
    (tmp_path / "cut.txt").write_bytes(b"w4 " * 40 + "é".encode()[:1])
    assert "not UTF-8" in refusal(tmp_path / "cut.txt", model)


def test_line_ends_of_other_systems_are_read_as_python_reads_them(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert documents.text_of(tmp_path / "text.txt", 0, 15) == (tmp_path / "text.txt").read_text() == "one\ntwo\nthree\n"


def test_a_stretch_has_the_characters_that_are_whole_in_it(tmp_path: Path) -> None:
    text, path = "aé漢🙂" * 4, tmp_path / "text.txt"
    path.write_text(text)
    raw = text.encode()
    for start in range(len(raw)):
        for stop in range(start + 4, len(raw) + 1):
            found = documents.text_of(path, start, stop)
            assert raw[start:stop].decode(errors="ignore") == found


def spoken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is given to the tokenizer from now on."""
    seen: list[str] = []
    ids_of = calibration.ids_of

    def listen(tokenizer: Any, text: str) -> list[int]:
        seen.append(text)
        return ids_of(tokenizer, text)

    monkeypatch.setattr(calibration, "ids_of", listen)
    return seen


def test_of_a_large_file_a_bounded_part_is_read_from_all_over_it(
    model: hs.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, words = tmp_path / "text.txt", 200_000
    text.write_text(" ".join(WORDS[i * len(WORDS) // words] for i in range(words)))
    seen = spoken(monkeypatch)
    found = Calibration.load(text, model, tokens=1024, window=WINDOW)
    assert found.tokens.shape == (64, WINDOW)
    assert sum(map(len, seen)) <= 1024 * BYTES_PER_TOKEN < text.stat().st_size / 40
    body = found.tokens[:, 1:]
    body = body[(body != 3).all(dim=1)]  # a stretch may begin within a word
    assert body.amin() < 4 + 12
    assert body.amax() > 100 - 12
    assert (body.amax(dim=1) - body.amin(dim=1)).max() <= 1  # no window reaches over a gap
    assert (body[1:, 0] >= body[:-1, 0]).all()
    assert found.digest != Calibration.load(text, model, tokens=1024, window=WINDOW, seed=1).digest
    assert found.digest == Calibration.load(text, model, tokens=1024, window=WINDOW).digest


@given(st.integers(0, 10**13), st.integers(1, 10**6), st.integers(1, 300), st.integers(0, 9))
def test_stretches_lie_in_the_file_apart_from_one_another(size: int, length: int, count: int, seed: int) -> None:
    found = calibration._stretches(size, length, count, seed)
    assert sum(stop - start for start, stop in found) == min(size, length * count)
    assert found[0][0] >= 0
    assert found[-1][1] <= size
    assert all(before[1] <= after[0] for before, after in pairwise(found))


# ---- documents


def test_documents_are_joined_by_the_end_of_text_token(model: hs.Checkpoint, tmp_path: Path) -> None:
    texts = ["w10 w11 w12", "", "w20 w21", "  ", "w30 w31 w32 w33"]
    found = Calibration.load(jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), model, tokens=12, window=12)
    assert found.tokens.tolist() == [[BOS, 10, 11, 12, EOS, 20, 21, EOS, 30, 31, 32, 33]]


def test_documents_are_joined_by_a_lines_end_where_no_token_ends_a_text(llama: Path, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "a.jsonl", [{"text": "w10 w11"}, {"text": "w20 w21"}])
    found = Calibration.load(rows, without_ends(llama), tokens=5, window=5)
    assert found.tokens.tolist() == [[10, 11, 4, 20, 21]]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"id": "w1", "text": "w9 " * 20}, None),
        ({"id": 7, "body": "w9 " * 20, "tags": ["x"]}, None),
        ({"title": "w1", "text": "w1", "body": "w9 " * 20}, "body"),
    ],
)
def test_a_rows_text_is_under_text_or_in_its_one_string_or_where_one_says(
    row: dict[str, Any], field: str | None, model: hs.Checkpoint, tmp_path: Path
) -> None:
    found = Calibration.load(jsonl(tmp_path / "a.jsonl", [row]), model, tokens=16, window=16, field=field)
    assert found.tokens.tolist() == [[BOS] + [9] * 15]


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        ('{"text": "w9', None, "not JSON"),
        ("\xff", None, "not JSON"),
        ("[" * 100_000, None, "not JSON"),
        ('["w9"]', None, "no object but ['w9']"),
        ('{"text": 7}', None, "7 under 'text'"),
        ('{"text": null}', None, "None under 'text'"),
        ('{"title": "w9"}', None, "no field 'text' and no text there; its fields are 'title'"),
        ('{"text": "w9"}', "body", "no field 'body' and no text there; its fields are 'text'"),
        ('{"text": "\\ud800"}', None, "half a character"),
    ],
)
def test_a_row_that_is_no_document_is_named_by_its_line(
    line: str, field: str | None, words: str, model: hs.Checkpoint, tmp_path: Path
) -> None:
    path, good = tmp_path / "a.jsonl", json.dumps({field or "text": "w9 w9"}).encode()
    path.write_bytes(good + b"\n\n" + good + b"\n" + line.encode("latin-1") + b"\n")
    said = refusal(path, model, field=field, tokens=32_768)
    assert f"line 4 of {path}" in said
    assert words in said


@pytest.mark.parametrize(("row", "strings"), [({"a": "x", "b": "y"}, 2), ({"a": 1}, 0), ({}, 0)])
def test_rows_that_leave_the_field_open_ask_for_it(
    row: dict[str, Any], strings: int, model: hs.Checkpoint, tmp_path: Path
) -> None:
    said = refusal(jsonl(tmp_path / "a.jsonl", [row]), model)
    assert f"none is called 'text', and {strings} of" in said
    assert "Name one: --field NAME" in said


def test_a_field_of_what_has_no_fields_is_refused(model: hs.Checkpoint, tmp_path: Path) -> None:
    assert "no fields to take 'body' from" in refusal(a_text(tmp_path / "text.txt"), model, field="body")
    assert "no fields to take 'body' from" in refusal("self", model, field="body")


def test_of_a_large_file_of_rows_whole_ones_are_read_from_all_over_it(
    model: hs.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [WORDS[i * len(WORDS) // 9000] for i in range(9000)]
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"w4 {word} w100"} for word in words])
    seen = spoken(monkeypatch)
    found = Calibration.load(path, model, tokens=512, window=WINDOW)
    texts = {f"w4 {word} w100" for word in words}
    assert sum(map(len, seen)) <= 512 * BYTES_PER_TOKEN < path.stat().st_size / 20
    assert set(seen) <= texts
    inner = [token for token in found.tokens.flatten().tolist() if token not in (BOS, EOS, 4, 100)]
    assert (min(inner) < 16, max(inner) > 88, inner == sorted(inner)) == (True, True, True)
    assert found.digest != Calibration.load(path, model, tokens=512, window=WINDOW, seed=1).digest


def test_a_stretch_that_begins_with_a_row_has_that_row(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", list(range(100, 200)))  # four bytes a row

    def rows(*places: int) -> list[int]:
        return [row for _, row in documents.json_rows(path, *places)]

    assert rows(40, 48, 60) == [110, 111]
    assert rows(41, 49, 60) == [111, 112]
    assert rows(0, 4, 60) == [100]
    assert rows(41, 43, 60) == [111]  # none begins there, and this is the next
    assert rows(41, 43, 44) == []


def test_the_line_of_a_bad_row_is_right_in_a_large_file_too(model: hs.Checkpoint, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": number} for number in range(20_000)])
    said = refusal(path, model)
    number = int(said.split(" has ")[1].split(" under ")[0])
    assert f"line {number + 1} of " in said
    assert number > 0


def test_a_row_without_end_is_refused(model: hs.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "ROW_BYTES", 100)
    path = jsonl(tmp_path / "a.jsonl", [{"text": "w9"}, {"text": "w9 " * 100}])
    assert f"line 2 of {path} is longer than 100 bytes" in refusal(path, model)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_of_long_documents_each_gives_its_share_and_no_more_is_tokenised_than_of_a_text(
    rows: int, seed: int, model: hs.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"w{n} " * (300_000 // rows)} for n in range(50, 50 + rows)])
    seen = spoken(monkeypatch)
    found = Calibration.load(path, model, tokens=512, window=WINDOW, seed=seed)
    assert found.tokens.shape == (32, WINDOW)
    assert sorted(set(found.tokens.flatten().tolist())) == [BOS, *range(50, 50 + rows)]
    assert (found.tokens[1:, 1] >= found.tokens[:-1, 1]).all()
    sizes = [len(text) for text in seen]
    assert sum(sizes) <= 512 * BYTES_PER_TOKEN
    assert min(sizes) > 512 * BYTES_PER_TOKEN / rows / 2


# ---- written by the model itself


@torch.no_grad()
def drawn(folder: Path, starts: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """What a stock model gives when each next token is drawn from its distribution, all of the text read each time."""
    stock = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    text = starts
    for _ in range(count):
        chances = torch.softmax(stock(input_ids=text).logits[:, -1].float(), dim=-1)
        text = torch.cat([text, torch.multinomial(chances, 1)], dim=1)
    return text


def test_text_of_its_own_is_drawn_from_the_models_distribution(model: hs.Checkpoint) -> None:
    before = torch.random.get_rng_state()
    found = Calibration.load("self", model, tokens=5 * WINDOW, window=WINDOW, seed=9)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(found.tokens, drawn(model.path, torch.full((5, 1), BOS), WINDOW - 1, 9))
    assert (found.bos, found.source) == (True, f"text written by {model.name}")


def test_text_of_its_own_is_written_in_short_numbers_where_the_device_multiplies_them(
    model: hs.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def noted(*given: object, **options: object) -> object:
        loaded.append(written_load(*given, **options))
        return loaded[-1]

    written_load = written.load_model
    monkeypatch.setattr(written, "load_model", noted)
    for short in (False, True):
        monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda device, short=short: short)
        Calibration.load("self", model, tokens=2 * WINDOW, window=WINDOW)
    assert [each.dtype for each in loaded] == [torch.float32, torch.bfloat16]
    # positions stay exact
    assert {buffer.dtype for each in loaded for buffer in each.buffers()} == {torch.float32}
    assert precision.short_type("auto") is None  # nobody knows yet which devices those are


def test_text_of_its_own_is_reproducible_and_another_seeds_is_another(model: hs.Checkpoint) -> None:
    options: dict[str, Any] = {"tokens": 20 * 8, "window": 8}
    one, again = (Calibration.load("self", model, **options) for _ in range(2))
    assert one.digest == again.digest != Calibration.load("self", model, **options, seed=1).digest
    assert len({tuple(row) for row in one.tokens.tolist()}) == 20


def test_a_checkpoints_own_way_of_generating_does_not_colour_the_text(model: hs.Checkpoint) -> None:
    plain = Calibration.load("self", model, tokens=8 * WINDOW, window=WINDOW)
    settings = {"do_sample": True, "temperature": 0.1, "top_k": 2, "repetition_penalty": 3.0, "max_length": 5}
    ends = plain.tokens[:, 2].tolist()  # were they to end the text, every window would be short
    (model.path / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": ends}))
    assert Calibration.load("self", model, tokens=8 * WINDOW, window=WINDOW).digest == plain.digest


def test_without_an_opening_token_a_text_begins_with_a_random_word(llama: Path) -> None:
    model = hs.open_checkpoint(add_tokenizer(llama, bos=False))
    found = Calibration.load("self", model, tokens=40 * 8, window=8)
    starts = found.tokens[:, :1]
    assert not found.bos
    assert starts.min() >= 4  # not a special token
    assert len(starts.unique()) > 20
    assert torch.equal(found.tokens[:16], drawn(llama, starts[:16], 7, 0))
    assert found.digest == Calibration.load("self", model, tokens=40 * 8, window=8).digest


def test_a_shared_model_writes_too(model: hs.Checkpoint, tmp_path: Path) -> None:
    shared = hs.share(model, hs.make_plan(hs.score_units(model), 0.5)).save(tmp_path / "shared")
    found = Calibration.load("self", hs.open_checkpoint(shared), tokens=2 * WINDOW, window=WINDOW)
    assert found.tokens.shape == (2, WINDOW)


def test_writing_says_how_far_it_has_come(
    model: hs.Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("headshare.progress.PLAIN_INTERVAL_S", 0.0)
    with shown():
        Calibration.load("self", model, tokens=40 * 4, window=4)
    told = capsys.readouterr().err
    assert "writes 120 tokens\n" in told
    assert "steps of writing, 16 windows at a time: 4 of 9, about " in told


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet"])
def test_an_encoder_writes_nothing_and_is_told_to_bring_a_file(name: str, tmp_path: Path) -> None:
    model = hs.open_checkpoint(add_tokenizer(tiny.make(name, tmp_path / name)))
    said = refusal("self", model)
    assert "does not predict the next token" in said
    assert "Give a text file" in said


def test_a_damaged_model_is_refused_before_it_writes(model: hs.Checkpoint) -> None:
    weights = load_file(model.path / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model.path / "model.safetensors", metadata={"format": "pt"})
    assert "NaN or infinite" in refusal("self", hs.open_checkpoint(model.path))


# ---- a data set


class Library(ModuleType):
    """A stand-in for `datasets`: some rows, and what was asked of it."""

    def __init__(self, rows: Callable[[], Iterator[Any]]) -> None:
        super().__init__("datasets")
        self.rows, self.asked, self.read = rows, [], 0

    def load_dataset(self, *words: Any, **options: Any) -> Iterator[Any]:
        self.asked.append((words, options))
        return self._count()

    def _count(self) -> Iterator[Any]:
        for row in self.rows():
            self.read += 1
            yield row


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library(lambda: iter([{"text": f"w{n} w{n}"} for n in range(4, 100)] * 1000))
    monkeypatch.setitem(sys.modules, "datasets", found)
    return found


@pytest.mark.parametrize(
    ("source", "words", "split"),
    [
        ("hf:allenai/c4", ("allenai/c4", None), "train"),
        ("hf:allenai/c4:en", ("allenai/c4", "en"), "train"),
        ("hf:allenai/c4:en:validation", ("allenai/c4", "en"), "validation"),
        ("hf:allenai/c4::validation", ("allenai/c4", None), "validation"),
    ],
)
def test_a_data_set_is_streamed_and_none_of_its_code_is_run(
    source: str, words: tuple[str, str | None], split: str, library: Library, model: hs.Checkpoint
) -> None:
    found = Calibration.load(source, model, tokens=64, window=WINDOW)
    assert library.asked == [(words, {"split": split, "streaming": True, "trust_remote_code": False})]
    assert library.read < 64 * BYTES_PER_TOKEN / 4  # five characters a row at least; it has 96 000 rows
    read = [token for n in range(4, 100) for token in (n, n, EOS)] * 2
    assert all(row in windows(read, WINDOW, BOS) for row in found.tokens.tolist())
    assert (found.tokens.shape, found.source) == ((4, WINDOW), source)


def test_a_bad_row_of_a_data_set_is_named_by_its_number(library: Library, model: hs.Checkpoint) -> None:
    library.rows = lambda: iter([{"text": "w9"}, {"text": None}])
    assert "row 1 of hf:some/set has None under 'text'" in refusal("hf:some/set", model)


def test_what_the_library_says_is_passed_on_in_one_line(library: Library, model: hs.Checkpoint) -> None:
    def broken() -> Iterator[Any]:
        yield {"text": "w9"}
        raise ConnectionError("the hub is away.\nsecond line")

    library.rows = broken
    said = refusal("hf:some/set", model)
    assert "hf:some/set cannot be read: the hub is away. second line. It is written hf:NAME[:CONFIG][:SPLIT]" in said


@pytest.mark.parametrize("source", ["hf:", "hf::en", "hf:a:b:c:d"])
def test_a_data_sets_name_that_is_none_is_refused(source: str, library: Library, model: hs.Checkpoint) -> None:
    assert "names no data set" in refusal(source, model)
    assert library.asked == []


def test_without_the_library_one_is_told_how_to_install_it(
    model: hs.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert install("data") in refusal("hf:some/set", model)


@pytest.mark.filterwarnings("default")  # the library's own
def test_the_library_itself_reads_a_folder(
    model: hs.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", [{"text": "w10 w11 w12"}, {"text": "w20 w21 w22"}])
    found = Calibration.load(f"hf:{tmp_path / 'set'}", model, tokens=8, window=8)
    assert found.tokens.tolist() == [[BOS, 10, 11, 12, EOS, 20, 21, 22]]
    assert "test" in refusal(f"hf:{tmp_path / 'set'}::test", model)


# ---- splitting, and knowing a text again


def counted(count: int, seed: int = 0) -> hs.Calibration:
    return hs.Calibration(torch.arange(count * 2).view(count, 2), True, "a text", seed)


@given(st.integers(2, 200), st.floats(0.001, 0.999), st.integers(0, 5))
def test_a_split_parts_the_windows_in_order_and_leaves_neither_side_empty(count: int, share: float, seed: int) -> None:
    whole = counted(count, seed)
    fit, held = whole.split(share)
    assert len(fit.tokens) >= 1
    assert len(held.tokens) == min(max(round(count * share), 1), count - 1)
    both = fit.tokens[:, 0].tolist(), held.tokens[:, 0].tolist()
    assert both == (sorted(both[0]), sorted(both[1]))
    assert sorted(both[0] + both[1]) == whole.tokens[:, 0].tolist()
    assert (fit.bos, fit.source, fit.seed) == (held.bos, held.source, held.seed) == (True, "a text", seed)
    assert [one.digest for one in whole.split(share)] == [fit.digest, held.digest]


def test_mixing_keeps_all_windows_and_draws_their_order_by_the_seed() -> None:
    """So the first of them stand for all of the text."""
    whole, other = counted(100, 7), counted(100, 8)
    mixed = whole.mixed()
    assert sorted(mixed.tokens[:, 0].tolist()) == whole.tokens[:, 0].tolist()
    assert (mixed.tokens[:, 1] - mixed.tokens[:, 0]).unique().tolist() == [1]
    assert mixed.tokens.equal(whole.mixed().tokens)
    assert not mixed.tokens.equal(other.mixed().tokens)
    first = mixed.tokens[:25, 0]
    assert 50 < first.double().mean() < 150
    assert first.unique().numel() == 25
    assert (mixed.source, mixed.seed, mixed.bos) == (whole.source, whole.seed, whole.bos)


def test_a_split_is_the_seeds_and_not_always_the_end() -> None:
    held = {tuple(counted(64, seed).split()[1].tokens[:, 0].tolist()) for seed in range(5)}
    assert len(held) == 5
    assert {len(rows) for rows in held} == {8}


def test_one_window_cannot_be_split_and_a_share_is_between_0_and_1() -> None:
    with pytest.raises(CalibrationError, match=r"a text gave 1 window, which cannot be split .* at least two"):
        counted(1).split()
    for share in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(CalibrationError, match="between 0 and 1"):
            counted(8).split(share)


def test_a_digest_is_of_the_tokens_their_shape_and_their_opening_alone() -> None:
    ids = random.Random(0).sample(range(2**40), 12)
    one = hs.Calibration(torch.tensor(ids).view(3, 4), False, "a text", 0)
    assert one.digest == hashlib.sha256(b"(3, 4) False" + struct.pack("<12q", *ids)).hexdigest()
    assert one.digest == hs.Calibration(one.tokens, False, "another", 5).digest
    others = [
        hs.Calibration(one.tokens.view(4, 3), False, "a text", 0),
        hs.Calibration(one.tokens, True, "a text", 0),
        hs.Calibration(one.tokens + 1, False, "a text", 0),
        hs.Calibration(one.tokens.flip(0), False, "a text", 0),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 5
    assert hs.Calibration(torch.ones(2, 2, dtype=torch.int32), True, "", 0).digest == (
        hs.Calibration(torch.ones(2, 2, dtype=torch.int64), True, "", 0).digest
    )
