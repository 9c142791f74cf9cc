"""Scores of all pairs against a loop over the definition, on weights that safetensors itself loads."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.header import TensorInfo
from headshare.errors import CheckpointError, OptionError, PlanError
from headshare.matching import functions as matching
from headshare.matching import products as products_module
from headshare.matching import similarity
from headshare.matching.functions import Products
from headshare.matching.pairing import best_pairs
from headshare.matching.scores import Scores
from headshare.plan.units import Part
from support import tiny

Weights = dict[str, torch.Tensor]
Units = list[list[np.ndarray]]  # [layer][group]: one flat float64 vector
LAYERS, HIDDEN, HEAD = 4, 32, 8

PARTS_OF = {"qk": "qk", "q": "q", "k": "k", "v": "v", "qkv": "qkv"}
NAMES = ["llama-mha", "llama-gqa", "llama-mqa", "gpt2", "gpt_neox", "phi3", "falcon-mqa", "falcon-mha", "falcon-gqa"]


def rows_of(name: str, part: str, layer: int, weights: Weights) -> list[torch.Tensor]:
    """What each key/value group owns of q, k, v or o, as the families' own model code splits it."""
    q_per_group = {"llama-gqa": 2, "phi3": 2, "llama-mqa": 4, "falcon-mqa": 4, "falcon-gqa": 2}.get(name, 1)
    groups = 4 // q_per_group
    if name.startswith("llama"):
        weight = weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"]
        return list((weight.T if part == "o" else weight).chunk(groups))
    if name == "phi3":
        fused = weights[f"model.layers.{layer}.self_attn.qkv_proj.weight"]
        q, k, v = fused.split([4 * HEAD, groups * HEAD, groups * HEAD])
        return list({"q": q, "k": k, "v": v}[part].chunk(groups))
    if name == "gpt2":
        fused = weights[f"transformer.h.{layer}.attn.c_attn.weight"]  # in x out
        q, k, v = fused.split(HIDDEN, dim=1)
        return list({"q": q, "k": k, "v": v}[part].chunk(groups, dim=1))
    if name == "gpt_neox":
        fused = weights[f"gpt_neox.layers.{layer}.attention.query_key_value.weight"]
    else:
        fused = weights[f"transformer.h.{layer}.self_attention.query_key_value.weight"]
    grid = fused.reshape(groups, q_per_group + 2, HEAD, HIDDEN)
    heads = {"q": grid[:, :q_per_group], "k": grid[:, -2], "v": grid[:, -1]}[part]
    return list(heads)


def units_of(name: str, parts: str, weights: Weights) -> Units:
    def unit(layer: int) -> list[np.ndarray]:
        split = [[rows.double().numpy().ravel() for rows in rows_of(name, part, layer, weights)] for part in parts]
        return [np.concatenate(group) for group in zip(*split, strict=True)]

    return [unit(layer) for layer in range(LAYERS)]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    ab, aa, bb = (math.fsum(x * y) for x, y in ((a, b), (a, a), (b, b)))
    return ab / math.sqrt(aa) / math.sqrt(bb) if aa and bb else 0.0


def algorithm_1(units: Units) -> tuple[np.ndarray, dict[int, int]]:
    """All scores, and each unit's best donor: the first of the best, layers and then units in order."""
    groups = len(units[0])
    scores, best = np.zeros((len(units) * groups,) * 2), {}
    for layer in range(1, len(units)):
        for group in range(groups):
            found = -math.inf
            for earlier in range(layer):
                for other in range(groups):
                    recipient, donor = layer * groups + group, earlier * groups + other
                    scores[recipient, donor] = cosine(units[layer][group], units[earlier][other])
                    if scores[recipient, donor] > found:
                        found, best[recipient] = scores[recipient, donor], donor
    return scores, best


def assert_equal_to_the_loop(table: similarity.ScoreTable, units: Units, within: float = 1e-9) -> None:
    scores, best = algorithm_1(units)
    assert np.abs(table.scores.numpy() - scores).max() < within
    assert best_pairs(table.layout, table.scores, len(best)) == best


