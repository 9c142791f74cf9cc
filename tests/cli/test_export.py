"""The command export: what it prints, and one line for each mistake."""

from pathlib import Path

import pytest

from support import tiny
from support.command_line import Run, assert_one_error_line
from support.gguf_models import make, reduce


@pytest.fixture
def reduced(tmp_path: Path) -> Path:
    return reduce(make("llama", tmp_path / "model"), tmp_path / "out", "units", "odd neurons", "ties")


def test_export_says_what_was_written_and_what_is_given_back(reduced: Path, run: Run, tmp_path: Path) -> None:
    said = run("export", "out", "out.gguf", "--dtype", "q8_0")
    assert said.status == 0
    lines = said.out.splitlines()
    assert "bytes of weights as q8_0, architecture deci; the dense model's have" in lines[0]
    assert "bytes are given back: ties written out 8,704, units or neurons of zeros" in lines[1]
    assert lines[-1].startswith("Written and checked in")
    assert lines[-1].endswith(f"{(tmp_path / 'out.gguf').stat().st_size:,} bytes: out.gguf")


def test_export_prints_json(reduced: Path, run: Run, tmp_path: Path) -> None:
    data = run("export", "out", "out.gguf", "--json").data
    assert (data["out"], data["architecture"], data["dtype"], data["layers"]) == ("out.gguf", "deci", "f16", 4)
    assert data["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert data["given_back"]["ties"] == 2 * 2 * 64 * 64
    again = run("export", "out", "out.gguf", "--json")
    assert_one_error_line(again)
    assert "out.gguf exists" in again.err
    assert run("export", "out", "out.gguf", "--overwrite", "--json").data["bytes"] == data["bytes"]


def test_a_mistake_is_one_line(run: Run, tmp_path: Path) -> None:
    tiny.make("gpt2", tmp_path / "gpt2")
    for words, said in (
        (("gpt2", "a.gguf"), "'gpt2' model"),
        (("none", "a.gguf"), "none"),
        (("gpt2", "a.bin"), "should end in .gguf"),
        (("gpt2", "a.gguf", "--dtype", "q4_k_m"), "'q4_k_m'"),
    ):
        found = run("export", *words)
        assert_one_error_line(found)
        assert said in found.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2"]
