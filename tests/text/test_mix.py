"""The mix of texts that comes with headshare may be passed on, has many kinds, and calibrates any model."""

import json
from collections import Counter
from pathlib import Path

import pytest

import headshare as hs
from headshare.errors import CalibrationError
from headshare.text.documents import MIX_FILE
from headshare.text.tokens import Calibration
from support.byte_level import make_writer

FREE = {"public domain", "PSF-2.0", "MIT", "Apache-2.0", "BSD-3-Clause"}


def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in MIX_FILE.read_text(encoding="utf-8").splitlines()]


def test_every_document_says_what_it_is_and_may_be_passed_on() -> None:
    assert {row["licence"] for row in rows()} == FREE
    assert all(row["source"] and 300 <= len(row["text"]) <= 5000 for row in rows())
    assert MIX_FILE.stat().st_size < 400_000


def test_no_kind_has_more_than_a_third() -> None:
    kinds: Counter[str] = Counter()
    for row in rows():
        kinds[row["kind"].split(" ")[0]] += len(row["text"])
    assert {"prose", "speech", "manual", "code", "web", "questions", "in"} == set(kinds)
    assert max(kinds.values()) < kinds.total() / 3
    assert len({row["kind"] for row in rows() if row["kind"].startswith("in ")}) == 17


def test_the_documentation_names_every_kind_and_licence() -> None:
    page = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()
    for row in rows():
        assert row["kind"].removeprefix("in ") in page
        assert row["licence"] in page


def test_it_is_a_text_to_calibrate_on_without_a_file(tmp_path: Path) -> None:
    model = hs.open_checkpoint(make_writer(tmp_path / "model"))
    made = Calibration.load("mix", model, tokens=64 * 32, window=64)
    assert made.tokens.shape == (32, 64)
    assert made.source == "headshare's mix of texts"
    assert made.digest == Calibration.load("mix", model, tokens=64 * 32, window=64).digest
    with pytest.raises(CalibrationError, match="there are no fields to take 'body' from"):
        Calibration.load("mix", model, tokens=64 * 32, window=64, field="body")
    with pytest.raises(CalibrationError, match="there is no file 'mix'"):
        Calibration.load(Path("mix"), model, tokens=64 * 32, window=64)  # a path is a path
