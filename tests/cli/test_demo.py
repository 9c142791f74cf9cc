"""The demo: what it prints is what it measured."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from headshare.experiments.demo_table import HEADERS
from support import tiny
from support.command_line import Run
from support.folders import WEIGHTS
from support.texts import a_text, add_tokenizer, windows_by_hand


def test_the_demo_measures_what_it_prints(run: Run, tmp_path: Path) -> None:
    dense = add_tokenizer(tiny.make_llama(tmp_path / "dense", max_position_embeddings=1024))
    text = a_text(tmp_path / "text.txt", 2400)
    words = ["demo", dense, "--text", text, "--tokens", 1100, "--work", "new/work"]
    table = run(*words)
    assert table.status == 0, table.err
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.out.splitlines() if line[:1] == "|"
    ]
    assert tuple(lines[0]) == HEADERS
    assert {"on disk", "parameters", "PSS", "shared", "deleted", "random donors", "dense"} <= set(lines[0])
    assert [line[0] for line in lines[2:]] == ["0", "0.1", "0.2", "0.3"]

    data = run(*words, "--json").data
    judge = transformers.LlamaForCausalLM.from_pretrained(dense).eval()
    rows = windows_by_hand(dense, text, 512, True, 1100)
    with torch.inference_mode():
        losses = [judge(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    expected = math.exp(sum(losses) / len(losses))
    stock_bytes = sum(parameter.nbytes for parameter in judge.parameters())
    for row, line in zip(data["rows"], lines[2:], strict=True):
        folder = tmp_path / "new" / "work" / f"shared-{row['ratio']:g}"
        stored = load_file(folder / WEIGHTS)
        assert row["disk_bytes"] == (folder / WEIGHTS).stat().st_size
        assert row["memory_bytes"] == sum(tensor.nbytes for tensor in stored.values())
        assert row["recipients"] == int(row["ratio"] * 10) * 8 // 10
        assert row["dense"] == pytest.approx(expected, rel=1e-5)
        assert row["verified"] is True
        assert line[1] == str(row["recipients"])
        assert row["pss_bytes"] is not None
        assert line[5:] == [f"{row[key]:,.1f}" for key in ("shared", "deleted", "random_donors", "dense", "refit")]
    first, last = data["rows"][0], data["rows"][-1]
    assert first["memory_bytes"] == stock_bytes
    assert first["shared"] == first["deleted"] == first["random_donors"] == pytest.approx(expected, rel=1e-5)
    assert last["memory_bytes"] < stock_bytes
    assert len({last["shared"], last["deleted"], last["random_donors"], last["dense"]}) == 4


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_the_demo_does_not_measure_beyond_the_models_length(name: str, run: Run, tmp_path: Path) -> None:
    # gpt2 has no position beyond, and a Llama was never trained there; stories15M, of 256 positions, is such a model.
    folder = add_tokenizer(tiny.make(name, tmp_path / name))  # 64 positions
    found = run("demo", folder, "--text", a_text(tmp_path / "long.txt", 1100), "--tokens", 1100)
    assert "windows of 64" in found.out or (found.status == 1 and "64" in found.err)
