"""Storage `alias`: each unit once in physical memory, read-only, and still a model that does all a stock model does.

Each test here stands for one way in which sharing was, or could be, lost silently, or a process lost loudly. What may
kill a process runs in one of its own. Physical memory is measured as PSS; never a clock.
"""

import copy
import gc
import io
import json
import logging
import multiprocessing.resource_tracker
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.multiprocessing
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import headshare as hs
import headshare.storage.pooled.alias as alias_module
import tiny
from headshare.architecture.modules import module_path
from headshare.experiments.controls import overwrite_recipients
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.plan.plan import SharePlan
from headshare.plan.tensors import gapped_tensors
from headshare.plan.ties import Selection
from headshare.storage.owner import OwnerProjection
from headshare.storage.pooled.alias import AliasBank
from headshare.storage.pooled.frozen import FrozenProjection
from headshare.storage.projection import SharedProjection, shared_projections

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="aliases are for Linux")

Q = "model.layers.0.self_attn.q_proj.weight"
PAGED = {"hidden_size": 64, "head_dim": 64, "num_hidden_layers": 5, "attention_bias": True}  # 64 rows fill pages


@dataclass(frozen=True)
class Case:
    """A dense checkpoint, what it was shared to, and the plan between them."""

    dense: Path
    shared: Path
    plan: SharePlan

    def load(self, storage: str = "alias", **options: Any) -> Any:
        return load_model(hs.open_checkpoint(self.shared), storage=storage, **options)

    def stock(self, **options: Any) -> Any:
        """A stock model with donors' rows written over recipients': what we did not write, to compare with."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.dense, **options).eval()
        overwrite_recipients(model, self.plan)
        return model


def make_case(folder: Path, dense: Path, parts: str, ratio: float, *, scale: bool = False, **scoring: Any) -> Case:
    checkpoint = hs.open_checkpoint(dense)
    plan = hs.make_plan(hs.score_units(checkpoint, parts=parts, **scoring), ratio, parts=parts)
    if scale:
        selections = tuple(
            Selection(layout=s.layout, ties=s.ties, scale=True, chosen=s.chosen) for s in plan.selections
        )
        plan = SharePlan(model_type=plan.model_type, selections=selections)
    return Case(dense, hs.share(checkpoint, plan).save(folder / "shared"), plan)


def build(kind: str, folder: Path) -> Case:
    if kind == "paged":  # q, k, v are mapped from the checkpoint's own file; o, being columns, stands in the arena
        return make_case(folder, tiny.make_llama(folder / "dense", **PAGED), "qkvo", 0.4)
    if kind == "padded":
        return make_case(folder, tiny.make_llama(folder / "dense"), "qkvo+ffn", 0.5, ffn_groups=2)
    if kind == "scaled":
        return make_case(folder, tiny.make_llama(folder / "dense"), "qkvo", 0.5, scale=True)
    return make_case(folder, tiny.make(kind, folder / "dense"), "qkvo+ffn", 0.5, ffn_groups=2)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    built: dict[str, Case] = {}

    def case(kind: str) -> Case:
        if kind not in built:
            built[kind] = build(kind, tmp_path_factory.mktemp(kind))
        return built[kind]

    return case


@pytest.fixture
def paged(cases: Callable[[str], Case]) -> Case:
    return cases("paged")


KINDS = ["paged", "padded", "scaled", "gpt2", "phi3", "falcon-gqa"]


@pytest.fixture(params=KINDS)
def any_case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens(), **options).logits


def assert_equal_to_rounding(found: Tensor, expected: Tensor) -> None:
    """Columns of o and down lie otherwise in memory than stock's, and for float16 and float64 some processors then add
    in another order. What is not shared is off by four times this bound at least, in bfloat16, else by thirty."""
    ends = torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * ends)


def kinds_of(model: nn.Module) -> set[str]:
    names = {FrozenProjection: "alias", OwnerProjection: "owner"}
    return {name for _, one in shared_projections(model) for kind, name in names.items() if isinstance(one, kind)}


class Mapping(NamedTuple):
    """A line of /proc/self/maps: addresses, device and inode of a file, what may be done there, and the offset."""

    start: int
    stop: int
    file: bytes
    mode: bytes
    offset: int


def mappings() -> list[Mapping]:
    found = []
    for line in Path("/proc/self/maps").read_bytes().rstrip(b"\n").split(b"\n"):
        bounds, mode, offset, device, inode, *_ = line.split(maxsplit=5)
        start, stop = (int(bound, 16) for bound in bounds.split(b"-"))
        found.append(Mapping(start, stop, device + b":" + inode, mode, int(offset, 16)))
    return found


def mapping_of(tensor: Tensor, among: list[Mapping] | None = None) -> Mapping:
    """What is mapped at a tensor's address, now or when these were read."""
    address = tensor.data_ptr()
    for one in mappings() if among is None else among:
        if one.start <= address < one.stop:
            return one
    raise AssertionError("no mapping there")


def in_memory(tensor: Tensor, among: list[Mapping] | None = None) -> tuple[bytes, int]:
    """Which bytes stand at a tensor's address: device and inode of the file that is mapped there, and the offset."""
    one = mapping_of(tensor, among)
    return one.file, one.offset + tensor.data_ptr() - one.start


def assert_rows_are_the_donors_own(model: nn.Module, plan: SharePlan) -> None:
    """First and last row (or column) of every gap: the recipient's address and the donor's show the same bytes."""
    tensors, modules, seen = gapped_tensors(plan), dict(shared_projections(model)), 0
    wholes = {name: modules[module_path(model, name)].whole_weight() for name in tensors}
    now = mappings()  # while all of them are there
    for name, tensor in tensors.items():
        for start, stop, donor, donor_start in tensor.gaps:
            lent, first = modules[module_path(model, donor)].weight, tensors[donor].stored_index(donor_start)
            for row in (0, stop - start - 1):
                ours = wholes[name].select(tensor.axis, start + row)
                theirs = lent.select(tensor.axis, first + row)
                assert in_memory(ours, now) == in_memory(theirs, now), (name, start + row)
                assert in_memory(ours, now)[0] != b"00:00:0", "anonymous memory"
                seen += 1
    assert seen > 0