def rewritten(folder: Path, change: Callable[[Weights], None]) -> Weights:
    """Change the weights on disk; return what is there now."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return load_file(folder / "model.safetensors")


def table_of(folder: Path, match: str = "qk", **settings: object) -> similarity.ScoreTable:
    return hs.score_units(hs.open_checkpoint(folder), match, **settings).tables[0]


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_module, "EXACT_PRODUCTS", 0)


@pytest.mark.parametrize("match", PARTS_OF)
@pytest.mark.parametrize("name", NAMES)
def test_scores_and_best_donors_equal_a_float64_loop(name: str, match: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")
    assert_equal_to_the_loop(table_of(folder, match), units_of(name, PARTS_OF[match], weights))


@pytest.mark.parametrize("name", NAMES)
def test_separate_matches_each_of_q_k_and_v_by_itself(name: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")
    tables = hs.score_units(hs.open_checkpoint(folder), "separate").tables
    assert [table.parts for table in tables] == [(Part.Q,), (Part.K,), (Part.V,)]
    for part, table in zip("qkv", tables, strict=True):
        assert_equal_to_the_loop(table, units_of(name, part, weights))


@pytest.mark.parametrize("match", PARTS_OF)
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox", "phi3"])
def test_products_in_float32_choose_what_float64_chooses(
    name: str, match: str, tmp_path: Path, float32_products: None
) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    units = units_of(name, PARTS_OF[match], load_file(folder / "model.safetensors"))
    assert_equal_to_the_loop(table_of(folder, match), units, within=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_slices_and_blocks_of_any_size_give_the_same_scores(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    units = units_of(name, "qkv", load_file(folder / "model.safetensors"))
    for slice_bytes, block in ((1, 1), (9_000, 3), (20_000, 5)):
        monkeypatch.setattr(products_module, "SLICE_BYTES", slice_bytes)
        monkeypatch.setattr(products_module, "BLOCK_UNITS", block)
        assert_equal_to_the_loop(table_of(folder, "qkv"), units)


def test_small_slices_are_streamed_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, counts = tiny.make("llama-mha", tmp_path / "dense"), []
    accumulate = products_module.accumulate

    def counting(*given: torch.Tensor, **named: bool) -> torch.Tensor | None:
        counts.append(given[1].shape)
        return accumulate(*given, **named)

    monkeypatch.setattr(products_module, "accumulate", counting)
    monkeypatch.setattr(products_module, "SLICE_BYTES", 3 * 16 * HIDDEN * 4)
    table_of(folder, "q")
    assert counts == [(16, 3 * HIDDEN), (16, 3 * HIDDEN), (16, 2 * HIDDEN)]


@pytest.mark.parametrize("products", ["float64", "float32"])
@pytest.mark.parametrize("name", ["llama-mha", "gpt2", "gpt_neox", "falcon-gqa"])
def test_exact_ties_go_to_the_lowest_layer_and_then_the_lowest_unit(
    name: str, products: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unit's weights stand in three places before the recipient, doubled in one, and in the recipient itself."""
    monkeypatch.setattr(products_module, "EXACT_PRODUCTS", 0 if products == "float32" else 2e9)
    folder = tiny.make(name, tmp_path / "dense")

    def copy_units(weights: Weights) -> None:
        for part in "qkv":
            source = rows_of(name, part, 1, weights)[0].clone()
            for layer, group, scale in ((0, 1, 1), (1, 1, 2), (2, 1, 1), (3, 0, 1), (3, 1, -1)):
                rows_of(name, part, layer, weights)[group].copy_(source * scale)

    units = units_of(name, "qk", rewritten(folder, copy_units))
    table, groups = table_of(folder), len(units[0])
    assert_equal_to_the_loop(table, units, within=1e-6 if products == "float32" else 1e-9)
    best = best_pairs(table.layout, table.scores, table.layout.units - groups)
    assert best[1 * groups + 0] == best[2 * groups + 1] == best[3 * groups + 0] == 1


@pytest.mark.parametrize("products", ["float64", "float32"])
def test_a_zero_unit_scores_zero_with_all_and_is_tied_to_the_first(
    products: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products_module, "EXACT_PRODUCTS", 0 if products == "float32" else 2e9)
    folder = tiny.make("llama-mha", tmp_path / "dense")

    def empty(weights: Weights) -> None:
        for part in "qkv":
            rows_of("llama-mha", part, 2, weights)[3].zero_()
            rows_of("llama-mha", part, 0, weights)[2].zero_()

    units = units_of("llama-mha", "qk", rewritten(folder, empty))
    table = table_of(folder)
    assert_equal_to_the_loop(table, units, within=1e-6)
    assert not table.scores[11].any() and not table.scores[:, 2].any()
    assert best_pairs(table.layout, table.scores, 12)[11] == 0


