"""Fixtures shared by all tests."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import tiny

torch.set_num_threads(1)  # tests of kill -9 fork this process, and a fork must not wait for threads that it lacks
transformers.utils.logging.set_verbosity(logging.ERROR)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny grouped-query Llama checkpoint: 4 layers x 2 groups."""
    return tiny.make_llama(tmp_path / "llama")


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
