"""What each rank of an engine holds: the rows of fused modules, filled from a shared checkpoint, each unit once."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import headshare as hs
from headshare.errors import CheckpointError, OptionError, StorageError
from headshare.integrations.vllm.rows import RankMatrix, lay_out, range_of
from headshare.integrations.vllm.weights import RankWeights
from headshare.integrations.vllm.widths import LayerWidth, layer_width
from headshare.plan.placement import shares_of_ranks
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.section import Borrowed
from headshare.plan.spans import Span
from headshare.plan.tensors import NOTHING, Source, TensorPlan
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Tie
from headshare.sharing.expanded import ExpandedTensors
from support.gguf_models import SIZES, make, plan_of, reduce

LAYERS = range(4)
HEAD = SIZES["head_dim"]
FUSED = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("dense") / "llama")


def name_of(layer: int, part: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if part in 'qkvo' else 'mlp'}.{part}_proj.weight"


def on_rank(size: int, part: str, rank: int, ranks: int) -> tuple[int, int]:
    """The indices of a part that vLLM gives a rank: an equal cut, but keys and values in whole heads."""
    again = max(1, ranks // (size // HEAD)) if part in "kv" else 1
    each = size * again // ranks
    return rank // again * each, (rank // again + 1) * each


def held(folder: Path, rank: int, ranks: int) -> tuple[RankWeights, dict[str, Tensor]]:
    """The weights of a rank, loaded as an engine loads them, and by matrix what its modules are to multiply with."""
    checkpoint = hs.open_checkpoint(folder)
    assert checkpoint.plan is not None
    expanded = ExpandedTensors.of(checkpoint)
    weights = RankWeights(checkpoint.plan)
    wanted: dict[str, Tensor] = {}
    for layer in LAYERS:
        for module, parts in FUSED.items():
            axis = len(parts) % 2 if module in ("o", "down") else 0
            wholes = {name_of(layer, part): expanded.read(name_of(layer, part)) for part in parts}
            if not any(name in checkpoint.plan.tensors for name in wholes):
                continue
            cuts = [
                on_rank(len(whole) if axis == 0 else whole.shape[1], part, rank, ranks)
                for part, whole in zip(parts, wholes.values(), strict=True)
            ]
            runs: list[Source] = []
            for (name, whole), (start, stop) in zip(wholes.items(), cuts, strict=True):
                tensor = weights.tensor(name, tuple(whole.shape), axis)
                runs += range_of(tensor, (), tensor.size, start, stop)
            matrix = RankMatrix(f"{layer}.{module}", axis, next(iter(wholes.values())).shape[1 - axis], tuple(runs))
            weights.add(matrix, torch.empty(0))
            pieces = zip(wholes.values(), cuts, strict=True)
            wanted[matrix.name] = torch.cat([whole.narrow(axis, low, high - low) for whole, (low, high) in pieces])
    for name in [*weights.tensors, *checkpoint.plan.added_tensors]:
        weights.put(name, checkpoint.read(name))
    return weights, wanted


CASES = [("ties",), ("units", "neurons", "ties across"), ("scaled ties", "odd neurons"), ("low rank", "narrow values")]


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("words", CASES)
def test_every_rank_multiplies_with_its_part_of_the_expanded_model(
    words: tuple[str, ...], ranks: int, dense: Path, tmp_path: Path
) -> None:
    folder = reduce(dense, tmp_path / "reduced", *words)
    for rank in range(ranks):
        weights, wanted = held(folder, rank, ranks)
        for name, whole in wanted.items():
            found = weights.whole(name)
            assert isinstance(found, Tensor)
            scale = weights.channel_scale(name)
            torch.testing.assert_close(found if scale is None else found * scale, whole, rtol=0, atol=1e-6)


def tie(dense: Path, *ties: tuple[int, int, int, int]) -> SharePlan:
    with hs.open_checkpoint(dense) as checkpoint:
        layout = checkpoint.layouts.attention.only((Part.Q, Part.K, Part.V))
    pairs = tuple(Tie(HeadUnit(*one[:2]), HeadUnit(*one[2:])) for one in ties)
    return SharePlan(selections=(Selection(layout=layout, ties=pairs),))


def rows_stored(plan: SharePlan, ranks: int) -> list[int]:
    """The rows of q, k and v that each rank stores."""
    counts = []
    for rank in range(ranks):
        matrices = [
            RankMatrix(
                f"{layer}.qkv",
                0,
                64,
                tuple(
                    Source(name, *on_rank(tensor.size, name.rpartition("_proj")[0][-1], rank, ranks))
                    for name, tensor in plan.tensors.items()
                    if f".{layer}." in name
                ),
            )
            for layer in LAYERS
        ]
        counts.append(sum(each.stored_shape[0] for each in lay_out(matrices, plan.tensors).plans.values()))
    return counts


def test_a_rank_stores_a_unit_once_wherever_its_donor_is(dense: Path, tmp_path: Path) -> None:
    unit = 4 * HEAD  # two heads of queries, one of keys, one of values
    # of two ranks, the first has groups 0 and 1; two tensors of three layers are touched, of four groups each
    assert rows_stored(tie(dense, (2, 1, 0, 0)), 2) == [2 * 2 * unit - unit, 2 * 2 * unit]
    across = tie(dense, (2, 3, 0, 0), (3, 2, 0, 0))
    assert rows_stored(across, 1) == [3 * 4 * unit - 2 * unit]
    # the other rank's unit stands in the first of the matrices that use it, and the second borrows it from there
    assert rows_stored(across, 2) == [3 * 2 * unit, 3 * 2 * unit - unit]
    # and that is what inspect counts, of all layers
    whole = 2 * unit * 64
    for plan, ranks in ((tie(dense, (2, 1, 0, 0)), 2), (across, 1), (across, 2), (across, 4)):
        itemsizes = dict.fromkeys((name_of(layer, part) for layer in LAYERS for part in "qkv"), 1)
        shares = shares_of_ranks(plan, ranks, itemsizes)
        untouched = 4 * (4 - len(plan.tensors) // 3) * unit // ranks
        assert [(share.stored + share.copied) // 64 for share in shares] == [
            rows + untouched for rows in rows_stored(plan, ranks)
        ]
        assert all(share.stored + share.borrowed + share.copied == 8 // ranks * whole for share in shares)
    with pytest.raises(OptionError, match="do not divide evenly by 3 ranks"):
        shares_of_ranks(across, 3, itemsizes)


def test_matrices_lend_to_each_other_in_their_own_rows() -> None:
    tensors = {
        "a": TensorPlan("a", (8, 4), 0),
        "b": TensorPlan("b", (8, 4), 0, gaps=(Borrowed(2, 6, "a", 4),)),
    }
    first = RankMatrix("first", 0, 4, (Source("b", 0, 4),))
    second = RankMatrix("second", 0, 4, (Source(NOTHING, 0, 1), Source("a", 4, 8)))
    layout = lay_out([first, second], tensors)
    assert layout.plans["first"].gaps == ()
    assert layout.plans["second"].gaps == (Borrowed(1, 3, "first", 2),)
    assert layout.pieces == {"b": [("first", 0, 0, 2)], "a": [("first", 2, 4, 2), ("second", 1, 6, 2)]}


def test_what_is_removed_leaves_no_place_in_layers_that_are_narrower() -> None:
    tensor = TensorPlan("a", (12, 4), 0, removed=(Span(2, 4), Span(8, 9)))
    removed = tensor.removed
    assert range_of(tensor, removed, 12, 4, 8) == [Source("a", 4, 8)]
    assert range_of(tensor, removed, 9, 0, 9) == [Source("a", 0, 2), Source("a", 4, 8), Source("a", 9, 12)]
    assert range_of(tensor, removed, 10, 5, 10) == [Source("a", 7, 8), Source("a", 9, 12), Source(NOTHING, 0, 1)]
    with pytest.raises(StorageError, match="of different models"):
        range_of(tensor, removed, 8, 0, 4)


def test_layers_are_as_wide_as_ranks_can_share(dense: Path) -> None:
    with hs.open_checkpoint(dense) as checkpoint:
        attention, neurons = checkpoint.layouts.attention, checkpoint.layouts.neurons
    assert neurons is not None
    plan = SharePlan(
        removals=(
            Removal(layout=attention, removed={0: [1], 1: range(4), 2: [0, 1, 2]}),
            Removal(layout=neurons, removed={0: range(5), 3: range(128)}),
        )
    )
    whole = LayerWidth(4, 128)
    assert [layer_width(plan, layer, whole, 1) for layer in LAYERS] == [(3, 128), (0, 128), (1, 128), (4, 16)]
    assert [layer_width(plan, layer, whole, 2) for layer in LAYERS] == [(4, 128), (0, 128), (2, 128), (4, 32)]
    # with more ranks than units, each has one as it is
    assert [layer_width(plan, layer, whole, 8).units for layer in LAYERS] == [4, 0, 4, 4]


def test_what_does_not_load_or_does_not_fit_is_refused(dense: Path, tmp_path: Path) -> None:
    folder = reduce(dense, tmp_path / "reduced", "ties")
    weights, _ = held(folder, 0, 1)
    name = name_of(2, "q")
    with pytest.raises(CheckpointError, match="by the plan it should be"):
        weights.put(name, torch.empty(3, 64))
    weights.whole("0.qkv")
    with pytest.raises(StorageError, match="cannot be loaded anew"):
        weights.put(name, torch.empty(weights.tensors[name].stored_shape))
    short = RankWeights(plan_of(hs.open_checkpoint(dense), "ties"))
    with pytest.raises(StorageError, match="no module on this rank"):
        short.whole("0.qkv")


def test_a_rank_for_which_a_layer_has_nothing_left_multiplies_with_zeros(dense: Path, tmp_path: Path) -> None:
    with hs.open_checkpoint(dense) as checkpoint:
        plan = SharePlan(removals=(Removal(layout=checkpoint.layouts.attention, removed={1: [0, 1, 3]}),))
        hs.share(checkpoint, plan).save(tmp_path / "reduced")
    reduced = hs.open_checkpoint(tmp_path / "reduced")
    width = layer_width(plan, 1, LayerWidth(4, 128), 2).units
    kept = reduced.read(name_of(1, "k"))
    for rank in range(2):
        weights = RankWeights(plan)
        for part in "qkvo":
            tensor = weights.tensor(name_of(1, part), (), 0)
            size = tensor.size // 4 * width
            runs = range_of(tensor, weights.removed[tensor.name], size, rank * size // 2, (rank + 1) * size // 2)
            weights.add(
                RankMatrix(tensor.name, tensor.axis, tensor.shape[1 - tensor.axis], tuple(runs)), torch.empty(0)
            )
        for part in "qkvo":
            weights.put(name_of(1, part), reduced.read(name_of(1, part)))
        found = weights.whole(name_of(1, "k"))
        assert isinstance(found, Tensor)
        assert torch.equal(found, torch.zeros_like(kept) if rank else kept)


@pytest.mark.parametrize(
    ("heads", "how"), [({}, "each unit stands once"), ({"head_dim": 8}, "put together in each matrix")]
)
def test_units_of_less_than_a_page_are_put_together_and_the_log_says_so(
    heads: dict[str, int], how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("llama", tmp_path / "model", **heads)
    folder = reduce(model, tmp_path / "reduced", "ties")
    checkpoint = hs.open_checkpoint(folder)
    assert checkpoint.plan is not None
    weights = RankWeights(checkpoint.plan)
    touched: Sequence[str] = sorted(checkpoint.plan.tensors)
    for name in touched:
        tensor = weights.tensor(name, (), 0)
        weights.add(RankMatrix(name, 0, tensor.shape[1], (Source(name, 0, tensor.size),)), torch.empty(0))
    for name in touched:
        weights.put(name, checkpoint.read(name))
    with caplog.at_level(logging.INFO, "vllm.headshare"):
        wholes = {name: weights.whole(name) for name in touched}
    assert how in caplog.text
    for name, whole in wholes.items():
        assert torch.equal(whole, ExpandedTensors.of(checkpoint).read(name))  # type: ignore[arg-type]
