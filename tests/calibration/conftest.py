"""Fixtures of the calibrated runs."""

from pathlib import Path

import pytest

import headshare as hs
from support import tiny
from support.calibrated import copy_of
from support.command_line import Run
from support.texts import a_text, add_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, shared too, and a text with more windows than are asked for."""
    folder = tmp_path_factory.mktemp("source")
    opened = hs.open_checkpoint(add_tokenizer(tiny.make_llama(folder / "model")))
    hs.share(opened, hs.make_plan(hs.score_units(opened), 0.5)).save(folder / "shared")
    a_text(folder / "text", 600)
    return folder


@pytest.fixture
def things(source: Path, tmp_path: Path, run: Run) -> Path:
    """These in the folder that commands run in: the model by a link, and a copy of the shared one that names it so."""
    (tmp_path / "model").symlink_to(source / "model")
    (tmp_path / "text").write_bytes((source / "text").read_bytes())
    copy_of(source / "shared", tmp_path / "shared")
    return tmp_path
