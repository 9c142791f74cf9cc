"""Storage indirect: each unit once in a bank, on each device that uses it, and products that read it by slots."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import headshare as hs
from headshare.cli.app import main
from headshare.cli.inspect import describe_split
from headshare.errors import OptionError, StorageError
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.integrations.transformers.quantizer import device_of
from headshare.plan.placement import held_again, split_evenly
from headshare.plan.plan import SharePlan
from headshare.plan.ties import Selection
from headshare.storage.pooled import product
from headshare.storage.pooled.indirect import IndirectBank, IndirectProjection
from headshare.storage.pooled.product import BlockTable, slot_linear
from headshare.storage.pooled.shelves import shelves_of
from headshare.storage.pooled.slots import racks_of
from headshare.storage.projection import shared_projections
from headshare.storage.registry import choose_storage
from support import tiny

if find_spec("triton") is None:
    pytest.skip("the extra `kernels` is not installed", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# triton decides for each kernel whether it is to be interpreted, when the kernel's module is imported
with mock.patch.dict(os.environ, {} if ON_GPU else {"TRITON_INTERPRET": "1"}):
    from headshare.storage.pooled import kernels

ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products go through the kernels: interpreted where there is no GPU."""
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def slots_of(height: int, width: int, count: int, dtype: torch.dtype) -> BlockTable:
    """A bank of twice as many slots, and a table that uses some of them more than once."""
    bank = (torch.randn(2 * count, height, width) / width**0.5).to(dtype)
    return BlockTable(bank.to(DEVICE), torch.randint(0, 2 * count, (count,), dtype=torch.int32).to(DEVICE))


def exact(x: torch.Tensor, slots: BlockTable, bias: torch.Tensor | None, across: bool) -> torch.Tensor:
    """The product in float64, row by row of the table."""
    rows = torch.cat([slots.bank[slot].double() for slot in slots.table.tolist()])
    return functional.linear(x.double(), rows.T if across else rows, None if bias is None else bias.double())


