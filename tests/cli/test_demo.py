"""The demo: what it prints is what it measured."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from headshare.defaults import DEMO_SAVED
from headshare.experiments.demo import DENSE, EIGHT_BITS, _texts, paper, shrunk
from headshare.experiments.demo_table import HEADERS
from support import tiny
from support.command_line import Run
from support.folders import WEIGHTS
from support.texts import a_text, add_tokenizer, windows_by_hand

NAMES = [DENSE, EIGHT_BITS, paper(0.3), *map(shrunk, DEMO_SAVED)]


def test_the_demo_measures_what_it_prints(run: Run, tmp_path: Path) -> None:
    dense = add_tokenizer(tiny.make_llama(tmp_path / "dense", max_position_embeddings=1024))
    text = a_text(tmp_path / "text.txt", 2400)
    work = tmp_path / "new" / "work"
    words = ["demo", dense, "--text", text, "--tokens", 1100, "--work", work]
    table = run(*words)
    assert table.status == 0, table.err
    assert list(work.iterdir()) == []  # each model is removed when it is measured

    data = run(*words, "--keep", "--json").data
    rows = data["rows"]
    assert [row["name"] for row in rows] == NAMES
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.out.splitlines() if line[:1] == "|"
    ]
    assert tuple(lines[0]) == HEADERS
    assert [line[0] for line in lines[2:]] == NAMES
    assert [line[4] for line in lines[2:]] == [f"{row['perplexity']:,.2f}" for row in rows]

    # the dense model, as transformers alone measures it
    judge = transformers.LlamaForCausalLM.from_pretrained(dense).eval()
    with torch.inference_mode():
        losses = [
            judge(input_ids=row[None], labels=row[None]).loss.item()
            for row in windows_by_hand(dense, text, 512, True, 1100)
        ]
    assert rows[0]["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    whole = sum(parameter.nbytes for parameter in judge.parameters())
    assert rows[0]["memory_bytes"] == whole

    # the others, by the files that they are in
    for row, folder in zip(rows[1:], sorted(work.iterdir(), key=lambda path: path.stat().st_mtime), strict=True):
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
        stored = load_file(folder / WEIGHTS)
        assert row["disk_bytes"] == (folder / WEIGHTS).stat().st_size
        assert row["memory_bytes"] == pytest.approx(sum(tensor.nbytes for tensor in stored.values()), rel=0.02)
    for row, amount in zip(rows[3:], DEMO_SAVED, strict=True):
        assert 1 - row["memory_bytes"] / whole >= float(amount.rstrip("%")) / 100
    assert rows[1]["memory_bytes"] < 0.4 * whole  # of 32-bit numbers
    assert len({row["perplexity"] for row in rows}) == len(rows)


@pytest.mark.parametrize("bos", [True, False])
def test_what_is_repaired_on_comes_after_what_is_measured(bos: bool, tmp_path: Path) -> None:
    folder = add_tokenizer(tiny.make_llama(tmp_path / "dense"), bos=bos)
    text = a_text(tmp_path / "text.txt", 3000)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    measured, calibration = _texts(tokenizer, text.read_text(), 512, 1100)
    assert measured.tokens.shape == (2, 512)
    assert calibration.tokens.shape == (4, 256)

    everything = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    places = [at for at in range(len(everything)) if everything[at : at + 200] == calibration.tokens[0, -200:].tolist()]
    assert len(places) == 1
    first = places[0] + 200 - (256 - bos)  # of the window's own tokens
    assert 2 * (512 - bos) <= first < 2 * 512 + 256


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_the_demo_does_not_measure_beyond_the_models_length(name: str, run: Run, tmp_path: Path) -> None:
    # gpt2 has no position beyond, and a Llama was never trained there; stories15M, of 256 positions, is such a model.
    folder = add_tokenizer(tiny.make(name, tmp_path / name))  # 64 positions
    found = run("demo", folder, "--text", a_text(tmp_path / "long.txt", 1100), "--tokens", 500)
    assert found.status == 0, found.err
    assert "windows of 64" in found.out
