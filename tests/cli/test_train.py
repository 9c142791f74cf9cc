"""The command train: options over a file of settings, and wrong options."""

import json
from pathlib import Path as Folder

import pytest

import headshare as hs
from support.command_line import Run, assert_one_error_line
from support.trainings import plan_of


def test_the_command_trains_by_options_over_a_file_and_goes_on_to_json(
    run: Run, model: Folder, text: Folder, tmp_path: Folder
) -> None:
    (tmp_path / "c.yaml").write_text(
        "text: {context: 16, held_out: 4}\nsharing: {ratio: 0.5}\nlearning: {arguments: {max_steps: 3, use_cpu: true}}"
    )
    words = ["--config", str(tmp_path / "c.yaml"), "--data", str(text), "--gamma", "0.25", "--learning_rate", "1e-3"]
    found = run("train", str(model), str(tmp_path / "out"), *words, "--max_steps", "2", "--json")
    assert found.status == 0, found.err
    data = json.loads(found.out)
    assert data["steps"] == 2
    assert data["settings"]["loss"]["gamma"] == 0.25
    assert data["settings"]["sharing"]["ratio"] == 0.5
    assert data["settings"]["learning"]["arguments"] == {"max_steps": 2, "use_cpu": True, "learning_rate": 1e-3}
    assert hs.open_checkpoint(tmp_path / "out").plan == plan_of(model, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learnin_rate", "1"], "has an option --learnin_rate"),
        (["--learning_rate", "much"], "invalid float value: 'much'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--ratio", "2"], "less than 1 at sharing.ratio"),
        (["--distill", "2"], "at loss.distill"),
        (["--plan", "p.json", "--ratio", "0.2"], "--ratio would not be used: --plan"),
        (["--method", "both", "--gamma", "0.2"], "--gamma would not be used"),
        (["--temperature", "2"], "--temperature would not be used"),
        (["--task-limit", "2"], "--task-limit would not be used"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str], message: str, run: Run, model: Folder, text: Folder, tmp_path: Folder
) -> None:
    found = run("train", str(model), str(tmp_path / "out"), "--data", str(text), *words)
    assert_one_error_line(found)
    assert message in found.err
    assert not list(tmp_path.glob("*out*"))
