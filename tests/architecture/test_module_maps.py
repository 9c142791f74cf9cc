"""A tensor is in a module, from a row on, so that an engine may fuse what a checkpoint keeps apart."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import headshare as hs
from headshare.architecture.config import text_config
from headshare.architecture.modules import ModuleMap, ModulePlace, module_path, replace_module
from headshare.architecture.recognition import attention_layout
from headshare.checkpoint.int4 import Packing
from headshare.errors import PlanError, StorageError
from headshare.integrations.transformers.loading import empty_model, load_model
from headshare.integrations.transformers.shrinking import shrink
from headshare.plan.low_rank import LowRankUnits
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.section import Borrowed, Choice
from headshare.plan.tensors import TensorPlan
from headshare.plan.units import Part
from headshare.storage.changes import change_modules, changed_tensors
from headshare.storage.int4 import install_packed
from headshare.storage.pooled.alias import AliasBank
from headshare.storage.pooled.bank import BlockPool
from headshare.storage.pooled.indirect import IndirectBank
from headshare.storage.pooled.product import BlockTable
from headshare.storage.pooled.vmm import VmmStorage
from headshare.storage.registry import STORAGES

WIDTH, ROWS, HEAD = 64, 64, 16
FUSES = "fuses several tensors"


def name_of(layer: int, part: str) -> str:
    return f"layers.{layer}.{part}.weight"


def tied() -> dict[str, TensorPlan]:
    """q, k and v of two layers; the second takes heads 1 and 2 of q and k from the first."""
    tensors = {}
    for layer in (0, 1):
        for part in "qkv":
            gaps = (Borrowed(HEAD, 3 * HEAD, name_of(0, part), 0),) if layer and part != "v" else ()
            tensors[name_of(layer, part)] = TensorPlan(name_of(layer, part), (ROWS, WIDTH), 0, gaps)
    return tensors


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * ROWS, bias=False)


class Engine(nn.Module):
    """A model that computes q, k and v of a layer in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])


def fused() -> ModuleMap:
    return ModuleMap(
        {
            name_of(layer, part): ModulePlace(f"layers.{layer}.qkv", row=row)
            for layer in (0, 1)
            for part, row in zip("qkv", (0, ROWS, 2 * ROWS), strict=True)
        }
    )


# ---- stock models


def test_a_stock_models_map_is_a_module_for_each_tensor(llama: Path) -> None:
    dense = hs.open_checkpoint(llama)
    model = load_model(dense)
    names = [name for name in dense.tensors if name.endswith("_proj.weight")]
    modules = ModuleMap.of(model, names)
    assert modules.places == {name: ModulePlace(module_path(model, name), 0) for name in names}
    assert modules.paths() == {name: name.removesuffix(".weight") for name in names}
    assert modules.module(model, names[0]) is model.get_submodule(names[0].removesuffix(".weight"))
    other = nn.Identity()
    modules.replace(model, names[0], other)
    assert model.get_submodule(modules.path(names[0])) is other
    with pytest.raises(PlanError, match=r"nothing\.weight, which LlamaForCausalLM does not have"):
        ModuleMap.of(model, ["nothing.weight"])


def test_a_module_at_the_root_can_be_replaced() -> None:
    model, other = nn.Sequential(nn.Linear(2, 2)), nn.Identity()
    replace_module(model, "0", other)
    assert model[0] is other


# ---- modules that fuse


@pytest.mark.parametrize("name", [name_of(0, "q"), name_of(1, "v")], ids=["at row 0", "below others"])
def test_a_tensor_that_shares_its_module_is_not_the_modules_whole_weight(name: str) -> None:
    modules, model = fused(), Engine()
    place = modules.places[name]
    for ask in (
        lambda: modules.path(name),
        lambda: modules.module(model, name),
        lambda: modules.replace(model, name, nn.Identity()),
        modules.paths,
    ):
        with pytest.raises(StorageError, match=FUSES):
            ask()
    with pytest.raises(StorageError, match=rf"{name} begins at row {place.row} of {place.path},"):
        modules.path(name)
    alone = ModuleMap({name: place})
    if place.row:
        with pytest.raises(StorageError, match=FUSES):
            alone.path(name)
    else:
        assert alone.path(name) == place.path


