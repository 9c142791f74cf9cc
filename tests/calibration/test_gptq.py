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
from safetensors.torch import load_file
from torch import Tensor, nn

import headshare as hs
from headshare.architecture.modules import module_path
from headshare.calibration.gptq import round_by_gptq
from headshare.calibration.layerwise.layers import Layers
from headshare.checkpoint.rounding.entry import Scheme
from headshare.errors import CheckpointError, EvaluationError, OptionError
from headshare.evaluation import EvalText
from headshare.evaluation.verify import verify
from headshare.experiments import Grid, compare
from headshare.integrations.transformers.loading import load_model
from headshare.plan.plan import SharePlan
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Tie
from headshare.sharing.rounded.write import RoundedCheckpoint, round_to_nearest
from headshare.text.tokens import Calibration
from support import tiny
from support.command_line import Run, assert_one_error_line
from support.nearest import Nearest, stand_in
from support.rounded import outputs, shared_by
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


def rounded(checkpoint: hs.Checkpoint, text: Calibration) -> RoundedCheckpoint:
    return round_by_gptq(checkpoint, text, group=GROUP)


def whole(found: RoundedCheckpoint) -> dict[str, Tensor]:
    """Numbers times scales, in plain words."""
    numbers = {}
    for name, bits in found.bits.of.items():
        if bits == BITS:
            made = found.make(name)
            wide = made.scale.float().repeat_interleave(GROUP, dim=1)[:, : made.numbers.shape[1]]
            numbers[name] = made.numbers.float() * wide
    return numbers


def dense_of(found: RoundedCheckpoint, tmp_path: Path) -> dict[str, Tensor]:
    """The numbers, with borrowed rows in their places, as a stock checkpoint has them."""
    out = hs.open_checkpoint(found.save(tmp_path / "rounded"))
    return load_file(hs.expand(out, tmp_path / "unpacked", unpacked=True) / "model.safetensors")


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
    assert len(whole(found)) == 4 * 7
    for name, tensor in whole(found).items():
        wanted = by_the_library(dense.read(name), seen[name])
        torch.testing.assert_close(
            tensor, wanted, rtol=1e-3, atol=1e-5
        )  # scales, and what they are multiplied to, are kept in 16 bits


@pytest.mark.usefixtures("gptqmodel")
def test_shared_rows_are_rounded_once_on_what_all_their_users_give(shared: hs.Checkpoint, text: Calibration) -> None:
    stock = load_model(shared, storage="owner", dtype=torch.float32).dequantize()
    found, seen = dense_of(rounded(shared, text), shared.path.parent), inputs_of(stock, text)
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
    numbers = dense_of(found, tmp_path)
    for layer, group in ((2, 1), (3, 0), (3, 2)):
        first, last = place.span(group)
        assert numbers[place.name(layer)][first:last].equal(numbers[place.name(0)][start:stop])
    stored = sum(math.prod(shared.tensors[key].shape) for key in whole(found))
    assert sum(one.weight.numel() for one in nearest) == stored  # nothing twice, nothing left out


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_what_is_rounded_is_written_and_computes_the_same(
    kind: str, text: Calibration, nearest: list[Nearest], dense: hs.Checkpoint, shared: hs.Checkpoint, tmp_path: Path
) -> None:
    found = rounded({"dense": dense, "shared": shared}[kind], text)
    out = hs.open_checkpoint(found.save(tmp_path / "out"))
    rounding = out.require_sharing().rounding
    assert rounding is not None
    assert (rounding.int4, rounding.int8) == (Scheme(group=GROUP, how="by GPTQ"), None)
    assert verify(out, {"dense": dense, "shared": None}[kind]).ok
    stock = load_model(shared if kind == "shared" else dense, storage="owner", dtype=torch.float32)
    stock = stock.dequantize() if kind == "shared" else stock
    with torch.no_grad():
        for name, numbers in dense_of(found, tmp_path).items():
            if "_proj" in name:
                stock.get_submodule(name.removesuffix(".weight")).weight.copy_(numbers)
        tokens = tiny.tokens(2, 8)
        torch.testing.assert_close(
            hs.load(out.path)(input_ids=tokens).logits, stock(input_ids=tokens).logits, rtol=1e-2, atol=1e-2
        )  # scales, and what they are multiplied to, are kept in 16 bits