def run(code: str, *arguments: object, **environment: str) -> str:
    """What a script of its own process prints; a crash is a failure here, with what it said."""
    head = "import sys, os, gc, json, copy, pickle, torch, tiny, headshare as hs, transformers\n"
    head += "from headshare.integrations.transformers.loading import load_model\ntorch.set_num_threads(1)\n"
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(tiny.__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_DEACTIVATE_ASYNC_LOAD": "1",  # threads' own heaps would stand between two measurements
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, check=False, env=variables, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


MEASURE = r"""
    import ctypes, re

    def pss():
        "PSS of checkpoints, arenas and anonymous memory; libraries are other processes' affair too."
        total, counts = 0, False
        for line in open("/proc/self/smaps", "rb"):
            if re.match(rb"[0-9a-f]+-[0-9a-f]+ ", line):
                path = line.split(maxsplit=5)[5].strip() if len(line.split(maxsplit=5)) > 5 else b""
                counts = not path or path[:1] == b"[" or b"memfd" in path or b".safetensors" in path
            elif counts and line.startswith(b"Pss:"):
                total += int(line.split()[1]) * 1024
        return total

    def settle():
        for _ in range(2):
            gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    def ready(folder, storage, dtype):
        model = load_model(hs.open_checkpoint(folder), storage=storage, dtype=dtype)
        with torch.inference_mode():
            model(tiny.tokens())
        return model
"""


# Physical memory -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Large:
    """Half of a hundred megabytes given up; and the same as transformers saves it, not at page boundaries."""

    case: Case
    resaved: Path
    ideal: int


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    folder = tmp_path_factory.mktemp("large")
    config = {
        "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": 128,
    }  # fmt: skip
    case = make_case(folder, tiny.make_llama(folder / "dense", **config), "qkvo+ffn", 0.5, ffn_groups=8)
    case.load("owner").save_pretrained(folder / "resaved")
    estimate = hs.estimate_plan(hs.open_checkpoint(case.dense), case.plan)
    yield Large(case, folder / "resaved", estimate.dense_bytes - estimate.shared_bytes)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def measured(large: Large) -> dict[str, int]:
    """Bytes of each model, loaded and run once; each measured on its second load, when nothing is new but the model."""
    wanted = {
        "dense float32": (large.case.dense, "auto", "float32"),
        "mapped float32": (large.case.shared, "alias", "float32"),
        "resaved float32": (large.resaved, "alias", "float32"),
        "dense float16": (large.case.dense, "auto", "float16"),
        "converted float16": (large.case.shared, "alias", "float16"),
        "resaved float16": (large.resaved, "alias", "float16"),
    }
    script = (
        MEASURE
        + """
    found = {}
    for name, (folder, storage, dtype) in json.loads(sys.argv[1]).items():
        model = ready(folder, storage, getattr(torch, dtype))
        del model
        settle()
        before = pss()
        model = ready(folder, storage, getattr(torch, dtype))
        settle()
        found[name] = pss() - before
        del model
        settle()
    print(json.dumps(found))
    """
    )
    given = {name: (str(folder), storage, dtype) for name, (folder, storage, dtype) in wanted.items()}
    return json.loads(run(script, json.dumps(given)).splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mapped", "float32"), ("resaved", "float32"), ("converted", "float16"), ("resaved", "float16")],
)
def test_physical_memory_falls_by_the_rows_given_up(
    measured: dict[str, int], large: Large, name: str, dtype: str
) -> None:
    ideal = large.ideal * getattr(torch, dtype).itemsize / 4
    saved = measured[f"dense {dtype}"] - measured[f"{name} {dtype}"]
    assert 0.98 * ideal <= saved <= 1.02 * ideal, f"saved {saved / ideal:.1%} of {ideal:,.0f} bytes"


def test_recipients_rows_are_the_donors_pages(any_case: Case) -> None:
    model = any_case.load()
    assert_rows_are_the_donors_own(model, any_case.plan)


def test_rows_that_stand_in_the_file_as_needed_are_mapped_from_there_and_others_from_one_arena(paged: Case) -> None:
    model = paged.load()
    file = (paged.shared / "model.safetensors").stat()
    own = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}".encode()
    places = {name: in_memory(module.weight)[0] for name, module in shared_projections(model) if module.weight.numel()}
    assert {place == own for name, place in places.items() if "o_proj" not in name} == {True}
    arenas = {place for name, place in places.items() if "o_proj" in name}
    assert len(arenas) == 1
    assert own not in arenas


@pytest.mark.parametrize("convert", [lambda model: model, lambda model: model.to(torch.float64), copy.deepcopy])
def test_the_system_itself_forbids_writing_to_shared_pages(any_case: Case, convert: Callable) -> None:
    """The last line of defence, below every Python one: a stray pointer stops the process, and changes nothing."""
    model = convert(any_case.load())
    for path, module in shared_projections(model):
        for tensor in (module.weight, module.whole_weight()):
            assert not tensor.numel() or mapping_of(tensor).mode == b"r--s", path


def test_what_is_loaded_is_what_a_stock_model_computes(any_case: Case) -> None:
    model = any_case.load()
    assert torch.equal(logits(model), logits(any_case.stock()))
    assert unique_parameter_bytes(model) == unique_parameter_bytes(any_case.load("owner"))
    assert kinds_of(model) == {"alias"}


def test_whole_weights_are_single_contiguous_tensors_of_the_stock_module(paged: Case) -> None:
    stock, model = paged.stock(), paged.load()
    for path, module in shared_projections(model):
        whole = module.whole_weight()
        assert torch.equal(whole, stock.get_submodule(path).weight), path
        assert whole.is_contiguous() or whole.T.is_contiguous()


def test_memory_files_and_mappings_are_given_back(paged: Case, cases: Callable[[str], Case]) -> None:
    script = (
        MEASURE
        + """
    def cycle(folder, number):
        model = ready(folder, "alias", torch.float32)
        if number % 5 == 0:
            twin = copy.deepcopy(model).to(torch.bfloat16)
            twin(tiny.tokens())
            pickle.loads(pickle.dumps(model))(tiny.tokens())
            model.model.layers[0].to(torch.float64)

    def state():
        gc.collect()
        settle()
        return pss(), len(os.listdir("/proc/self/fd")), sum(1 for _ in open("/proc/self/maps", "rb"))

    for number in range(11):
        cycle(sys.argv[1 + number % 2], number)
    before = state()
    for number in range(100):
        cycle(sys.argv[1 + number % 2], number)
    print(json.dumps([after - at for after, at in zip(state(), before)]))
    """
    )
    grown, descriptors, mappings = json.loads(run(script, paged.shared, cases("padded").shared))
    assert descriptors <= 0
    assert mappings < 40, "fewer than one mapping in two loads"
    assert grown < 6 << 20, "a lost model each time would be 80 MB"


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_refused_load_closes_its_files(paged: Case) -> None:
    tensors, stored = gapped_tensors(paged.plan), load_file(paged.shared / "model.safetensors")
    gc.collect()
    before = open_files()
    for _ in range(5):
        bank = AliasBank(tensors)
        for name in tensors:
            bank.put(name, stored[name] if name != Q else stored[name].half())
        with pytest.raises(hs.StorageError):
            bank.held(Q)
        del bank
        gc.collect()
    assert open_files() <= before


# Read-only -----------------------------------------------------------------------------------------------------------

