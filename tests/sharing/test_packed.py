"""Matrices of four bits: shared rows stored once, loaded through the nested entry; what they compute is what
their numbers say, and stock transformers computes the same of them once expanded."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import headshare as hs
from headshare.architecture.modules import module_path
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.int4 import Packing
from headshare.errors import CheckpointError, PlanError, StorageError, TrainingError
from headshare.evaluation.verify import verify
from headshare.integrations.transformers.loading import load_model
from headshare.plan.plan import SharePlan
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Tie
from headshare.sharing.expand import expand
from headshare.training import train
from support import tiny
from support.command_line import Run, assert_one_error_line
from support.packed import PackedMatrix, pack, write_packed
from support.running import assert_is_one_graph, with_layers_on_disk
from support.texts import a_text, add_tokenizer
from support.trainings import settings

GROUP = 16


@pytest.fixture(name="dense")
def a_model(tmp_path: Path) -> Checkpoint:
    """4 layers of 2 groups; q, k and v have biases, which are shared too."""
    folder = tiny.make_llama(tmp_path / "dense", initializer_range=0.2, attention_bias=True, dtype="bfloat16")
    return hs.open_checkpoint(add_tokenizer(folder))


@pytest.fixture(name="shared")
def a_shared_model(dense: Checkpoint, tmp_path: Path) -> Checkpoint:
    """Half of its units; the last layer has none of its own."""
    (selection,) = hs.make_plan(hs.score_units(dense), 0.5).selections
    pairs = {(1, 1): (0, 1), (2, 0): (1, 0), (3, 0): (0, 0), (3, 1): (0, 1)}
    ties = tuple(Tie(HeadUnit(*recipient), HeadUnit(*donor)) for recipient, donor in pairs.items())
    plan = SharePlan(model_type="llama", selections=(Selection(layout=selection.layout, ties=ties),))
    return hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "shared"))


def drawn(dense: Checkpoint, shared: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """Any numbers, and any scales, for every matrix of the layers; rows that are shared are the same in all users."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, info in dense.tensors.items():
        if name.endswith("_proj.weight"):
            rows, inputs = info.shape
            numbers = torch.randint(-8, 8, (rows, inputs), generator=draw, dtype=torch.int8)
            scale = torch.rand(rows, inputs // GROUP, generator=draw) * 0.1
            found[name] = (numbers, scale.half())
    for place, tie in tied(shared.plan):
        (start, stop), (first, last) = place.span(tie.recipient.group), place.span(tie.donor.group)
        pairs = zip(found[place.name(tie.recipient.layer)], found[place.name(tie.donor.layer)], strict=True)
        for mine, theirs in pairs:
            mine[start:stop] = theirs[first:last]
    return found


def grouped(dense: Checkpoint, shared: Checkpoint) -> dict[str, PackedMatrix]:
    return {name: PackedMatrix(pack(numbers), scale) for name, (numbers, scale) in drawn(dense, shared).items()}


def tied(plan: SharePlan | None) -> list[tuple[Any, Any]]:
    if plan is None:
        return []
    return [(place, tie) for one in plan.selections for place in one.layout.parts.values() for tie in one.ties]


@pytest.fixture(name="packed")
def a_packed_model(dense: Checkpoint, shared: Checkpoint, tmp_path: Path) -> Checkpoint:
    packing = Packing(group=GROUP, ignore=("lm_head",))
    return hs.open_checkpoint(write_packed(shared, grouped(dense, shared), packing, tmp_path / "packed"))


def numbers_written_in(dense: Checkpoint, shared: Checkpoint, dtype: torch.dtype) -> Any:
    """The stock model, its matrices overwritten with the numbers times their scales."""
    model = load_model(shared, storage="owner", dtype=dtype).dequantize()
    with torch.no_grad():
        for name, (numbers, scale) in drawn(dense, shared).items():
            wanted = numbers.double() * scale.double().repeat_interleave(GROUP, dim=1)
            model.get_submodule(module_path(model, name)).weight.copy_(wanted)
    return model


# ---- what is written, and loaded again


def test_shared_rows_are_stored_once(packed: Checkpoint, shared: Checkpoint) -> None:
    for name, info in shared.tensors.items():
        if not name.endswith("_proj.weight"):
            assert packed.tensors[name].shape == info.shape
            continue
        (rows, inputs), stem = info.shape, name.removesuffix("weight")
        assert packed.tensors[f"{stem}weight_packed"].shape == (rows, inputs // 8)
        assert packed.tensors[f"{stem}weight_scale"].shape == (rows, inputs // GROUP)
        assert packed.tensors[name].shape == (0,)  # it guards the others
    assert packed.tensors["model.layers.3.self_attn.q_proj.weight_packed"].nbytes == 0
    entry = packed.config["quantization_config"]
    assert entry["quant_method"] == "headshare"
    assert entry["quantization_config"]["quant_method"] == "compressed-tensors"
    assert packed.plan == shared.plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_loads_and_computes_what_its_numbers_say(
    dtype: torch.dtype, packed: Checkpoint, dense: Checkpoint, shared: Checkpoint
) -> None:
    model = load_model(packed, dtype=dtype)
    tokens = tiny.tokens(2, 12)
    wanted = numbers_written_in(dense, shared, dtype)
    with torch.no_grad():
        assert model(input_ids=tokens).logits.equal(wanted(input_ids=tokens).logits)
    assert model.model.layers[3].self_attn.q_proj.weight_packed.numel() == 0
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float16
    assert {p.dtype for n, p in model.named_parameters() if not n.endswith(("_packed", "_scale"))} == {dtype}
    found = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert found.equal(wanted.generate(tokens, max_new_tokens=5, do_sample=False))


def test_a_dense_model_is_packed_as_one_that_shares_nothing(dense: Checkpoint, tmp_path: Path) -> None:
    packing = Packing(group=GROUP, ignore=("lm_head",))
    out = write_packed(dense, grouped(dense, dense), packing, tmp_path / "out")
    found = hs.open_checkpoint(out)
    assert found.require_sharing().base_model == dense.name
    assert found.plan is not None
    assert found.plan.ties == 0
    model = hs.load(out)
    assert model.dequantize()(input_ids=tiny.tokens()).logits.isfinite().all()
    assert verify(found).ok


def test_it_saves_as_it_was_loaded(packed: Checkpoint, tmp_path: Path) -> None:
    hs.load(packed.path).save_pretrained(tmp_path / "again")
    again, tensors = hs.open_checkpoint(tmp_path / "again"), load_file(packed.path / "model.safetensors")
    assert again.sharing == packed.sharing
    assert {name: tensor.shape for name, tensor in tensors.items()} == again.shapes
    assert all(again.read(name).equal(tensor) for name, tensor in tensors.items())


def test_conversion_and_copies_keep_what_is_packed(packed: Checkpoint) -> None:
    model, tokens = load_model(packed, dtype=torch.float32), tiny.tokens(2, 8)
    before = model(input_ids=tokens).logits
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float64)):
        other = made.to(torch.float32)
        assert other.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float16
        assert other(input_ids=tokens).logits.equal(before)


def test_layers_offloaded_to_disk_lend_and_borrow(packed: Checkpoint, tmp_path: Path) -> None:
    model = with_layers_on_disk(packed.path, tmp_path / "offload", head="cpu")
    assert model.model.layers[0].self_attn.q_proj.weight_packed.device.type == "meta"
    with torch.inference_mode():
        assert model(tiny.tokens()).logits.equal(hs.load(packed.path)(tiny.tokens()).logits)


@pytest.mark.slow
def test_torch_compile_takes_the_whole_model_as_one_graph(packed: Checkpoint) -> None:
    assert_is_one_graph(packed.path, ", dtype=torch.float32")


def test_dequantized_it_is_a_stock_model(packed: Checkpoint) -> None:
    model, tokens = load_model(packed, dtype=torch.float32), tiny.tokens(2, 8)
    before = model(input_ids=tokens).logits
    stock = model.dequantize()
    assert type(stock.model.layers[1].self_attn.q_proj) is torch.nn.Linear
    assert stock(input_ids=tokens).logits.equal(before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_expanded_it_is_a_checkpoint_that_stock_transformers_loads(packed: Checkpoint, tmp_path: Path) -> None:
    """Through compressed-tensors, which knows nothing of sharing; or as ordinary matrices."""
    tokens = tiny.tokens(2, 12)
    ours = load_model(packed, dtype=torch.float32)(input_ids=tokens).logits
    for name, unpacked in (("stock", False), ("unpacked", True)):
        out = expand(packed, tmp_path / name, unpacked=unpacked)
        assert "headshare" not in (out / "config.json").read_text()
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(found(input_ids=tokens).logits, ours, rtol=2e-2, atol=2e-2)
    assert (tmp_path / "stock/model.safetensors").stat().st_size < (
        tmp_path / "unpacked/model.safetensors"
    ).stat().st_size


# ---- checks


def test_verify_opens_all_of_it(packed: Checkpoint, dense: Checkpoint) -> None:
    found = verify(packed, dense)
    assert found.ok, found.problems
    assert found.max_logit_diff == 0.0
    assert found.tensors_checked == len([name for name in dense.tensors if not name.endswith("_proj.weight")])
    assert any("matrices of 4 bits" in note for note in found.notes)


def test_verify_finds_a_number_that_was_changed(packed: Checkpoint, dense: Checkpoint) -> None:
    path = packed.path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 7.0
    save_file(tensors, path, {"format": "pt"})
    (packed.path / "headshare.json").unlink()
    found = verify(hs.open_checkpoint(packed.path), dense)
    assert found.problems == ["model.norm.weight differs from the dense model's beyond what the plan gave up"]


W_O, W_Q = "model.layers.1.self_attn.o_proj.", "model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{W_O}weight_scale", None),
        (f"{W_O}weight_scale", torch.zeros(32, 0, dtype=torch.float16)),
        (f"{W_O}weight_scale", torch.zeros(31, 2, dtype=torch.float16)),
        (f"{W_O}weight_scale", torch.zeros(32, 2)),
        (f"{W_O}weight_packed", None),
        (f"{W_O}weight_packed", torch.zeros(32, 4, dtype=torch.int64)),
        (f"{W_Q}weight_packed", torch.zeros(16, 4)),
        (f"{W_Q}weight_packed", torch.zeros(3, 4, dtype=torch.int32)),
        (f"{W_Q}weight_shape", torch.tensor([2**40, 3])),
        (f"{W_O}weight_shape", torch.tensor([32, 64])),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(name: str, tensor: Tensor | None, packed: Checkpoint) -> None:
    path = packed.path / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name)
    tensors |= {} if tensor is None else {name: tensor}
    save_file(tensors, path, {"format": "pt"})
    changed = hs.open_checkpoint(packed.path)
    with pytest.raises(CheckpointError, match=name.rpartition(".")[0]):
        expand(changed, packed.path.parent / "whole")
    with pytest.raises(hs.HeadshareError):
        load_model(changed)
    assert any(name.rpartition(".")[0] in problem for problem in verify(changed).problems)


