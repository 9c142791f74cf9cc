"""Fixtures shared by all tests."""

import gc
import logging
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping
import torch

if find_spec("triton") and not torch.cuda.is_available():  # triton decides at its import whether it interprets
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        import triton  # noqa: F401

import transformers

pytest.register_assert_rewrite("support")

from support.shapes import checked  # noqa: E402 - the same

jaxtyping.jaxtyped = checked

from headshare import precision  # noqa: E402 - the same
from headshare.calibration.costs import measured, sensitivity  # noqa: E402 - the same
from headshare.calibration.refit import layer_fit, refitter  # noqa: E402 - the same
from headshare.calibration.refit.steps import whole_model  # noqa: E402 - the same
from headshare.evaluation import harness  # noqa: E402 - the same
from support import tiny  # noqa: E402 - after the line above
from support.command_line import Run, run_in  # noqa: E402 - the same
from support.questions import some_tasks  # noqa: E402 - the same
from support.undrawn import draw_nothing_without_memory  # noqa: E402 - the same

# Layers multiply float32 numbers, as on a machine that has no faster ones: figures are the same everywhere.
# What shorter numbers change is measured in tests that ask for them.
precision._multiplies_bfloat16 = lambda _: False
for module in (measured, sensitivity, layer_fit, refitter, whole_model):
    module.short_layers = lambda _: precision.full_float32()
harness.tasks_of_harness = some_tasks
draw_nothing_without_memory()
torch.set_num_threads(1)  # tests of kill -9 fork this process, and a fork must not wait for threads that it lacks
transformers.utils.logging.set_verbosity(logging.ERROR)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny grouped-query Llama checkpoint: 4 layers x 2 groups."""
    return tiny.make_llama(tmp_path / "llama")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in this process, in the test's own folder, as the console script does."""
    return run_in(tmp_path, capsys, monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary files of this process and its children lie in a folder that no other test process looks into.

    A test that does without locks leaves files that others would take for those of a dead run. Everybody may enter it,
    as tests act for another user, too.
    """
    tmp_path_factory.getbasetemp()  # pytest's own folders stay where they are kept
    with tempfile.TemporaryDirectory(prefix="headshare-tests-") as place:
        Path(place).chmod(0o755)
        with mock.patch.dict(os.environ, {"TMPDIR": place}), mock.patch.object(tempfile, "tempdir", place):
            yield


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def pytest_collection_finish() -> None:
    """Millions of objects of imported libraries are not gone through again at every collection."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What was set aside is freed like anything else."""
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of a GPU say so, instead of failing, where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