def assert_rounded(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    error = ((found.double() - expected).abs() / (1 + expected.abs())).max().item()
    assert error < ROUNDING[found.dtype], error


def run_python(code: str, **settings: str) -> str:
    """What a fresh process prints. There, nothing checks types at run time, which torch.compile cannot trace."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", **settings}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- kernels


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("across", [False, True], ids=["rows", "across"])
@pytest.mark.parametrize(
    ("height", "width", "count"), [(16, 40, 5), (48, 72, 3), (64, 100, 2), (80, 64, 3), (96, 33, 2), (128, 50, 2)]
)
def test_kernels_give_the_product_within_rounding(
    height: int, width: int, count: int, across: bool, dtype: torch.dtype, by_kernels: None
) -> None:
    slots = slots_of(height, width, count, dtype)
    inputs, outputs = (count * height, width) if across else (width, count * height)
    for tokens, biased in ((1, True), (1, False), (3, True), (7, False), (33, True)):
        x = torch.randn(tokens, inputs).to(dtype).to(DEVICE)
        bias = torch.randn(outputs).to(dtype).to(DEVICE) if biased else None
        assert_rounded(slot_linear(x, slots, bias, across=across), exact(x, slots, bias, across))


@pytest.mark.parametrize("across", [False, True], ids=["rows", "across"])
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_all_tiles_that_may_be_chosen_give_the_same_product(
    tokens: int, across: bool, by_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = slots_of(48, 144, 3, torch.float32)
    x, bias = torch.randn(tokens, 144).to(DEVICE), torch.randn(144).to(DEVICE)
    shape = kernels.shape_of(x, *slots, across)
    tried = kernels.candidates(shape)
    for config in tried:
        monkeypatch.setitem(kernels._CHOSEN, shape, config)
        assert_rounded(kernels.product(shape, x, *slots, bias), exact(x, slots, bias, across))
    assert len(tried) > 1


def test_tiles_are_no_larger_than_the_product_and_never_tried_twice() -> None:
    for tokens in (*kernels.BUCKETS, 10**6):
        for across in (False, True):
            for dtype in kernels.DTYPES:
                x, bank = torch.empty(tokens, 48, dtype=dtype, device="meta"), torch.empty(4, 16, 48, dtype=dtype)
                shape = kernels.shape_of(x, bank, torch.zeros(3, dtype=torch.int32), across)
                configs = kernels.candidates(shape)
                assert configs
                assert len({str(config) for config in configs}) == len(configs)
                assert all(config.kwargs["BN"] <= 64 and config.kwargs["BK"] <= 64 for config in configs)


def test_inputs_of_any_shape_and_stride_are_taken(by_kernels: None) -> None:
    slots = slots_of(16, 24, 2, torch.float32)
    x = torch.randn(2, 24, 5).to(DEVICE).transpose(1, 2)
    assert_rounded(slot_linear(x, slots, None, across=False), exact(x, slots, None, False))
    assert_rounded(slot_linear(x[0, 0], slots, None, across=False), exact(x[0, 0], slots, None, False))
    assert slot_linear(x[:, :0], slots, None, across=False).shape == (2, 0, 32)


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from headshare.storage.pooled import kernels

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
for capability, dtype in ((80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32)):
    for tokens in (1, 16, 1024):
        for height, across in ((128, False), (80, True)):
            shape = kernels.Shape(tokens, 1280, 1280, height, across, dtype, torch.device("cpu"))
            config = kernels.candidates(shape)[0]
            kernel = kernels._vector_product if tokens == 1 else kernels._matrix_product
            kinds = {name: TYPES[dtype] for name in ("x", "bank", "bias", "y")} | {"table": "*i32", "tokens": "i32"}
            sizes = {"N": 1280, "K": 1280, "HEIGHT": height, "ACROSS": across, "WIDEN": False, **config.kwargs}
            names = kernel.arg_names
            signature = {name: kinds.get(name, "constexpr") for name in names}
            constants = {(n,): sizes[name] for n, name in enumerate(names) if name in sizes}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
            assert triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]
"""
    run_python(code, TRITON_CACHE_DIR=str(tmp_path))


# ---- the operator


# torch 2.14 looks at the gradient of an intermediate result in its own check
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("across", [False, True], ids=["rows", "across"])
@pytest.mark.parametrize("interpreted", [False, True], ids=["gathered", "kernels"])
def test_the_operator_is_what_torch_expects_of_one(
    across: bool, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    slots = slots_of(16, 40, 3, torch.float32)
    inputs, outputs = (48, 40) if across else (40, 48)
    x, bias = torch.randn(2, 3, inputs, device=DEVICE), torch.randn(outputs, device=DEVICE)
    for arguments in ((x.requires_grad_(), *slots, bias.requires_grad_(), across), (x, *slots, None, across)):
        assert set(torch.library.opcheck(product._operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("across", [False, True], ids=["rows", "across"])
def test_gradients_are_those_of_the_gathered_weight(across: bool) -> None:
    slots = slots_of(16, 48, 3, torch.float64)
    x = torch.randn(2, 3, 48, dtype=torch.float64, device=DEVICE, requires_grad=True)
    bias = torch.randn(48, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: slot_linear(x, slots, bias, across=across), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x: slot_linear(x, slots, None, across=across), (x,))


def test_gradients_through_the_kernels_are_within_rounding(by_kernels: None) -> None:
    slots = slots_of(16, 40, 3, torch.float32)
    x = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    weights = torch.randn(5, 48, device=DEVICE)
    (slot_linear(x, slots, None, across=False) * weights).sum().backward()
    rows = slots.gather().double()
    assert x.grad is not None
    assert_rounded(x.grad, weights.double() @ rows)


def test_the_operator_compiles_as_one_graph_with_its_gradient() -> None:
    run_python("""
import torch
from headshare.storage.pooled.product import BlockTable, slot_linear
slots = BlockTable(torch.randn(6, 16, 48), torch.tensor([3, 1, 1], dtype=torch.int32))
x = torch.randn(4, 48, requires_grad=True)
def product(x): return slot_linear(x.relu(), slots, None, across=False)
found = torch.compile(product, fullgraph=True, backend="aot_eager")(x)
assert torch.equal(found, product(x))
gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (found, product(x))]
assert torch.equal(*gradients)
""")


def test_an_input_of_another_type_is_refused() -> None:
    slots = slots_of(16, 48, 3, torch.float32)
    with pytest.raises(StorageError, match=r"weights are torch.float32 and its input is torch.float16"):
        slot_linear(torch.randn(4, 48, device=DEVICE).half(), slots, None, across=False)


def test_what_is_faster_is_measured_once_and_never_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    slots, measured = slots_of(16, 48, 3, torch.float32), []
    times = iter([2.0, 1.0])

    def milliseconds(call: object) -> float:
        measured.append(call)
        return next(times)

    monkeypatch.setattr(product, "kernels", lambda: SimpleNamespace(milliseconds=milliseconds))
    monkeypatch.setattr(product, "_KERNEL_WINS", {})
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    recording = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)

    def kernel_wins(tokens: int) -> bool:
        x = torch.empty(tokens, 48)
        return product._kernel_wins(kernels.shape_of(x, *slots, False), x, *slots, None)

    assert (kernel_wins(1), kernel_wins(1024), kernel_wins(1025)) == (True, True, False)
    assert not measured
    recording = False
    assert [kernel_wins(3), kernel_wins(16)] == [False, False]  # one bucket, gathering took half the time
    assert len(measured) == 2


# ---- models


@pytest.fixture
def shared(llama: Path, tmp_path: Path) -> Path:
    """Half of the tiny Llama's units given up, in q, k, v and o and in its feed-forward."""
    dense = hs.open_checkpoint(llama)
    scores = hs.score_units(dense, parts="qkvo+ffn", ffn_groups=2)
    return hs.share(dense, hs.make_plan(scores, 0.5, parts="qkvo+ffn")).save(tmp_path / "shared")


def load(folder: Path, storage: str = "indirect", **options: object) -> torch.nn.Module:
    return load_model(hs.open_checkpoint(folder), storage=storage, **options)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tiny.tokens())[0]


@pytest.mark.parametrize("parts", ["qk", "qkv", "qkvo", "qkvo+ffn"])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biased", "gpt2", "falcon-gqa", "falcon-mha", "opt"])
def test_a_model_equals_the_one_held_by_owners(name: str, parts: str, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    plan = hs.make_plan(hs.score_units(dense, parts=parts), 0.5, parts=parts)
    out = hs.share(dense, plan).save(tmp_path / "shared")
    owner, indirect = load(out, "owner"), load(out)
    torch.testing.assert_close(logits(indirect), logits(owner))
    assert unique_parameter_bytes(indirect) == unique_parameter_bytes(owner)
    assert any(isinstance(module, IndirectProjection) for module in indirect.modules())


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "falcon-mha"])
def test_a_model_run_by_kernels_equals_the_one_held_by_owners(name: str, by_kernels: None, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(tiny.make(name, tmp_path / "dense"))
    out = hs.share(dense, hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo")).save(tmp_path / "out")
    torch.testing.assert_close(logits(load(out)), logits(load(out, "owner")), rtol=1e-4, atol=1e-5)


def test_scaled_ties_multiply_as_owners_do(llama: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(llama)
    plan = hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo")
    scaled = SharePlan(
        selections=tuple(
            Selection(layout=one.layout, ties=one.ties, scale=True, chosen=one.chosen) for one in plan.selections
        )
    )
    owner = load(hs.share(dense, scaled).save(tmp_path / "ones"), "owner")
    for _, module in shared_projections(owner):
        if module.tie_scale is not None:
            torch.nn.init.normal_(module.tie_scale)
    owner.save_pretrained(tmp_path / "scaled")
    indirect = load(tmp_path / "scaled")
    torch.testing.assert_close(logits(indirect), logits(owner))
    torch.testing.assert_close(logits(indirect.dequantize()), logits(owner))


def test_every_stored_row_is_in_the_bank_once_and_a_weight_is_a_view_of_its_own(shared: Path) -> None:
    model = load(shared)
    modules = [module for _, module in shared_projections(model)]
    (bank,) = {module.bank for module in modules}
    held = sum(memory.nbytes for memory in bank._memory.values())
    assert held == sum(module.weight.nbytes for module in modules)
    assert held < sum(module.whole_weight().nbytes for module in modules)
    ranges = [(memory.data_ptr(), memory.data_ptr() + memory.nbytes) for memory in bank._memory.values()]
    for module in modules:
        if module.weight.numel():
            assert any(start <= module.weight.data_ptr() < stop for start, stop in ranges)
            assert module.weight.untyped_storage().nbytes() == module.weight.nbytes


def test_saving_again_gives_the_tensors_that_owners_save(shared: Path, tmp_path: Path) -> None:
    load(shared).save_pretrained(tmp_path / "indirect")
    load(shared, "owner").save_pretrained(tmp_path / "owner")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("indirect", "owner")]
    assert files[0] == files[1]


def test_copies_read_the_same_bank_and_pickles_carry_it_once(shared: Path) -> None:
    model, owner = load(shared), load(shared, "owner")
    expected, twin, pickled = logits(model), copy.deepcopy(model), pickle.dumps(model)
    assert {m.bank for _, m in shared_projections(twin)} == {m.bank for _, m in shared_projections(model)}
    assert len(pickled) < len(pickle.dumps(owner)) + 10_000
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(pickle.loads(pickled)), expected)


def test_another_type_of_number_rebuilds_the_bank_once(shared: Path) -> None:
    converted = load(shared).to(torch.bfloat16)
    assert len({module.bank for _, module in shared_projections(converted)}) == 1
    assert torch.equal(logits(converted), logits(load(shared, "owner").to(torch.bfloat16)))


def test_autocast_multiplies_in_the_banks_type(shared: Path) -> None:
    model = load(shared, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(logits(model)).all()


def test_another_device_is_refused_and_writes_and_training_too(shared: Path) -> None:
    model = load(shared)
    weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(StorageError, match=r"held on cpu and cannot be moved to meta"):
        model.to("meta")
    with pytest.raises(StorageError, match="read-only"):
        weight.add_(1)
    with pytest.raises(StorageError, match='storage="owner"'):
        _ = model.hf_quantizer.is_trainable


def test_generation_gives_what_owners_give(shared: Path) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 10).long()}
    first, second = (load(shared, storage).generate(tiny.tokens(), **options) for storage in ("indirect", "owner"))
    assert torch.equal(first, second)


def test_a_model_compiles_as_one_graph(shared: Path) -> None:
    run_python(f"""
import torch, headshare
from headshare.integrations.transformers.loading import load_model
model = load_model(headshare.open_checkpoint({str(shared)!r}), storage="indirect")
tokens = torch.arange(5, 15)[None]
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    found, expected = (one(tokens, use_cache=False).logits for one in (compiled, model))
torch.testing.assert_close(found, expected)
""")


def test_a_weight_that_never_came_is_named(shared: Path) -> None:
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    tensors = plan.tensors
    bank = IndirectBank(tensors, dict.fromkeys(tensors, torch.device("cpu")))
    first, *others = tensors
    for name in others:
        bank.put(name, torch.zeros(tensors[name].stored_shape))
    with pytest.raises(StorageError, match=f"{first} did not load"):
        bank.held(others[0])


def test_two_types_of_number_in_one_bank_are_refused(shared: Path) -> None:
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    tensors = plan.tensors
    bank = IndirectBank(tensors, dict.fromkeys(tensors, torch.device("cpu")))
    first, second = list(tensors)[:2]
    bank.put(first, torch.zeros(tensors[first].stored_shape))
    with pytest.raises(StorageError, match=r"float16 and other shared weights are torch.float32"):
        bank.put(second, torch.zeros(tensors[second].stored_shape).half())


# ---- several devices. cpu:0 and cpu:1 are two devices to us, and one to torch


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(path: str, device_map: object) -> str:
        return "cpu:1" if any(f"layers.{layer}." in path for layer in (2, 3)) else "cpu:0"

    monkeypatch.setattr("headshare.integrations.transformers.quantizer.device_of", place)


def test_units_used_on_two_devices_are_held_on_both_and_said_so(
    shared: Path, two_devices: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="headshare"):
        model = load(shared)
    checkpoint = hs.open_checkpoint(shared)
    expected = describe_split(checkpoint, 2)
    assert torch.equal(logits(model), logits(load(shared, "owner")))
    (bank,) = {module.bank for _, module in shared_projections(model)}
    own = sum(module.weight.nbytes for _, module in shared_projections(model))
    assert sum(memory.nbytes for memory in bank._memory.values()) == own + expected["bytes"]
    assert expected["units"] > 0
    assert f"{expected['units']} units, {expected['bytes']} bytes, are held more than once" in caplog.text


def test_replicas_are_filled_whichever_comes_first(shared: Path) -> None:
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    tensors = plan.tensors
    names = {f"device {n}": torch.device("cpu", n) for n in range(2)}
    devices = {name: names[device] for name, device in split_evenly(plan, 2).items() if name in tensors}
    stored = {name: torch.randn(tensor.stored_shape) for name, tensor in tensors.items()}
    wholes = []
    for order in (list(tensors), list(tensors)[::-1]):
        bank = IndirectBank(tensors, devices)
        for name in order:
            bank.put(name, stored[name])
        wholes.append({name: bank.held(name).whole.gather() for name in tensors})
    for name, tensor in tensors.items():
        runs = [
            stored[source].narrow(tensor.axis, tensors[source].stored_index(start), stop - start)
            for source, start, stop in tensor.whole()
        ]
        expected = torch.cat(runs, dim=tensor.axis)
        for whole in wholes:
            assert torch.equal(whole[name].T if tensor.axis == 1 else whole[name], expected)


def test_a_shelf_holds_its_tensors_slots_and_those_that_they_borrow(shared: Path) -> None:
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    tensors = plan.tensors
    devices = {name: torch.device("cpu", n) for name, n in zip(tensors, [0, 1] * len(tensors), strict=False)}
    for rack in racks_of(tensors):
        for shelf in shelves_of(rack, devices):
            used = {slot for name in shelf.names for slot in rack.table(name)}
            own = {rack.placed[name].first + n for name in shelf.names for n in range(rack.placed[name].count)}
            assert set(shelf.positions) == used | own
            assert sorted(shelf.positions.values()) == list(range(len(shelf.positions)))
            for name in shelf.names:
                positions = shelf.wanted(name)[1]
                assert positions == list(range(positions[0], positions[0] + len(positions))) if positions else True


def test_held_again_counts_each_donor_once_for_each_other_device(shared: Path) -> None:
    checkpoint = hs.open_checkpoint(shared)
    plan = checkpoint.plan
    assert plan is not None
    for devices in (1, 2, 4):
        places = split_evenly(plan, devices)
        pairs: dict[tuple[int, int], set[tuple[int, int, int]]] = {}
        sizes = 0
        for number, one in enumerate(plan.selections):
            for recipient, donor in one.ties:
                pair = (donor.layer * devices // 4, recipient.layer * devices // 4)
                if pair[0] != pair[1] and (number, *donor) not in pairs.setdefault(pair, set()):
                    pairs[pair].add((number, *donor))
                    sizes += sum(place.rows * place.shape[1 - place.axis] * 4 for place in one.layout.parts.values())
        found = held_again(plan, places, dict.fromkeys(places, 4))
        assert {(p.home, p.device): p.units for p in found} == {
            (f"device {a}", f"device {b}"): len(units) for (a, b), units in pairs.items() if units
        }
        assert sum(p.nbytes for p in found) == sizes


def test_layers_split_over_more_devices_than_there_are_is_refused(shared: Path) -> None:
    with pytest.raises(OptionError, match="4 layers cannot be split over 5 devices; choose 1 to 4"):
        describe_split(hs.open_checkpoint(shared), 5)


def test_inspect_says_what_a_split_holds_more_than_once(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["headshare", "inspect", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        found = capsys.readouterr()
        return found.err if ended.value.code else found.out

    split = json.loads(run(str(shared), "--split", "2", "--json"))["split"]
    assert split == describe_split(hs.open_checkpoint(shared), 2)
    assert [device["units"] for device in split["devices"]] == [0, split["units"]]
    words = run(str(shared), "--split", "2")
    assert f"split over 2 devices: {split['units']} units held more than once, {split['bytes']:,} bytes" in words
    assert f"device 1 also holds {split['units']} units of device 0" in words
    assert "give it a shared checkpoint" in run("share_plan.json", "--split", "2")


def test_a_modules_device_is_that_of_the_longest_key_above_it() -> None:
    places = {"": "disk", "model": 1, "model.layers.1": "cpu", "model.layers.10": torch.device("cuda", 3)}
    assert device_of("model.layers.1.q", places) == "cpu"
    assert device_of("model.layers.10.q", places) == "cuda:3"
    assert device_of("model.layers.2.q", places) == device_of("model.layers.12.q", places) == "cuda:1"
    assert device_of("lm_head", places) == "disk"
    assert device_of("lm_head", None) == "cpu"
    assert device_of("lm_head", torch.device("cuda")) == "cuda"


# ---- what is chosen, and what is refused


def test_cuda_devices_get_indirect_where_kernels_serve_and_owner_with_a_reason_elsewhere(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = hs.open_checkpoint(tiny.make("qwen3", tmp_path / "wide"))
    heads_of_16 = hs.make_plan(hs.score_units(wide), 0.5).tensors
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None

    def chosen(tensors: dict, dtype: torch.dtype = torch.bfloat16, devices: set[str] | None = None) -> str:
        caplog.clear()
        return choose_storage("auto", tensors, {dtype}, devices or {"cuda"})

    with caplog.at_level(logging.INFO, logger="headshare"):
        assert chosen(heads_of_16) == "indirect"
        assert "storage indirect: the model is placed on CUDA devices" in caplog.text
        assert chosen(plan.tensors) == "owner"
        assert "blocks of 8 rows, and kernels take multiples of 16" in caplog.text
        assert chosen(heads_of_16, torch.float64) == "owner"
        assert "no kernels for torch.float64" in caplog.text
        assert chosen(heads_of_16, devices={"cuda", "disk"}) == "owner"
        assert "placed on cuda, disk" in caplog.text
        monkeypatch.setattr("headshare.storage.pooled.indirect.kernels_installed", lambda: False)
        assert chosen(heads_of_16) == "owner"
        assert "triton is not installed" in caplog.text


def test_weights_on_disk_are_refused_before_anything_is_loaded(shared: Path, tmp_path: Path) -> None:
    places = {"model.layers.3": "disk", "": "cpu"}
    with pytest.raises(StorageError, match=r"are placed on cpu and disk.*storage=\"owner\""):
        load(shared, device_map=places, offload_folder=tmp_path / "offload")


def test_a_cpu_is_said_to_be_for_testing(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="headshare"):
        load(shared)
    assert "for testing" in caplog.text


def test_without_triton_all_but_kernels_work(shared: Path) -> None:
    code = f"""
import sys
sys.modules["triton"] = None
import torch, headshare
from headshare.integrations.transformers.loading import load_model
from headshare.storage.pooled.product import kernels
model = load_model(headshare.open_checkpoint({str(shared)!r}), storage="indirect")
model(torch.arange(5, 15)[None])
try:
    kernels()
except headshare.errors.StorageError as error:
    print(error)
"""
    assert '[kernels]", or load with storage="owner"' in run_python(code)


def test_importing_headshare_does_not_import_triton() -> None:
    run_python("import sys, headshare; assert 'triton' not in sys.modules")


# ---- on a GPU


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A Llama whose slots are 64 rows high."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "dense", **sizes))
    scores = hs.score_units(dense, parts="qkvo+ffn", ffn_groups=2)
    return hs.share(dense, hs.make_plan(scores, 0.5, parts="qkvo+ffn")).save(tmp_path / "shared")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_on_a_gpu_auto_chooses_indirect_and_equals_owner(big: Path, dtype: torch.dtype) -> None:
    options = {"device_map": "cuda", "dtype": dtype}
    tokens = tiny.tokens().cuda()
    auto, owner = load(big, "auto", **options), load(big, "owner", **options)
    assert any(isinstance(module, IndirectProjection) for module in auto.modules())
    with torch.inference_mode():
        found, expected = auto(tokens).logits, owner(tokens).logits
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 10 * ROUNDING[dtype]


@pytest.mark.gpu
def test_on_a_gpu_memory_is_the_stored_bytes(big: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load(big, device_map="cuda")
    tables_and_rounding = 200 * 512
    assert torch.cuda.memory_allocated() - before < unique_parameter_bytes(model) + tables_and_rounding


@pytest.mark.gpu
def test_on_a_gpu_a_graph_records_untuned_products_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "milliseconds", lambda _: pytest.fail("measured while recording"))
    slots, x = slots_of(64, 320, 3, torch.bfloat16), torch.randn(7, 320, device="cuda", dtype=torch.bfloat16)
    shape = kernels.shape_of(x, *slots, False)
    kernels._launch(kernels._matrix_product, shape, (x, *slots, None, torch.empty(7, 192).to(x)),
                    **kernels.candidates(shape)[0].all_kwargs())  # fmt: skip  # compiled, not tuned
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = slot_linear(x, slots, None, across=False)
    x.normal_()
    graph.replay()
    assert_rounded(y, exact(x, slots, None, False))


@pytest.mark.gpu
def test_on_a_gpu_a_compiled_model_runs_in_cuda_graphs(big: Path) -> None:
    model = load(big, device_map="cuda")
    tokens = tiny.tokens().cuda()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits
        for _ in range(3):
            found = compiled(tokens, use_cache=False).logits.clone()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_generation_gives_what_owners_give(big: Path) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = tiny.tokens().cuda()
    models = [AutoModelForCausalLM.from_pretrained(big, device_map="cuda"), load(big, "owner", device_map="cuda")]
    first, second = (model.generate(tokens, attention_mask=torch.ones_like(tokens), **options) for model in models)
    assert torch.equal(first, second)