def test_the_largest_group_that_fits_is_taken(dense: hs.Checkpoint, text: Calibration, nearest: list[Nearest]) -> None:
    """Matrices of 32 and 48 inputs."""
    assert round_by_gptq(dense, text).bits.groups[BITS] == 16
    for wrong in (-1, 0):
        with pytest.raises(OptionError, match="cannot have a scale"):
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
    assert (data["matrices"], data["group"], data["bytes"]) == (25 + 2, GROUP, stored)
    # three matrices have no rows of their own, and two embeddings get 8 bits
    assert data["bytes"] < data["bytes_before"] / 2
    assert_one_error_line(run(*words))  # it is there


def test_methods_that_tie_more_are_not_compared_in_four_bits_yet() -> None:
    with pytest.raises(EvaluationError, match="tie q, k and v alone, as deletion does not"):
        Grid(("deletion+gptq4",), (0.5,), tasks=("piqa",))


@pytest.mark.parametrize(("name", "kind"), [
    ("llama-gqa", "ties"), ("llama-gqa", "removals"), ("llama-gqa", "low_rank"), ("gpt2", "ties"),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in (("gpt2", "removals"), ("gpt2", "low_rank"), ("opt", "narrow_values"), ("bert", "removals"))),
])  # fmt: skip
def test_every_plan_is_rounded_on_the_inputs_of_its_own_columns(
    name: str, kind: str, text: Calibration, nearest: list[Nearest], tmp_path: Path
) -> None:
    shared = shared_by(kind, name, tmp_path)
    found = round_by_gptq(shared, text, group=8, embeddings=True)
    out = hs.open_checkpoint(found.save(tmp_path / "out"))
    assert verify(out).ok
    assert bool(outputs(load_model(out)).isfinite().all())
    # the stand-in takes the nearest numbers, wherever a piece of rows came from
    assert found.bits == round_to_nearest(shared, bits=4, group=8).bits
    for key, bits in found.bits.of.items():
        matrix = shared.read(key).T if found.matrices[key].in_out else shared.read(key)
        numbers, scale = found.make(key)
        wide = scale.float().repeat_interleave(8, dim=1)[:, : matrix.shape[1]] if bits == BITS else scale.float()
        assert bool(((numbers * wide - matrix).abs() <= 0.51 * wide).all()), key
    # every stored row of the layers once, on inputs as wide as it is and as many tokens as use it
    stored = sum(math.prod(shared.tensors[key].shape) for key, bits in found.bits.of.items() if bits == BITS)
    wide = [(-(-shared.tensors[key].shape[0 if matrix.in_out else 1] // 8) * 8, matrix)
            for key, matrix in found.matrices.items() if found.bits.of.get(key) == BITS]  # fmt: skip
    assert sum(one.weight.numel() for one in nearest) == sum(width * matrix.outputs for width, matrix in wide) >= stored
    assert all(len(torch.cat(one.inputs)) % text.tokens.numel() == 0 for one in nearest)
    assert all(bool(one.inputs[0].abs().sum()) for one in nearest)


def test_columns_that_others_borrow_see_what_these_give_them_times_the_scale(
    text: Calibration, nearest: list[Nearest], tmp_path: Path
) -> None:
    shared = shared_by("ties", "llama-mha", tmp_path)
    round_by_gptq(shared, text, group=8)
    stock = load_model(shared, storage="owner").dequantize()
    seen = inputs_of(stock, text)
    name = "model.layers.{}.self_attn.o_proj.weight"
    (task,) = [one for one in nearest if one.weight.equal(shared.read(name.format(0)).float())]
    own, *lent = task.inputs
    torch.testing.assert_close(own, seen[name.format(0)].flatten(0, 1), rtol=1e-4, atol=1e-5)
    # group 0 of layer 0 is the last group of layer 1, with scales from a half to two, and group 0 of layer 3
    scale = torch.linspace(0.5, 2, 8)
    for layer, columns, given in zip((1, 3), (slice(24, 32), slice(0, 8)), lent, strict=True):
        wanted = torch.zeros_like(given)
        wanted[:, :8] = seen[name.format(layer)].flatten(0, 1)[:, columns] * scale
        if layer == 3:
            wanted[:, :8] = seen[name.format(layer)].flatten(0, 1)[:, columns] * torch.linspace(0.5, 2, 8)
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_without_gptqmodel_the_error_says_what_to_install(
    dense: hs.Checkpoint, text: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    monkeypatch.setitem(sys.modules, "gptqmodel.quantization", None)
    with pytest.raises(CheckpointError, match=r'pip install .*\[gptq\]"'):
        round_by_gptq(dense, text)
