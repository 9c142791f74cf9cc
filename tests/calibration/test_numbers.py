"""A model whose numbers cannot be calibrated on is refused before anything is priced, in one line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.layerwise.numbers import check_numbers
from headshare.errors import CheckpointError
from support import tiny
from support.calibrated import BY_OUTPUT, PLAN
from support.command_line import Run, assert_one_error_line
from support.folders import WEIGHTS, left_behind
from support.texts import a_text, add_tokenizer

BAD = {
    "NaN in a readout": ("model.layers.2.self_attn.o_proj.weight", float("nan"), "o_proj.weight"),
    "NaN in a word that no text has": ("model.embed_tokens.weight", float("nan"), "embed_tokens.weight"),
    "NaN in the head": ("lm_head.weight", float("nan"), "lm_head.weight"),
    "infinite": ("model.layers.1.mlp.up_proj.weight", float("inf"), "up_proj.weight"),
    "so large that products overflow": ("model.layers.1.self_attn.v_proj.weight", 3e38, "layer 1 of"),
}


@pytest.mark.parametrize(("name", "value", "blamed"), BAD.values(), ids=BAD.keys())
def test_numbers_that_cannot_be_calibrated_on_are_one_error_before_anything_is_priced(
    name: str, value: float, blamed: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_tokenizer(tiny.make_llama(tmp_path / "model"))
    a_text(tmp_path / "text", 600)
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    tensors[name][-1 if "embed" in name else slice(None)] = value
    save_file(tensors, tmp_path / "model" / WEIGHTS, metadata={"format": "pt"})
    monkeypatch.setattr("headshare.calibration.run.plan_on", None)
    for words in (BY_OUTPUT, PLAN):
        found = run(*words)
        assert_one_error_line(found)
        assert blamed in found.err
    assert left_behind(tmp_path) == []


def test_equations_without_a_solution_are_one_error(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsolvable(*_: object, **__: object) -> None:
        torch.linalg.cholesky(torch.full((2, 2), float("nan")))

    add_tokenizer(tiny.make_llama(tmp_path / "model"))
    a_text(tmp_path / "text", 600)
    monkeypatch.setattr("headshare.calibration.run.plan_on", unsolvable)
    found = run(*PLAN)
    assert_one_error_line(found)
    assert "too large, or too uneven" in found.err


def test_a_token_whose_numbers_overflow_beside_others_that_do_not_is_no_reason_to_refuse(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_over = Layers.run_over

    def one_overflows(self: Layers, module: object, layer: int, stream: torch.Tensor) -> torch.Tensor:
        run_over(self, module, layer, stream)  # type: ignore[arg-type]
        if layer == self.count - 1:
            stream[0, -1] = float("inf")
        return stream

    monkeypatch.setattr(Layers, "run_over", one_overflows)
    check_numbers(hs.open_checkpoint(llama), tiny.tokens(), "cpu")
    monkeypatch.setattr(Layers, "run_over", lambda *arguments: arguments[-1].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="layer 0 of"):
        check_numbers(hs.open_checkpoint(llama), tiny.tokens(), "cpu")
