"""The harness is kept from asking git for a commit, for as long as a task runs and no longer."""

import pytest
from lm_eval import evaluator

from headshare.evaluation.harness import _no_commit_asked


def test_the_harness_asks_for_no_commit_while_it_runs_and_can_again_after_it() -> None:
    asks = evaluator.get_git_commit_hash
    with _no_commit_asked():
        assert evaluator.get_git_commit_hash is not asks
        assert evaluator.get_git_commit_hash() is None
    assert evaluator.get_git_commit_hash is asks
    with pytest.raises(KeyError), _no_commit_asked():
        raise KeyError
    assert evaluator.get_git_commit_hash is asks


def test_a_harness_that_does_not_ask_there_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(evaluator, "get_git_commit_hash")
    with _no_commit_asked():
        assert not hasattr(evaluator, "get_git_commit_hash")
    assert not hasattr(evaluator, "get_git_commit_hash")
