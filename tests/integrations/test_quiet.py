"""transformers is silenced while it loads, is as loud afterwards as before, and is entered by few doors."""

import ast
import re
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
DOORS = ("integrations/transformers/", "calibration/layerwise/shell.py")
# classes of ours that have a `from_config` too
OURS = ("SharingEntry",)


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


def trees() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield str(path.relative_to(SOURCE)), ast.parse(path.read_text())


def test_no_other_module_lets_transformers_choose_a_class() -> None:
    """Its automatic classes may run code of a checkpoint, or ask on standard input whether to."""
    for module, tree in trees():
        names = {getattr(node, kind, "") for node in ast.walk(tree) for kind in ("attr", "id", "name")}
        found = {name for name in names if re.match(r"Auto(Model|Tokenizer|Config|Processor)", str(name))}
        assert not found or module.startswith(DOORS), (module, found)


def test_whatever_transformers_loads_it_is_told_to_run_no_code() -> None:
    loading = 0
    for module, tree in trees():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if getattr(call.func, "attr", "") in ("from_pretrained", "from_config"):
                told = {keyword.arg: keyword.value for keyword in call.keywords}
                answer = told.get("trust_remote_code")
                known = isinstance(answer, ast.Constant) and answer.value is False
                ours = getattr(getattr(call.func, "value", None), "id", "") in OURS
                assert ours or known or None in told, (module, call.lineno)  # None: **LOCAL_ONLY and options
                loading += not ours
    assert loading >= 4