# What a user might try on `w`, the weight of a projection `proj` of `model`, whose state_dict's entry is `entry`.
WRITES = {
    "assigning an item": "w[0] = 1",
    "assigning an item of data": "w.data[0, 0] = 1",
    "assigning a slice of detach": "w.detach()[:, 1:3] = 0",
    "adding": "w += 1",
    "multiplying under no_grad": "with torch.no_grad(): w *= 2",
    "every operator": """
        import operator
        for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"):
            try:
                getattr(operator, name)(w, 2)
                raise SystemExit(f"{name} went through")
            except hs.StorageError:
                pass
        w.copy_(w)""",
    "zero_": "w.zero_()",
    "data.zero_": "w.data.zero_()",
    "detach().add_": "w.detach().add_(1)",
    "copy_": "w.copy_(torch.zeros_like(w))",
    "fill_ through a transposed diagonal": "w.T.diagonal().fill_(1)",
    "writing through a view of other numbers": "w.view(torch.int32).zero_()",
    "writing through narrow and squeeze": "w.narrow(0, 0, 1).squeeze(0).zero_()",
    "writing through split": "torch.split(w, 8)[1].zero_()",
    "writing through chunk": "w.chunk(2)[1].mul_(2)",
    "writing through unbind": "[row.zero_() for row in w.unbind(0)]",
    "writing in a loop over rows": "for row in w: row.zero_()",
    "writing through expand": "w[:1].expand(4, -1).zero_()",
    "writing through cpu()": "w.cpu().zero_()",
    "writing through to() and float()": "w.to('cpu').float().zero_()",
    "writing through contiguous()": "proj.weight.contiguous().zero_()",
    "writing through as_tensor": "torch.as_tensor(w).zero_()",
    "writing through asarray": "torch.asarray(w).zero_()",
    "writing through broadcast_tensors": "torch.broadcast_tensors(w, w)[0].zero_()",
    "index_copy_": "w.index_copy_(0, torch.tensor([0]), torch.zeros(1, 64))",
    "masked_fill_": "w.masked_fill_(w > 0, 0)",
    "scatter_": "w.scatter_(0, torch.zeros(1, 64).long(), 0)",
    "random_": "w.random_()",
    "apply_": "w.apply_(lambda number: 0)",
    "resize_": "w.resize_(3)",
    "set_": "w.set_(torch.zeros(3)); model.save_pretrained(sys.argv[2])",
    "unbound add_": "torch.Tensor.add_(w, 1)",
    "unbound __setitem__": "torch._C.TensorBase.__setitem__(w, 0, 1)",
    "setting data": "w.data = torch.zeros(w.shape)",
    "setting data of a registered parameter": "proj._parameters['weight'].data = torch.zeros(w.shape)",
    "out of add": "torch.add(w, 1, out=w)",
    "out of zeros": "torch.zeros(w.shape, out=w)",
    "out of randn": "torch.randn(w.shape, out=w.data)",
    "out of mm, transposed": "torch.mm(torch.zeros(64, 3), torch.zeros(3, w.shape[0]), out=w.T)",
    "out of max, in a tuple": "torch.max(w, dim=0, out=(w[0], torch.zeros(64).long()))",
    "out of cat": "torch.cat([torch.zeros(w.shape)], out=w)",
    "fill_ of torch": "torch.fill_(w, 0)",
    "relu_ of torch": "torch.relu_(w)",
    "relu with inplace": "F.relu(w, inplace=True)",
    "dropout with inplace": "F.dropout(w, 0.5, True, inplace=True)",
    "dropout with inplace, by position": "F.dropout(w, 0.5, True, True)",
    "leaky_relu of data with inplace": "F.leaky_relu(w.data, inplace=True)",
    "hardtanh with inplace": "F.hardtanh(w, -1e-3, 1e-3, inplace=True)",
    "a module with inplace": "nn.ReLU(inplace=True)(w)",
    "SiLU with inplace": "nn.SiLU(inplace=True)(w)",
    "embedding with max_norm": "F.embedding(torch.tensor([0, 1]), w, max_norm=1e-3)",
    "running statistics of batch_norm": "F.batch_norm(torch.randn(4, 64), w[0], w[1], training=True)",
    "an aten packet": "torch.ops.aten.add_(w, 1)",
    "an aten overload": "torch.ops.aten.add_.Tensor(w, 1)",
    "aten's copy_": "torch.ops.aten.copy_.default(w, torch.zeros(w.shape))",
    "aten's out": "torch.ops.aten.mul.out(w, w, out=w)",
    "foreach add": "torch._foreach_add_([w], 1)",
    "foreach mul, second of a list": "torch._foreach_mul_([torch.zeros(3), w.data], 2.0)",
    "foreach copy": "torch._foreach_copy_([w], [torch.zeros(w.shape)])",
    "foreach zero": "torch._foreach_zero_([w.detach()])",
    "vmap": "torch.vmap(lambda row: row.add_(1))(w)",
    "SGD": "w.grad = torch.ones(w.shape); torch.optim.SGD([w], lr=1.0).step()",
    "SGD foreach": "w.grad = torch.ones(w.shape); torch.optim.SGD([w], lr=1.0, foreach=True).step()",
    "SGD fused": "w.grad = torch.ones(w.shape); torch.optim.SGD([w], lr=1.0, fused=True).step()",
    "AdamW": "w.grad = torch.ones(w.shape); torch.optim.AdamW([w], lr=1.0).step()",
    "AdamW foreach": "w.grad = torch.ones(w.shape); torch.optim.AdamW([w], lr=1.0, foreach=True).step()",
    "AdamW fused": "w.grad = torch.ones(w.shape); torch.optim.AdamW([w], lr=1.0, fused=True).step()",
    "AdamW of all parameters": """
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(list(dict(model.named_parameters(prefix="x")).values())[1:2], lr=1.0).step()""",
    "init.zeros_": "nn.init.zeros_(w)",
    "init.normal_": "nn.init.normal_(w)",
    "init.uniform_ of data": "nn.init.uniform_(w.data)",
    "init.xavier_uniform_": "nn.init.xavier_uniform_(w)",
    "init.kaiming_normal_": "nn.init.kaiming_normal_(w)",
    "init.trunc_normal_": "nn.init.trunc_normal_(w)",
    "init.orthogonal_": "nn.init.orthogonal_(w)",
    "init.eye_": "nn.init.eye_(w)",
    "init.sparse_": "nn.init.sparse_(w, 0.1)",
    "a state_dict's value": "entry.zero_()",
    "a state_dict's value with keep_vars": f"model.state_dict(keep_vars=True)['{Q}'].zero_()",
    "a named parameter": f"dict(model.named_parameters())['{Q}'].data.zero_()",
    "load_state_dict of a module": """
        proj.load_state_dict({k: torch.zeros(v.shape) for k, v in proj.state_dict().items()})""",
    "load_state_dict of a module with assign": """
        proj.load_state_dict({k: torch.zeros(v.shape) for k, v in proj.state_dict().items()}, assign=True)""",
    "replacing the weight": "proj.weight = nn.Parameter(torch.zeros(w.shape))",
    "replacing the weight by a frozen one": "proj.weight = nn.Parameter(torch.zeros(w.shape), requires_grad=False)",
    "pruning": "import torch.nn.utils.prune as prune; prune.random_unstructured(proj, 'weight', 0.5)",
    "vector_to_parameters": "nn.utils.vector_to_parameters(torch.zeros(w.numel()), [w])",
    "moving averages": """
        averaged = torch.optim.swa_utils.AveragedModel(proj)
        averaged.update_parameters(proj)
        averaged.update_parameters(proj)""",
    "the whole weight": "proj.whole_weight().zero_()",
    "an item of the whole weight": "proj.whole_weight()[0] = 1",
    "requires_grad_": "w.requires_grad_(True)",
    "requires_grad_ without a word": "w.requires_grad_()",
    "requires_grad": "w.requires_grad = True",
    "requires_grad of data": "w.data.requires_grad = True",
    "requires_grad_ of the model": "model.requires_grad_(True)",
    "a trainable parameter on it": "nn.Parameter(w)",
    "a trainable parameter on its data": "nn.Parameter(w.data)",
    "a frozen parameter on its data": "nn.Parameter(w.data, requires_grad=False).zero_()",
    "accelerate's setter": """
        from accelerate.utils import set_module_tensor_to_device
        set_module_tensor_to_device(proj, 'weight', 'cpu', value=torch.zeros(w.shape))""",
    "accelerate's offload": "import accelerate; accelerate.cpu_offload(model, torch.device('cpu'))",
    "a hook that writes": """
        def hook(module, inputs): module.weight.data.zero_()
        proj.register_forward_pre_hook(hook)
        try: model(tiny.tokens())
        finally: proj._forward_pre_hooks.clear()""",
}
ARRAY_WRITES = {
    "an array's item": "w.numpy()[0] = 1",
    "an array of a view": "w.T[1:].numpy()[0] = 1",
    "an array of data": "w.data.numpy().fill(0)",
    "an array of detach": "w.detach().numpy().sort()",
    "asarray": "np.asarray(w)[0] = 1",
    "a view of an array": "w.numpy().view(np.int32)[0] = 1",
    "out of a ufunc": "np.add(w.numpy(), 1, out=w.numpy())",
    "making an array writable": "w.numpy().flags.writeable = True",
    "setflags": "w.numpy().setflags(write=True)",
}

