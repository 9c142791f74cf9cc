"""Fixtures of the evaluations."""

from pathlib import Path

import pytest

import headshare as hs
from headshare.evaluation.harness import Runner, Settings
from support.byte_level import make_writer
from support.questions import make_data


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose logits are far from uniform, with a byte-level tokenizer."""
    return make_writer(tmp_path_factory.mktemp("evaluated") / "model")


@pytest.fixture
def runner(model: Path) -> Runner:
    return Runner.of(hs.open_checkpoint(model), Settings(batch_size=3))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a file for every task."""
    return make_data(tmp_path / "data")
