"""Storage vmm: blocks of physical memory under as many addresses as weights use them.

Without a GPU a driver made of memfds and mmap stands in for CUDA's. It has the same rules: a handle is mapped whole,
memory lives while a handle or a mapping does, a range is unmapped as it was mapped and freed when nothing is there.
"""

import ctypes
import gc
import os
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import headshare as hs
from headshare.errors import StorageError
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.plan.placement import split_evenly
from headshare.storage.pooled import vmm
from headshare.storage.pooled.cuda_driver import AddressSpan, Driver, access_of, allocation
from headshare.storage.pooled.frozen import MappedProjection
from headshare.storage.pooled.vmm import VmmBank, VmmStorage
from headshare.storage.projection import shared_projections
from headshare.storage.registry import STORAGES
from support import tiny

GRANULE = 4096
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PRIVATE_ANONYMOUS_NORESERVE, SHARED_FIXED, PRIVATE_FIXED = 0x4022, 0x11, 0x4032


class FakeDriver:
    """CUDA's rules on a CPU's memory. `fail` names a method and the call of it that is refused."""

    granularity = GRANULE

    def __init__(self) -> None:
        self.fail: tuple[str, int] | None = None
        self.calls: Counter[str] = Counter()
        self.handles: dict[int, int] = {}
        self.ranges: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.allowed: set[int] = set()
        self.finished_at: list[int] = []

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if self.fail == (name, self.calls[name]):
            raise StorageError(f"{name} was refused")

    def create(self, nbytes: int) -> int:
        self._called("create")
        assert nbytes % GRANULE == 0 < nbytes
        descriptor = os.memfd_create("block")
        os.ftruncate(descriptor, nbytes)
        self.handles[descriptor] = nbytes
        return descriptor

    def release(self, handle: int) -> None:
        self._called("release")
        del self.handles[handle]
        os.close(handle)

    def reserve(self, nbytes: int) -> int:
        self._called("reserve")
        address = LIBC.mmap(None, nbytes, 0, PRIVATE_ANONYMOUS_NORESERVE, -1, 0)
        self.ranges[address] = nbytes
        return address

    def free(self, address: int, nbytes: int) -> None:
        self._called("free")
        assert self.ranges.pop(address) == nbytes
        assert not [at for at in self.mapped if address <= at < address + nbytes]
        assert LIBC.munmap(address, nbytes) == 0

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._called("map")
        assert self.handles[handle] == nbytes
        assert LIBC.mmap(address, nbytes, 3, SHARED_FIXED, handle, 0) == address
        self.mapped[address] = nbytes

    def unmap(self, address: int, nbytes: int) -> None:
        self._called("unmap")
        assert self.calls["finish"]
        assert self.mapped.pop(address) == nbytes
        assert LIBC.mmap(address, nbytes, 0, PRIVATE_FIXED, -1, 0) == address

    def allow(self, address: int, nbytes: int) -> None:
        self._called("allow")
        assert sum(size for at, size in self.mapped.items() if address <= at < address + nbytes) == nbytes
        self.allowed.add(address)

    def tensor(self, span: AddressSpan) -> torch.Tensor:
        assert span.address in self.allowed
        buffer = (ctypes.c_ubyte * span.nbytes).from_address(span.address)
        buffer._span = span
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def finish(self) -> None:
        self._called("finish")

    def left(self) -> tuple[int, int, int]:
        gc.collect()
        return len(self.handles), len(self.ranges), len(self.mapped)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """The driver of all devices."""
    fake = FakeDriver()
    assert isinstance(fake, Driver)

    class Faked(VmmStorage):
        def __init__(self, devices: Mapping[str, str]) -> None:
            super().__init__(devices, lambda _: fake)

    monkeypatch.setitem(STORAGES, "vmm", Faked)
    monkeypatch.setattr(vmm, "cuda_driver", lambda _: fake)
    return fake


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Half the units of a model given up, whose slots are 16 rows of 64 float32 numbers: one granule."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "dense", **sizes))
    return hs.share(dense, hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo")).save(tmp_path / "out")


def load(folder: Path, storage: str = "vmm", **options: object) -> torch.nn.Module:
    return load_model(hs.open_checkpoint(folder), storage=storage, **options)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(tiny.tokens()).logits


def test_a_model_equals_the_one_held_by_owners_through_stock_products(shared: Path, driver: FakeDriver) -> None:
    model, owner = load(shared), load(shared, "owner")
    torch.testing.assert_close(logits(model), logits(owner))
    assert unique_parameter_bytes(model) == unique_parameter_bytes(owner)
    assert all(type(module) is MappedProjection for _, module in shared_projections(model))


def test_physical_memory_is_the_stored_bytes_and_handles_are_let_go_of(shared: Path, driver: FakeDriver) -> None:
    model = load(shared)
    stored = sum(module.weight.nbytes for _, module in shared_projections(model))
    assert driver.calls["create"] * GRANULE == stored
    assert driver.left()[0] == 0
    assert sum(driver.mapped.values()) > stored
    for _, module in shared_projections(model):
        if module.weight.numel():
            assert module.weight.data_ptr() in driver.ranges


def test_a_donors_rows_are_one_memory_with_their_recipients(shared: Path, driver: FakeDriver) -> None:
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    tensors = plan.tensors
    bank = VmmBank(tensors, dict.fromkeys(tensors, torch.device("cpu")), lambda _: driver)
    shown = {name: bank.put(name, torch.randn(tensor.stored_shape)) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        for gap in tensor.gaps:
            whole = bank.held(tensor.name).whole.narrow(tensor.axis, gap.start, gap.stop - gap.start)
            first = tensors[gap.donor].stored_index(gap.donor_start)
            lent = shown[gap.donor].narrow(tensor.axis, first, gap.stop - gap.start)
            assert torch.equal(whole, lent)
            lent.add_(1)
            assert torch.equal(whole, lent)


def test_everything_is_given_back_with_the_model(shared: Path, driver: FakeDriver) -> None:
    model = load(shared)
    weight = model.model.layers[0].self_attn.q_proj.weight
    expected = weight.clone()
    del model
    assert driver.left()[1] == 1
    assert torch.equal(weight, expected)
    del weight
    assert driver.left() == (0, 0, 0)
    assert driver.calls["create"] == driver.calls["release"]
    assert driver.calls["map"] == driver.calls["unmap"]
    assert driver.calls["reserve"] == driver.calls["free"]


@pytest.mark.parametrize(
    ("method", "call"),
    [("create", 1), ("create", 7), ("reserve", 1), ("reserve", 3), ("map", 1), ("map", 6), ("allow", 2), ("map", -1)],
)
def test_a_refusal_half_way_gives_everything_back(shared: Path, driver: FakeDriver, method: str, call: int) -> None:
    if call < 0:  # the last of them: while whole weights are laid over their blocks
        load(shared)
        call = driver.calls[method]
        gc.collect()
        driver.calls.clear()
    driver.fail = (method, call)
    with pytest.raises(StorageError, match=f"{method} was refused"):
        load(shared)
    assert driver.calls[method] == call
    assert driver.left() == (0, 0, 0)


def test_blocks_that_are_no_multiple_of_a_granule_are_refused_with_what_to_do(shared: Path, driver: FakeDriver) -> None:
    message = (
        r"maps memory in granules of 4,096 bytes, and the blocks of model\.layers\.\d\.self_attn\.\w_proj\.weight "
        r'are 16 rows of 64 torch\.bfloat16 numbers, 2,048 bytes\. Load the model with storage="indirect"\.'
    )
    with pytest.raises(StorageError, match=message):
        load(shared, dtype=torch.bfloat16)
    assert driver.left() == (0, 0, 0)


def test_a_pickle_and_a_conversion_map_blocks_of_their_own(shared: Path, driver: FakeDriver) -> None:
    model = load(shared)
    expected, created = logits(model), driver.calls["create"]
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), expected)
    assert driver.calls["create"] == 2 * created
    wide = twin.to(torch.float64)
    torch.testing.assert_close(logits(wide), logits(load(shared, "owner", dtype=torch.float64)))
    del twin, wide, model
    assert driver.left() == (0, 0, 0)