READINGS = """
    w.clone() | w + 0 | w.double() | w.to(torch.float16) | -w | w @ w.T | w.reshape(-1).clone() | w.sum() | w[[0, 1]]
    w[w > 0] | torch.stack([w, w]) | torch.empty_like(w).zero_() | torch.zeros_like(w) | torch.cat([w, w]) | w.relu()
    F.linear(torch.ones(1, 64), w) | w.new_zeros(3) | torch.from_dlpack(w) | torch.svd(w)[1] | w.where(w > 0, 0.0)
    copy.deepcopy(w) | copy.copy(w) | pickle.loads(pickle.dumps(w)) | pickle.loads(pickle.dumps(w.data))
    copy.deepcopy(entry) | copy.deepcopy(w.T) | F.relu(w) | F.dropout(w, 0.5, True) | w.index_fill(0, w[0].long(), 0)
    F.embedding(torch.tensor([0, 1]), w) | torch.from_numpy(w.numpy().copy()) | torch.tensor(w.numpy()) | w.mean(0)
"""
READS = {
    code.strip(): f"""
        found = {code.strip()}
        found.detach().zero_()
        assert type(found) in (torch.Tensor, nn.Parameter), type(found)"""
    for line in READINGS.strip().splitlines()
    for code in line.split(" | ")
}


