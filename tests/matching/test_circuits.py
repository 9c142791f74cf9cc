"""The match function `circuit` against W_q^T W_k made in full, from the weights that safetensors loads."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import headshare as hs
from headshare.errors import CheckpointError
from headshare.matching import circuits as module
from headshare.matching.circuits import Circuits
from headshare.matching.functions import CIRCUIT
from headshare.matching.pairing import best_pairs
from headshare.matching.similarity import NEAR_FLOAT32, ScoreTable
from headshare.plan.units import Part
from support import tiny

# the scale of the norm before the attention, and what the model's own code adds to it; None: there is none in the layer
NORMS: dict[str, tuple[str | None, int]] = {
    "llama-mha": ("model.layers.{}.input_layernorm.weight", 0),
    "llama-gqa": ("model.layers.{}.input_layernorm.weight", 0),
    "llama-mqa": ("model.layers.{}.input_layernorm.weight", 0),
    "mistral": ("model.layers.{}.input_layernorm.weight", 0),
    "gemma2": ("model.layers.{}.input_layernorm.weight", 1),
    "gemma3": ("model.layers.{}.input_layernorm.weight", 1),
    "phi3": ("model.layers.{}.input_layernorm.weight", 0),
    "gpt2": ("transformer.h.{}.ln_1.weight", 0),
    "gpt_neox": ("gpt_neox.layers.{}.input_layernorm.weight", 0),
    "falcon-mqa": ("transformer.h.{}.input_layernorm.weight", 0),
    "falcon-gqa": ("transformer.h.{}.ln_attn.weight", 0),
    "opt": ("model.decoder.layers.{}.self_attn_layer_norm.weight", 0),
    "bert": (None, 0),
}
LAYERS = 4


def forms_of(name: str, folder: Path, norm: tuple[str | None, int] | None = None) -> torch.Tensor:
    """W_q^T W_k of every head of every unit: units x heads x hidden x hidden."""
    layout = hs.open_checkpoint(folder).layouts.attention
    weights = load_file(folder / "model.safetensors")
    scale_of, offset = norm or NORMS[name]
    units = []
    for layer, group in map(layout.unit, range(layout.units)):
        rows = {}
        for part in (Part.Q, Part.K):
            place = layout.parts[part]
            weight = weights[place.name(layer)].double()
            start, stop = place.span(group)
            scale = 1.0 if scale_of is None else weights[scale_of.format(layer)].double() + offset
            rows[part] = (weight[start:stop] if place.axis == 0 else weight[:, start:stop].T) * scale
        heads = rows[Part.Q].split(len(rows[Part.K]))
        units.append(torch.stack([head.T @ rows[Part.K] for head in heads]))
    return torch.stack(units)


def cosines(forms: torch.Tensor, groups: int) -> np.ndarray:
    """Of every unit with those of earlier layers."""
    flat = forms.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    found = (flat @ flat.T).numpy()
    layer = np.arange(len(found)) // groups
    return np.where(layer[:, None] > layer[None, :], found, 0.0)


def table_of(folder: Path) -> ScoreTable:
    (table,) = hs.score_units(hs.open_checkpoint(folder), "circuit").tables
    return table


def differs(folder: Path, forms: torch.Tensor) -> float:
    table = table_of(folder)
    return float(np.abs(table.scores.numpy() - cosines(forms, table.layout.groups)).max())


def rewritten(folder: Path, **changed: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | changed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", NORMS)
def test_scores_are_cosines_of_w_q_t_w_k_with_the_norm_folded_in(name: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    assert differs(folder, forms_of(name, folder)) < 1e-9


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox", "falcon-gqa"])
def test_slices_of_any_size_and_products_in_float32_choose_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    forms = forms_of(name, folder)
    table = table_of(folder)
    monkeypatch.setattr(module, "FORM_BYTES", 3 * forms[:, :, 0].numel() * 8)
    assert differs(folder, forms) < 1e-9
    monkeypatch.setattr(module, "EXACT_PRODUCTS", 0)
    assert differs(folder, forms) < 1e-6
    recipients = table.layout.units - table.layout.groups
    scores = table_of(folder).scores
    assert best_pairs(table.layout, scores, recipients) == best_pairs(table.layout, table.scores, recipients)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox", "falcon-gqa"])
def test_products_of_heads_are_those_of_their_own_forms(name: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    heads = forms_of(name, folder).flatten(0, 1).flatten(1)
    dense = hs.open_checkpoint(folder)
    found = Circuits(dense, dense.layouts.attention).of_heads()
    assert torch.allclose(found, heads @ heads.T, rtol=1e-9, atol=1e-12)


def test_of_many_heads_and_layers_only_slices_of_forms_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "dense")
    sizes: list[int] = []
    empty = torch.empty

    def counting(*shape: int, **named: object) -> torch.Tensor:
        made = empty(*shape, **named)
        sizes.append(made.numel() * made.element_size())
        return made

    monkeypatch.setattr(module, "FORM_BYTES", 40_000)
    monkeypatch.setattr(module.torch, "empty", counting)
    table_of(folder)
    forms = [size for size in sizes if size > 20_000]
    assert len(forms) > 2
    assert max(forms) <= 40_000


def test_queries_and_keys_in_another_basis_are_the_same_circuit(tmp_path: Path) -> None:
    """Both turned by transformers' rotary positions at one place, which W_q^T W_k cannot tell, and `qk` can."""
    folder = tiny.make("llama-mha", tmp_path / "dense")
    before = table_of(folder).scores, hs.score_units(hs.open_checkpoint(folder), "qk").tables[0].scores
    angles = torch.tensor([0.3, 1.1, 2.0, 2.9])
    cos, sin = (torch.cat([each, each]).expand(1, 32, 8) for each in (angles.cos(), angles.sin()))
    names = [f"model.layers.2.self_attn.{part}_proj.weight" for part in "qk"]
    weights = load_file(folder / "model.safetensors")
    by_head = [weights[name].unflatten(0, (4, 8)).mT[None] for name in names]
    turned = [each[0].mT.flatten(0, 1).contiguous() for each in apply_rotary_pos_emb(*by_head, cos, sin)]
    rewritten(folder, **dict(zip(names, turned, strict=True)))
    after = table_of(folder).scores, hs.score_units(hs.open_checkpoint(folder), "qk").tables[0].scores
    assert torch.allclose(before[0], after[0], atol=1e-6)
    assert (before[1] - after[1]).abs().max() > 0.05