def test_writes_moves_and_training_are_refused(shared: Path, driver: FakeDriver) -> None:
    model = load(shared)
    with pytest.raises(StorageError, match="read-only"):
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    with pytest.raises(StorageError, match="cannot be moved to meta"):
        model.to("meta")


def test_saving_again_gives_the_tensors_that_owners_save(shared: Path, driver: FakeDriver, tmp_path: Path) -> None:
    load(shared).save_pretrained(tmp_path / "vmm")
    load(shared, "owner").save_pretrained(tmp_path / "owner")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("vmm", "owner")]
    assert files[0] == files[1]


def test_each_device_has_blocks_of_its_own_for_what_it_uses(shared: Path) -> None:
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    tensors = plan.tensors
    devices = {name: torch.device("cpu", int(place[-1])) for name, place in split_evenly(plan, 2).items()}
    stored = {name: torch.randn(tensor.stored_shape) for name, tensor in tensors.items()}
    for order in (list(tensors), list(tensors)[::-1]):
        drivers = {torch.device("cpu", n): FakeDriver() for n in range(2)}
        bank = VmmBank(tensors, devices, drivers.__getitem__)
        for name in order:
            bank.put(name, stored[name])
        for name, tensor in tensors.items():
            runs = [
                stored[source].narrow(tensor.axis, tensors[source].stored_index(start), stop - start)
                for source, start, stop in tensor.whole()
            ]
            assert torch.equal(bank.held(name).whole, torch.cat(runs, dim=tensor.axis))
        needed = [
            {(run.source, slot) for name in tensors if devices[name] == device for run in tensors[name].whole()
             for slot in range(run.start, run.stop, 16)}
            | {(name, start + n) for name in tensors if devices[name] == device
               for start, stop in tensors[name].kept() for n in range(0, stop - start, 16)}
            for device in drivers
        ]  # fmt: skip
        assert [driver.calls["create"] for driver in drivers.values()] == [len(slots) for slots in needed]
        del bank
        assert [driver.left() for driver in drivers.values()] == [(0, 0, 0)] * 2