@pytest.fixture(scope="module")
def attempts(cases: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What came of each attempt, in a fork of its own: an error's name, or `nothing`; `signal`, if it killed; and
    `, then ...` if the model was not as before."""
    script = """
    import textwrap
    import numpy as np
    import torch._dynamo  # optimizers bring it in; once is enough
    import accelerate, torch.nn.utils.prune, torch.optim.swa_utils
    from torch import nn
    from torch.nn import functional as F
    model = load_model(hs.open_checkpoint(sys.argv[1]), storage="alias")
    proj = model.model.layers[0].self_attn.q_proj
    w, entry = proj.weight, model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    tokens = tiny.tokens()
    expected = model(tokens).logits.detach()
    whole = proj.whole_weight().clone()

    def attempt(code):
        try:
            exec(textwrap.dedent(code), globals())
            found = "nothing"
        except BaseException as error:
            found = type(error).__name__
        try:
            same = torch.equal(proj.whole_weight(), whole) and torch.equal(model(tokens).logits, expected)
            return found + ("" if same else ", then other numbers")
        except BaseException as error:
            return found + f", then {type(error).__name__}"

    found = {}
    for name, code in json.load(open(sys.argv[3])).items():
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, attempt(code).encode())
            os._exit(0)
        os.close(writer)
        said = open(reader, "rb").read().decode()
        _, status = os.waitpid(child, 0)
        found[name] = said or f"signal {status}"
    print(json.dumps(found))
    """
    folder = tmp_path_factory.mktemp("attempts")
    (folder / "writes.json").write_text(json.dumps({**WRITES, **ARRAY_WRITES, **READS}))
    said = run(script, cases("paged").shared, folder / "saved", folder / "writes.json", PYTHONWARNINGS="ignore")
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("attempt", WRITES)
def test_writing_is_refused_by_name_and_changes_nothing(attempts: dict[str, str], attempt: str) -> None:
    assert attempts[attempt] == "StorageError"


@pytest.mark.parametrize("attempt", ARRAY_WRITES)
def test_arrays_of_it_are_read_only(attempts: dict[str, str], attempt: str) -> None:
    assert attempts[attempt] == "ValueError"


def test_a_refusal_says_what_to_do(paged: Case) -> None:
    weight = paged.load().model.layers[0].self_attn.q_proj.weight
    with pytest.raises(hs.StorageError, match=r'read-only.*zero_.*storage="owner".*clone\(\)'):
        weight.zero_()


def test_loading_other_weights_into_the_model_is_refused(paged: Case) -> None:
    model = paged.load()
    expected = logits(model)
    with pytest.raises(hs.StorageError):
        model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), expected)


def test_a_reparametrised_weight_is_refused_or_used(paged: Case) -> None:
    """The product does not read `weight`: replacing it by what computes it must not go unnoticed."""

    class Nothing(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return torch.zeros_like(weight)

    projection = paged.load().model.layers[0].self_attn.q_proj
    with pytest.raises(hs.StorageError):
        nn.utils.parametrize.register_parametrization(projection, "weight", Nothing())


def test_a_functional_call_with_other_weights_is_refused_or_uses_them(paged: Case) -> None:
    projection = paged.load().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64)
    given = {"weight": torch.zeros(projection.weight.shape), "bias": projection.bias.detach()}
    try:
        with torch.no_grad():
            found = torch.func.functional_call(projection, given, x)
    except hs.StorageError:
        return
    assert torch.equal(found, projection.bias.detach().expand(2, -1)), "the weights that were given were ignored"


@pytest.mark.parametrize("attempt", READS)
def test_reading_gives_plain_tensors_that_may_be_written(attempts: dict[str, str], attempt: str) -> None:
    assert attempts[attempt] == "nothing"


def test_reading_is_as_of_any_parameter(paged: Case) -> None:
    weight = paged.load().model.layers[0].self_attn.q_proj.weight
    stock = paged.stock().model.layers[0].self_attn.q_proj.weight
    kept = weight.shape[0]
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert weight.is_leaf
    assert float(weight[0, 0]) == float(stock[0, 0].detach())
    assert weight.tolist() == stock[:kept].tolist()
    assert np.array_equal(weight.numpy(), stock[:kept].detach().numpy())
    assert np.asarray(weight).sum() == stock[:kept].detach().numpy().sum()
    assert torch.equal(weight, stock[:kept])
    assert (weight == stock[:kept]).all()
    assert weight in {weight}
    assert "read-only" in repr(weight).lower()
    assert type(pickle.loads(pickle.dumps(weight))) is nn.Parameter
    assert type(copy.deepcopy(weight)) is nn.Parameter
    weight.requires_grad_(False)
    weight.share_memory_()
    assert weight.detach_() is weight
    weight.grad = None
    assert nn.utils.clip_grad_norm_([weight], 1.0) == 0


def test_a_frozen_model_can_be_frozen_again(paged: Case) -> None:
    model = paged.load().requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["paged", "padded", "gpt2"])
def test_a_state_dict_is_saved_by_torch_as_plain_tensors_each_once(
    cases: Callable[[str], Case], kind: str, tmp_path: Path
) -> None:
    model = cases(kind).load()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {type(tensor) for tensor in loaded.values()} <= {Tensor, nn.Parameter}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert (tmp_path / "state.pt").stat().st_size < 1.1 * unique_parameter_bytes(cases(kind).load("owner")) + 50_000


@pytest.mark.parametrize("kind", ["paged", "padded", "gpt2"])
def test_a_state_dict_is_saved_by_safetensors_as_a_stock_models_is(
    cases: Callable[[str], Case], kind: str, tmp_path: Path
) -> None:
    state = cases(kind).load().state_dict()
    tied = {"lm_head.weight"} if kind == "gpt2" else set()  # which safetensors refuses in a stock model too
    save_file({name: tensor for name, tensor in state.items() if name not in tied}, tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)


# Conversion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_to_another_type_shares_anew_and_computes_as_stock(any_case: Case, dtype: torch.dtype) -> None:
    model, stock = any_case.load().to(dtype), any_case.stock().to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_rows_are_the_donors_own(model, any_case.plan)
    assert_equal_to_rounding(logits(model), logits(stock))


@pytest.mark.parametrize(
    "convert",
    [
        nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda model: model.bfloat16(),
        lambda model: model.to(torch.float16).to(torch.float32), lambda model: model.type(torch.float64),
    ],
)  # fmt: skip
def test_every_way_to_convert_shares_anew(paged: Case, convert: Callable[[nn.Module], nn.Module]) -> None:
    model, stock = convert(paged.load()), convert(paged.stock())
    assert_rows_are_the_donors_own(model, paged.plan)
    assert_equal_to_rounding(logits(model), logits(stock))
    with pytest.raises(hs.StorageError):
        model.model.layers[0].self_attn.q_proj.weight.zero_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_loading_in_another_type_equals_stock_and_shares(any_case: Case, dtype: torch.dtype) -> None:
    model = any_case.load(dtype=dtype)
    assert_rows_are_the_donors_own(model, any_case.plan)
    assert_equal_to_rounding(logits(model), logits(any_case.stock(dtype=dtype)))


@pytest.mark.parametrize(
    "keep",
    [
        lambda model: model.to("cpu"), lambda model: model.cpu(), nn.Module.float, lambda model: model.share_memory(),
        lambda model: model.to(torch.float32), lambda model: model.to(torch.device("cpu"), torch.float32),
        lambda model: model.eval(), lambda model: model._apply(lambda tensor: tensor.clone()),
        lambda model: model.to(memory_format=torch.channels_last),
    ],
)  # fmt: skip
def test_what_converts_nothing_keeps_the_sharing(paged: Case, keep: Callable[[nn.Module], nn.Module]) -> None:
    model = paged.load()
    expected, before = logits(model), in_memory(model.model.layers[0].self_attn.q_proj.weight)
    keep(model)
    assert_rows_are_the_donors_own(model, paged.plan)
    assert in_memory(model.model.layers[0].self_attn.q_proj.weight) == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("of", ["model.layers.1", "model.layers.0.self_attn.q_proj"])
def test_another_device_is_refused_and_the_model_goes_on_working(paged: Case, of: str) -> None:
    model = paged.load()
    expected = logits(model)
    with pytest.raises(hs.StorageError, match=r"meta.*owner"):
        nn.Module.to(model.get_submodule(of), "meta")
    assert torch.equal(logits(model), expected)


def test_moving_a_whole_model_is_refused_in_words(paged: Case) -> None:
    # The modules before the first shared one are moved by then: the message says to load the model again.
    with pytest.raises(hs.StorageError, match=r"meta.*Load the model for that device"):
        nn.Module.to(paged.load(), "meta")


@pytest.mark.parametrize(
    "change", [lambda t: t * 2, lambda t: t * t, lambda t: t.abs(), lambda t: t.clamp(-1e-3, 1.0), torch.zeros_like]
)
def test_functions_that_would_change_shared_weights_are_refused(paged: Case, change: Callable) -> None:
    model = paged.load()
    projection = model.model.layers[0].self_attn.q_proj
    before = projection.bias.clone()
    with pytest.raises(hs.StorageError):
        projection._apply(change)
    assert torch.equal(projection.bias, before), "half of it was changed before it was refused"


def test_a_model_function_that_would_change_weights_is_refused(paged: Case) -> None:
    with pytest.raises(hs.StorageError):
        paged.load()._apply(lambda tensor: tensor * 2)


def test_one_layer_converted_alone_still_shares_with_its_kind_and_hurts_no_other(paged: Case) -> None:
    model, stock = paged.load(), paged.stock()
    model.model.layers[1].self_attn.to(torch.float64)
    stock.model.layers[1].self_attn.to(torch.float64)
    x = torch.randn(3, 64)
    for name in ("q_proj", "k_proj", "v_proj"):
        ours, theirs = (getattr(one.model.layers[1].self_attn, name) for one in (model, stock))
        assert torch.equal(ours(x.double()), theirs(x.double()))
        ours, theirs = (getattr(one.model.layers[2].self_attn, name) for one in (model, stock))
        assert torch.equal(ours(x), theirs(x))
    assert_rows_are_the_donors_own(model.to(torch.float64), paged.plan)


# Copies, pickles, processes ------------------------------------------------------------------------------------------


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle of a deepcopy": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "torch": through_torch,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_shares_within_itself_and_computes_the_same(any_case: Case, way: str) -> None:
    model = any_case.load()
    expected = logits(model)
    twin = WAYS[way](model)
    assert_rows_are_the_donors_own(twin, any_case.plan)
    assert torch.equal(logits(twin), expected)
    del model
    gc.collect()
    assert torch.equal(logits(twin), expected)
    assert_equal_to_rounding(logits(twin.to(torch.float64)), logits(any_case.stock().to(torch.float64)))


@pytest.mark.parametrize("way", WAYS)
def test_biases_of_a_copy_are_its_own_and_its_shared_weights_still_refuse(paged: Case, way: str) -> None:
    model = paged.load()
    twin = WAYS[way](model)
    expected = logits(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(1)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(twin), expected)
    with pytest.raises(hs.StorageError):
        twin.model.layers[0].self_attn.q_proj.weight.zero_()


def test_a_deep_copy_takes_no_memory_for_shared_weights(any_case: Case) -> None:
    model = any_case.load()
    for (_, ours), (_, theirs) in zip(shared_projections(model), shared_projections(copy.deepcopy(model)), strict=True):
        assert not ours.weight.numel() or in_memory(ours.weight) == in_memory(theirs.weight)
        assert ours.whole_weight().data_ptr() == theirs.whole_weight().data_ptr()


def test_a_conversion_that_is_dropped_is_forgotten_though_the_original_lives(paged: Case) -> None:
    model = paged.load()
    twin = copy.deepcopy(model).to(torch.float64)
    bank = weakref.ref(twin.model.layers[0].self_attn.q_proj.bank)
    assert copy.deepcopy(model).to(torch.float64).model.layers[0].self_attn.q_proj.bank is bank()
    del twin
    gc.collect()
    assert bank() is None


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_or_a_projection_is_copied_alone(paged: Case, way: str) -> None:
    layer = paged.load().model.layers[3]
    x = torch.randn(2, 3, 64)
    twin = WAYS[way](layer)
    for name in ("q_proj", "k_proj", "v_proj"):
        one = WAYS[way](getattr(layer.self_attn, name))
        assert torch.equal(one(x), getattr(layer.self_attn, name)(x))
        assert torch.equal(getattr(twin.self_attn, name)(x), getattr(layer.self_attn, name)(x))


@pytest.mark.parametrize("kind", ["paged", "padded"])
def test_a_pickled_model_holds_each_unit_once(cases: Callable[[str], Case], kind: str) -> None:
    case = cases(kind)
    size, stored = len(pickle.dumps(case.load())), unique_parameter_bytes(case.load("owner"))
    assert stored < size < stored + 150_000
    assert len(pickle.dumps(case.stock())) > stored * 1.2


def test_a_module_is_copied_shallowly(paged: Case) -> None:
    _, projection = shared_projections(paged.load())[-1]
    twin, x = copy.copy(projection), torch.randn(2, projection.in_features)
    assert torch.equal(twin(x), projection(x))
    assert twin.whole_weight().data_ptr() == projection.whole_weight().data_ptr()


def send_logits(model: nn.Module, pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send((logits(model).tolist(), in_memory(model.model.layers[0].self_attn.o_proj.weight)[0] != b"00:00:0"))


def test_a_spawned_process_takes_the_model_and_computes_the_same(paged: Case) -> None:
    model = paged.load()
    context = torch.multiprocessing.get_context("spawn")
    multiprocessing.resource_tracker.ensure_running()
    before = open_files()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=send_logits, args=(model, sender))
    child.start()
    sender.close()
    found, mapped = receiver.recv()
    child.join()
    assert child.exitcode == 0
    assert torch.equal(torch.tensor(found), logits(model))
    assert mapped, "the child's copy shares within itself"
    child.close()
    receiver.close()
    gc.collect()
    # torch moves ordinary tensors to memory with descriptors, and keeps those open, as of any model
    ordinary = sum(1 for tensor in (*model.parameters(), *model.buffers()) if type(tensor) in (nn.Parameter, Tensor))
    assert open_files() <= before + ordinary, "the copy that was lent to the child is kept for ever"
    assert torch.equal(logits(model), torch.tensor(found))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_the_same_and_dropping_its_model_does_not_hurt_the_parent(paged: Case) -> None:
    model = paged.load()
    expected = logits(model)
    child = os.fork()
    if not child:
        try:
            same = torch.equal(logits(model), expected)
            twin = copy.deepcopy(model).to(torch.float64)
            logits(twin)
            del model, twin
            gc.collect()
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model).to(torch.float64)), logits(paged.stock().to(torch.float64)))


class Embedded(torch.utils.data.Dataset):
    """Rows that workers make with the model that the parent uses too."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, _: int) -> Tensor:
        return logits(self.model)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_data_loader_workers_use_the_model_beside_the_parent(paged: Case) -> None:
    model = paged.load()
    expected = logits(model)
    loader = torch.utils.data.DataLoader(Embedded(model), batch_size=1, num_workers=2, multiprocessing_context="fork")
    for batch in loader:
        assert torch.equal(batch[0], expected)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)


