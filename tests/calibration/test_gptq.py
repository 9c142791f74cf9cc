"""Four bits by GPTQ: which inputs each row is rounded on, and what gptqmodel makes of them (`pip install gptqmodel`
first). Without it the nearest number stands for the library's rounding, and what it is given is tested."""

import contextlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from torch import Tensor, nn

import headshare as hs
from headshare.architecture.modules import module_path
from headshare.calibration.gptq import QuantizedModel, round_by_gptq
from headshare.calibration.layerwise.layers import Layers
from headshare.checkpoint.int4 import Packing
from headshare.errors import CheckpointError, EvaluationError, OptionError, PlanError
from headshare.evaluation import EvalText
from headshare.evaluation.verify import verify
from headshare.experiments import Grid, compare
from headshare.integrations.transformers.loading import load_model
from headshare.plan.plan import SharePlan
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Tie
from headshare.text.tokens import Calibration
from support import tiny
from support.command_line import Run, assert_one_error_line
from support.nearest import Nearest, stand_in
from support.texts import a_text, add_tokenizer

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


@pytest.fixture(name="nearest")
def nearest_numbers(monkeypatch: pytest.MonkeyPatch) -> list[Nearest]:
    return stand_in(monkeypatch)


def rounded(checkpoint: hs.Checkpoint, text: Calibration) -> QuantizedModel:
    return round_by_gptq(checkpoint, text, group=GROUP)


def whole(found: QuantizedModel) -> dict[str, Tensor]:
    """Numbers times scales, in plain words."""
    return {
        name: unpack_from_int32(one.packed, 4, (len(one.packed), 8 * one.packed.shape[1])).float()
        * one.scale.float().repeat_interleave(found.packing.group, dim=1)
        for name, one in found.matrices.items()
    }


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
    assert len(found.matrices) == 4 * 7
    for name, tensor in whole(found).items():
        wanted = by_the_library(dense.read(name), seen[name])
        torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-5)  # scales are kept in 16 bits


@pytest.mark.usefixtures("gptqmodel")
def test_shared_rows_are_rounded_once_on_what_all_their_users_give(shared: hs.Checkpoint, text: Calibration) -> None:
    stock = load_model(shared, storage="owner", dtype=torch.float32).dequantize()
    found, seen = whole(rounded(shared, text)), inputs_of(stock, text)
    assert shared.plan is not None
    (selection,) = shared.plan.selections
    donors = {tie.donor for tie in selection.ties}
    expanded = hs.open_checkpoint(hs.expand(shared, shared.path.parent / "whole"))
    assert donors
    for place in selection.layout.parts.values():
        for donor in donors:
            users = [donor, *sorted(tie.recipient for tie in selection.ties if tie.donor == donor)]
            start, stop = place.span(donor.group)
            rows = expanded.read(place.name(donor.layer))[start:stop]
            wanted = by_the_library(rows, *(seen[place.name(user.layer)] for user in users))
            for user in users:
                first, last = place.span(user.group)
                mine = found[place.name(user.layer)][first:last]
                torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-5)
    alone = by_the_library(rows, seen[place.name(donor.layer)])
    assert not torch.allclose(alone, wanted, atol=1e-4)  # the other users count


@pytest.mark.usefixtures("gptqmodel")
def test_a_shared_model_is_compared_in_four_bits(dense: hs.Checkpoint, text: Calibration, tmp_path: Path) -> None:
    measured = EvalText(a_text(tmp_path / "text", 200), 32)
    names = ("gptq4", "directshare", "directshare+gptq4", "directshare+refit+gptq4")
    cells = {
        cell.method: cell
        for cell in compare(dense, Grid(names, (0.5,), text=measured), tmp_path / "out", calibration=text)
    }
    assert not [cell.failed for cell in cells.values() if cell.failed]
    alone, plain, both = (cells[name] for name in names[:3])
    assert alone.saved_bytes > plain.saved_bytes
    assert alone.saved_bytes < both.saved_bytes < alone.saved_bytes + plain.saved_bytes
    assert both.disk_bytes is not None
    assert both.memory_bytes is not None
    whole = sum(info.nbytes for info in dense.tensors.values())
    assert both.memory_bytes == pytest.approx(whole - both.saved_bytes, abs=64 * 28)  # shapes are buffers
    assert both.memory_bytes < both.disk_bytes < both.memory_bytes + 20_000
    assert len({cell.losses for cell in cells.values()}) == 5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "about.json", "cells.csv", "cells.json", "table.md",
    ]  # fmt: skip


# ---- which inputs a row is rounded on, without the library


def many_users(dense: hs.Checkpoint, out: Path) -> hs.Checkpoint:
    """Four heads a layer. Two of layer 3 and one of layer 2 use one of layer 0, and one of layer 3 one of layer 1."""
    (selection,) = hs.make_plan(hs.score_units(dense), 0.5).selections
    pairs = {(2, 1): (0, 0), (3, 0): (0, 0), (3, 2): (0, 0), (3, 3): (1, 1)}
    ties = tuple(Tie(HeadUnit(*recipient), HeadUnit(*donor)) for recipient, donor in pairs.items())
    plan = SharePlan(model_type=dense.config["model_type"], selections=(Selection(layout=selection.layout, ties=ties),))
    return hs.open_checkpoint(hs.share(dense, plan).save(out))


