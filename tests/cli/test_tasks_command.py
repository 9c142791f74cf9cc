"""The commands eval and generate, of tasks, translations and prompts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from support.byte_level import make_writer
from support.command_line import told
from support.questions import make_data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose logits are far from uniform, with a byte-level tokenizer."""
    return make_writer(tmp_path_factory.mktemp("asked") / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a file for every task."""
    return make_data(tmp_path / "data")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    return told(capsys, monkeypatch)


def test_the_command_prints_a_table_or_one_object(model: Path, data: Path, run: Callable, tmp_path: Path) -> None:
    words = ["eval", model, "--tasks", "piqa, rte", "--data-dir", data, "--limit", 1, "--out", tmp_path / "out"]
    status, out, _ = run(*words)
    assert status == 0
    assert out.splitlines()[0] == "| model | piqa (1) | rte (1) |"
    status, out, _ = run(*words, "--json")
    assert [row["task"] for row in json.loads(out)["results"]] == ["piqa", "rte"]
    status, out, err = run("eval", model, "--tasks", "cats", "--data-dir", data)
    assert (status, out) == (1, "")
    assert err.startswith("error: there is no task 'cats'.")
    status, out, err = run("eval", model, "--tasks", "piqa", "--data-dir", data, "--against", model)
    assert (status, out) == (1, "")
    assert "--against" in err
    text = tmp_path / "text"
    text.write_text("the cat was there and the pig went " * 40)
    for option, value in (("--limit", 4), ("--few-shot", 1), ("--data-dir", data), ("--prompt", "x")):
        status, out, err = run("eval", model, "--text", text, option, value)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert f"{option} would not be used" in err
    said = [run("eval", model, "--text", text, "--window", 32, "--dtype", name)[1] for name in ("float32", "bfloat16")]
    assert said[0] != said[1]


def test_the_command_writes_side_by_side(model: Path, run: Callable, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("the cat\n\na | kite\n")
    words = ["generate", model, model, "--prompts", tmp_path / "prompts", "--prompt", "the river", "--tokens", 4]
    status, out, _ = run(*words)
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith("**")] == [
        "**the river**",
        "**the cat**",
        "**a \\| kite**",
    ]
    assert len([line for line in out.splitlines() if line.startswith(f"| {model} |")]) == 6
    data = json.loads(run(*words, "--json")[1])
    assert data["prompts"] == ["the river", "the cat", "a | kite"]
    status, out, err = run("generate", model)
    assert (status, out) == (1, "")
    assert "--prompt" in err
    (tmp_path / "en").write_text("the cat\n")
    status, out, _ = run("eval", model, "--source", tmp_path / "en", "--reference", tmp_path / "en", "--limit", 1)
    assert status == 0
    assert "translation of en (1)" in out
    assert run("eval", model, "--source", tmp_path / "en")[0] == 1