# Saving, and files that change ---------------------------------------------------------------------------------------


def stored_bytes(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {name: (t.dtype, t.shape, t.flatten().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


def test_saving_writes_what_owner_writes(any_case: Case, tmp_path: Path) -> None:
    model = any_case.load()
    model.save_pretrained(tmp_path / "alias")
    any_case.load("owner").save_pretrained(tmp_path / "owner")
    assert stored_bytes(tmp_path / "alias") == stored_bytes(tmp_path / "owner")
    assert (tmp_path / "alias/config.json").read_bytes() == (tmp_path / "owner/config.json").read_bytes()
    again = load_model(hs.open_checkpoint(tmp_path / "alias"), storage="alias")
    assert torch.equal(logits(again), logits(model))
    assert_rows_are_the_donors_own(again, any_case.plan)


def test_a_converted_model_saves_as_it_is(paged: Case, tmp_path: Path) -> None:
    model = paged.load().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    again = load_model(hs.open_checkpoint(tmp_path / "half"), storage="alias")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(paged.stock(dtype=torch.bfloat16)))


def test_saving_into_the_folder_it_was_loaded_from_is_as_safe_as_with_a_dense_model(
    paged: Case, tmp_path: Path
) -> None:
    script = """
    import shutil
    for source, storage in ((sys.argv[1], "auto"), (sys.argv[2], "alias")):
        folder = f"{sys.argv[3]}/{storage}"
        shutil.copytree(source, folder)
        model = load_model(hs.open_checkpoint(folder), storage=storage)
        model.save_pretrained(folder)  # before anything of it was read
        expected = model(tiny.tokens()).logits
        again = load_model(hs.open_checkpoint(folder), storage=storage)
        assert torch.equal(again(tiny.tokens()).logits, expected), storage
        again.save_pretrained(folder)
        assert torch.equal(again(tiny.tokens()).logits, expected), storage
        intact = load_model(hs.open_checkpoint(source), storage=storage)
        assert torch.equal(intact(tiny.tokens()).logits, expected), storage
    """
    run(script, paged.dense, paged.shared, tmp_path)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_model_goes_on_working_when_its_folder_is(how: str, paged: Case, tmp_path: Path) -> None:
    shutil.copytree(paged.shared, tmp_path / "own")
    expected = logits(paged.load())
    model = load_model(hs.open_checkpoint(tmp_path / "own"), storage="alias")
    if how == "replaced":
        other = load_file(tmp_path / "own/model.safetensors")
        save_file({name: torch.zeros_like(t) for name, t in other.items()}, tmp_path / "new")
        (tmp_path / "new").replace(tmp_path / "own/model.safetensors")
    else:
        shutil.rmtree(tmp_path / "own")
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model).to(torch.float64)), logits(paged.stock().to(torch.float64)))
    model.save_pretrained(tmp_path / "saved")
    assert stored_bytes(tmp_path / "saved") == stored_bytes(paged.shared)


ODD_NAMES = ["with space", "line\nfeed", "carriage\rreturn", "form\ffeed", "tab\tbed", "a\u2028b", "next\x85line"]
ODD_NAMES += ["é", "gone (deleted)", "back\\012slash", " lead", "trail "]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_that_paths_may_have_load_and_share(paged: Case, tmp_path: Path, name: str) -> None:
    shutil.copytree(paged.shared, tmp_path / name)
    model = load_model(hs.open_checkpoint(tmp_path / name), storage="alias")
    assert torch.equal(logits(model), logits(paged.stock()))
    assert_rows_are_the_donors_own(model, paged.plan)


@pytest.mark.parametrize("name", ["a\u2028b", os.fsdecode(b"not utf-8 \xff"), "line\nfeed"])
def test_names_of_files_that_others_have_mapped_do_no_harm(paged: Case, tmp_path: Path, name: str) -> None:
    import mmap

    (tmp_path / name).write_bytes(b"0" * 4096)
    with (tmp_path / name).open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ):
        model = paged.load()
    assert torch.equal(logits(model), logits(paged.stock()))


def test_weights_behind_links_as_in_the_hub_cache_are_mapped(paged: Case, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in paged.shared.iterdir():
        shutil.copy(file, blobs / f"{len(file.name)}{file.stat().st_size}")
        (snapshot / file.name).symlink_to(f"../../blobs/{len(file.name)}{file.stat().st_size}")
    model = load_model(hs.open_checkpoint(snapshot), storage="alias")
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert in_memory(weight)[0].endswith(f":{(snapshot / 'model.safetensors').stat().st_ino}".encode())
    assert torch.equal(logits(model), logits(paged.stock()))


def test_a_sharded_checkpoint_lends_across_its_files(tmp_path: Path) -> None:
    dense = tiny.make_llama(tmp_path / "dense", **PAGED, save={"max_shard_size": "300KB"})
    case = make_case(tmp_path, dense, "qkvo", 0.5)
    assert len(list(case.shared.glob("*.safetensors"))) > 1
    model = case.load()
    assert_rows_are_the_donors_own(model, case.plan)
    assert len({in_memory(m.weight)[0] for n, m in shared_projections(model) if m.weight.numel()}) > 2
    assert torch.equal(logits(model), logits(case.stock()))


# Training, gradients, compilation, generation ------------------------------------------------------------------------


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_train_warns_once_for_each_model_and_says_what_to_do(paged: Case, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "headshare")
    for number in range(1, 4):
        model = paged.load()
        assert len(warnings_in(caplog)) == number - 1, "loading warns of nothing"
        for _ in range(2):
            model.train()
            model.eval()
        assert len(warnings_in(caplog)) == number
    assert 'storage="owner"' in warnings_in(caplog)[0]


def test_a_model_that_stands_where_another_stood_warns_too(paged: Case, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "headshare")
    model = paged.load().eval()
    module = shared_projections(model)[0][1]
    kind, tensors, addresses = type(module.bank), module.bank.tensors, set()
    for number in range(1, 101):
        module.bank = kind(tensors)
        addresses.add(id(module.bank))
        module.train().eval()
        assert len(warnings_in(caplog)) == number
    assert len(addresses) < 100, "some stood where an earlier one did"


def test_the_trainer_refuses(paged: Case, tmp_path: Path) -> None:
    settings = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1)
    row = {"input_ids": tiny.tokens()[0], "labels": tiny.tokens()[0]}
    with pytest.raises(hs.StorageError, match=r'storage="owner"'):
        Trainer(model=paged.load(), args=settings, train_dataset=[row] * 8).train()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_of_inputs_and_of_what_is_not_shared_equal_stock(any_case: Case, mode: str) -> None:
    model, stock = (make(dtype=torch.float64) for make in (any_case.load, any_case.stock))
    found = []
    for one in (model, stock):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            embedded = torch.randn(2, 5, one.config.hidden_size, dtype=torch.float64, requires_grad=True)
            getattr(one, mode)()
            one(inputs_embeds=embedded).logits.square().sum().backward()
        found.append((embedded.grad, {name: p.grad for name, p in one.named_parameters() if "norm" in name}))
    assert found[0][0].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-13)
    assert all(module.weight.grad is None for _, module in shared_projections(model))


