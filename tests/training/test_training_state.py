"""A run of training that was killed goes on to the same weights, and takes no other run's state."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path as Folder

import pytest
from safetensors import SafetensorError

import headshare as hs
import headshare.files.resume
from headshare.errors import OutputError, TrainingError
from headshare.files.resume import HEADER, discard_committed
from headshare.files.state_files import Workspace
from headshare.progress import shown
from headshare.training import SharingTrainer, TrainSettings, train
from headshare.training.state import checkpoints, trainer_run
from support.folders import left_behind, nothing_changes
from support.processes import in_child
from support.texts import a_text
from support.trainings import LONGER, PLAIN, curve_of, killed_after, settings


@pytest.mark.parametrize("every", [{}, {"logging_steps": 5, "eval_steps": 3}])
def test_a_killed_run_goes_on_with_the_same_curve_to_the_same_weights(
    every: dict[str, int], model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(text, arguments={**LONGER, **every})
    whole = train(model, tmp_path / "whole", asked)

    def run_and_be_killed() -> None:
        killed_after(7)
        train(model, tmp_path / "out", asked)

    child = multiprocessing.get_context("fork").Process(target=run_and_be_killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(TrainingError, match=r"another loss.gamma\. .*--restart"):
        train(model, tmp_path / "out", settings(text, arguments={**LONGER, **every}, loss={"gamma": 0.1}))
    text.write_text(text.read_text().replace("w5 ", "w6 ", 1))
    with pytest.raises(TrainingError, match="it had another text"):
        train(model, tmp_path / "out", asked)
    a_text(text, words=15 * 40)
    seen: list[int] = []
    real = SharingTrainer.compute_loss
    monkeypatch.setattr(SharingTrainer, "compute_loss", lambda self, model, *a, **k: (
        seen.append(self.state.global_step) if model.training else None) or real(self, model, *a, **k))  # fmt: skip
    again = train(model, tmp_path / "out", asked)
    assert min(seen) >= 6
    assert curve_of(again) == curve_of(whole)
    one, other = (hs.open_checkpoint(tmp_path / name) for name in ("whole", "out"))
    assert all(one.read(name).equal(other.read(name)) for name in one.tensors)


def a_state(work: Folder, step: int, steps: int, content: str | None = None) -> Folder:
    folder = work / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    state = json.dumps({"global_step": step, "max_steps": steps}) if content is None else content
    (folder / "trainer_state.json").write_text(state)
    return folder


def test_checkpoints_that_are_half_written_or_after_the_last_step_are_not_gone_on_from(tmp_path: Folder) -> None:
    """The Trainer would fail at the first, and take a step too many after the second."""
    whole, early = a_state(tmp_path, 12, 20), a_state(tmp_path, 8, 20)
    torn, last = a_state(tmp_path, 16, 20, '{"global_'), a_state(tmp_path, 20, 20)
    (tmp_path / "checkpoint-18").mkdir()
    Workspace(tmp_path, TrainingError).write_json(HEADER, {"identity": {"model": "this"}})
    with trainer_run(tmp_path, {"model": "this"}, restart=False):
        assert list(checkpoints(tmp_path)) == [(12, whole), (8, early)]
        assert not torn.exists()
        assert not last.exists()
        assert not (tmp_path / "checkpoint-18").exists()
        with pytest.raises(OutputError, match="another run is working"), trainer_run(tmp_path, {}, restart=True):
            pass


NOT_THE_TRAINERS = {
    "infinite": '{"global_step": Infinity, "max_steps": 20}',
    "deep": "[" * 100_000,
    "callbacks": '{"global_step": 8, "max_steps": 20, "stateful_callbacks": 5}',
    "best": '{"global_step": 8, "max_steps": 20, "best_metric": "low"}',
    "log": '{"global_step": 8, "max_steps": 20, "log_history": [{"step": 0, "eval_loss": "low"}]}',
    "patience": '{"global_step": 8, "max_steps": 20, "stateful_callbacks": {"EarlyStoppingCallback": {}}}',
}


@pytest.mark.parametrize("content", NOT_THE_TRAINERS.values(), ids=NOT_THE_TRAINERS.keys())
def test_a_state_that_is_not_the_trainers_is_left_out(content: str, tmp_path: Folder) -> None:
    whole = a_state(tmp_path, 4, 20)
    a_state(tmp_path, 8, 20, content)
    assert list(checkpoints(tmp_path)) == [(4, whole)]


def test_digests_of_names_that_no_file_can_have_are_damage(
    tmp_path: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, strange = a_state(tmp_path, 4, 20), a_state(tmp_path, 8, 20)
    Workspace(tmp_path, TrainingError).write_json(HEADER, {"identity": {}})
    (strange / "digests.json").write_text(json.dumps({"a" * 300: ""}))
    with shown(), trainer_run(tmp_path, {}, restart=False):
        assert list(checkpoints(tmp_path)) == [(4, whole)]
    assert "is damaged" in capsys.readouterr().err


def test_a_state_in_which_nothing_was_saved_does_not_stand_in_the_way(
    model: Folder, text: Folder, tmp_path: Folder
) -> None:
    work = tmp_path / ".out.headshare-training"
    work.mkdir()
    Workspace(work, TrainingError).write_json(HEADER, {"identity": {"model": "another"}})
    train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1}))
    assert not work.exists()


def test_a_run_stopped_after_its_last_step_takes_no_more_of_them(
    model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(text, arguments=LONGER)
    whole = train(model, tmp_path / "whole", asked)
    with monkeypatch.context() as patched:
        patched.setattr("headshare.training.run.share", lambda *_, **__: (_ for _ in ()).throw(OutputError("full")))
        with pytest.raises(OutputError, match="full"):
            train(model, tmp_path / "out", asked)
    again = train(model, tmp_path / "out", asked)
    assert (again.steps, again.best_step, curve_of(again)) == (10, whole.best_step, curve_of(whole))


def test_a_run_killed_once_its_output_is_whole_leaves_no_state_for_good(
    model: Folder, text: Folder, tmp_path: Folder
) -> None:
    asked = settings(text, arguments={"max_steps": 2})

    def run_and_be_killed() -> None:
        real = headshare.files.resume._empty

        def removed(folder: Folder) -> None:
            if (tmp_path / "out").is_dir() and folder.name.endswith("-training"):
                os.kill(os.getpid(), signal.SIGKILL)
            real(folder)

        headshare.files.resume._empty = removed
        train(model, tmp_path / "out", asked)

    child = multiprocessing.get_context("fork").Process(target=run_and_be_killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (work,) = tmp_path.glob(".out.*")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == 2
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="out exists"):
        train(model, tmp_path / "out", asked)
    assert not work.exists()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_state_stays_where_the_output_is_not_there(tmp_path: Folder) -> None:
    """An old output was to be replaced; writing failed, and then the old one was removed to make room."""
    work, out = tmp_path / ".out.headshare-training", tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="full"), trainer_run(work, {"model": "this"}, restart=False) as run:
        a_state(work, 1, 1)
        run.mark_committing(out, holds="training.json")
        raise OutputError("full")
    assert not discard_committed(out)
    (tmp_path / "other").mkdir()  # while the old one is there: a number of a folder that is gone may come again
    out.rmdir()
    assert not discard_committed(out)
    (tmp_path / "other").rename(out)
    assert not discard_committed(out)
    assert work.is_dir()
    (out / "training.json").write_text("{}")
    assert discard_committed(out)
    assert not work.exists()


def test_a_run_that_stopped_early_and_was_not_written_stops_at_the_same_step(
    model: Folder, text: Folder, tmp_path: Folder
) -> None:
    arguments = {"max_steps": 40, "learning_rate": 0.02, "optim": "adamw_torch", "eval_steps": 2}
    asked = settings(text, "both", arguments=arguments, learning={"patience": 2, "arguments": {**PLAIN, **arguments}})
    whole = train(model, tmp_path / "whole", asked)
    with pytest.MonkeyPatch.context() as patched:
        stopped = OutputError("full")
        patched.setattr("headshare.training.run.write_trained", lambda *_, **__: (_ for _ in ()).throw(stopped))
        with pytest.raises(OutputError, match="full"):
            train(model, tmp_path / "out", asked)
    again = train(model, tmp_path / "out", asked)
    assert whole.steps < 40
    assert (again.steps, again.best_step, curve_of(again)) == (whole.steps, whole.best_step, curve_of(whole))


def test_how_fast_it_learns_may_change_on_the_way(model: Folder, text: Folder, tmp_path: Folder) -> None:
    asked = settings(text, arguments=LONGER)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("headshare.training.run.share", lambda *_, **__: (_ for _ in ()).throw(OutputError("full")))
        with pytest.raises(OutputError):
            train(model, tmp_path / "out", asked)
    assert train(model, tmp_path / "out", settings(text, arguments={**LONGER, "learning_rate": 1e-4})).steps == 10


def killed(model: Folder, out: Folder, asked: TrainSettings) -> None:
    """A run of ten steps, killed after the seventh."""

    def run() -> None:
        killed_after(7)
        train(model, out, asked)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_a_run_goes_on_at_the_rate_that_is_asked_for_now(model: Folder, text: Folder, tmp_path: Folder) -> None:
    cosine = {**LONGER, "lr_scheduler_type": "cosine"}
    whole = train(model, tmp_path / "whole", settings(text, arguments=cosine))
    killed(model, tmp_path / "out", settings(text, arguments=cosine))
    again = train(model, tmp_path / "out", settings(text, arguments={**cosine, "learning_rate": 1e-3}))
    rates = [[one["learning_rate"] for one in found.curve if "learning_rate" in one] for found in (whole, again)]
    assert rates[1] == pytest.approx([*rates[0][:6], *(rate / 10 for rate in rates[0][6:])])


def test_a_stream_that_begins_otherwise_is_another_text(model: Folder, text: Folder, tmp_path: Folder) -> None:
    held = a_text(tmp_path / "held.txt", words=15 * 8)
    asked = settings(text, text={"stream": True, "held_out_data": str(held)}, arguments=LONGER)
    killed(model, tmp_path / "out", asked)
    text.write_text(text.read_text().replace("w", "w7 w", 1))
    with pytest.raises(TrainingError, match="it had another text"):
        train(model, tmp_path / "out", asked)


def test_what_is_trained_and_not_written_yet_is_not_thrown_away_by_another_run(
    model: Folder, text: Folder, tmp_path: Folder
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("headshare.training.run.share", lambda *_, **__: (_ for _ in ()).throw(OutputError("full")))
        with pytest.raises(OutputError):
            train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1}))
    with pytest.raises(TrainingError, match=r"another loss\.gamma"):
        train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1}, loss={"gamma": 0.1}))
    assert train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1})).steps == 1


def test_restart_throws_the_state_away(model: Folder, text: Folder, tmp_path: Folder) -> None:
    work = tmp_path / ".out.headshare-training"
    a_state(work, 1, 10)
    Workspace(work, TrainingError).write_json(HEADER, {"identity": {"model": "another"}})
    with pytest.raises(TrainingError, match="another model"):
        train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1}))
    train(model, tmp_path / "out", settings(text, arguments={"max_steps": 1}), restart=True)
    assert not work.exists()


# ---- a state that is damaged


LAST = "checkpoint-6"


@pytest.fixture
def stopped(model: Folder, text: Folder, tmp_path: Folder) -> Folder:
    """The state of a run that was killed after its seventh step: checkpoints after the fifth and the sixth."""

    def run_and_be_killed() -> None:
        killed_after(7)
        train(model, tmp_path / "out", settings(text, arguments=LONGER))

    assert in_child(run_and_be_killed) == -signal.SIGKILL
    return tmp_path / ".out.headshare-training"


def damaged(file: Folder, how: str) -> None:
    """Change a file in this way."""
    if how == "missing":
        file.unlink()
    else:
        whole = file.read_bytes()
        file.write_bytes(
            {"empty": b"", "half": whole[: len(whole) // 2], "one bit": whole[:-9] + b"\x01" + whole[-8:]}[how]
        )


def test_a_damaged_checkpoint_is_never_gone_on_from(stopped: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its optimiser's state the Trainer would go on in silence."""
    earlier = next(path for step, path in checkpoints(stopped) if step < 6)
    identity = json.loads((stopped / HEADER).read_bytes()[:-32])["identity"]
    whole = shutil.copytree(stopped / LAST, stopped.parent / "whole")
    for name in ("optimizer.pt", "model.safetensors", "trainer_state.json"):
        for how in ("missing", "empty", "half", "one bit"):
            damaged(stopped / LAST / name, how)
            with shown(), pytest.raises(OutputError, match="stopped"), trainer_run(stopped, identity, restart=False):
                assert [path for _, path in checkpoints(stopped)] == [earlier]
                raise OutputError("stopped")
            assert f"{LAST}/{name} is damaged" in capsys.readouterr().err
            shutil.copytree(whole, stopped / LAST)


