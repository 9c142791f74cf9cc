"""Fixtures of the commands."""

from pathlib import Path

import pytest

import headshare as hs
from support.texts import a_text, add_tokenizer


@pytest.fixture
def model(llama: Path) -> Path:
    """A tiny Llama with a tokenizer: 4 layers x 2 groups."""
    return add_tokenizer(llama)


@pytest.fixture
def shared(model: Path, tmp_path: Path) -> Path:
    """The same, shared at a ratio of a half."""
    dense = hs.open_checkpoint(model)
    return hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "shared")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return a_text(tmp_path / "text.txt")
