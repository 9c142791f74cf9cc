"""Rounded matrices under every kind of plan: what is stored, what is computed of it, and what stock tools load.

What is right is computed anew here: every stored matrix rounded by a loop in float64, and put into a checkpoint of the
same plan that is not rounded."""

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import headshare as hs
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.rounding.numbers import dense as unpacked
from headshare.checkpoint.rounding.numbers import from_halves, halves, to_nearest
from headshare.errors import CheckpointError, OptionError, StorageError
from headshare.evaluation.verify import verify
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.matching.estimate import estimate
from headshare.sharing.expand import expand
from headshare.sharing.rounded.write import round_to_nearest
from headshare.sharing.size import parameter_bytes
from support import tiny
from support.command_line import Run, assert_one_error_line
from support.rounded import MODEL, of_kind, outputs, shared_by
from support.running import assert_is_one_graph, with_layers_on_disk
from support.texts import a_text, add_tokenizer

# what is no matrix of attention, feed-forward or embedding
LEFT = ("position", "wpe", "token_type", "pooler", "predictions.transform")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


KINDS = ("nothing", "ties", "removals", "low_rank", "narrow_values")
QUICK = [*(("llama-gqa", kind) for kind in KINDS[1:]), ("gpt2", "ties"), ("bert", "low_rank")]
SLOW = [
    *(("gpt2", kind) for kind in ("nothing", "removals", "low_rank")),
    ("opt", "narrow_values"),
    ("falcon-mha", "ties"),
    ("phi3", "removals"),
    ("gpt_neox", "ties"),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


def by_a_loop(matrix: Tensor, bits: int, group: int | None) -> Tensor:
    """The nearest multiples of each group's largest number over 127 (or 7), row by row."""
    top = 2 ** (bits - 1) - 1
    found = matrix.double().clone()
    for row in found:
        for part in row.split(group or len(row)):
            step = part.abs().max() / top
            part.copy_((part / step).round() * step if step else part)
    return found.to(matrix)


def rounded_by_a_loop(shared: Checkpoint, folder: Path, bits: int, group: int | None) -> Checkpoint:
    """The checkpoint, not rounded, with the numbers in it that rounding should give."""
    shutil.copytree(shared.path, folder)
    tensors = load_file(folder / MODEL)
    turned = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    for key, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.numel() and not any(word in key for word in LEFT):
            matrix = tensor.T if key.endswith(turned) else tensor
            found = by_a_loop(matrix, bits, group)
            tensors[key] = (found.T if key.endswith(turned) else found).contiguous()
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    return hs.open_checkpoint(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_rounded_model_of_any_plan_computes_what_its_numbers_say(name: str, kind: str, tmp_path: Path) -> None:
    shared = shared_by(kind, name, tmp_path)
    out = hs.open_checkpoint(round_to_nearest(shared).save(tmp_path / "rounded"))
    model = load_model(out)
    wanted = outputs(load_model(rounded_by_a_loop(shared, tmp_path / "loop", 8, None), storage="owner"))
    torch.testing.assert_close(outputs(model), wanted, **CLOSE)
    assert not torch.allclose(wanted, outputs(load_model(shared, storage="owner")), atol=1e-4)
    # each stored row once, and all of it one byte a number
    assert {key: info.shape for key, info in out.tensors.items()} == {k: i.shape for k, i in shared.tensors.items()}
    matrices = {key for key, info in shared.tensors.items() if len(info.shape) == 2 and info.nbytes}
    left = {key for key in matrices if any(word in key for word in LEFT)}
    assert {key for key, info in out.tensors.items() if info.parts} == matrices - left
    assert parameter_bytes(out) == unique_parameter_bytes(model)
    found = verify(out)
    assert found.ok, found.problems
    # stock transformers, by compressed-tensors where that can hold it
    folder = expand(out, tmp_path / "stock")
    stock = getattr(transformers, type(model).__name__).from_pretrained(folder)
    torch.testing.assert_close(outputs(stock.eval()), outputs(model), **CLOSE)
    torch.testing.assert_close(outputs(model.dequantize()), wanted, **CLOSE)


def test_it_is_saved_again_copied_and_pickled(tmp_path: Path) -> None:
    out = round_to_nearest(shared_by("ties", "llama-gqa", tmp_path)).save(tmp_path / "rounded")
    model = hs.load(out)
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / MODEL).keys() == load_file(out / MODEL).keys()
    for other in (hs.load(tmp_path / "again"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert outputs(other).equal(outputs(model))


@pytest.mark.parametrize(("dtype", "group"), [(torch.bfloat16, None), (torch.float16, 5)])
def test_a_model_of_16_bits_is_rounded_in_groups_and_generates(
    dtype: torch.dtype, group: int | None, tmp_path: Path
) -> None:
    """A group may be left over at the end of a row: 32, 48 and fewer inputs."""
    shared = shared_by("removals", "llama-gqa", tmp_path, dtype)
    out = hs.open_checkpoint(round_to_nearest(shared, group=group).save(tmp_path / "rounded"))
    assert verify(out).ok
    model = load_model(out, dtype="auto")
    assert model.dtype == dtype
    exact = load_model(rounded_by_a_loop(shared, tmp_path / "loop", 8, group), dtype=torch.float32)
    wanted = outputs(exact)
    torch.testing.assert_close(outputs(model).float(), wanted, rtol=0.1, atol=0.1)
    asked = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(1, 6).long()}
    stock = exact.dequantize()
    wide = load_model(out, dtype=torch.float32)
    assert wide.generate(tiny.tokens(1, 6), **asked).equal(stock.generate(tiny.tokens(1, 6), **asked))


def test_a_shared_row_is_stored_and_rounded_once_and_the_embedding_too(tmp_path: Path) -> None:
    shared = shared_by("ties", "llama-gqa", tmp_path)
    out = round_to_nearest(shared).save(tmp_path / "rounded")
    stored = load_file(out / MODEL)
    layer = "model.layers.{}.self_attn.{}_proj.weight"
    assert stored[layer.format(2, "q") + "_int8"].shape == (16, 32)  # one group of two gave its rows up
    assert stored[layer.format(2, "q") + "_scale"].shape == (16, 1)
    assert stored[layer.format(1, "o") + "_int8"].shape == (32, 16)
    assert stored[layer.format(1, "o")].shape == (0, 16)  # it guards the others
    assert stored["model.embed_tokens.weight_int8"].shape == (tiny.VOCABULARY, 32)
    assert not [name for name in stored if name.startswith("lm_head")]
    model = hs.load(out)
    assert model.lm_head.weight.stored is model.model.embed_tokens.weight_int8
    plain = model.dequantize()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_embeddings_may_stay_and_a_head_of_its_own_is_rounded_by_itself(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-mha", tmp_path / "dense"))
    both = load_file(round_to_nearest(dense).save(tmp_path / "both") / MODEL)
    none = load_file(round_to_nearest(dense, embeddings=False).save(tmp_path / "none") / MODEL)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert both[f"{name}_int8"].shape == none[name].shape == (tiny.VOCABULARY, 32)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_bytes_are_known_before(kind: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense", dtype=torch.bfloat16))
    plan = of_kind(dense, kind)
    shared = hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "shared"))
    for group in (None, 16):
        out = hs.open_checkpoint(round_to_nearest(shared, group=group).save(tmp_path / f"out{group}"))
        assert parameter_bytes(out) == estimate(dense, plan, bits=8, group=group).shared_bytes


def test_experts_stay_and_attention_beside_them_is_rounded(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("mixtral", tmp_path / "dense"))
    out = hs.open_checkpoint(round_to_nearest(dense).save(tmp_path / "rounded"))
    assert {name.split(".")[-2] for name, info in out.tensors.items() if info.parts} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens", "lm_head",
    }  # fmt: skip
    assert verify(out, dense).ok
    stock = transformers.MixtralForCausalLM.from_pretrained(expand(out, tmp_path / "stock"))
    torch.testing.assert_close(outputs(stock), outputs(load_model(out)), **CLOSE)


def test_layers_on_disk_run(tmp_path: Path) -> None:
    out = round_to_nearest(shared_by("ties", "llama-mha", tmp_path)).save(tmp_path / "rounded")
    model = with_layers_on_disk(out, tmp_path / "offload", head="disk")
    assert model.model.layers[0].self_attn.q_proj.weight_int8.device.type == "meta"
    assert outputs(model).equal(outputs(hs.load(out)))


@pytest.mark.slow
def test_torch_compile_takes_it_as_one_graph(tmp_path: Path) -> None:
    out = round_to_nearest(shared_by("ties", "llama-gqa", tmp_path)).save(tmp_path / "rounded")
    assert_is_one_graph(out)


# ---- what is refused


def test_what_cannot_be_rounded_is_one_clear_error(run: Run, tmp_path: Path) -> None:
    folder = add_tokenizer(tiny.make("llama-gqa", tmp_path / "dense"))
    dense = hs.open_checkpoint(folder)
    with pytest.raises(OptionError, match="no rounding to 3 bits"):
        round_to_nearest(dense, bits=3)
    with pytest.raises(OptionError, match="a group of 0 inputs cannot have a scale"):
        round_to_nearest(dense, group=0)
    out = hs.open_checkpoint(round_to_nearest(dense).save(tmp_path / "out"))
    text = a_text(tmp_path / "text", 200)
    calibrated = ("--calibration", str(text), "--calibration-window", "16")
    for words, why in (
        (("quantize", str(out.path), str(tmp_path / "again"), "--bits", "8"), "are rounded already"),
        (("quantize", str(out.path), str(tmp_path / "again"), *calibrated), "are rounded"),
        (("refit", str(out.path), *calibrated), "are rounded"),
        (("share", str(out.path), str(tmp_path / "again")), "expand --unpack"),
        (("quantize", str(folder), str(tmp_path / "again")), "say how to round"),
        (("quantize", str(folder), str(tmp_path / "again"), "--bits", "4", "--group", "5"), "groups of 5"),
        (("quantize", str(folder), str(tmp_path / "again"), "--bits", "8", *calibrated), "need no text"),
    ):
        found = run(*words)
        assert_one_error_line(found)
        assert why in found.err
    assert not (tmp_path / "again").exists()
    with pytest.raises(StorageError, match="held by their owners"):
        load_model(out, storage="alias")
    with pytest.raises(StorageError, match="Train it before"):
        _ = hs.load(out.path).hf_quantizer.is_trainable


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_named(number: float, tmp_path: Path) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "dense")
    tensors = load_file(folder / MODEL)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = number
    save_file(tensors, folder / MODEL, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight cannot be rounded: it has numbers"):
        round_to_nearest(hs.open_checkpoint(folder)).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


W_O = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{W_O}_scale", None),
        (f"{W_O}_scale", torch.zeros(32, 2)),
        (f"{W_O}_scale", torch.zeros(32, 1, dtype=torch.int32)),
        (f"{W_O}_int8", None),
        (f"{W_O}_int8", torch.zeros(32, 31, dtype=torch.int8)),
        (f"{W_O}_int8", torch.zeros(32, 32, dtype=torch.uint8)),
        (f"{W_O}_int8", torch.zeros(31, 32, dtype=torch.int8)),
        (W_O, None),
        (W_O, torch.zeros(0, 33, dtype=torch.int8)),
        (W_O, torch.zeros(0, 0, dtype=torch.int8)),
        (W_O, torch.zeros(32, 32)),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(name: str, tensor: Tensor | None, tmp_path: Path) -> None:
    out = round_to_nearest(shared_by("removals", "llama-gqa", tmp_path)).save(tmp_path / "rounded")
    tensors = load_file(out / MODEL)
    tensors.pop(name)
    tensors |= {} if tensor is None else {name: tensor}
    save_file(tensors, out / MODEL, {"format": "pt"})
    with pytest.raises(hs.HeadshareError, match=W_O):
        hs.load(out)
    with pytest.raises(hs.HeadshareError, match=W_O):
        transformers.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("change", [{"int8": None}, {"int8": {"group": 0}}, {"int9": {}}, {"int8": {"how": "\x1b[2J"}}])
def test_a_record_that_is_not_ours_is_one_error(change: dict[str, Any], tmp_path: Path) -> None:
    out = round_to_nearest(hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))).save(tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(config))
    for load in (hs.open_checkpoint, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="record of how its matrices are rounded"):
            load(out)


