"""The command eval, beside the losses that transformers computes itself."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional

import headshare as hs
from support import tiny
from support.command_line import Run, assert_one_error_line
from support.texts import add_tokenizer, windows_by_hand


@pytest.mark.parametrize(("options", "window", "bos", "limit"), [
    (["--window", 32], 32, True, None), (["--window", 50, "--no-bos"], 50, False, None),
    (["--window", 2], 2, True, None), (["--window", 2, "--no-bos"], 2, False, None),
    (["--window", 16, "--tokens", 100], 16, True, 100), (["--window", 64, "--bos"], 64, True, None),
])  # fmt: skip
@pytest.mark.parametrize("which", ["dense", "shared"])
def test_perplexity_is_what_transformers_own_loss_gives(
    options: list[object], window: int, bos: bool, limit: int | None, which: str, model: Path, shared: Path,
    text: Path, run: Run, tmp_path: Path,
) -> None:  # fmt: skip
    folder = model if which == "dense" else shared
    data = run("eval", folder, "--text", text, *options, "--json").data
    stock = folder if which == "dense" else hs.expand(hs.open_checkpoint(shared), tmp_path / "expanded")
    judge = transformers.LlamaForCausalLM.from_pretrained(stock).eval()
    rows = windows_by_hand(model, text, window, bos, limit)
    with torch.inference_mode():
        losses = [judge(input_ids=row[None], labels=row[None]).loss.double().item() for row in rows]
    assert data["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert data["tokens"] == rows.numel() - len(rows)
    assert (data["window"], data["bos"]) == (window, bos)


def test_perplexity_in_words_has_the_numbers_of_its_json(model: Path, text: Path, run: Run) -> None:
    words = ["eval", model, "--text", text, "--window", 32]
    data = run(*words, "--json").data
    assert run(*words).out == (f"perplexity {data['perplexity']:,.3f} over {data['tokens']} tokens in windows of 32\n")


@pytest.mark.parametrize("name", ["bert", "mpnet", "roberta"])
def test_an_encoder_has_no_perplexity_and_is_told_what_it_has(name: str, text: Path, run: Run, tmp_path: Path) -> None:
    folder = add_tokenizer(tiny.make(name, tmp_path / name))
    found = run("eval", folder, "--text", text, "--window", 32)
    assert (found.status, found.out) == (1, "")
    assert "no perplexity" in found.err
    assert "--against" in found.err
    assert_one_error_line(found)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_embeddings_of_an_encoder_are_compared_as_transformers_computes_them(
    name: str, text: Path, run: Run, tmp_path: Path
) -> None:
    folder = add_tokenizer(tiny.make(name, tmp_path / name), bos=False)
    assert run("share", folder, "out", "--ratio", 0.5).status == 0
    words = ["--text", text, "--window", 32, "--against", folder]
    assert run("eval", folder, *words, "--json").data["cosine"] == pytest.approx(1.0, abs=1e-6)
    data = run("eval", "out", *words, "--json").data
    run("expand", "out", "expanded")
    rows = windows_by_hand(folder, text, 32, bos=False)
    cosines = []
    with torch.inference_mode():
        ours, theirs = (transformers.AutoModel.from_pretrained(path).eval() for path in (tmp_path / "expanded", folder))
        for row in rows:
            one, other = (judge(row[None]).last_hidden_state[0].mean(dim=0) for judge in (ours, theirs))
            cosines.append(functional.cosine_similarity(one, other, dim=0).item())
    assert data["cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert data["cosine"] < 0.9999
    with torch.inference_mode():
        for judge, found in ((ours, data["retrieved"]), (theirs, data["dense_retrieved"])):
            halves = [
                [judge(part[None]).last_hidden_state[0].mean(dim=0) for part in (row[:16], row[16:])] for row in rows
            ]
            right = 0
            for number, (query, _) in enumerate(halves):
                near = [functional.cosine_similarity(query, answer, dim=0).item() for _, answer in halves]
                right += near.index(max(near)) == number
            assert found == pytest.approx(right / len(rows))
    assert data["tokens"] == rows.numel()
    assert "mean cosine" in run("eval", "out", *words).out
