"""The commands repeat, share --match exact and estimate --match exact."""

import json
from pathlib import Path

import pytest

import headshare as hs
from headshare.integrations.transformers.loading import unique_parameter_bytes
from support import tiny
from support.command_line import Run, assert_one_error_line
from support.merges import make_merge


def test_repeat_writes_a_model_whose_weights_stand_once(run: Run, tmp_path: Path) -> None:
    llama = tiny.make("llama-gqa", tmp_path / "llama")
    said = run("repeat", llama, "out", "--layers", "1-2", "--times", 3)
    assert said.status == 0, said.err
    before = unique_parameter_bytes(hs.load(llama))
    assert f"8 layers of 4: {before:,} bytes of weights are stored and held" in said.out
    assert "AutoModelForCausalLM" in said.out or "LlamaForCausalLM" in said.out
    data = run("repeat", llama, "out", "--layers", "1-2", "--overwrite", "--json").data
    assert (data["layers_before"], data["layers"], data["shared_bytes"]) == (4, 6, before)
    assert "layers 1-2 x 2" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    assert run("verify", "out").status == 0
    assert run("inspect", "out").out.count("tensors of layer") == 2


@pytest.mark.parametrize("words", [["--layers", "9"], ["--layers", "2-1"], ["--layers", "1", "--times", 1]])
def test_wrong_layers_are_one_line(words: list[object], llama: Path, run: Run, tmp_path: Path) -> None:
    assert_one_error_line(run("repeat", llama, "out", *words))
    assert not (tmp_path / "out").exists()


def test_an_estimate_says_that_it_reads_and_then_what_share_does(run: Run, tmp_path: Path) -> None:
    merge = make_merge(tmp_path / "merge")
    told = run("estimate", merge, "--match", "exact")
    assert "so they are read" in told.err
    assert "18 tensors stand elsewhere too, bit for bit" in told.out
    estimated = run("estimate", merge, "--match", "exact", "--json").data
    shared = run("share", merge, "out", "--match", "exact", "--json").data
    assert estimated == {key: shared[key] for key in estimated}
    assert estimated["identical_tensors"] == 18
    assert run("verify", "out", "--against", merge).status == 0


def test_where_nothing_stands_twice_both_say_so(run: Run, tmp_path: Path) -> None:
    tiny.make("llama-gqa", tmp_path / "model")
    assert "Nothing stands twice" in run("estimate", "model", "--match", "exact").out
    said = run("share", "model", "out", "--match", "exact")
    assert_one_error_line(said)
    assert "nothing stands twice" in said.err


@pytest.mark.parametrize("words", [["--ratio", "0.2"], ["--save", "5%"], ["--calibration", "mix"], ["--refit"]])
def test_options_that_an_exact_match_has_no_use_for_are_refused(words: list[str], llama: Path, run: Run) -> None:
    said = run("share", llama, "out", "--match", "exact", *words)
    assert_one_error_line(said)
    assert "would not be used" in said.err