@pytest.mark.parametrize("ignore", [[], ["lm_head", "model.layers.0.self_attn.q_proj"]])
def test_an_entry_that_ignores_other_modules_is_one_error(ignore: list[str], packed: Checkpoint) -> None:
    config = json.loads((packed.path / "config.json").read_text())
    config["quantization_config"]["quantization_config"]["ignore"] = ignore
    (packed.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(hs.HeadshareError, match=r"lm_head.weight_packed|layers.0.self_attn.q_proj, which is not"):
        hs.load(packed.path)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"},
        {"config_groups": {}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"group_size": 0}}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3, "group_size": 16}}}},
        {"ignore": "lm_head"},
        {"ignore": ["\x1b[2J"]},
        {"kv_cache_scheme": {}},
    ],
)
def test_an_entry_that_is_not_ours_is_one_error(change: dict[str, Any], packed: Checkpoint) -> None:
    config = json.loads((packed.path / "config.json").read_text())
    config["quantization_config"]["quantization_config"] |= change
    (packed.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="in a way that this headshare does not read"):
        hs.open_checkpoint(packed.path)
    with pytest.raises(CheckpointError, match="in a way that this headshare does not read"):
        transformers.AutoModelForCausalLM.from_pretrained(packed.path)


def test_a_plan_that_does_more_than_share_rows_is_not_packed(dense: Checkpoint, tmp_path: Path) -> None:
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.3, parts="qkvo")
    shared = hs.open_checkpoint(hs.share(dense, plan).save(tmp_path / "qkvo"))
    with pytest.raises(PlanError, match="only shared rows can be packed"):
        write_packed(shared, grouped(dense, dense), Packing(group=GROUP, ignore=("lm_head",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_wants_other_numbers_is_refused(packed: Checkpoint, dense: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="held by their owners"):
        load_model(packed, storage="alias")
    text = a_text(tmp_path / "text", 15 * 40)
    with pytest.raises(TrainingError, match="rounded, and those are not trained"):
        train(packed.path, tmp_path / "out", settings(text, "recover"))
    with pytest.raises(StorageError, match="Train it before"):
        _ = hs.load(packed.path).hf_quantizer.is_trainable
    with pytest.raises(CheckpointError, match="headshare expand --unpack"):
        hs.share(packed, hs.make_plan(hs.score_units(dense), 0.3))


# ---- the command line


def test_commands_know_what_is_packed(run: Run, packed: Checkpoint, tmp_path: Path) -> None:
    text = a_text(tmp_path / "text", 200)
    shown = run("inspect", str(packed.path))
    assert "matrices of 4 bits, a scale for every 16 inputs of a row" in shown.out
    assert json.loads(run("inspect", str(packed.path), "--json").out)["quantization_config"]["ignore"] == ["lm_head"]
    assert run("verify", str(packed.path)).status == 0
    assert "is not counted for rounded matrices" in run("inspect", str(packed.path), "--split", "2").err
    assert run("expand", str(packed.path), str(tmp_path / "whole"), "--unpack").status == 0
    assert "quantization_config" not in json.loads((tmp_path / "whole/config.json").read_text())
    for words in (
        (
            "quantize",
            str(packed.path),
            str(tmp_path / "again"),
            "--calibration",
            str(text),
            "--calibration-window",
            "16",
        ),
        ("refit", str(packed.path), "--calibration", str(text), "--calibration-window", "16"),
    ):
        found = run(*words)
        assert_one_error_line(found)
        assert "are rounded" in found.err
    found = run("eval", str(packed.path), "--text", str(text), "--window", "16")
    assert found.status == 0, found.err
