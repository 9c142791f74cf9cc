"""What a plan takes away, expand gives back from the donors: on coordinates, and on the bytes of real files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import headshare as hs
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.plan.section import Borrowed
from headshare.plan.tensors import Source, TensorPlan
from headshare.sharing import assembly
from support import tiny
from support.examples import Example, Json, Weights, examples, plan_of

MODEL = "model.safetensors"
TYPES = {"float16": np.uint16, "float32": np.uint32, "float64": np.uint64}


def random_bits(shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> Weights:
    """Any bits of finite numbers: -0 and subnormal numbers among them."""
    generator, unsigned = np.random.default_rng(seed), TYPES[dtype]
    highest = np.iinfo(unsigned).max
    weights = {
        name: np.asarray(generator.integers(0, highest, shape, dtype=unsigned, endpoint=True)).view(dtype)
        for name, shape in shapes.items()
    }
    for array in weights.values():
        array[~np.isfinite(array)] = -0.0
    return weights


def write_folder(folder: Path, weights: Weights) -> Checkpoint:
    folder.mkdir()
    save_file(weights, folder / MODEL, metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "x"}')
    return hs.open_checkpoint(folder)


def places_of(selection: Json) -> list[tuple[int, list[tuple[str, slice, str, slice]]]]:
    """For each part: its axis, and where each tie writes and reads, from the plan's own words."""
    found = []
    for place in selection["layout"]["parts"].values():
        moves = []
        for layer, group, donor_layer, donor_group in selection["ties"]:
            into, taken = (place["start"] + number * place["step"] for number in (group, donor_group))
            moves.append(
                (
                    place["tensor"].replace("{layer}", str(layer)),
                    slice(into, into + place["rows"]),
                    place["tensor"].replace("{layer}", str(donor_layer)),
                    slice(taken, taken + place["rows"]),
                )
            )
        found.append((place["axis"], moves))
    return found


def overwritten(weights: Weights, selections: list[Json]) -> Weights:
    result = {name: array.copy() for name, array in weights.items()}
    for selection in selections:
        for axis, moves in places_of(selection):
            for name, into, donor, taken in moves:
                if axis == 0:
                    result[name][into] = weights[donor][taken]
                else:
                    result[name][:, into] = weights[donor][:, taken]
    return result


def bits(weights: Weights) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in weights.items()}


