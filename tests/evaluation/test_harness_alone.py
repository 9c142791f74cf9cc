"""The harness is kept from asking git and the machine, for as long as a task runs and no longer."""

from pathlib import Path

import pytest
from lm_eval import evaluator

from headshare.evaluation.harness import Runner, _only_results, chosen_tasks


@pytest.mark.parametrize("name", ["get_git_commit_hash", "add_env_info"])
def test_the_harness_asks_nothing_while_it_runs_and_can_again_after_it(name: str) -> None:
    asks = getattr(evaluator, name)
    with _only_results():
        assert getattr(evaluator, name) is not asks
        assert getattr(evaluator, name)() is None
    assert getattr(evaluator, name) is asks
    with pytest.raises(KeyError), _only_results():
        raise KeyError
    assert getattr(evaluator, name) is asks


def test_no_process_is_started_for_a_task(runner: Runner, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *args, **_: pytest.fail(f"{args} was started"))
    (task,) = chosen_tasks(["piqa"], data)
    assert runner.run(task, "key").questions


def test_a_harness_that_does_not_ask_there_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(evaluator, "get_git_commit_hash")
    with _only_results():
        assert not hasattr(evaluator, "get_git_commit_hash")
    assert not hasattr(evaluator, "get_git_commit_hash")