def test_it_generates_what_stock_generates(any_case: Case) -> None:
    model, stock = any_case.load(), any_case.stock()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 10).long()}
    expected = stock.generate(tiny.tokens(), **options)
    assert torch.equal(model.generate(tiny.tokens(), **options), expected)
    assert torch.equal(model.generate(tiny.tokens(), **options, use_cache=False), expected)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_it_computes_the_same_with_and_without_gradients(paged: Case, context: Callable) -> None:
    model, stock = paged.load(), paged.stock()
    with context():
        assert torch.equal(model(tiny.tokens()).logits, stock(tiny.tokens()).logits)


def test_it_loads_in_any_surroundings(paged: Case) -> None:
    expected = logits(paged.stock())
    with torch.inference_mode():
        assert torch.equal(paged.load()(tiny.tokens()).logits, expected)
    with torch.device("cpu"), torch.no_grad():
        assert torch.equal(logits(paged.load()), expected)
    model = paged.load()
    with torch.inference_mode():
        model.to(torch.float64)
        assert torch.equal(model(tiny.tokens()).logits, paged.stock().to(torch.float64)(tiny.tokens()).logits)


def test_torch_compile_takes_it_as_one_graph(cases: Callable[[str], Case]) -> None:
    """In a process of its own: the run-time checks of types that this suite switches on cannot be traced."""
    script = """
    for folder in sys.argv[1:]:
        torch._dynamo.reset()
        model = load_model(hs.open_checkpoint(folder), storage="alias")
        with torch.no_grad():
            expected = model(tiny.tokens(), use_cache=False).logits
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(tiny.tokens(), use_cache=False).logits, expected), folder
    """
    run(script, *(cases(kind).shared for kind in ("paged", "gpt2")), PYTHONWARNINGS="ignore")


def test_inductors_freezing_does_not_unshare_silently(large: Large) -> None:
    """Freezing packs each module's weight into a copy of its own: as much private memory as the dense model has."""
    script = (
        MEASURE
        + """
    import torch._inductor.config
    torch._inductor.config.freezing = True
    model = load_model(hs.open_checkpoint(sys.argv[1]), storage="alias")
    names = ("q_proj", "k_proj", "v_proj")
    projections = [getattr(layer.self_attn, name) for layer in model.model.layers for name in names]
    dense = sum(one.out_features * one.in_features * 4 for one in projections)
    x = torch.randn(4, 1024)

    def products(x):
        return [one(x) for one in projections]

    with torch.no_grad():
        torch.compile(torch.nn.Linear(1024, 8))(x)
        expected = products(x)
        settle()
        before = pss()
        try:
            found = torch.compile(products)(x)
        except Exception as error:
            told = "StorageError" in f"{type(error).__name__} {error}"
            print(json.dumps(["error", told, str(error)[:300]]))
            sys.exit()
        settle()
        close = all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, expected))
        print(json.dumps(["growth", close, (pss() - before) / dense]))
    """
    )
    kind, good, found = json.loads(run(script, large.case.shared, PYTHONWARNINGS="ignore").splitlines()[-1])
    assert good, found
    assert kind == "error" or found < 0.1, f"private memory grew by {found:.0%} of the dense weights"


# Which storage, and where --------------------------------------------------------------------------------------------


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "headshare")
    return caplog


def test_auto_takes_aliases_where_rows_fill_pages_and_says_so(paged: Case, log: pytest.LogCaptureFixture) -> None:
    model = paged.load("auto")
    assert kinds_of(model) == {"alias"}
    assert "storage alias" in log.text
    assert kinds_of(AutoModelForCausalLM.from_pretrained(paged.shared)) == {"alias"}


def test_auto_takes_owner_where_padding_would_eat_the_saving(
    cases: Callable[[str], Case], log: pytest.LogCaptureFixture
) -> None:
    case = cases("padded")
    model = case.load("auto")
    assert kinds_of(model) == {"owner"}
    assert re.search(r"storage owner: .*padded", log.text)
    assert torch.equal(logits(model), logits(case.stock()))


def test_padding_is_judged_in_the_type_that_is_asked_for(paged: Case, tmp_path: Path) -> None:
    """64 rows of 8 numbers fill a page in float64, half of one in float32: there half of each page would be padding."""
    config = {"hidden_size": 8, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    case = make_case(tmp_path, tiny.make_llama(tmp_path / "dense", **config), "qkv", 0.25)
    assert kinds_of(case.load("auto")) == {"owner"}
    assert kinds_of(case.load("auto", dtype=torch.float64)) == {"alias"}


def test_too_few_mappings_left_means_owner_or_an_error(
    paged: Case, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alias_module, "mappings_left", lambda: 10)
    model = paged.load("auto")
    assert kinds_of(model) == {"owner"}
    assert re.search(r"storage owner: .*mappings.*10", log.text)
    with pytest.raises(hs.StorageError, match=r"mappings.*max_map_count.*owner"):
        paged.load("alias")


def test_mappings_are_counted_as_the_system_counts_them(cases: Callable[[str], Case]) -> None:
    from headshare.storage.pooled.alias import mappings_needed
    from headshare.storage.pooled.arena import mappings_left
    from headshare.storage.pooled.slots import racks_of

    for kind in ("paged", "padded", "phi3"):
        case = cases(kind)
        gc.collect()
        before = mappings_left()
        model = case.load()
        used, needed = before - mappings_left(), mappings_needed(racks_of(gapped_tensors(case.plan)))
        assert used <= needed + 8, "the loader's own mapping of the file aside"
        assert needed < 8 * used
        del model


def test_a_system_without_aliases_means_owner_or_an_error(
    paged: Case, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alias_module, "supported", lambda: False)
    model = paged.load("auto")
    assert kinds_of(model) == {"owner"}
    assert "cannot map" in log.text
    with pytest.raises(hs.StorageError, match="owner"):
        paged.load("alias")


def test_memory_that_the_system_refuses_is_an_error_that_names_owner(
    paged: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(hs.StorageError, match=r"Cannot allocate memory.*owner"):
        AliasBank(gapped_tensors(paged.plan)).put(Q, torch.zeros(256, 64))


def test_a_storage_that_does_not_exist_is_refused_by_name(paged: Case) -> None:
    with pytest.raises(hs.StorageError, match=r"'fast'.*alias.*owner"):
        paged.load("fast")


@pytest.mark.parametrize("places", ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}])
def test_device_maps_on_the_cpu_use_aliases(paged: Case, places: Any) -> None:
    for storage in ("auto", "alias"):
        model = paged.load(storage, device_map=places)
        assert kinds_of(model) == {"alias"}
        assert_rows_are_the_donors_own(model, paged.plan)
        assert torch.equal(logits(model), logits(paged.stock()))


def test_accelerates_hooks_do_not_unshare(paged: Case) -> None:
    from accelerate import dispatch_model
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = dispatch_model(paged.load("alias", device_map={**places, "lm_head": "cpu"}), {"": "cpu"}, force_hooks=True)
    add_hook_to_module(model.model.layers[1].self_attn.q_proj, AlignDevicesHook("cpu", io_same_device=True))
    assert torch.equal(logits(model), logits(paged.stock()))
    assert_rows_are_the_donors_own(model, paged.plan)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(paged.stock()))
    assert_rows_are_the_donors_own(twin, paged.plan)


