"""Fixtures of the runs of training."""

from pathlib import Path as Folder

import pytest

from support import tiny
from support.texts import a_text, add_tokenizer


@pytest.fixture(name="model")
def a_model(tmp_path: Folder) -> Folder:
    """A tiny Llama with a tokenizer."""
    return add_tokenizer(tiny.make_llama(tmp_path / "model", initializer_range=0.2))


@pytest.fixture(name="text")
def some_text(tmp_path: Folder) -> Folder:
    return a_text(tmp_path / "text.txt", words=15 * 40)
