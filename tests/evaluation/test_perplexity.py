"""What windows lose, against the loss that transformers computes itself."""

import math
from pathlib import Path as Folder

import pytest
import torch
import transformers

import headshare as hs
from headshare.architecture.model_class import predicts_next
from headshare.errors import EvaluationError
from headshare.evaluation.embeddings import agreement
from headshare.evaluation.perplexity import Predictions, losses_and_divergences, perplexity, window_losses
from headshare.integrations.transformers.loading import load_model
from headshare.text.windows import Windows
from support import tiny


@pytest.mark.parametrize(("together", "runs"), [(2048, 1), (32, 3), (1, 5)])
def test_each_windows_loss_is_the_one_that_the_model_gives_for_labels(
    together: int, runs: int, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headshare.evaluation.perplexity.TOGETHER", together)
    model = load_model(hs.open_checkpoint(tiny.make_llama(tmp_path / "llama", initializer_range=0.2)))
    windows = Windows(tiny.tokens(16, 5), False)
    with torch.no_grad():
        wanted = [model(input_ids=one[None], labels=one[None]).loss.item() for one in windows.tokens]
    ran: list[int] = []
    model.register_forward_hook(lambda *_: ran.append(1))
    found = window_losses(model, windows)
    assert len(ran) == runs
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert max(wanted) > min(wanted) + 0.1
    whole = perplexity(model, windows)
    assert math.log(whole.perplexity) == pytest.approx(sum(wanted) / 5, rel=1e-6)
    assert whole.tokens == 5 * 15


def test_a_windows_divergence_is_the_sum_over_tokens_of_p_log_p_over_q(tmp_path: Folder) -> None:
    dense = load_model(hs.open_checkpoint(tiny.make_llama(tmp_path / "dense", initializer_range=0.2)))
    other = load_model(hs.open_checkpoint(tiny.make_llama(tmp_path / "other", initializer_range=0.2, seed=1)))
    windows = Windows(tiny.tokens(16, 3), False)
    losses, found = losses_and_divergences(other, Predictions(dense, windows))
    with torch.no_grad():
        p, q = (model(input_ids=windows.tokens).logits[:, :-1].double().softmax(-1) for model in (dense, other))
    wanted = (p * (p / q).log()).sum(-1).mean(-1)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    assert (found > 0.01).all()
    assert torch.equal(losses, window_losses(other, windows))
    assert losses_and_divergences(dense, Predictions(dense, windows))[1].tolist() == pytest.approx([0.0] * 3, abs=1e-6)


def test_the_dense_model_runs_once_for_all_models_where_there_is_room(tmp_path: Folder) -> None:
    dense = load_model(hs.open_checkpoint(tiny.make_llama(tmp_path / "dense", initializer_range=0.2)), dtype="bfloat16")
    other = load_model(hs.open_checkpoint(tiny.make_llama(tmp_path / "other", initializer_range=0.2, seed=1)))
    windows = Windows(tiny.tokens(16, 4), False)
    ran = []
    dense.register_forward_hook(lambda *_: ran.append(1))
    one = Predictions(dense, windows).logits(0).nbytes
    found = []
    for room, runs in ((4 * one, 4), (2 * one, 8), (0, 12)):
        ran.clear()
        predictions = Predictions(dense, windows, room=room)
        found += [losses_and_divergences(other, predictions)[1] for _ in range(3)]
        assert len(ran) == runs
    assert all(torch.equal(found[0], divergences) for divergences in found[1:])


def test_embeddings_that_cannot_be_compared_are_refused(tmp_path: Folder) -> None:
    model = load_model(hs.open_checkpoint(tiny.make("mpnet", tmp_path / "mpnet")))
    windows = Windows(tiny.tokens(16, 4), False)
    assert agreement(model, model, windows).cosine == pytest.approx(1.0)
    wider = load_model(hs.open_checkpoint(tiny.make_llama(tmp_path / "wider", hidden_size=64)))
    with pytest.raises(EvaluationError, match="embeddings of 32 and of 64 numbers"):
        agreement(model, wider, windows)
    damaged = load_model(hs.open_checkpoint(tiny.make("mpnet", tmp_path / "damaged")))
    next(damaged.parameters()).data.fill_(math.nan)
    with pytest.raises(EvaluationError, match="an embedding is NaN or infinite"):
        agreement(model, damaged, windows)


def test_what_predicts_a_text_from_another_predicts_no_next_token() -> None:
    assert predicts_next("Gemma3ForConditionalGeneration", {"model_type": "gemma3"})
    assert not predicts_next("BartForConditionalGeneration", transformers.BartConfig().to_dict())