def test_a_run_goes_on_from_the_last_whole_checkpoint_to_the_same_weights(
    stopped: Folder, model: Folder, text: Folder, tmp_path: Folder
) -> None:
    asked = settings(text, arguments=LONGER)
    whole = train(model, tmp_path / "whole", asked)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        damaged(stopped / LAST / name, "empty")
    again = train(model, tmp_path / "out", asked)
    assert curve_of(again) == curve_of(whole)
    one, other = (hs.open_checkpoint(tmp_path / name) for name in ("whole", "out"))
    assert all(one.read(name).equal(other.read(name)) for name in one.tensors)


def test_where_no_whole_checkpoint_is_left_it_is_one_error_and_the_state_stays(
    stopped: Folder, model: Folder, text: Folder, tmp_path: Folder
) -> None:
    for path in stopped.glob("checkpoint-*"):
        damaged(path / "optimizer.pt", "missing")
    with nothing_changes(stopped), pytest.raises(TrainingError, match=r"optimizer\.pt is not as it was .*--restart"):
        train(model, tmp_path / "out", settings(text, arguments=LONGER))


def test_a_checkpoint_that_the_trainer_cannot_read_is_one_error_that_names_it(
    stopped: Folder, model: Folder, text: Folder, tmp_path: Folder
) -> None:
    """Its digests may be missing, where a kill came before them, or somebody else's."""
    for path in stopped.glob("checkpoint-*"):
        damaged(path / "rng_state.pth", "half")
        (path / "digests.json").unlink()
    with pytest.raises(TrainingError, match=rf"cannot go on from .*{LAST}: .*--restart"):
        train(model, tmp_path / "out", settings(text, arguments=LONGER))
    assert (stopped / LAST).is_dir()


