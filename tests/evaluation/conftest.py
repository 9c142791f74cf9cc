"""Fixtures of the evaluations."""

from pathlib import Path

import pytest

from support.byte_level import make_writer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose logits are far from uniform, with a byte-level tokenizer."""
    return make_writer(tmp_path_factory.mktemp("evaluated") / "model")