def test_a_zero_donor_is_the_best_where_all_others_point_the_other_way(tmp_path: Path) -> None:
    folder = tiny.make("llama-mha", tmp_path / "dense")

    def oppose(weights: Weights) -> None:
        for part in "qk":
            recipient = rows_of("llama-mha", part, 1, weights)[0].clone()
            for group, scale in enumerate((-1, -2, 0, -0.5)):
                rows_of("llama-mha", part, 0, weights)[group].copy_(recipient * scale)

    units = units_of("llama-mha", "qk", rewritten(folder, oppose))
    table = table_of(folder)
    assert_equal_to_the_loop(table, units)
    assert best_pairs(table.layout, table.scores, 12)[4] == 2


def test_exact_copies_score_the_same_so_that_the_lowest_layer_gives_up_first(tmp_path: Path) -> None:
    """Every unit of layers 1, 2 and 3 is a copy of the one in layer 0 with its number, so all best scores are equal."""
    folder = tiny.make("llama-mha", tmp_path / "dense")

    def copy_all(weights: Weights) -> None:
        for name in list(weights):
            if ".self_attn." in name:
                layer = name.split(".")[2]
                weights[name] = weights[name.replace(f".{layer}.", ".0.", 1)].clone()

    rewritten(folder, copy_all)
    table = table_of(folder)
    assert set(best_pairs(table.layout, table.scores, 5)) == {4, 5, 6, 7, 8}


def test_near_ties_are_called_in_float64_when_products_are_float32(tmp_path: Path, float32_products: None) -> None:
    """Every donor differs from the next by about 1e-7 in cosine, less than float32 products can tell."""
    folder = tiny.make("llama-mha", tmp_path / "dense")

    def crowd(weights: Weights) -> None:
        generator = torch.Generator().manual_seed(5)
        for part in "qk":
            base = rows_of("llama-mha", part, 0, weights)[0].clone()
            for layer in range(LAYERS):
                for rows in rows_of("llama-mha", part, layer, weights):
                    rows.copy_(base + 1e-4 * torch.randn(base.shape, generator=generator) * base.abs())

    units = units_of("llama-mha", "qk", rewritten(folder, crowd))
    scores, _ = algorithm_1(units)
    assert np.ptp(scores[15, :12]) < similarity.NEAR_FLOAT32
    table = table_of(folder)
    assert_equal_to_the_loop(table, units, within=1e-6)
    assert np.abs(table.scores.numpy()[15, :12] - scores[15, :12]).max() < similarity.GRID