def test_equal_units_have_equal_scores_and_go_to_the_lowest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_PRODUCTS", 0)
    folder = tiny.make("llama-mha", tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")
    for layer in (1, 2, 3):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "input_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = weights[f"model.layers.0.{name}.weight"].clone()
    rewritten(folder, **weights)
    table = table_of(folder)
    assert set(best_pairs(table.layout, table.scores, 5)) == {4, 5, 6, 7, 8}
    assert [best_pairs(table.layout, table.scores, 12)[unit] for unit in range(4, 16)] == [0, 1, 2, 3] * 3


def test_near_ties_are_called_in_float64_when_products_are_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXACT_PRODUCTS", 0)
    folder = tiny.make("llama-mha", tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for part in "qk":
        base = weights[f"model.layers.0.self_attn.{part}_proj.weight"][:8].repeat(4, 1)
        for layer in range(LAYERS):
            noise = 1e-4 * torch.randn(base.shape, generator=generator) * base.abs()
            weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = base + noise
            weights[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(32)
    rewritten(folder, **weights)
    wanted = cosines(forms_of("llama-mha", folder), 4)
    assert np.ptp(wanted[15, :12]) < NEAR_FLOAT32
    assert np.abs(table_of(folder).scores.numpy()[15, :12] - wanted[15, :12]).max() < 1e-11


def test_a_function_of_ones_own_can_score_circuits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hs.matching.functions, "MATCH_FUNCTIONS", dict(hs.matching.functions.MATCH_FUNCTIONS))
    folder = tiny.make("llama-gqa", tmp_path / "dense")

    @hs.match_function("plain_circuit", Part.Q, Part.K, circuits=True)
    def plain(products: dict[str, torch.Tensor]) -> torch.Tensor:
        return products[CIRCUIT]

    scores = hs.score_units(hs.open_checkpoint(folder), "plain_circuit").tables[0].scores
    flat = forms_of("llama-gqa", folder).flatten(1)
    assert float(scores[5, 2]) == pytest.approx(float(flat[5] @ flat[2]), rel=1e-9)


def test_circuits_choose_ties_of_all_parts_and_are_planned_and_shared_like_others(tmp_path: Path) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "dense")
    dense = hs.open_checkpoint(folder)
    plan = hs.make_plan(hs.score_units(dense, "circuit", "qkvo"), 0.5, parts="qkvo")
    assert (plan.ties, plan.selections[0].chosen.match) == (4, "circuit")
    saved = hs.estimate(dense, 0.5, parts="qkvo", match="circuit").saved_bytes
    assert hs.estimate(dense, plan).saved_bytes == saved


@pytest.mark.parametrize(("part", "bad"), [("q", math.nan), ("k", math.inf)])
def test_a_weight_that_is_not_finite_is_refused_by_tensor_and_unit(part: str, bad: float, tmp_path: Path) -> None:
    folder = tiny.make("llama-mha", tmp_path / "dense")
    name = f"model.layers.2.self_attn.{part}_proj.weight"
    weight = load_file(folder / "model.safetensors")[name]
    weight[25, 3] = bad
    rewritten(folder, **{name: weight})
    with pytest.raises(CheckpointError, match=rf"{name} .*NaN or infinite.*layer 2, group 3"):
        table_of(folder)


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (None, r"layers\.2\.input_layernorm\.weight.*should have 32 numbers.*is missing"),
        (torch.ones(31), r"should have 32 numbers.*\(31,\)"),
        (torch.full((32,), math.nan), r"layers\.2\.input_layernorm\.weight .*NaN or infinite"),
    ],
    ids=["missing", "short", "nan"],
)
def test_a_norm_whose_scale_is_not_there_is_refused(scale: torch.Tensor | None, says: str, tmp_path: Path) -> None:
    folder = tiny.make("llama-mha", tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.input_layernorm.weight"]
    if scale is not None:
        weights["model.layers.2.input_layernorm.weight"] = scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        table_of(folder)


@pytest.mark.parametrize("factor", [1e12, 1e-12, 1e30])
def test_huge_or_tiny_weights_are_scored_like_any_or_refused(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXACT_PRODUCTS", 0)
    folder = tiny.make("llama-mha", tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")
    changed = {name: weights[name] * factor for name in weights if "layers.1.self_attn" in name and "_proj" in name}
    rewritten(folder, **changed)
    try:
        found = differs(folder, forms_of("llama-mha", folder))
    except CheckpointError as error:
        assert "too large to compare" in str(error)
        assert factor == 1e30
    else:
        assert found < 1e-6


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_the_product_of_a_single_pair_is_the_same(name: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    circuits = Circuits(dense, dense.layouts.attention)
    assert circuits.of_pair(5, 2) == pytest.approx(float(circuits.of_units()[5, 2]), rel=1e-9)
