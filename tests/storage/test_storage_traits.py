"""A storage says what it is, and nobody else knows one by its name."""

import ast
import logging
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import headshare
import headshare as hs
from headshare.errors import StorageError
from headshare.integrations.transformers.loading import load_model
from headshare.plan.tensors import TensorPlan
from headshare.storage.owner import OwnerProjection, OwnerStorage
from headshare.storage.pooled import cuda_driver, vmm
from headshare.storage.projection import shared_projections
from headshare.storage.registry import AUTO, STORAGES, TRAINABLE, Storage, choose_storage
from support import tiny

SOURCE = Path(headshare.__file__).parent
# Words that name no storage where they stand.
ALLOWED = {
    ("files/untrusted.py", "alias"): "YAML's own word",
    ("integrations/vllm/weights.py", "alias"): "its bank, by the name of its module",
    ("integrations/vllm/weights.py", "indirect"): "the same",
}


class Kept(OwnerStorage):
    """A storage of somebody else's."""

    name: ClassVar[str] = "kept"
    trains: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    replicates: ClassVar[bool] = True
    brings_memory: ClassVar[bool] = True

    @classmethod
    def refusal(cls, tensors: Mapping[str, TensorPlan], dtypes: Set[torch.dtype], devices: Set[str]) -> str | None:
        return None if devices == {"disk"} else "it is for disks"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    dense = hs.open_checkpoint(tiny.make("llama-gqa", tmp_path / "dense"))
    return hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "shared")


def test_every_storage_in_the_table_says_what_it_is() -> None:
    for name, storage in STORAGES.items():
        assert storage.name == name != AUTO
        assert isinstance(storage({}), Storage)
        assert {type(getattr(storage, trait)) for trait in ("trains", "packs", "replicates", "brings_memory")} == {bool}
    assert STORAGES[TRAINABLE].trains
    assert {name for name, storage in STORAGES.items() if storage.replicates} == {"indirect", "vmm"}
    assert {name for name, storage in STORAGES.items() if storage.brings_memory} == {"vmm"}
    assert not isinstance(torch.nn.Linear(1, 1), Storage)


def test_auto_takes_the_first_that_has_nothing_against_it_and_says_what_others_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = {Kept.name: Kept, **STORAGES}
    monkeypatch.setattr("headshare.storage.registry.STORAGES", first)
    with caplog.at_level(logging.INFO, logger="headshare"):
        assert choose_storage(AUTO, {}, {torch.float32}, {"disk"}) == "kept"
        assert "storage kept: the model is placed on disk" in caplog.text
        caplog.clear()
        assert choose_storage(AUTO, {}, {torch.float32}, {"cpu", "disk"}) == TRAINABLE
        assert f"storage {TRAINABLE}: it is for disks; the model is placed on cpu, disk" in caplog.text
        caplog.clear()
        assert choose_storage("kept", {}, {torch.float32}, {"cpu"}) == "kept"  # who names one is not asked
        assert caplog.text == ""
    monkeypatch.setattr("headshare.storage.registry.STORAGES", {Kept.name: Kept})
    with pytest.raises(StorageError, match="no storage holds this model: it is for disks"):
        choose_storage(AUTO, {}, {torch.float32}, {"cpu"})


def test_a_storage_that_stands_in_the_table_is_loaded_and_treated_by_its_traits(
    shared: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(STORAGES, Kept.name, Kept)
    places = {"": "cpu", "model.layers.3": "meta"}
    quantizers = {}
    for storage in ("kept", TRAINABLE):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="headshare"):
            model = load_model(
                hs.open_checkpoint(shared), storage=storage, device_map=places if storage == "kept" else None
            )
        quantizers[storage] = model.hf_quantizer
        assert {type(module) for _, module in shared_projections(model)} == {OwnerProjection}
        assert ("are held more than once" in caplog.text) == (storage == "kept")
    path = next(path for path, _ in shared_projections(model))
    weight = torch.zeros(3)
    assert quantizers["kept"].param_element_size(None, f"{path}.weight", weight) == 0
    assert quantizers["kept"].param_element_size(None, "model.norm.weight", weight) == 4
    assert quantizers[TRAINABLE].param_element_size(None, f"{path}.weight", weight) == 4


def test_vmm_is_for_cuda_devices_with_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = vmm.VmmStorage.refusal
    assert refusal({}, {torch.float32}, {"cpu"}) == "the model is placed on this machine's CPU"
    assert refusal({}, {torch.float32}, {"cuda", "cpu"}) == "the model is placed on cpu, cuda"
    monkeypatch.setattr(vmm, "driver_installed", lambda: False)
    assert refusal({}, {torch.float32}, {"cuda"}) == "cuda-bindings is not installed"
    monkeypatch.setattr(vmm, "driver_installed", lambda: True)
    assert refusal({}, {torch.float32}, {"cuda"}) is None
    assert choose_storage(AUTO, {}, {torch.float64}, {"cuda"}) == TRAINABLE  # no kernels; and who wants vmm says so
    monkeypatch.setattr(cuda_driver, "find_spec", lambda _: None)
    assert not cuda_driver.driver_installed()


def named_in(code: str) -> set[str]:
    """Storages that code names, in literals other than docstrings, and modules of storages that it imports from."""
    tree, found = ast.parse(code), set()
    modules = {storage.__module__: name for name, storage in STORAGES.items()}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        id(node.body[0].value)  # type: ignore[attr-defined]
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found |= set(re.findall(r"\w+", node.value)) & set(STORAGES)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            found.add(modules[node.module])
    return found


def test_storages_are_found_in_code() -> None:
    assert named_in('"""alias"""\nload(storage="owner")\nhelp = "alias,vmm"') == {"owner", "alias", "vmm"}
    assert named_in("from headshare.storage.pooled.indirect import IndirectBank") == {"indirect"}


def test_no_module_beside_storages_names_one() -> None:
    found = set()
    for path in SOURCE.rglob("*.py"):
        module = path.relative_to(SOURCE).as_posix()
        if not module.startswith("storage/"):
            found |= {(module, name) for name in named_in(path.read_text(encoding="utf-8"))}
    assert found == set(ALLOWED)