def test_transformers_reserves_no_memory_for_what_is_mapped(shared: Path, driver: FakeDriver) -> None:
    model = load(shared)
    sizes = {name: model.hf_quantizer.param_element_size(model, name, p) for name, p in model.named_parameters()}
    mapped = {f"{path}.weight" for path, _ in shared_projections(model)}
    assert sizes == {name: 0 if name in mapped else 4 for name in sizes}


def test_a_tensor_that_never_came_is_named(shared: Path, driver: FakeDriver) -> None:
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    tensors = plan.tensors
    bank = VmmBank(tensors, dict.fromkeys(tensors, torch.device("cpu")), lambda _: driver)
    first, *others = tensors
    for name in others:
        bank.put(name, torch.zeros(tensors[name].stored_shape))
    with pytest.raises(StorageError, match=f"{first}, or a tensor whose rows it uses, did not load"):
        bank.held(others[0])


def test_tied_tensors_of_two_types_of_number_are_refused(shared: Path, driver: FakeDriver) -> None:
    plan = hs.open_checkpoint(shared).plan
    assert plan is not None
    tensors = plan.tensors
    bank = VmmBank(tensors, dict.fromkeys(tensors, torch.device("cpu")), lambda _: driver)
    recipient = next(tensor.name for tensor in tensors.values() if tensor.gaps)
    for name, tensor in tensors.items():
        bank.put(name, torch.zeros(tensor.stored_shape, dtype=torch.float64 if name == recipient else torch.float32))
    with pytest.raises(StorageError, match="rows of another type"):
        bank.held(recipient)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_is_refused_in_one_line(shared: Path) -> None:
    with pytest.raises(StorageError, match=r"needs (a CUDA device|cuda-bindings)"):
        load(shared)


def test_what_is_asked_of_the_driver_is_in_its_own_words() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    properties, access = allocation(driver, 3), access_of(driver, 3)
    assert properties.location.id == access.location.id == 3
    assert properties.location.type == driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    assert access.flags == driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE


# ---- on a GPU


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Slots of 128 rows of 4096 float32 numbers: one granule of 2 MiB."""
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 64}
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "dense", num_hidden_layers=3, **sizes))
    return hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "out")


@pytest.mark.gpu
def test_on_a_gpu_mapped_weights_equal_owners_and_take_the_stored_bytes(large: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    tokens = tiny.tokens().cuda()
    with torch.inference_mode():
        expected = load(large, "owner", device_map="cuda")(tokens).logits
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
        model = load(large, device_map="cuda")
        assert torch.equal(model(tokens).logits, expected)
    gc.collect()
    torch.cuda.empty_cache()
    taken = before - torch.cuda.mem_get_info()[0]
    assert taken < unique_parameter_bytes(model) + (64 << 20)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] < 64 << 20


@pytest.mark.gpu
def test_on_a_gpu_a_graph_replays_on_mapped_weights(large: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    projection = load(large, device_map="cuda").model.layers[2].self_attn.q_proj
    x = torch.randn(1, 4096, device="cuda")
    with torch.inference_mode():
        expected = projection(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = projection(x)
        graph.replay()
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_on_a_gpu_a_block_below_the_granularity_is_refused(shared: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    with pytest.raises(StorageError, match="granules of 2,097,152 bytes"):
        load(shared, device_map="cuda")