@settings(max_examples=120, deadline=None)
@given(examples(), st.sampled_from(sorted(TYPES)), st.integers(0, 99))
def test_sharing_and_expanding_equals_overwriting_recipients_with_donors(
    tmp_path_factory: pytest.TempPathFactory, example: Example, dtype: str, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("one")
    weights = random_bits(example.shapes, dtype, seed)
    shared = hs.share(write_folder(folder / "dense", weights), example.plan)
    out = shared.save(folder / "shared")
    stored = load_file(out / MODEL)
    whole = load_file(hs.expand(hs.open_checkpoint(out), folder / "expanded") / MODEL)
    expected = overwritten(weights, example.selections)
    scaled = {name.removesuffix("tie_scale") + "weight" for name in stored if name.endswith("tie_scale")}
    for name in scaled:  # a multiplication by one may change the payload of a NaN, and nothing else
        assert np.array_equal(whole.pop(name), expected.pop(name), equal_nan=True)
    assert bits(whole) == bits(expected)
    assert sum(array.nbytes for array in stored.values()) == shared.estimate.shared_bytes


@settings(max_examples=60, deadline=None)
@given(examples(), st.integers(0, 99))
def test_what_is_stored_is_the_dense_tensor_less_its_gaps(
    tmp_path_factory: pytest.TempPathFactory, example: Example, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("one")
    weights = random_bits(example.shapes, "float16", seed)
    out = hs.share(write_folder(folder / "dense", weights), example.plan).save(folder / "shared")
    axis_of: dict[str, int] = {}
    keep: dict[str, np.ndarray] = {}
    for selection in example.selections:
        for axis, moves in places_of(selection):
            for name, into, _, _ in moves:
                axis_of[name] = axis
                keep.setdefault(name, np.ones(example.shapes[name][axis], bool))[into] = False
    expected = weights | {name: np.compress(keep[name], weights[name], axis=axis_of[name]) for name in keep}
    stored = {name: array for name, array in load_file(out / MODEL).items() if not name.endswith("tie_scale")}
    assert bits(stored) == bits(expected)


@settings(max_examples=300, deadline=None)
@given(examples())
def test_kept_stored_and_whole_coordinates_agree(example: Example) -> None:
    tensors = example.plan.tensors
    for tensor in tensors.values():
        gone = {index for gap in tensor.gaps for index in range(gap.start, gap.stop)}
        kept = [index for start, stop in tensor.kept() for index in range(start, stop)]
        assert kept == [index for index in range(tensor.size) if index not in gone]
        assert [tensor.stored_index(index) for index in kept] == list(range(len(kept)))
        assert tensor.stored_shape[tensor.axis] == len(kept)
        assert tensor.stored_shape[1 - tensor.axis] == tensor.shape[1 - tensor.axis]
        sources = [(run.source, index) for run in tensor.whole() for index in range(run.start, run.stop)]
        expected = [(tensor.name, index) for index in range(tensor.size)]
        for gap in tensor.gaps:
            for index in range(gap.start, gap.stop):
                expected[index] = (gap.donor, gap.donor_start + index - gap.start)
        assert sources == expected
        for run in tensor.whole():
            first = tensors[run.source].stored_index(run.start)
            assert 0 <= first <= tensors[run.source].stored_shape[tensor.axis] - (run.stop - run.start)


@settings(max_examples=200, deadline=None)
@given(examples())
def test_tensors_are_listed_where_they_give_or_take_and_nowhere_else(example: Example) -> None:
    moves = [move for one in example.selections for _, some in places_of(one) for move in some]
    assert set(example.plan.tensors) == {name for into, _, donor, _ in moves for name in (into, donor)}
    for selection, given_ in zip(example.plan.selections, example.selections, strict=True):
        by_layer = selection.by_layer()
        assert sorted([layer, *rest] for layer, many in by_layer.items() for rest in many) == sorted(given_["ties"])
        assert all(many == sorted(many) for many in by_layer.values())


@settings(max_examples=200, deadline=None)
@given(examples())
def test_a_scaled_plan_has_one_number_for_each_channel_that_a_recipient_reads_out(example: Example) -> None:
    expected: dict[str, int] = {}
    for one in example.selections:
        for tie in one["ties"] if one["scale"] else ():
            place = one["layout"]["parts"]["o"]
            name = place["tensor"].replace("{layer}", str(tie[0])).removesuffix("weight") + "tie_scale"
            expected[name] = expected.get(name, 0) + place["rows"]
    assert {name: one.shape[0] for name, one in example.plan.added_tensors.items()} == expected


def test_neighbouring_runs_of_one_tensor_are_one_run() -> None:
    gaps = (Borrowed(2, 4, "a", 6), Borrowed(4, 6, "a", 8), Borrowed(6, 8, "b", 8), Borrowed(10, 12, "a", 0))
    tensor = TensorPlan("c", (12, 3), 0, gaps)
    runs = [Source("c", 0, 2), Source("a", 6, 10), Source("b", 8, 10), Source("c", 8, 10), Source("a", 0, 2)]
    assert tensor.whole() == runs
    assert tensor.kept() == [(0, 2), (8, 10)]
    assert tensor.stored_shape == (4, 3)
    assert [tensor.stored_index(index) for index in (0, 1, 8, 9)] == [0, 1, 2, 3]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("slice_bytes", [1, 100, 2**24])
def test_a_layer_that_gives_up_every_unit_stores_a_tensor_of_no_size(
    axis: int, slice_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "SLICE_BYTES", slice_bytes)
    shape = (8, 5) if axis == 0 else (5, 8)
    place = {"tensor": "h.{layer}.q", "axis": axis, "shape": shape, "start": 0, "step": 2, "rows": 2}
    ties = [[2, group, group % 2, 3 - group] for group in range(4)]
    selection = {"layout": {"kind": "attention", "layers": 3, "groups": 4, "parts": {"q": place}}, "ties": ties}
    weights = random_bits({f"h.{layer}.q": shape for layer in range(3)}, "float32", 0)
    plan = plan_of(selection)
    out = hs.share(write_folder(tmp_path / "dense", weights), plan).save(tmp_path / "shared")
    assert load_file(out / MODEL)["h.2.q"].shape == ((0, 5) if axis == 0 else (5, 0))
    whole = load_file(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded") / MODEL)
    assert bits(whole) == bits(overwritten(weights, [selection]))


@pytest.mark.parametrize("axis", [0, 1])
def test_expanding_multiplies_each_shared_channel_by_its_scale(axis: int, tmp_path: Path) -> None:
    """Scales other than one, as a refit would leave them, in the order of the channels."""
    shape = (6, 4) if axis == 0 else (4, 6)
    place = {"tensor": "h.{layer}.o.weight", "axis": axis, "shape": shape, "start": 0, "step": 2, "rows": 2}
    layout = {"kind": "attention", "layers": 2, "groups": 3, "parts": {"o": place}}
    selection = {"layout": layout, "ties": [[1, 2, 0, 0], [1, 0, 0, 1]], "scale": True}
    weights = {f"h.{n}.o.weight": np.random.default_rng(n).normal(size=shape).astype(np.float32) for n in range(2)}
    plan = plan_of(selection)
    out = hs.share(write_folder(tmp_path / "dense", weights), plan).save(tmp_path / "shared")
    stored = load_file(out / MODEL)
    assert np.array_equal(stored["h.1.o.tie_scale"], np.ones(4, np.float32))
    save_file(stored | {"h.1.o.tie_scale": np.array([2, 3, 0, -0.5], np.float32)}, out / MODEL)
    whole = load_file(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded") / MODEL)
    expected = overwritten(weights, [selection])["h.1.o.weight"]
    factors = np.array([2, 3, 1, 1, 0, -0.5], np.float32)
    assert np.array_equal(whole["h.1.o.weight"], expected * (factors[:, None] if axis == 0 else factors))
    assert np.array_equal(whole["h.0.o.weight"], weights["h.0.o.weight"])
    assert "h.1.o.tie_scale" not in whole


@pytest.mark.parametrize("mode", ["star", "root", "published"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox", "phi3", "falcon-gqa", "opt"])
def test_a_ratio_of_zero_leaves_every_tensor_bit_for_bit(name: str, mode: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo+ffn"), 0.0, parts="qkvo+ffn", mode=mode)
    out = hs.share(dense, plan).save(tmp_path / "shared")
    stock = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    assert bits(load_file(out / MODEL)) == bits(load_file(dense.path / MODEL)) == bits(load_file(stock / MODEL))
    assert json.loads((stock / "config.json").read_text()) == json.loads((dense.path / "config.json").read_text())


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox"])
def test_bfloat16_is_shared_and_expanded_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    weights = {key: value.bfloat16() for key, value in load_torch(folder / MODEL).items()}
    save_torch(weights, folder / MODEL, metadata={"format": "pt"})
    dense = hs.open_checkpoint(folder)
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo+ffn"), 0.5, parts="qkvo+ffn")
    out = hs.share(dense, plan).save(tmp_path / "shared")
    whole = load_torch(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded") / MODEL)
    as_numbers = {key: value.view(torch.int16).numpy() for key, value in weights.items()}
    expected = overwritten(as_numbers, plan.model_dump(mode="json")["selections"])
    assert bits({key: value.view(torch.int16).numpy() for key, value in whole.items()}) == bits(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_converted_while_sharing_are_rounded_as_torch_rounds(dtype: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense), 0.5)
    out = hs.share(dense, plan, dtype=dtype).save(tmp_path / "shared")
    whole = load_torch(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded") / MODEL)
    plain = load_torch(dense.path / MODEL)
    kept = {name for name in plain if name not in plan.tensors}
    assert kept
    for name in plain:
        assert whole[name].dtype == getattr(torch, dtype)
        assert name not in kept or torch.equal(whole[name], plain[name].to(getattr(torch, dtype)))
    for recipient, donor in plan.selections[0].ties:
        ours, theirs = (f"model.layers.{unit.layer}.self_attn.v_proj.weight" for unit in (recipient, donor))
        rows = whole[ours].chunk(2)[recipient.group]
        assert torch.equal(rows, plain[theirs].chunk(2)[donor.group].to(rows.dtype))
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