def test_what_fails_in_a_step_is_not_blamed_on_the_checkpoint(
    stopped: Folder, model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SharingTrainer, "compute_loss", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, tmp_path / "out", settings(text, arguments=LONGER))


# ---- a disk that is full


def no_room_for(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as the libraries do that write these parts of a checkpoint."""
    name, error = {
        "weights": ("safetensors.torch.save_file", SafetensorError("Error while serializing: I/O error: No space")),
        "optimiser": ("torch.save", RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed")),
        "state": ("transformers.TrainerState.save_to_json", OSError(errno.ENOSPC, "No space left on device", "x.json")),
    }[part]  # fmt: skip

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(name, fail)
    if part == "weights":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)


@pytest.mark.parametrize("part", ["weights", "optimiser", "state"])
def test_a_disk_that_fills_up_while_training_is_one_error_and_leaves_nothing_half_written(
    part: str, model: Folder, text: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_room_for(part, monkeypatch)
    with pytest.raises(TrainingError, match="could not be written") as found:
        train(model, tmp_path / "out", settings(text, arguments=LONGER))
    assert "\n" not in str(found.value)
    assert "Free some room" in str(found.value)
    assert left_behind(tmp_path) == []


def test_the_optimisers_state_cannot_be_left_out(model: Folder, text: Folder, tmp_path: Folder) -> None:
    with pytest.raises(TrainingError, match="save_only_model cannot be given"):
        train(model, tmp_path / "out", settings(text, arguments={"save_only_model": True}))


def test_a_teacher_is_not_overwritten_by_its_pupil(model: Folder, text: Folder, tmp_path: Folder) -> None:
    teacher = shutil.copytree(model, tmp_path / "teacher")
    asked = settings(text, loss={"distill": 0.5, "teacher": str(teacher)})
    with nothing_changes(tmp_path), pytest.raises(OutputError, match="is inside the input"):
        train(model, teacher, asked, overwrite=True)
