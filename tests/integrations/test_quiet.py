"""transformers is silenced while it loads, and is as loud afterwards as it was before."""

import ast
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

import headshare
from headshare.integrations.transformers.loading import quiet

SOURCE = Path(headshare.__file__).parent
# the modules in which models, tokenizers and configurations are made, behind the checks of `checkpoint/remote_code.py`
DOORS = {"integrations/transformers/loading.py", "calibration/layerwise/shell.py"}


@pytest.fixture
def loud() -> Iterator[None]:
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.INFO)
    logging.enable_progress_bar()
    yield
    logging.set_verbosity(level)
    if not bars:
        logging.disable_progress_bar()


def how_loud() -> tuple[int, bool, list[object]]:
    return logging.get_verbosity(), logging.is_progress_bar_enabled(), [*warnings.filters]


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize("ends_first", [0, 1])
def test_blocks_of_threads_that_overlap_leave_everything_as_it_was(ends_first: int) -> None:
    before = how_loud()
    began = [threading.Event(), threading.Event()]
    may_end = [threading.Event(), threading.Event()]

    def block(number: int) -> None:
        with quiet():
            began[number].set()
            may_end[number].wait(10)

    threads = [threading.Thread(target=block, args=(number,)) for number in range(2)]
    for thread, event in zip(threads, began, strict=True):
        thread.start()
        event.wait(10)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
    for number in (ends_first, 1 - ends_first):
        assert logging.get_verbosity() == logging.ERROR
        may_end[number].set()
        threads[number].join()
    assert how_loud() == before


@pytest.mark.usefixtures("loud")
def test_a_block_that_fails_puts_back_what_was() -> None:
    before = how_loud()
    with pytest.raises(ValueError, match="broken"), quiet(), quiet():
        warnings.warn("unheard", UserWarning, stacklevel=1)
        raise ValueError("broken")
    assert how_loud() == before


def test_no_other_module_lets_transformers_choose_a_class() -> None:
    """Its automatic classes may run code of a checkpoint, or ask on standard input whether to."""
    for path in sorted(SOURCE.rglob("*.py")):
        found = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (getattr(node, "attr", ""), getattr(node, "id", ""), getattr(node, "name", ""))
            if isinstance(name, str) and name.startswith(("AutoModel", "AutoTokenizer", "AutoConfig", "AutoProcessor"))
        }
        assert not found or str(path.relative_to(SOURCE)) in DOORS, path
