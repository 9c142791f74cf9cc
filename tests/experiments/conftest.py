"""Fixtures of the comparisons."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support import tiny
from support.byte_level import make_writer
from support.command_line import told
from support.texts import a_text, add_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a text to measure on and one to calibrate on."""
    folder = tmp_path_factory.mktemp("compared")
    add_tokenizer(tiny.make_llama(folder / "model", initializer_range=0.2))
    a_text(folder / "test", 200, seed=1)
    a_text(folder / "calibration", 1200, seed=2)
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    return told(capsys, monkeypatch)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose logits are far from uniform, with a byte-level tokenizer."""
    return make_writer(tmp_path_factory.mktemp("compared") / "model")
