"""The examples run, each on a tiny model; and the model that they train when nobody gives them one is a model."""

import runpy
import sys
from pathlib import Path

import pytest
import transformers

import headshare as hs
from support.texts import a_text, add_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_a_small_model_is_shrunk_loaded_and_writes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = a_text(tmp_path / "text.txt", 1200)
    words = [str(add_tokenizer(llama)), str(text), "--out", str(tmp_path / "out"), "--tokens", "512", "--window", "32"]
    run(monkeypatch, "shrink_and_load.py", *words, "--save", "5%", "--yes")
    small = tmp_path / "out" / "small"
    assert hs.open_checkpoint(small).sharing is not None
    assert f"{small}: " in capsys.readouterr().out


def test_a_researcher_goes_through_the_steps(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [str(a_text(tmp_path / f"{seed}.txt", 1200, seed)) for seed in range(2)]
    out = tmp_path / "out"
    words = ["--out", str(out), "--ratio", "0.4", "--tokens", "512", "--window", "32"]
    run(monkeypatch, "research.py", str(add_tokenizer(llama)), *texts, *words)
    printed = capsys.readouterr().out
    assert hs.open_checkpoint(out / "shared").sharing is not None
    assert all(f"| {name} |" in printed for name in ("dense", "directshare", "directshare+refit", "random-donors"))


def test_the_examples_train_a_model_that_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    small_model = __import__("small_model")
    seen, unseen = small_model.texts()
    assert len(seen) > 300_000
    assert unseen not in seen
    monkeypatch.setattr(small_model, "texts", lambda: (seen[:20_000], unseen[:2_000]))
    small_model.make(tmp_path, steps=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.num_hidden_layers == 6
    assert (tmp_path / "test.txt").read_text() == unseen[:2_000]