def test_verify_finds_a_number_that_was_changed(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    out = round_to_nearest(dense).save(tmp_path / "out")
    assert verify(hs.open_checkpoint(out), dense).ok
    tensors = load_file(out / MODEL)
    tensors[f"{W_O}_int8"][3, 5] ^= 64
    save_file(tensors, out / MODEL, {"format": "pt"})
    (out / "headshare.json").unlink()
    found = verify(hs.open_checkpoint(out), dense)
    assert found.problems == [f"{W_O} has a number that is not the nearest to the dense model's"]


# ---- numbers


@given(
    st.integers(1, 4), st.integers(1, 9), st.sampled_from([4, 8]), st.sampled_from([None, 1, 3, 8]), st.integers(0, 99)
)
def test_numbers_are_the_nearest_and_halves_come_apart_again(
    rows: int, inputs: int, bits: int, group: int | None, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, inputs, generator=draw) * 10.0 ** torch.randint(-6, 4, (rows, 1), generator=draw)
    matrix[0] = matrix[0] * (seed % 3)  # rows of zeros too
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numbers, scale = to_nearest(matrix, bits, group, dtype)
        wide = scale.double().repeat_interleave(group or inputs, dim=1)[:, :inputs]
        off = (unpacked(numbers, scale, group, torch.float64) - matrix.double()).abs()
        if bits == 8:
            assert bool((off <= 0.5001 * wide).all())
            continue
        assert from_halves(halves(numbers), inputs).equal(numbers)
        # each number is the nearest that there is, none is cut off, and steps are no wider than fifteen numbers need
        assert bool((off <= 0.5001 * wide.abs()).all())
        largest = torch.stack([part.abs().amax(dim=1) for part in matrix.split(group or inputs, dim=1)], dim=1)
        stored = scale.double().abs()
        assert bool(((stored <= largest.double() / 7 * 1.01 + 1e-7) | (largest == 0)).all())


def test_the_command_rounds_and_says_what_it_left(run: Run, tmp_path: Path) -> None:
    folder = add_tokenizer(tiny.make("llama-gqa", tmp_path / "dense", dtype=torch.bfloat16))
    found = run("quantize", str(folder), str(tmp_path / "out"), "--bits", "8", "--json")
    assert found.status == 0, found.err
    data = json.loads(found.out)
    assert (data["matrices"], data["bits"], data["group"]) == (4 * 7 + 1, 8, None)
    told = json.loads(run("estimate", str(folder), "--ratio", "0", "--bits", "8", "--json").out)
    assert told["shared_bytes"] == data["bytes"] < 0.56 * data["bytes_before"]
    assert "matrices of 8 bits, to the nearest, a scale for each row" in run("inspect", str(tmp_path / "out")).out
    assert run("inspect", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")).status == 0
    assert run("verify", str(tmp_path / "out"), "--against", str(folder)).status == 0
    text = a_text(tmp_path / "text", 100)
    assert run("eval", str(tmp_path / "out"), "--text", str(text), "--window", "16").status == 0
    assert run("expand", str(tmp_path / "out"), str(tmp_path / "stock"), "--unpack").status == 0
