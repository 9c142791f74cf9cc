"""Methods of others, each beside what its paper says, worked out by hand on tiny models."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headshare as hs
from headshare.errors import ArchitectureError, CalibrationError, EvaluationError, PlanError
from headshare.evaluation import EvalText
from headshare.experiments import Compared, Grid, Recipe, compare
from headshare.experiments.peers.aa_svd import anchored
from headshare.experiments.peers.depth import linear_map, replaceme, shortgpt
from headshare.experiments.peers.flap import flap, fluctuation
from headshare.experiments.peers.matrices import Remade
from headshare.experiments.peers.modegpt import allocated, modegpt, most_leverage, nystroem, projected_values
from headshare.experiments.peers.peer import Bench, Peer, Stage
from headshare.experiments.peers.registry import PEERS, edited
from headshare.experiments.peers.sizes import numbers_of, rank_within
from headshare.experiments.peers.slicegpt import SlicedWidth, Slicing, slicegpt
from headshare.experiments.peers.svd import basis_sharing, root_of, svd_llm, truncated
from headshare.experiments.peers.walk import made_by
from headshare.files.state_files import Workspace
from headshare.integrations.transformers.loading import load_model
from headshare.plan.units import Part, Sublayer
from headshare.sharing.size import parameter_infos
from headshare.text.tokens import Calibration
from support import tiny

WINDOWS, WINDOW = 16, 16
FAMILIES = ("llama-gqa", "llama-biased", "qwen2", "gemma2", "phi3", "gpt2", "gpt_neox", "falcon-gqa", "opt")


def bench_of(folder: Path, work: Path) -> Bench:
    work.mkdir(exist_ok=True)
    calibration = Calibration(tiny.tokens(WINDOW, WINDOWS), False, "test", 0)
    return Bench(hs.open_checkpoint(folder), calibration, Workspace(work, CalibrationError))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """4 layers of 2 groups, each of 2 query heads of 8 channels and a key and value head."""
    folder = tmp_path_factory.mktemp("peers")
    return bench_of(tiny.make_llama(folder / "model", initializer_range=0.2, tie_word_embeddings=True), folder / "work")


def made(bench: Bench, peer: Peer, *, refit: bool = False) -> Any:
    model = load_model(bench.dense, dtype=torch.float32)
    assert edited(bench, peer, model, refit=refit) == peer.saved_bytes
    return model


@torch.no_grad()
def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    return model(input_ids=tiny.tokens(12, 3) if tokens is None else tokens, use_cache=False).logits


def inputs_of(bench: Bench, *paths: str) -> dict[str, Tensor]:
    """What modules of the stock model read on the calibration text, a row a token."""
    model = load_model(bench.dense, dtype=torch.float32)
    seen = {}
    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.update({path: args[0].flatten(0, -2)})
        )
    logits(model, bench.calibration.tokens)
    return seen


# ---- statistics


def test_statistics_are_means_over_the_tokens_that_the_stock_model_sees(bench: Bench) -> None:
    paths = {
        Part.Q: "model.layers.2.self_attn.q_proj",
        Part.O: "model.layers.2.self_attn.o_proj",
        Part.UP: "model.layers.2.mlp.up_proj",
        Part.DOWN: "model.layers.2.mlp.down_proj",
    }
    seen, found = inputs_of(bench, *paths.values()), bench.statistics.of(2)
    for part, path in paths.items():
        rows = seen[path].double()
        wanted = torch.einsum("ti,tj->ij", rows, rows) / len(rows)
        assert torch.allclose(found.grams[part].double(), wanted, atol=1e-5 * wanted.abs().max())
        assert torch.allclose(found.means[part].double(), rows.mean(0), atol=1e-5)
    assert found.grams[Part.K] is found.grams[Part.V] is found.grams[Part.Q]
    with torch.no_grad():
        states = load_model(bench.dense, dtype=torch.float32)(
            input_ids=bench.calibration.tokens, output_hidden_states=True
        ).hidden_states
    influence = 1 - torch.cosine_similarity(states[2], states[3], dim=-1).mean()
    assert found.influence == pytest.approx(influence.item(), abs=1e-5)


# ---- bytes


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 12), (12, 7), (9, 9)])
def test_a_rank_is_the_largest_that_takes_no_more_numbers(outputs: int, inputs: int, pivoted: bool) -> None:
    def takes(rank: int) -> int:
        return rank * (outputs + inputs - rank * pivoted)

    for numbers in range(outputs + inputs, outputs * inputs + 1):
        rank = rank_within(numbers, outputs, inputs, pivoted=pivoted)
        fitting = [one for one in range(1, min(outputs, inputs) + 1) if takes(one) <= numbers]
        assert rank == max(fitting)
        assert numbers_of(rank, outputs, inputs, pivoted=pivoted) <= numbers


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_saves_at_least_what_is_asked_and_not_much_more(bench: Bench, name: str) -> None:
    asked = int(0.2 * bench.sizes.whole)
    peer = PEERS[name][1](bench, asked)
    assert asked <= peer.saved_bytes < 1.3 * asked
    with pytest.raises(PlanError, match="Ask for less"):
        PEERS[name][1](bench, bench.sizes.whole - 1)


def test_what_svd_llm_stores_is_all_but_the_matrices_and_two_factors_for_each(bench: Bench) -> None:
    asked = int(0.3 * bench.sizes.whole)
    model = made(bench, peer := svd_llm(bench, asked))
    stored = 0
    for name, weight in model.named_parameters():
        rank = (
            int(torch.linalg.matrix_rank(weight.double(), rtol=1e-5)) if ".layers." in name and weight.ndim == 2 else 0
        )
        stored += 4 * (rank * sum(weight.shape) if rank else weight.numel())
    assert stored == sum(info.nbytes for info in parameter_infos(bench.dense).values()) - peer.saved_bytes


# ---- nothing asked, nothing changed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peer_that_is_to_save_nothing_changes_nothing(family: str, tmp_path: Path) -> None:
    """All of the rank, of the neurons, the channels and the directions are kept, in whatever layout they are."""
    bench = bench_of(tiny.make(family, tmp_path / family), tmp_path / "work")
    dense = logits(load_model(bench.dense, dtype=torch.float32))
    makers: dict[str, Callable[[], Peer]] = {
        "svd": lambda: svd_llm(bench, 0, pivoted=True),
        "modegpt": lambda: modegpt(bench, 0),
        "slicegpt": lambda: whole_slicing(bench),
    }
    for name, make in makers.items():
        if (name, family) in {("modegpt", "gpt_neox"), ("slicegpt", "gpt_neox"), ("slicegpt", "gemma2")} or (
            name == "slicegpt" and "falcon" in family
        ):
            with pytest.raises(ArchitectureError):
                make()
            continue
        assert torch.allclose(logits(made(bench, make())), dense, atol=2e-3 * dense.abs().max()), name


def whole_slicing(bench: Bench) -> Peer:
    slicegpt(bench, 0)  # which refuses what it does not fit
    slices = Slicing(bench, SlicedWidth.of(bench).hidden)
    return Peer(slices.make, 0, "", follows=True, enter=slices.enter, around=slices.around)


def test_a_layer_is_left_out_of_a_model_that_adds(bench: Bench, tmp_path: Path) -> None:
    encoder = bench_of(tiny.make("bert", tmp_path / "bert"), tmp_path / "work")
    for make in (shortgpt, replaceme, slicegpt):
        with pytest.raises(ArchitectureError):
            make(encoder, 1000)
    experts = bench_of(tiny.make("mixtral", tmp_path / "experts"), tmp_path / "work2")
    with pytest.raises(ArchitectureError, match="experts"):
        svd_llm(experts, 1000)


# ---- products of low rank


def test_a_truncated_matrix_is_the_best_of_its_rank_for_its_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    for outputs, inputs in ((6, 10), (10, 6)):
        weight = torch.randn(outputs, inputs, generator=generator)
        tokens = torch.randn(50, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
        root = root_of(tokens.T @ tokens)
        found = truncated(weight, root, 3)
        assert int(torch.linalg.matrix_rank(found.double(), rtol=1e-5)) == 3
        # the outputs' own best approximation of rank 3 (Eckart and Young) bounds every matrix of that rank
        outs = (tokens @ weight.T).double()
        sizes = torch.linalg.svdvals(outs)
        least = float(sizes[3:].square().sum())
        missed = float((outs - tokens.double() @ found.double().T).square().sum())
        assert missed == pytest.approx(least, rel=1e-3)
        plain = weight - torch.linalg.svd(weight)[0][:, :3] @ (torch.linalg.svd(weight)[0][:, :3].T @ weight)
        assert missed < 0.95 * float((tokens @ plain.T).square().sum())


def test_layers_that_share_a_basis_read_one_space_of_inputs(bench: Bench) -> None:
    asked = int(0.3 * bench.sizes.whole)
    model = made(bench, basis_sharing(bench, asked))
    for path in ("self_attn.q_proj", "mlp.up_proj"):
        first, second, third = (model.get_submodule(f"model.layers.{n}.{path}").weight.double() for n in (0, 1, 2))
        rank = int(torch.linalg.matrix_rank(torch.cat([first, second]), rtol=1e-5))
        assert rank == int(torch.linalg.matrix_rank(first, rtol=1e-5)) < min(first.shape)
        assert int(torch.linalg.matrix_rank(torch.cat([first, third]), rtol=1e-5)) > rank


def test_an_anchored_matrix_is_the_best_of_its_rank_for_other_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 8, generator=generator)
    dense = torch.randn(60, 8, generator=generator)
    own = dense + 0.5 * torch.randn(60, 8, generator=generator)
    cross = (dense.T @ own).double()
    root = root_of(own.T @ own)
    wanted = torch.linalg.lstsq(own, dense @ weight.T).solution.T
    assert torch.allclose(anchored(weight, root, cross, 5), wanted, atol=1e-4)
    # at a rank: nothing near it of that rank is better
    found = anchored(weight, root, cross, 2)
    lost = float((own @ found.T - dense @ weight.T).square().sum())
    left, sizes, right = torch.linalg.svd(found, full_matrices=False)
    for _ in range(20):
        near = (left[:, :2] * sizes[:2] + 0.02 * torch.randn(5, 2, generator=generator)) @ (
            right[:2] + 0.02 * torch.randn(2, 8, generator=generator)
        )
        assert float((own @ near.T - dense @ weight.T).square().sum()) > lost
    same = anchored(weight, root_of(dense.T @ dense), (dense.T @ dense).double(), 2)
    assert torch.allclose(same, truncated(weight, root_of(dense.T @ dense), 2), atol=1e-3)


# ---- FLAP


def test_fluctuation_is_variance_times_the_size_of_the_column(bench: Bench) -> None:
    path = "model.layers.1.mlp.down_proj"
    rows = inputs_of(bench, path)[path].double()
    weight = load_model(bench.dense, dtype=torch.float32).get_submodule(path).weight.detach()
    statistics = bench.statistics.of(1)
    found = fluctuation(statistics.grams[Part.DOWN], statistics.means[Part.DOWN], weight)
    for neuron in range(0, 48, 5):
        spread = sum((value - rows[:, neuron].mean()) ** 2 for value in rows[:, neuron]) / len(rows)
        size = sum(value.double() ** 2 for value in weight[:, neuron])
        assert found[neuron].item() == pytest.approx(float(spread * size), rel=1e-3, abs=1e-9)


def test_flap_adds_what_removed_inputs_give_on_average(bench: Bench) -> None:
    peer = flap(bench, int(0.3 * bench.sizes.whole))
    removed = 0
    for layer in range(4):
        ffn = peer.make(Stage(bench, layer, Sublayer.FFN))
        path = f"model.layers.{layer}.mlp.down_proj"
        rows = inputs_of(bench, path)[path]
        weight = load_model(bench.dense, dtype=torch.float32).get_submodule(path).weight.detach()
        assert ffn.kept is not None
        assert bool((ffn.weights[Part.DOWN][:, ~ffn.kept] == 0).all())
        after = rows @ ffn.weights[Part.DOWN].T + ffn.biases[Part.DOWN]
        assert torch.allclose(after.mean(0), (rows @ weight.T).mean(0), atol=1e-4)
        removed += int((~ffn.kept).sum())
    assert f"{removed} neurons" in peer.note


# ---- MoDeGPT


def test_influence_says_how_much_a_layer_keeps() -> None:
    kept = allocated([0.1, 0.2, 0.3, 0.9], 0.3)
    assert sum(kept) == pytest.approx(4 * 0.7)
    assert kept == sorted(kept)
    assert kept[1] - kept[0] > 0.05
    taken = [1 - one for one in allocated([0.0, 5.0, 5.0], 0.5)]
    assert taken[0] == pytest.approx(0.8)
    assert sum(taken) == pytest.approx(1.5)


def test_nystroem_is_the_least_squares_readout_of_the_kept_inputs() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(200, 9, generator=generator) @ torch.randn(9, 9, generator=generator)
    weight = torch.randn(4, 9, generator=generator)
    gram = rows.T @ rows
    kept = most_leverage(gram, 5)
    inverse = torch.linalg.inv(gram.double() + 1e-2 * gram.diagonal().mean() * torch.eye(9))
    scores = (gram.double() @ inverse).diagonal()
    assert kept.tolist() == sorted(scores.argsort(descending=True)[:5].tolist())
    wanted = torch.linalg.lstsq(rows[:, kept], rows @ weight.T).solution.T
    found = nystroem(gram, weight, kept)
    assert torch.allclose(found[:, kept], wanted, atol=1e-3)
    assert int((found != 0).any(dim=0).sum()) == 5


def test_values_keep_the_directions_that_their_outputs_need_most() -> None:
    generator = torch.Generator().manual_seed(3)
    values, outputs = torch.randn(6, 10, generator=generator), torch.randn(10, 2, 6, generator=generator)
    rows = torch.randn(80, 10, generator=generator) @ torch.randn(10, 10, generator=generator)
    found = projected_values(values.double(), outputs.double(), root_of(rows.T @ rows), 4)
    joint = torch.einsum("ti,ci,dhc->thd", rows.double(), values.double(), outputs.double()).flatten(1)
    after = torch.einsum("ti,ci,dhc->thd", rows.double(), found, outputs.double()).flatten(1)
    least = torch.linalg.svdvals(joint)[4:].square().sum()
    assert float((joint - after).square().sum()) == pytest.approx(float(least), rel=1e-3)
    assert int(torch.linalg.matrix_rank(found, rtol=1e-5)) == 4


def test_channels_of_q_and_k_go_in_pairs_of_the_least_products(bench: Bench) -> None:
    peer = modegpt(bench, int(0.3 * bench.sizes.whole))
    half = 4
    for layer in range(4):
        remade = peer.make(Stage(bench, layer, Sublayer.ATTENTION))
        names = [f"model.layers.{layer}.self_attn.{part}_proj" for part in "qk"]
        stock = load_model(bench.dense, dtype=torch.float32)
        rows = inputs_of(bench, names[0])[names[0]]
        q, k = (rows @ stock.get_submodule(name).weight.detach().T for name in names)
        for unit in range(2):
            scores = []
            for pair in range(half):
                queries = [16 * unit + 8 * head + pair + more for head in range(2) for more in (0, half)]
                keys = [8 * unit + pair + more for more in (0, half)]
                scores.append(float(q[:, queries].square().sum() * k[:, keys].square().sum()))
                gone = bool((remade.weights[Part.K][keys] == 0).all())
                assert gone == bool((remade.weights[Part.Q][queries] == 0).all())
            lost = [bool((remade.weights[Part.K][8 * unit + pair] == 0).all()) for pair in range(half)]
            order = sorted(range(half), key=scores.__getitem__)
            assert {pair for pair in range(half) if lost[pair]} == set(order[: sum(lost)])
    assert any(
        float(peer.make(Stage(bench, n, Sublayer.ATTENTION)).weights[Part.K].abs().sum(1).min()) == 0 for n in range(4)
    )


def test_channels_that_go_take_their_biases_along(tmp_path: Path) -> None:
    bench = bench_of(tiny.make("qwen2", tmp_path / "qwen2"), tmp_path / "work")
    model = made(bench, modegpt(bench, int(0.3 * bench.sizes.whole)))
    gone = 0
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            empty = (projection.weight == 0).all(dim=1)
            assert torch.equal(projection.bias == 0, empty)
            gone += int(empty.sum())
    assert gone > 0


# ---- layers


def test_the_layers_of_least_influence_are_left_out(bench: Bench) -> None:
    model = made(bench, peer := shortgpt(bench, int(0.3 * bench.sizes.whole)))
    influences = bench.statistics.influences()
    gone = sorted(range(4), key=influences.__getitem__)[:2]
    stock = load_model(bench.dense, dtype=torch.float32)
    stock.model.layers = nn.ModuleList(layer for n, layer in enumerate(stock.model.layers) if n not in gone)
    for number, layer in enumerate(stock.model.layers):
        layer.self_attn.layer_idx = number
    assert torch.allclose(logits(model), logits(stock), atol=1e-5)
    left = sum(value.numel() * 4 for value in stock.parameters())
    assert peer.saved_bytes == bench.sizes.whole - left


def test_a_linear_map_stands_for_a_run_of_layers(bench: Bench) -> None:
    generator = torch.Generator().manual_seed(4)
    inputs, outputs = (torch.randn(70, 6, generator=generator) for _ in range(2))
    wanted = torch.linalg.lstsq(inputs.double(), outputs.double()).solution
    assert torch.allclose(linear_map(inputs, outputs), wanted, atol=1e-5)

    model = made(bench, peer := replaceme(bench, int(0.2 * bench.sizes.whole)))
    (number,) = [n for n in range(1, 3) if f"layers {n} to {n}" in peer.note]
    stock, tokens = load_model(bench.dense, dtype=torch.float32), bench.calibration.tokens
    seen = {}
    mlp = stock.model.layers[number - 1].mlp
    mlp.register_forward_hook(lambda _, __, output: seen.update(out=output.detach()))
    with torch.no_grad():
        states = stock(input_ids=tokens, output_hidden_states=True).hidden_states
        found = model(input_ids=tokens, output_hidden_states=True).hidden_states
    # hidden_states[n] enters layer n: what leaves the run is M T + Y in the place of X
    carried = states[number] - seen["out"]
    flat = seen["out"].flatten(0, 1).double()
    target = (states[number + 1] - carried).flatten(0, 1).double()
    best = flat @ torch.linalg.lstsq(flat, target).solution
    assert torch.allclose(found[number + 1].flatten(0, 1).double(), best + carried.flatten(0, 1), atol=1e-3)
    states_of = [state / state.norm(dim=-1, keepdim=True) for state in states[:4]]
    alike = [float((states_of[n] * states_of[n + 1]).sum(-1).mean()) for n in (1, 2)]
    assert number == 1 + alike.index(max(alike))


# ---- SliceGPT


def test_hidden_states_are_cut_between_all_sublayers(bench: Bench) -> None:
    peer = slicegpt(bench, int(0.3 * bench.sizes.whole))
    model, stock = made(bench, peer), load_model(bench.dense, dtype=torch.float32)
    width = int(peer.note.split()[2])
    tokens = bench.calibration.tokens

    def cut(hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1).double()
        directions = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -width:]
        return (hidden.double() @ directions @ directions.T).float()

    with torch.no_grad():
        hidden = cut(first := stock.model.embed_tokens(tokens))
        places = stock.model.rotary_emb(hidden, torch.arange(WINDOW)[None])
        mask = torch.full((WINDOW, WINDOW), -math.inf).triu(1)[None, None]
        for layer in stock.model.layers:
            read = layer.input_layernorm(hidden)
            hidden = cut(hidden + layer.self_attn(read, position_embeddings=places, attention_mask=mask)[0])
            hidden = cut(hidden + layer.mlp(layer.post_attention_layernorm(hidden)))
        rows = first.flatten(0, 1).double()
        directions = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -width:].float()
        wanted = stock.lm_head(stock.model.norm(hidden) @ directions @ directions.T)
    found = logits(model, tokens)
    assert torch.allclose(found, wanted, atol=1e-3 * wanted.abs().max())
    assert not torch.allclose(found, logits(stock, tokens), atol=0.1)


def test_a_sliced_models_bytes_are_those_of_its_matrices(bench: Bench) -> None:
    width = 20
    stored = 0
    for name, weight in load_model(bench.dense).named_parameters():
        if weight.ndim == 2:
            stored += 4 * weight.numel() * width // 32
        assert weight.ndim == 2 or "norm" in name
    stored += 4 * (2 * 4 + 1) * width * width
    assert SlicedWidth.of(bench).bytes_at(width) == stored


# ---- the refit


@pytest.mark.parametrize("name", PEERS)
def test_a_refit_brings_hidden_states_back_to_the_dense_models(bench: Bench, name: str) -> None:
    tokens, states = bench.calibration.tokens, []
    for refit in (None, False, True):
        peer = PEERS[name][1](bench, int(0.2 * bench.sizes.whole))
        model = load_model(bench.dense, dtype=torch.float32)
        if refit is not None:
            edited(bench, peer, model, refit=refit)
        with torch.no_grad():
            states.append(model.model(input_ids=tokens).last_hidden_state)
    plain, refitted = (float((state - states[0]).square().mean()) for state in states[1:])
    assert refitted <= plain
    assert plain > 0
    assert refitted < plain or name == "shortgpt"  # here the last layer is left out, and nothing comes after it


def test_a_refit_stores_no_more(bench: Bench) -> None:
    asked = int(0.3 * bench.sizes.whole)
    for make in (svd_llm, flap):
        peer = make(bench, asked)
        plain, refitted = (list(made_by(bench, peer, refit=refit)) for refit in (False, True))
        changed = 0
        for (_, kind, before), (_, _, after) in zip(plain, refitted, strict=True):
            part = bench.matrices.readout(kind)
            was, now = before.weights[part], after.weights[part]
            assert int(torch.linalg.matrix_rank(now.double(), rtol=1e-5)) <= int(
                torch.linalg.matrix_rank(was.double(), rtol=1e-5)
            )
            if before.kept is not None:
                assert bool((now[:, ~before.kept] == 0).all())
            changed += not torch.equal(was, now)
        assert changed > 2


# ---- in a comparison


def test_peers_are_compared_at_shares_of_the_bytes(place: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(place / "model")
    text = Calibration.load(str(place / "calibration"), dense, tokens=512, window=32, seed=0)
    grid = Grid(("svd-llm", "svd-llm+refit", "directshare"), (), text=EvalText(place / "test", 32), save=(0.1, 0.2))
    cells = {cell.title: cell for cell in compare(dense, grid, tmp_path / "out", calibration=text)}
    assert [*cells][1:4] == ["svd-llm 10 %", "svd-llm+refit 10 %", "directshare 10 %"]
    assert "use --ratios" in cells["directshare 20 %"].failed
    plain, refitted = cells["svd-llm 20 %"], cells["svd-llm+refit 20 %"]
    assert (
        plain.saved_bytes == refitted.saved_bytes >= 0.2 * sum(info.nbytes for info in parameter_infos(dense).values())
    )
    assert plain.losses != refitted.losses
    shown = (tmp_path / "out" / "table.md").read_text()
    assert "| 20 % | svd-llm |" in shown
    assert "At 20 %, by perplexity" in shown
    again = compare(dense, grid, tmp_path / "out", calibration=text)
    assert {cell.title: cell for cell in again if not cell.failed} == {
        title: cell for title, cell in cells.items() if not cell.failed
    }


def test_shares_are_given_in_percent_or_as_fractions(place: Path) -> None:
    text = place / "test"
    recipe = Recipe(save=("20%", "0.1"), text=text)  # type: ignore[arg-type]
    assert recipe.save == (0.2, 0.1)
    assert [str(asked) for asked in recipe.grid().asked] == ["20 %", "10 %"]
    both = Recipe(save=("5%",), ratios=(0.3,), text=text)  # type: ignore[arg-type]
    assert [str(asked) for asked in both.grid().asked] == ["0.3", "5 %"]
    with pytest.raises(EvaluationError, match="between 0 and 1"):
        Recipe(save=("120%",), text=text).grid()  # type: ignore[arg-type]


def test_a_cell_is_asked_one_thing() -> None:
    assert Compared("key", "flap", 0.0, save=0.2).title == "flap 20 %"
    assert Remade({}).kept is None