def test_recipients_whose_best_scores_are_near_are_ordered_in_float64_too(
    tmp_path: Path, float32_products: None
) -> None:
    """Each unit of layers 1 to 3 is one of layer 0 turned by the same angle, to a few times 1e-9."""
    folder = tiny.make("llama-mha", tmp_path / "dense")

    def turn(weights: Weights) -> None:
        generator = torch.Generator().manual_seed(6)
        for layer in (1, 2, 3):
            for group in range(4):
                bases = [rows_of("llama-mha", part, 0, weights)[group].double() for part in "qk"]
                base = torch.cat(bases)
                other = torch.randn(base.shape, generator=generator, dtype=torch.float64)
                other -= base * (other * base).sum() / (base * base).sum()
                turned = base + other / other.norm() * base.norm() / 2
                for part, rows in zip("qk", turned.chunk(2), strict=True):
                    rows_of("llama-mha", part, layer, weights)[group].copy_(rows)

    scores, best = algorithm_1(units_of("llama-mha", "qk", rewritten(folder, turn)))
    assert all(donor == recipient % 4 for recipient, donor in best.items())
    order = sorted(best, key=lambda recipient: -scores[recipient, best[recipient]])
    assert np.ptp([scores[pair] for pair in best.items()]) < 1e-7
    table = table_of(folder)
    for count in range(len(order)):
        assert set(best_pairs(table.layout, table.scores, count)) == set(order[:count])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("products", ["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama-mha", "model.layers.2.self_attn.k_proj.weight"),
        ("gpt2", "transformer.h.2.attn.c_attn.weight"),
        ("gpt_neox", "gpt_neox.layers.2.attention.query_key_value.weight"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused_by_tensor_and_unit(
    name: str, tensor: str, products: str, bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products_module, "EXACT_PRODUCTS", 0 if products == "float32" else 2e9)
    monkeypatch.setattr(products_module, "SLICE_BYTES", 5_000)
    folder = tiny.make(name, tmp_path / "dense")

    def spoil(weights: Weights) -> None:
        rows_of(name, "k", 2, weights)[3][4, 5] = bad

    rewritten(folder, spoil)
    with pytest.raises(CheckpointError, match=rf"{tensor} .*NaN or infinite.*layer 2, group 3"):
        table_of(folder)


@pytest.mark.parametrize("factor", [1e25, 1e-25])
@pytest.mark.parametrize("products", ["float64", "float32"])
def test_units_of_huge_or_tiny_finite_weights_are_scored_like_any_or_refused(
    products: str, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products_module, "EXACT_PRODUCTS", 0 if products == "float32" else 2e9)
    folder = tiny.make("llama-mha", tmp_path / "dense")

    def stretch(weights: Weights) -> None:
        for layer, part in ((1, "q"), (1, "k"), (2, "q"), (2, "k")):
            rows_of("llama-mha", part, layer, weights)[1].mul_(factor)

    units = units_of("llama-mha", "qk", rewritten(folder, stretch))
    try:
        table = table_of(folder)
    except CheckpointError:
        return
    assert_equal_to_the_loop(table, units, within=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "falcon-gqa"])
def test_weights_of_any_type_score_as_their_float64_values(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    weights = rewritten(folder, lambda all_: all_.update({key: value.to(dtype) for key, value in all_.items()}))
    assert all(weight.dtype == dtype for weight in weights.values())
    assert_equal_to_the_loop(table_of(folder), units_of(name, "qk", weights))


@pytest.mark.parametrize("match", [*PARTS_OF, "separate"])
@pytest.mark.parametrize("name", NAMES)
def test_each_weight_is_read_once(name: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    parts = PARTS_OF.get(match, "qkv")
    weights = load_file(folder / "model.safetensors")
    owned = sum(
        rows.nbytes for part in parts for layer in range(LAYERS) for rows in rows_of(name, part, layer, weights)
    )
    read: list[int] = []

    def counting(self: Checkpoint, buffer: memoryview, info: TensorInfo, offset: int) -> None:
        read.append(len(buffer))
        original(self, buffer, info, offset)

    original = Checkpoint.read_into
    monkeypatch.setattr(Checkpoint, "read_into", counting)
    monkeypatch.setattr(products_module, "SLICE_BYTES", 9_000)
    table_of(folder, match)
    if name == "gpt2":
        # Conv1D keeps q, k and v side by side in every row, and rows are read whole.
        whole = sum(weight.nbytes for key, weight in weights.items() if key.endswith("c_attn.weight"))
        assert sum(read) <= whole
    else:
        assert sum(read) == owned


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox", "phi3"])
def test_feed_forward_scores_equal_a_loop_over_layers_or_neuron_groups(name: str, groups: int, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")

    def features(layer: int) -> list[torch.Tensor]:
        """Matrices of neurons x hidden."""
        if name == "llama-gqa":
            return [weights[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        if name == "phi3":
            return list(weights[f"model.layers.{layer}.mlp.gate_up_proj.weight"].chunk(2))
        if name == "gpt2":
            return [weights[f"transformer.h.{layer}.mlp.c_fc.weight"].T]
        return [weights[f"gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight"]]

    def unit(layer: int) -> list[np.ndarray]:
        split = [[rows.double().numpy().ravel() for rows in matrix.chunk(groups)] for matrix in features(layer)]
        return [np.concatenate(one) for one in zip(*split, strict=True)]

    table = table_of(folder, "ffn", parts="ffn", ffn_groups=groups)
    assert_equal_to_the_loop(table, [unit(layer) for layer in range(LAYERS)])
    assert Part.DOWN in table.parts


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    with monkeypatch.context() as patch:
        patch.setattr(matching, "MATCH_FUNCTIONS", dict(matching.MATCH_FUNCTIONS))
        yield
    with pytest.raises(OptionError, match=r"no match function 'closest_v'. There are: qk, q, k, v, qkv"):
        matching.get_match_function("closest_v")


def test_a_match_function_of_ones_own_scores_recipient_rows_and_donor_columns(tmp_path: Path, registry: None) -> None:
    @hs.match_function("closest_v", Part.V, Part.O)
    def closest_v(products: Products) -> torch.Tensor:
        """Less the squared distance, relative to the recipient's norm: not symmetric."""
        total = products[Part.V] + products[Part.O]
        norms = total.diagonal()
        return -(norms[:, None] - 2 * total + norms[None, :]) / norms[:, None]

    folder = tiny.make("llama-gqa", tmp_path / "dense")
    units = [one for layer in units_of("llama-gqa", "vo", load_file(folder / "model.safetensors")) for one in layer]
    table = table_of(folder, "closest_v")
    for recipient in range(2, 8):
        for donor in range(recipient // 2 * 2):
            distance = ((units[recipient] - units[donor]) ** 2).sum() / (units[recipient] ** 2).sum()
            assert table.scores[recipient, donor].item() == pytest.approx(-distance, rel=1e-9)
    assert hs.make_plan(hs.score_units(hs.open_checkpoint(folder), "closest_v"), 0.5).ties == 4


def test_an_unknown_match_function_and_one_for_the_other_half_of_the_layer_are_refused(llama: Path) -> None:
    with pytest.raises(OptionError, match="no match function 'cosine'"):
        table_of(llama, "cosine")
    with pytest.raises(OptionError, match="'ffn' is for ffn units, not for attention"):
        table_of(llama, "ffn")


@pytest.mark.parametrize(("match", "parts"), [("qk", "qkv"), ("separate", "qkv+ffn"), ("qkv", "qkvo+ffn")])
def test_saved_scores_are_read_back_as_they_were(match: str, parts: str, llama: Path, tmp_path: Path) -> None:
    scores = hs.score_units(hs.open_checkpoint(llama), match, parts, ffn_groups=3)
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert again.digest == scores.digest
    assert again.model_type == scores.model_type == "llama"
    for ours, theirs in zip(again.tables, scores.tables, strict=True):
        assert (ours.layout, ours.match, ours.parts) == (theirs.layout, theirs.match, theirs.parts)
        assert torch.equal(ours.scores, theirs.scores)
    assert hs.make_plan(again, 0.4, parts=parts) == hs.make_plan(scores, 0.4, parts=parts)


def header_and_matrix(llama: Path, folder: Path) -> tuple[dict, torch.Tensor]:
    hs.score_units(hs.open_checkpoint(llama)).save(folder / "good.safetensors")
    raw = (folder / "good.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["headshare"])
    return header, load_file(folder / "good.safetensors")["0"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda header, scores: ({"0": scores[:-1].contiguous()}, header),
        lambda header, scores: ({"0": scores[None]}, header),
        lambda header, scores: ({"0": scores.float()}, header),
        lambda header, scores: ({"0": torch.full_like(scores, math.nan)}, header),
        lambda header, scores: ({"0": scores.index_fill(0, torch.tensor([3]), math.inf)}, header),
        lambda header, scores: ({"1": scores}, header),
        lambda header, scores: ({"0": scores}, None),
        lambda header, scores: ({"0": scores}, "[" * 100_000),
        lambda header, scores: ({"0": scores}, "{"),
        lambda header, scores: ({"0": scores}, []),
        lambda header, scores: ({"0": scores}, {**header, "tables": None}),
        lambda header, scores: ({"0": scores}, {**header, "tables": [[]]}),
        lambda header, scores: ({"0": scores}, {**header, "tables": [{**header["tables"][0], "parts": ["x"]}]}),
        lambda header, scores: ({"0": scores}, {**header, "tables": [{**header["tables"][0], "layout": {}}]}),
        lambda header, scores: ({"0": scores}, {"tables": header["tables"]}),
    ],
    ids=[
        *(
            "not-square",
            "three-axes",
            "float32",
            "nan",
            "infinite",
            "no-matrix",
            "no-metadata",
            "deep-json",
            "not-json",
        ),
        *("a-list", "no-tables", "a-list-for-a-table", "unknown-part", "no-layout", "no-model-type"),
    ],
)
def test_a_damaged_scores_file_is_refused(
    damage: Callable[[dict, torch.Tensor], tuple[Weights, object]], llama: Path, tmp_path: Path
) -> None:
    matrices, header = damage(*header_and_matrix(llama, tmp_path))
    text = header if isinstance(header, str) else json.dumps(header)
    path = tmp_path / "bad.safetensors"
    save_file(matrices, path, metadata=None if header is None else {"headshare": text})
    with pytest.raises(PlanError, match=r"bad\.safetensors is not a scores file"):
        Scores.load(path)


def test_a_file_of_another_kind_or_none_is_refused_as_scores(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no scores file at .*headshare score MODEL"):
        Scores.load(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_text("these are not scores")
    with pytest.raises(PlanError, match="not a scores file"):
        Scores.load(tmp_path / "text")


def test_a_truncated_scores_file_is_refused_wherever_it_ends(llama: Path, tmp_path: Path) -> None:
    header_and_matrix(llama, tmp_path)
    whole = (tmp_path / "good.safetensors").read_bytes()

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, len(whole) - 1))
    def check(length: int) -> None:
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(PlanError, match="not a scores file"):
            Scores.load(tmp_path / "cut")

    check()


def test_a_name_too_long_for_a_plan_is_refused_when_it_is_registered(registry: None) -> None:
    with pytest.raises(OptionError, match="at most 200"):
        hs.match_function("q" * 201, Part.Q)
