"""Text that a model writes after the calibration text, for a refit to have more of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import headshare as hs
from headshare.calibration.refit import refitter
from headshare.calibration.refit.refinement import REFINEMENTS, Refinement
from headshare.calibration.refit.refitter import Refitter, text_written
from headshare.calibration.refit.run import refit
from headshare.calibration.run import calibrated_run
from headshare.calibration.settings import CalibrationSettings
from headshare.errors import CalibrationError
from headshare.text.tokens import Calibration
from support import tiny
from support.refits import WINDOW, calibration, dense_of, plan_of
from support.texts import add_tokenizer


def test_windows_begin_with_the_end_of_the_text_and_go_on_as_the_model_does(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    text = calibration()
    windows = len(text.tokens)
    written = text.continued(dense, windows + 2)
    assert written.tokens.shape == (windows + 2, WINDOW)
    begun = WINDOW // 8
    ends = text.tokens[[*range(windows), 0, 1], WINDOW - begun :]
    assert torch.equal(written.tokens[:, :begun], ends)
    assert not torch.equal(written.tokens[0, begun:], text.tokens[1, : WINDOW - begun])
    assert torch.equal(text.continued(dense, windows + 2).tokens, written.tokens)  # by its seed
    assert len({tuple(row.tolist()) for row in written.tokens}) == windows + 2


def test_what_is_written_is_likely_to_the_model(tmp_path: Path) -> None:
    """Tokens drawn from its own distribution are likelier than any others."""
    dense = dense_of("llama-gqa", tmp_path)
    written = calibration().continued(dense, 16).tokens
    with torch.no_grad():
        known = hs.load(dense.path)(input_ids=written).logits[:, :-1].log_softmax(-1)
    begun = WINDOW // 8
    own = known.gather(2, written[:, 1:, None])[:, begun:].mean()
    entropy = -(known.exp() * known).sum(-1)[:, begun:].mean()
    assert float(own) == pytest.approx(-float(entropy), abs=0.1)


def test_the_first_token_stays_the_beginning_of_text(tmp_path: Path) -> None:
    text = Calibration(torch.cat([torch.full((4, 1), 1), tiny.tokens(15, 4)], dim=1), True, "a text", 0)
    written = text.continued(dense_of("llama-gqa", tmp_path), 4).tokens
    assert written[:, 0].tolist() == [1] * 4
    assert torch.equal(written[:, 1:2], text.tokens[:, -1:])


def test_a_refit_has_it_besides_its_own_windows_and_says_so(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    plan, text = plan_of(dense, "removed neurons"), calibration()
    written = text_written(dense, text, REFINEMENTS["text"], "cpu")
    assert written is not None
    fit, held = text.split(refitter.HELD_OUT)
    both = Refitter(dense, plan, text, written=written)
    assert torch.equal(both.tokens, torch.cat([fit.tokens, written.tokens, held.tokens]))
    assert both.layer_fit.fitted == len(fit.tokens) + len(written.tokens)
    shared = refit(hs.share(dense, plan), text, refine="text")
    alone = refit(hs.share(dense, plan), text)
    assert shared.refit is not None
    assert alone.refit is not None
    assert (shared.refit.written, alone.refit.written) == (written.tokens.numel(), 0)
    assert (shared.refit.steps, shared.refit.step_tokens) == (0, 0)
    assert "that the model wrote after it" in shared.refit.in_words()
    assert not torch.equal(*(one.refitted[max(one.refitted)] for one in (shared, alone)))


def test_nothing_is_written_where_it_is_not_wanted_or_cannot_be(tmp_path: Path) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    assert text_written(dense, calibration(), None, "cpu") is None
    assert text_written(dense, calibration(), Refinement(3), "cpu") is None
    bert = dense_of("bert", tmp_path / "bert")
    assert text_written(bert, calibration(), REFINEMENTS["fast"], "cpu") is None
    with pytest.raises(CalibrationError, match="writes no text"):
        calibration().continued(bert, 2)


def test_a_stopped_run_goes_on_with_the_text_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_of("llama-gqa", tmp_path)
    (tmp_path / "text").write_text("word " * 2000)
    monkeypatch.setattr(CalibrationSettings, "load", lambda *_: calibration())
    settings = CalibrationSettings(str(tmp_path / "text"), device="cpu")
    found = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), calibrated_run(dense, tmp_path / "out", settings) as run:
            found.append(text_written(dense, calibration(), REFINEMENTS["text"], "cpu", run.resumable.workspace))
            monkeypatch.setattr(Calibration, "continued", lambda *_, **__: 1 / 0)
            raise ZeroDivisionError
    assert torch.equal(found[0].tokens, found[1].tokens)


def test_a_stopped_run_goes_on_with_the_text_that_the_model_wrote_to_be_calibrated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = hs.open_checkpoint(add_tokenizer(tiny.make("llama-gqa", tmp_path / "model")))
    settings = CalibrationSettings("self", tokens=64, window=16, device="cpu")
    found = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), calibrated_run(dense, tmp_path / "out", settings) as run:
            found.append(run.calibration)
            monkeypatch.setattr(Calibration, "load", lambda *_, **__: 1 / 0)
            raise ZeroDivisionError
    first, second = found
    assert torch.equal(first.tokens, second.tokens)
    assert replace(first, tokens=second.tokens) == second
    other = replace(settings, seed=1)
    with pytest.raises(CalibrationError, match="seed"), calibrated_run(dense, tmp_path / "out", other):
        pass