@pytest.mark.parametrize("name", ["llama-mha", "gpt_neox"])
def test_each_row_is_rounded_once_on_the_inputs_of_every_use_of_it(
    name: str, text: Calibration, nearest: list[Nearest], tmp_path: Path
) -> None:
    shared = many_users(hs.open_checkpoint(tiny.make(name, tmp_path / "dense")), tmp_path / "shared")
    stock = load_model(shared, storage="owner", dtype=torch.float32).dequantize()
    found, seen = rounded(shared, text), inputs_of(stock, text)
    assert shared.plan is not None
    (selection,) = shared.plan.selections
    place = selection.layout.parts[Part.Q]
    start, stop = place.span(0)
    expanded = hs.open_checkpoint(hs.expand(shared, tmp_path / "whole"))
    lent = expanded.read(place.name(0))[start:stop].float()
    (task,) = [one for one in nearest if any(row.equal(lent[0]) for row in one.weight)]
    uses = [module_path(stock, place.name(layer)) for layer in (0, 2, 3, 3)]
    wanted = torch.cat([seen[f"{path}.weight"].flatten(0, 1) for path in uses])
    torch.testing.assert_close(torch.cat(task.inputs), wanted, rtol=1e-4, atol=1e-5)
    numbers = whole(found)
    for layer, group in ((2, 1), (3, 0), (3, 2)):
        first, last = place.span(group)
        assert numbers[place.name(layer)][first:last].equal(numbers[place.name(0)][start:stop])
    stored = sum(math.prod(shared.tensors[key].shape) for key in found.matrices)
    assert sum(one.weight.numel() for one in nearest) == stored  # nothing twice, nothing left out


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_what_is_rounded_is_written_and_computes_the_same(
    kind: str, text: Calibration, nearest: list[Nearest], dense: hs.Checkpoint, shared: hs.Checkpoint, tmp_path: Path
) -> None:
    found = rounded({"dense": dense, "shared": shared}[kind], text)
    out = hs.open_checkpoint(found.save(tmp_path / "out"))
    assert out.require_sharing().packing == Packing(group=GROUP, ignore=("lm_head",))
    assert verify(out).ok
    stock = load_model(shared if kind == "shared" else dense, storage="owner", dtype=torch.float32)
    stock = stock.dequantize() if kind == "shared" else stock
    with torch.no_grad():
        for name, numbers in whole(found).items():
            stock.get_submodule(name.removesuffix(".weight")).weight.copy_(numbers)
        tokens = tiny.tokens(2, 8)
        assert hs.load(out.path)(input_ids=tokens).logits.equal(stock(input_ids=tokens).logits)


def test_the_largest_group_that_fits_is_taken(dense: hs.Checkpoint, text: Calibration, nearest: list[Nearest]) -> None:
    """Matrices of 32 and 48 inputs."""
    assert round_by_gptq(dense, text).packing.group == 16
    for wrong in (-1, 0, 4, 12):
        with pytest.raises(OptionError, match="use a multiple of 8"):
            round_by_gptq(dense, text, group=wrong)
    with pytest.raises(CheckpointError, match="32, 48 inputs do not divide into groups of 64"):
        round_by_gptq(dense, text, group=64)


def test_numbers_that_are_not_finite_are_not_rounded(
    dense: hs.Checkpoint, text: Calibration, nearest: list[Nearest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, add = Nearest.quantize, Nearest.add_batch
    for name, changed in (
        ("quantize", lambda self: (real(self)[0] / 0, *real(self)[1:])),
        ("add_batch", lambda self, inputs, _: add(self, inputs / 0, _)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(Nearest, name, changed)
            with pytest.raises(
                CheckpointError, match=r"layers.0.self_attn.q_proj.weight has numbers that are not finite"
            ):
                rounded(dense, text)


@pytest.mark.usefixtures("gptqmodel")
@pytest.mark.parametrize("times", [math.inf, math.nan, 1e25])
def test_what_the_library_rounds_without_the_inputs_is_refused(
    times: float, dense: hs.Checkpoint, text: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so in its log alone."""
    real = Layers.run

    def run(self: Layers, *given: Any) -> Any:
        left, seen = real(self, *given)
        return left, replace(seen, inputs={path: one * times for path, one in seen.inputs.items()})

    monkeypatch.setattr(Layers, "run", run)
    with pytest.raises(CheckpointError, match=r"GPTQ cannot round .*q_proj.weight has .* Nothing is rounded"):
        rounded(dense, text)


def test_the_command_rounds(
    run: Run, nearest: list[Nearest], dense: hs.Checkpoint, shared: hs.Checkpoint, tmp_path: Path
) -> None:
    text = a_text(tmp_path / "text", 400)
    words = ("quantize", str(shared.path), str(tmp_path / "out"), "--calibration", str(text))
    found = run(*words, "--calibration-window", "16", "--group", str(GROUP), "--json")
    assert found.status == 0, found.err
    data = json.loads(found.out)
    stored = sum(info.nbytes for info in hs.open_checkpoint(tmp_path / "out").tensors.values())
    assert (data["matrices"], data["group"], data["bytes"]) == (28, GROUP, stored)
    assert data["bytes"] < data["bytes_before"] / 2
    assert_one_error_line(run(*words))  # it is there


def test_what_cannot_be_rounded_is_one_error(dense: hs.Checkpoint, text: Calibration, tmp_path: Path) -> None:
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo")
    other = hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "qkvo"))
    with pytest.raises(PlanError, match="only ties of q, k and v"):
        round_by_gptq(other, text)
    turned = hs.open_checkpoint(tiny.make("gpt2", tmp_path / "gpt2"))
    with pytest.raises(CheckpointError, match="input, output"):
        round_by_gptq(turned, text)
    with pytest.raises(EvaluationError, match="tie q, k and v alone, as deletion does not"):
        Grid(("deletion+gptq4",), (0.5,), tasks=("piqa",))


def test_without_gptqmodel_the_error_says_what_to_install(
    dense: hs.Checkpoint, text: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    monkeypatch.setitem(sys.modules, "gptqmodel.quantization", None)
    with pytest.raises(CheckpointError, match=r'pip install .*\[gptq\]"'):
        round_by_gptq(dense, text)