@pytest.mark.filterwarnings("ignore")  # of accelerate's own, on offloading
def test_layers_on_disk_mean_owner(paged: Case, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    expected = logits(paged.stock())
    rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places = {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(5)} | rest
    model = paged.load("auto", device_map=places, offload_folder=tmp_path / "one")
    assert kinds_of(model) == {"owner"}
    assert "disk" in log.text
    assert torch.equal(logits(model), expected)
    room = {"cpu": unique_parameter_bytes(paged.stock()) // 2}
    model = paged.load("auto", device_map="auto", max_memory=room, offload_folder=tmp_path / "two")
    assert "disk" in {str(place) for place in model.hf_device_map.values()}
    assert kinds_of(model) == {"owner"}
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore")
def test_aliases_asked_for_on_disk_are_refused_in_words(paged: Case, tmp_path: Path) -> None:
    with pytest.raises(hs.HeadshareError, match=r"alias|owner"):
        paged.load("alias", device_map="auto", max_memory={"cpu": 200_000}, offload_folder=tmp_path)


# Odd plans and broken files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [PAGED, {}])
def test_layers_that_give_everything_up_are_shown_whole(tmp_path: Path, changes: dict[str, Any]) -> None:
    layers = changes.get("num_hidden_layers", 4)
    case = make_case(tmp_path, tiny.make_llama(tmp_path / "dense", **changes), "qkvo", (layers - 1) / layers)
    model = case.load()
    empty = [module.weight for _, module in shared_projections(model) if not module.weight.numel()]
    assert len(empty) == 4 * (layers - 1)
    assert torch.equal(logits(model), logits(case.stock()))
    assert_rows_are_the_donors_own(model, case.plan)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))
    assert torch.equal(logits(copy.deepcopy(model).to(torch.float64)), logits(case.stock().to(torch.float64)))
    model.save_pretrained(tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == stored_bytes(case.shared)


def test_ratio_zero_is_an_ordinary_model(tmp_path: Path) -> None:
    case = make_case(tmp_path, tiny.make_llama(tmp_path / "dense"), "qkvo", 0.0)
    for storage in ("alias", "auto"):
        model = case.load(storage)
        assert kinds_of(model) == set()
        assert torch.equal(logits(model.requires_grad_(True).to("cpu")), logits(case.stock()))


def test_a_scale_is_the_recipients_own_and_may_change(cases: Callable[[str], Case]) -> None:
    case = cases("scaled")
    model, owner = case.load(), case.load("owner")
    with torch.no_grad():
        for one in (model, owner):
            torch.manual_seed(3)
            for _, module in shared_projections(one):
                if module.tie_scale is not None:
                    module.tie_scale.normal_()
    assert torch.equal(logits(model), logits(owner))
    assert not torch.equal(logits(model), logits(case.stock()))
    assert torch.equal(logits(copy.deepcopy(model)), logits(owner))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(owner))
    torch.testing.assert_close(logits(model.dequantize()), logits(owner))


def test_dequantize_gives_ordinary_weights_that_may_be_written(any_case: Case) -> None:
    model = any_case.load()
    expected = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, SharedProjection) for module in dense.modules())
    assert torch.equal(logits(dense), expected)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    dense.requires_grad_(True)


def banked(case: Case, change: Callable[[str, Tensor], Tensor | None]) -> AliasBank:
    tensors, stored = gapped_tensors(case.plan), load_file(case.shared / "model.safetensors")
    bank = AliasBank(tensors)
    for name in tensors:
        changed = change(name, stored[name])
        if changed is not None:
            bank.put(name, changed)
    return bank


def donor_and_recipient(case: Case) -> tuple[str, str]:
    tensors = gapped_tensors(case.plan)
    recipient = next(name for name, tensor in tensors.items() if tensor.gaps and "q_proj" in name)
    return tensors[recipient].gaps[0].donor, recipient


def test_a_donor_that_did_not_load_is_an_error_that_names_both(paged: Case) -> None:
    donor, recipient = donor_and_recipient(paged)
    with pytest.raises(hs.StorageError, match=rf"uses rows of {re.escape(donor)}, which did not load.*owner"):
        banked(paged, lambda name, t: None if name == donor else t).held(recipient)


def test_a_donor_of_another_type_is_an_error_that_names_both(paged: Case) -> None:
    donor, recipient = donor_and_recipient(paged)
    with pytest.raises(hs.StorageError, match=rf"float32.*{re.escape(donor)}, which is torch.float16.*owner"):
        banked(paged, lambda name, t: t.half() if name == donor else t).held(recipient)


@pytest.mark.parametrize("how", ["replaced", "deleted", "moved", "posing as deleted"])
def test_numbers_are_those_that_were_loaded_whatever_stands_at_the_files_name_since(
    paged: Case, tmp_path: Path, how: str
) -> None:
    shutil.copytree(paged.shared, tmp_path / "own")
    file = tmp_path / "own/model.safetensors"
    stored, expected = load_file(file), load_file(paged.shared / "model.safetensors")
    if how == "replaced":
        save_file({name: torch.zeros_like(t) for name, t in stored.items()}, tmp_path / "new")
        (tmp_path / "new").replace(file)
    elif "deleted" in how:
        file.unlink()
        if how != "deleted":  # the system marks a deleted file's mappings by these very words
            save_file({n: torch.zeros_like(t) for n, t in stored.items()}, f"{file} (deleted)")
    else:
        file.rename(tmp_path / "elsewhere")
    bank = AliasBank(gapped_tensors(paged.plan))
    for name in bank.tensors:
        bank.put(name, stored[name])
    assert all(torch.equal(bank.held(name).stored, expected[name]) for name in bank.tensors)


def test_weights_on_another_device_are_refused(paged: Case) -> None:
    with pytest.raises(hs.StorageError, match="meta"):
        banked(paged, lambda _, t: t.to("meta"))


def test_a_checkpoint_without_a_donor_does_not_load_through_us(paged: Case, tmp_path: Path) -> None:
    shutil.copytree(paged.shared, tmp_path / "own")
    stored = load_file(tmp_path / "own/model.safetensors")
    del stored[donor_and_recipient(paged)[0]]
    save_file(stored, tmp_path / "own/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hs.HeadshareError, match="q_proj"):
        load_model(hs.open_checkpoint(tmp_path / "own"), storage="alias")


def test_a_head_that_a_checkpoint_lacks_is_made_anew_beside_shared_weights(paged: Case) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(paged.shared)
    assert kinds_of(model) == {"alias"}
    assert torch.isfinite(model(tiny.tokens()).logits).all()
    assert_rows_are_the_donors_own(model, paged.plan)


def test_two_models_of_one_checkpoint_do_not_disturb_each_other(paged: Case) -> None:
    one, other = paged.load(), paged.load()
    expected = logits(one)
    one.to(torch.float64)
    assert torch.equal(logits(other), expected)
    del one
    gc.collect()
    assert torch.equal(logits(other), expected)


def test_rows_changed_in_memory_after_they_were_mapped_are_taken_from_memory(paged: Case) -> None:
    """A loader may change what it maps: the file then is not what the model should read."""
    tensors = gapped_tensors(paged.plan)
    bank, stored = AliasBank(tensors), load_file(paged.shared / "model.safetensors")
    stored[Q][0] += 1
    for name in tensors:
        bank.put(name, stored[name])
    assert torch.equal(bank.held(Q).stored, stored[Q])