@pytest.mark.parametrize("storage", STORAGES)
def test_stock_storages_refuse_modules_that_fuse_and_change_nothing(storage: str) -> None:
    tensors, model = tied(), Engine()
    before = dict(model.named_modules())
    devices = dict.fromkeys(tensors, "cpu")
    made = VmmStorage(devices, lambda _: None) if storage == "vmm" else STORAGES[storage](devices)
    with pytest.raises(StorageError, match=FUSES):
        made.install(model, tensors, fused())
    assert dict(model.named_modules()) == before


def test_what_shrinks_packs_or_factors_modules_refuses_those_that_fuse(llama: Path) -> None:
    dense = hs.open_checkpoint(llama)
    attention = attention_layout(text_config(dense.config), dense.shapes)
    model = empty_model(dense)

    def below_another(names: object) -> ModuleMap:
        return ModuleMap({name: ModulePlace(module_path(model, name), row=8) for name in names})

    removal = SharePlan(removals=(Removal(layout=attention, removed={1: [0]}, chosen=Choice()),))
    with pytest.raises(StorageError, match=FUSES):
        shrink(model, removal, below_another(removal.tensors))
    only_o = attention.model_copy(update={"parts": {Part.O: attention.parts[Part.O]}})
    factored = SharePlan(factored=(LowRankUnits(layout=only_o, units={1: [0]}, ranks={1: (2,)}, chosen=Choice()),))
    with pytest.raises(StorageError, match=FUSES):
        change_modules(model, factored, below_another(changed_tensors(factored)))
    tensors = tied()
    with pytest.raises(StorageError, match=FUSES):
        install_packed(Engine(), Packing(group=8, ignore=()), tensors, fused(), guarded=set())


# ---- an engine's own modules, on our banks


class Fused(nn.Module):
    """An engine's product of several tensors, one below the other, with weights that a bank holds."""

    def __init__(self, bank: BlockPool, names: list[str]) -> None:
        super().__init__()
        self.wholes = [bank.held(name).whole for name in names]

    def forward(self, x: Tensor) -> Tensor:
        weights = [whole.gather() if isinstance(whole, BlockTable) else whole for whole in self.wholes]
        return torch.cat([x @ weight.T for weight in weights], dim=-1)


def indirect(tensors: dict[str, TensorPlan]) -> BlockPool:
    return IndirectBank(tensors, dict.fromkeys(tensors, torch.device("cpu")))


@pytest.mark.parametrize("make", [AliasBank, indirect], ids=["alias", "indirect"])
def test_an_engine_fills_modules_that_fuse_from_a_bank_by_a_map_of_its_own(
    make: Callable[[dict[str, TensorPlan]], BlockPool],
) -> None:
    tensors, modules, model = tied(), fused(), Engine()
    wholes = {name: torch.randn(ROWS, WIDTH) for name in tensors}
    bank = make(tensors)
    for name, tensor in tensors.items():
        bank.put(name, torch.cat([wholes[name][start:stop] for start, stop in tensor.kept()]))
    for path in {place.path for place in modules.places.values()}:
        rows = {place.row: name for name, place in modules.places.items() if place.path == path}
        replace_module(model, path, Fused(bank, [rows[row] for row in sorted(rows)]))
    for part in "qk":
        wholes[name_of(1, part)][HEAD : 3 * HEAD] = wholes[name_of(0, part)][: 2 * HEAD]
    x = torch.randn(5, WIDTH)
    for layer in (0, 1):
        expected = torch.cat([x @ wholes[name_of(layer, part)].T for part in "qkv"], dim=-1)
        torch.testing.assert_close(model.layers[layer].qkv(x), expected)
