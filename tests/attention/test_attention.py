"""Attention maps against transformers' own, and what is said of them against loops over the definitions."""

import json
import math
from pathlib import Path
from xml.etree.ElementTree import fromstring

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.attention import maps as module
from headshare.attention.analysis import attention
from headshare.attention.figures import figures_of
from headshare.attention.maps import map_products
from headshare.attention.page import Attended, attention_page
from headshare.attention.ranks import over_pairs, rank_correlation, within_heads
from headshare.attention.result import FILE, AttentionResult
from headshare.attention.weights import similarities
from headshare.errors import ArchitectureError, CalibrationError, CheckpointError, EvaluationError
from headshare.matching.functions import MATCH_FUNCTIONS
from headshare.plan.units import Part, Sublayer
from support import tiny
from support.command_line import Run, assert_one_error_line
from support.texts import a_text, add_tokenizer

HEADS, LAYERS = 4, 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return add_tokenizer(tiny.make("llama-gqa", tmp_path / "model"))


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    return [a_text(tmp_path / f"text{seed}.txt", 120, seed) for seed in (0, 1)]


def stock_maps(name: str, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Layers x heads x windows x window x window, by transformers."""
    stock = tiny.FAMILIES[name][0].from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return torch.stack(stock(tokens, output_attentions=True).attentions).transpose(1, 2).double()


def cosines(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)


# ---- maps


@pytest.mark.parametrize("name", sorted(tiny.FAMILIES))
def test_similarities_are_those_of_the_maps_that_transformers_gives(name: str, tmp_path: Path) -> None:
    folder, tokens = tiny.make(name, tmp_path / "dense"), tiny.tokens(10, 3)
    found = map_products(hs.open_checkpoint(folder), tokens)
    maps = stock_maps(name, folder, tokens)
    assert (found.layers, found.heads, found.tokens, found.rows) == (LAYERS, HEADS, 30, 30)
    assert torch.allclose(found.by_head(), cosines(maps.flatten(2).flatten(0, 1)), atol=1e-5)
    assert torch.allclose(found.by_layer(), cosines(maps.mean(1).flatten(1)), atol=1e-5)
    maps[..., 0] = 0
    assert torch.allclose(found.by_head(first=False), cosines(maps.flatten(2).flatten(0, 1)), atol=1e-5)
    assert torch.allclose(found.by_layer(first=False), cosines(maps.mean(1).flatten(1)), atol=1e-5)


def test_a_shared_model_attends_as_its_donors_rows_make_it(model: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(model)
    hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "out")
    found = map_products(hs.open_checkpoint(tmp_path / "out"), tiny.tokens(10, 2))
    hs.expand(hs.open_checkpoint(tmp_path / "out"), tmp_path / "expanded")
    maps = stock_maps("llama-gqa", tmp_path / "expanded", tiny.tokens(10, 2))
    assert torch.allclose(found.by_head(), cosines(maps.flatten(2).flatten(0, 1)), atol=1e-5)


def test_windows_in_any_number_at_once_give_the_same_and_no_more_are_kept(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, sizes = tiny.tokens(10, 5), []
    whole = map_products(hs.open_checkpoint(model), tokens)
    empty = torch.empty

    def counting(*shape: int, **named: object) -> torch.Tensor:
        sizes.extend([math.prod(shape) * 4] if len(shape) == 5 else [])  # maps of all layers
        return empty(*shape, **named)

    monkeypatch.setattr(module.torch, "empty", counting)
    one_window = LAYERS * HEADS * 10 * 10 * 4
    few = map_products(hs.open_checkpoint(model), tokens, memory=2 * one_window)
    assert sizes == [2 * one_window, 2 * one_window, one_window]
    assert torch.allclose(few.all, whole.all, rtol=1e-5)
    assert torch.allclose(few.rest, whole.rest, rtol=1e-5)


def test_where_no_window_fits_every_so_many_tokens_stand_for_all(model: Path) -> None:
    tokens = tiny.tokens(10, 3)
    found = map_products(hs.open_checkpoint(model), tokens, memory=LAYERS * HEADS * 10 * 4 * 4)
    maps = stock_maps("llama-gqa", model, tokens)[..., ::3, :]
    assert (found.tokens, found.rows) == (30, 12)
    assert torch.allclose(found.by_head(), cosines(maps.flatten(2).flatten(0, 1)), atol=1e-5)


def test_an_attention_that_gives_no_maps_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EAGER", "sdpa")
    with pytest.raises(ArchitectureError, match=r"does not give its maps \(self_attn of layer 0\).*eager"):
        map_products(hs.open_checkpoint(model), tiny.tokens(10, 2))


def test_maps_that_are_not_finite_are_refused_by_layer(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.self_attn.q_proj.weight"][3, 4] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer 2 of .* gives no finite attention maps"):
        map_products(hs.open_checkpoint(model), tiny.tokens(10, 2))


# ---- weights


def rows_of_heads(name: str, folder: Path, part: Part) -> torch.Tensor:
    """What each query head has or reads in one part: heads x numbers."""
    layout = hs.open_checkpoint(folder).layouts.attention
    weights = load_file(folder / "model.safetensors")
    place, size = layout.parts[part], layout.parts[Part.K].rows
    found = []
    for layer, group in map(layout.unit, range(layout.units)):
        weight = weights[place.name(layer)].double()
        start, stop = place.span(group)
        rows = weight[start:stop] if place.axis == 0 else weight[:, start:stop].T
        count = layout.parts[Part.Q].rows // size
        found += rows.split(size) if part in (Part.Q, Part.O) else [rows] * count
    return torch.stack(found).flatten(1)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "gpt2", "falcon-gqa", "phi3"])
def test_weights_of_query_heads_stand_with_the_keys_and_values_that_they_read(name: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    found = similarities(hs.open_checkpoint(folder))
    assert list(found) == ["qk", "q", "k", "v", "qkv", "circuit"]
    for match in ("qk", "q", "k", "v", "qkv"):
        heads = torch.cat([rows_of_heads(name, folder, Part(part)) for part in match], dim=1)
        assert torch.allclose(found[match], cosines(heads), atol=1e-9)


def test_a_function_of_ones_own_is_among_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MATCH_FUNCTIONS, "mine", None)
    del MATCH_FUNCTIONS["mine"]
    hs.match_function("mine", Part.O)(lambda products: products[Part.O])
    heads = rows_of_heads("llama-gqa", model, Part.O)
    assert torch.allclose(similarities(hs.open_checkpoint(model))["mine"], heads @ heads.T, atol=1e-9)


def test_weights_that_are_not_finite_are_refused_by_unit(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][9, 0] = math.inf
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj\.weight .*layer 1, group 1"):
        similarities(hs.open_checkpoint(model))


# ---- ranks


def slow_ranks(values: list[float]) -> list[float]:
    return [sum(other < one for other in values) + (values.count(one) - 1) / 2 for one in values]


def test_rank_correlations_are_pearsons_of_ranks_with_ties_in_their_middle() -> None:
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randint(0, 6, (40,), generator=generator).double() for _ in range(2))
    wanted = np.corrcoef(slow_ranks(one.tolist()), slow_ranks(other.tolist()))[0, 1]
    assert rank_correlation(one, other) == pytest.approx(wanted, abs=1e-12)
    assert rank_correlation(one, one * 3 + 1) == pytest.approx(1)
    assert rank_correlation(one, torch.zeros(40)) is None
    assert rank_correlation(one[:1], other[:1]) is None


def test_pairs_are_of_different_layers_and_within_a_head_of_earlier_ones() -> None:
    generator = torch.Generator().manual_seed(4)
    one, other = (torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = [(later, earlier) for later in range(6) for earlier in range(later // 2 * 2)]
    a, b = ([float(of[pair]) for pair in pairs] for of in (one, other))
    assert over_pairs(one, other, 2) == pytest.approx(np.corrcoef(slow_ranks(a), slow_ranks(b))[0, 1])
    each = [rank_correlation(one[head, : head // 2 * 2], other[head, : head // 2 * 2]) for head in range(2, 6)]
    assert within_heads(one, other, 2) == pytest.approx(sum(each) / 4)


# ---- the result


def test_a_result_says_what_its_matrices_say(model: Path, texts: list[Path]) -> None:
    result = attention(hs.open_checkpoint(model), texts, tokens=96, window=16)
    assert (result.layers, result.heads, len(result.texts)) == (LAYERS, HEADS, 2)
    assert [text.text for text in result.texts] == ["text0.txt", "text1.txt"]
    assert [text.tokens for text in result.texts] == [96, 96]
    (pair, *more) = result.most_similar(3)
    allowed = {(a, b): float(result.maps[a, b]) for a in range(16) for b in range(a // 4 * 4)}
    assert sorted(allowed.values())[-3:][::-1] == pytest.approx([allowed[each] for each in (pair, *more)])
    agreement = {each.match: each for each in result.agreements()}
    assert agreement["circuit"].pairs == pytest.approx(over_pairs(result.maps, result.weights["circuit"], HEADS))
    near = result.nearest(5, result.maps)
    assert len(near) == HEADS
    assert near == sorted((i for i in range(16) if i // 4 != 1), key=lambda i: -float(result.maps[5, i]))[:HEADS]
    ((one, other, pairs, _),) = result.stability()
    assert (one, other) == ("text0.txt", "text1.txt")
    assert pairs == pytest.approx(over_pairs(result.texts[0].heads, result.texts[1].heads, HEADS))


def test_maps_are_their_own_best_match(model: Path, texts: list[Path]) -> None:
    result = attention(hs.open_checkpoint(model), texts[:1], tokens=64, window=16)
    mirrored = AttentionResult("m", "llama", LAYERS, HEADS, result.texts, {"same": result.maps, "none": -result.maps})
    same, none = mirrored.agreements()
    assert (same.pairs, same.within, same.found) == (pytest.approx(1), pytest.approx(1), 1)
    assert none.pairs == pytest.approx(-1)


def test_a_result_is_read_back_as_it_was(model: Path, texts: list[Path], tmp_path: Path) -> None:
    result = attention(hs.open_checkpoint(model), texts, tokens=64, window=16)
    (tmp_path / FILE).write_bytes(result.to_bytes())
    again = AttentionResult.load(tmp_path)
    assert again.in_words() == result.in_words()
    assert torch.allclose(again.maps, result.maps, atol=1e-6)


@pytest.mark.parametrize(
    "damage",
    [
        lambda header, tensors: header.update(layers=0),
        lambda header, tensors: header.update(layers=10**6),
        lambda header, tensors: header.update(heads="many"),
        lambda header, tensors: header.update(texts=[]),
        lambda header, tensors: header.pop("weights"),
        lambda header, tensors: header.update(weights=["qk"] * 9),
        lambda header, tensors: header.update(format=2),
        lambda header, tensors: tensors.update({"text.0.heads": torch.ones(3, 3)}),
        lambda header, tensors: tensors.update({"weights.0": torch.full((16, 16), math.nan)}),
        lambda header, tensors: tensors.pop("text.0.by_layer"),
    ],
)
def test_a_damaged_result_is_refused(damage: object, model: Path, texts: list[Path], tmp_path: Path) -> None:
    result = attention(hs.open_checkpoint(model), texts[:1], tokens=32, window=16)
    path = tmp_path / FILE
    path.write_bytes(result.to_bytes())
    tensors, header = load_file(path), result._header()
    damage(header, tensors)
    save_file(tensors, path, metadata={"headshare": json.dumps(header)})
    with pytest.raises(EvaluationError, match="is not a result of headshare attention"):
        AttentionResult.load(tmp_path)


def test_texts_that_cannot_be_compared_on_are_refused(model: Path, texts: list[Path], tmp_path: Path) -> None:
    dense = hs.open_checkpoint(model)
    with pytest.raises(EvaluationError, match="none was given"):
        attention(dense, [])
    with pytest.raises(EvaluationError, match="given twice"):
        attention(dense, [texts[0], str(texts[0])])
    with pytest.raises(CalibrationError, match="no file"):
        attention(dense, [tmp_path / "absent"])
    hs.share(dense, hs.make_plan(hs.score_units(dense), 0.25)).save(tmp_path / "out")
    with pytest.raises(CheckpointError, match="already shared"):
        attention(hs.open_checkpoint(tmp_path / "out"), texts)


# ---- shown


def test_figures_have_a_panel_for_each_matrix_and_mark_the_heads_most_alike(model: Path, texts: list[Path]) -> None:
    result = attention(hs.open_checkpoint(model), texts[:1], tokens=64, window=16)
    maps, scatter = figures_of(result)
    assert (len(maps.panels), len(scatter.panels)) == (4, 2)
    rects = [len(list(panel.root.iter("rect"))) for panel in maps.panels]
    scale = 9
    assert rects == [LAYERS * (LAYERS - 1) + scale, *[(LAYERS - 1) * HEADS + scale] * 3]
    ticks = [sum(path.get("d", "").count("l") == 2 for path in panel.root.iter("path")) for panel in maps.panels]
    assert ticks == [1, HEADS, HEADS, HEADS]
    counted = [title.text for title in scatter.panels[0].root.iter("title") if "pair" in (title.text or "")]
    assert sum(int(words.split()[0].replace(",", "")) for words in counted) == 96


def test_a_page_and_a_report_show_tables_and_figures_escaped(
    model: Path, texts: list[Path], run: Run, tmp_path: Path
) -> None:
    strange = texts[0].rename(tmp_path / "<b>text.txt")
    page = tmp_path / "page.html"
    words = run(
        "attention", model, "--text", strange, "--tokens", 64, "--window", 16, "--out", "looked", "--html", page
    )
    assert (words.status, words.err) == (0, "")
    assert "| circuit |" in words.out
    assert "&lt;b&gt;text.txt" in page.read_text()
    assert "<b>text" not in page.read_text()
    assert sorted(path.name for path in (tmp_path / "looked").iterdir()) == [
        "attention-maps.svg",
        "attention-scatter.svg",
        FILE,
    ]
    fromstring((tmp_path / "looked" / "attention-maps.svg").read_text())
    made = run("report", "looked", "--out", "report.md", "--html", "report.html", "--figures", "figures")
    assert made.status == 0
    assert "## Who attends alike, in model" in (tmp_path / "report.md").read_text()
    assert "![Figure 1 of the paper" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "figures" / "attention-1-maps.svg").exists()
    assert "Who attends alike, in model" in (tmp_path / "report.html").read_text()
    assert attention_page(AttentionResult.load(tmp_path / "looked")).count("<figure>") == 2
    assert Attended.of(AttentionResult.load(tmp_path / "looked")).facts[0] == ("model type", "llama")


def test_json_has_every_match_function_and_every_text(model: Path, texts: list[Path], run: Run) -> None:
    options = ["--text", texts[0], "--text", texts[1], "--tokens", 64, "--window", 16]
    data = run("attention", model, *options, "--json").data
    functions = [
        name for name, each in MATCH_FUNCTIONS.items() if each.kind is Sublayer.ATTENTION and not each.separate
    ]
    assert [each["match"] for each in data["agreements"]] == functions
    assert [each["text"] for each in data["texts"]] == ["text0.txt", "text1.txt"]
    assert len(data["layers_alike"]) == LAYERS
    assert data["stability"][0]["texts"] == ["text0.txt", "text1.txt"]
    assert set(data["most_similar"][0]) == {"heads", "maps", *functions}


def test_a_result_is_not_replaced_unasked(model: Path, texts: list[Path], run: Run, tmp_path: Path) -> None:
    options = ["attention", model, "--text", texts[0], "--tokens", 32, "--window", 16, "--out", "looked"]
    assert run(*options).status == 0
    found = run(*options)
    assert_one_error_line(found)
    assert "--overwrite" in found.err
    assert run(*options, "--overwrite").status == 0
    assert_one_error_line(run("attention", model, "--text", tmp_path / "absent"))
    assert_one_error_line(run("attention", model))
