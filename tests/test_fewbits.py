"""Four bits by GPTQ: what gptqmodel gives for each row on the inputs of all that use it. `pip install gptqmodel` first;
without it only the errors are tested."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headshare as hs
import tiny
from headshare.calibration import Calibration
from headshare.comparing import Grid, compare
from headshare.errors import CheckpointError, EvaluationError, PlanError
from headshare.evaluating import Text
from headshare.fewbits import Rounded, round_by_gptq
from headshare.models import load_model
from test_cli import a_text, add_tokenizer

BITS, GROUP = 4, 16


@pytest.fixture
def dense(tmp_path: Path) -> hs.Checkpoint:
    """4 layers of 2 groups, 32 channels."""
    return hs.open_checkpoint(add_tokenizer(tiny.make_llama(tmp_path / "dense", initializer_range=0.2)))


@pytest.fixture
def text() -> Calibration:
    return Calibration(tiny.tokens(16, 12), False, "drawn", 0)


@pytest.fixture
def shared(dense: hs.Checkpoint, tmp_path: Path) -> hs.Checkpoint:
    return hs.open_checkpoint(hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "shared"))


@pytest.fixture
def gptqmodel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library, imported while triton interprets, as it does in this process (see conftest.py)."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with contextlib.redirect_stdout(sys.stderr):
        pytest.importorskip("gptqmodel.quantization.gptq", reason="gptqmodel is not installed")


def rounded(checkpoint: hs.Checkpoint, text: Calibration) -> Rounded:
    return round_by_gptq(checkpoint, text, bits=BITS, group=GROUP)


def inputs_of(model: Any, text: Calibration) -> dict[str, Tensor]:
    """What enters each linear module of a stock model, by the name of its weight."""
    seen = dict[str, Tensor]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({f"{name}.weight": args[0]}))
    with torch.no_grad():
        model(input_ids=text.tokens)
    return seen


def by_the_library(weight: Tensor, *inputs: Tensor) -> Tensor:
    """The library's own rounding of these rows on these inputs."""
    with contextlib.redirect_stdout(sys.stderr):
        from gptqmodel.quantization import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ

        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        task = GPTQ(
            linear,
            QuantizeConfig(
                bits=BITS, group_size=GROUP, sym=True, desc_act=False, act_group_aware=False, offload_to_disk=False
            ),
        )
        task.quantizer.configure(perchannel=True)
        for one in inputs:
            task.add_batch(one, None)
        found: Any = task.quantize()[0]
    return found.detach()


@pytest.mark.usefixtures("gptqmodel")
def test_a_dense_models_matrices_are_rounded_on_their_own_inputs(dense: hs.Checkpoint, text: Calibration) -> None:
    found, seen = rounded(dense, text), inputs_of(load_model(dense, dtype=torch.float32), text)
    assert len(found.tensors) == 4 * 7
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor, by_the_library(dense.read(name), seen[name]), rtol=1e-4, atol=1e-5)
    for name in ("model.layers.2.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        row = found.tensors[name][3]
        for start in range(0, len(row), GROUP):
            assert len(row[start : start + GROUP].unique()) <= 2**BITS
    numbers = sum(tensor.numel() for tensor in found.tensors.values())
    rows = sum(tensor.shape[0] * tensor.shape[1] // GROUP for tensor in found.tensors.values())
    assert found.saved_bytes == pytest.approx(numbers * (4 - BITS / 8) - rows * (2 + BITS / 8), abs=30)


@pytest.mark.usefixtures("gptqmodel")
def test_shared_rows_are_rounded_once_on_what_all_their_users_give(shared: hs.Checkpoint, text: Calibration) -> None:
    stock = load_model(shared, storage="owner", dtype=torch.float32).dequantize()
    found, seen = rounded(shared, text), inputs_of(stock, text)
    assert shared.plan is not None
    (selection,) = shared.plan.selections
    donors = {tie.donor for tie in selection.ties}
    whole = hs.open_checkpoint(hs.sharing.expand(shared, shared.path.parent / "whole"))
    assert donors
    for place in selection.layout.parts.values():
        for donor in donors:
            users = [donor, *sorted(tie.recipient for tie in selection.ties if tie.donor == donor)]
            start, stop = place.span(donor.group)
            rows = whole.read(place.name(donor.layer))[start:stop]
            wanted = by_the_library(rows, *(seen[place.name(user.layer)] for user in users))
            for user in users:
                first, last = place.span(user.group)
                mine = found.tensors[place.name(user.layer)][first:last]
                torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    alone = by_the_library(rows, seen[place.name(donor.layer)])
    assert not torch.allclose(alone, wanted, atol=1e-4)  # the other users count


@pytest.mark.usefixtures("gptqmodel")
def test_a_shared_model_is_compared_in_four_bits(dense: hs.Checkpoint, text: Calibration, tmp_path: Path) -> None:
    measured = Text(a_text(tmp_path / "text", 200), 32)
    names = ("gptq4", "directshare", "directshare+gptq4", "directshare+refit+gptq4")
    cells = {
        cell.method: cell
        for cell in compare(dense, Grid(names, (0.5,), text=measured), tmp_path / "out", calibration=text)
    }
    assert not [cell.failed for cell in cells.values() if cell.failed]
    alone, plain, both = (cells[name] for name in names[:3])
    assert alone.saved_bytes > plain.saved_bytes
    assert alone.saved_bytes < both.saved_bytes < alone.saved_bytes + plain.saved_bytes
    assert both.note == alone.note != ""
    assert len({cell.losses for cell in cells.values()}) == 5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "about.json", "cells.csv", "cells.json", "table.md",
    ]  # fmt: skip


def test_what_cannot_be_rounded_is_one_error(dense: hs.Checkpoint, text: Calibration, tmp_path: Path) -> None:
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo")
    other = hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "qkvo"))
    with pytest.raises(PlanError, match="only ties of q, k and v"):
        round_by_gptq(other, text)
    turned = hs.open_checkpoint(tiny.make("gpt2", tmp_path / "gpt2"))
    with pytest.raises(CheckpointError, match="input, output"):
        round_by_gptq(turned, text)
    with pytest.raises(EvaluationError, match="shares nothing"):
        Grid(("deletion+gptq4",), (0.5,), tasks=("piqa",))


def test_without_gptqmodel_the_error_says_what_to_install(
    dense: hs.Checkpoint, text: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    monkeypatch.setitem(sys.modules, "gptqmodel.quantization", None)
    with pytest.raises(CheckpointError, match=r'pip install "headshare\[gptq\]"'):
        round_by_gptq(dense, text)
