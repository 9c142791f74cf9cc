"""The length of windows that nobody gave: the usual one, or the model's longest."""

import json
from pathlib import Path

import pytest

import headshare as hs
from headshare.errors import CalibrationError, EvaluationError, TrainingError
from headshare.evaluation.measuring import EvalText, measure
from headshare.evaluation.perplexity import Perplexity, evaluate
from headshare.text.tokens import Calibration
from headshare.text.windows import window_for
from headshare.training.settings import TrainingText
from headshare.training.windows import training_windows
from support import tiny
from support.command_line import Run
from support.texts import a_text, add_tokenizer

READ = 64  # tokens that the tiny Llama reads at once


def test_windows_are_the_usual_ones_unless_a_model_reads_less_or_they_are_given() -> None:
    short = {"max_position_embeddings": 64}
    long = {"max_position_embeddings": 4096}
    assert [window_for(None, long), window_for(None, long, short), window_for(None, {})] == [512, 64, 512]
    assert [window_for(None, long, most=1024), window_for(None, short, most=1024)] == [1024, 64]
    assert window_for(128, short) == 128  # what is given is not changed, and is refused where it is too long


def test_every_reader_of_texts_takes_the_models_longest_window(llama: Path, tmp_path: Path) -> None:
    text = a_text(tmp_path / "text.txt", words=63 * 9)
    model = hs.open_checkpoint(add_tokenizer(llama))
    assert Calibration.load(text, model, tokens=640).tokens.shape == (9, READ)
    found = evaluate(model, text.read_text())
    assert isinstance(found, Perplexity)
    assert (found.window, found.tokens) == (READ, 9 * 63)
    kept, held = training_windows(model, TrainingText(data=str(text), held_out=1))
    assert {one["input_ids"].shape for one in (*kept, *held)} == {(READ,)}


def test_a_window_that_was_given_and_is_too_long_stays_an_error(llama: Path, tmp_path: Path) -> None:
    text = a_text(tmp_path / "text.txt", words=63 * 9)
    model = hs.open_checkpoint(add_tokenizer(llama))
    with pytest.raises(CalibrationError, match=r"longer than the model's 64\. Use --calibration-window 64"):
        Calibration.load(text, model, window=65, tokens=650)
    with pytest.raises(EvaluationError, match=r"longer than the model's 64\. Use --window 64"):
        evaluate(model, text.read_text(), window=65)
    with pytest.raises(EvaluationError, match=r"longer than the model's 64\. Use --window 64"):
        measure([llama], text=EvalText(text, 65))
    with pytest.raises(TrainingError, match=r"longer than the model's 64\. Use --context 64"):
        training_windows(model, TrainingText(data=str(text), context=65))


def test_models_that_are_measured_together_have_one_length_of_windows(llama: Path, tmp_path: Path) -> None:
    text = a_text(tmp_path / "text.txt", words=640)
    shorter = add_tokenizer(tiny.make_llama(tmp_path / "shorter", max_position_embeddings=32))
    found = measure([add_tokenizer(llama), shorter], text=EvalText(text))
    assert [row.settings["window"] for row in found] == [32, 32]
    (alone,) = measure([shorter], text=EvalText(text, 32))
    assert found[1].key == alone.key


def test_commands_need_no_window_for_a_model_that_reads_little(llama: Path, tmp_path: Path, run: Run) -> None:
    model = str(add_tokenizer(llama))
    a_text(tmp_path / "text.txt", words=63 * 20)
    calibrated = ("--calibration", "text.txt", "--calibration-tokens", "640")
    assert run("share", model, "out", "--refit", *calibrated).status == 0
    assert run("refit", "out", *calibrated, "--dense", model).status == 0
    found = json.loads(run("eval", "out", "--text", "text.txt", "--json").out)
    assert found["window"] == READ
    words = ("--methods", "directshare", "--ratios", "0.3", "--text", "text.txt", "--out", "compared")
    assert run("compare", model, *words).status == 0
    assert "windows of 64" in (tmp_path / "compared" / "about.json").read_text()
