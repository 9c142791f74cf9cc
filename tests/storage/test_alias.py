"""Storage `alias`: each unit once in physical memory, read-only, and still a model that does all a stock model does.

Each test here stands for one way in which sharing was, or could be, lost silently, or a process lost loudly. What may
kill a process runs in one of its own. Physical memory is measured as PSS; never a clock.
"""

import copy
import gc
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import headshare as hs
from headshare.errors import StorageError
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.storage.pooled.alias import AliasBank
from headshare.storage.projection import SharedProjection, shared_projections
from support import tiny
from support.aliases import PAGED, Case, Q, kinds_of, logits, make_case, stored_bytes
from support.pages import assert_rows_are_the_donors_own, in_memory, mapping_of, open_files
from support.processes import MEASURE, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="aliases are for Linux")


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
    estimate = hs.estimate(hs.open_checkpoint(case.dense), case.plan)
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


def test_a_refused_load_closes_its_files(paged: Case) -> None:
    tensors, stored = paged.plan.tensors, load_file(paged.shared / "model.safetensors")
    gc.collect()
    before = open_files()
    for _ in range(5):
        bank = AliasBank(tensors)
        for name in tensors:
            bank.put(name, stored[name] if name != Q else stored[name].half())
        with pytest.raises(StorageError):
            bank.held(Q)
        del bank
        gc.collect()
    assert open_files() <= before


@pytest.mark.slow
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
    tensors, stored = case.plan.tensors, load_file(case.shared / "model.safetensors")
    bank = AliasBank(tensors)
    for name in tensors:
        changed = change(name, stored[name])
        if changed is not None:
            bank.put(name, changed)
    return bank


def donor_and_recipient(case: Case) -> tuple[str, str]:
    tensors = case.plan.tensors
    recipient = next(name for name, tensor in tensors.items() if tensor.gaps and "q_proj" in name)
    return tensors[recipient].gaps[0].donor, recipient


def test_a_donor_that_did_not_load_is_an_error_that_names_both(paged: Case) -> None:
    donor, recipient = donor_and_recipient(paged)
    with pytest.raises(StorageError, match=rf"uses rows of {re.escape(donor)}, which did not load.*owner"):
        banked(paged, lambda name, t: None if name == donor else t).held(recipient)


def test_a_donor_of_another_type_is_an_error_that_names_both(paged: Case) -> None:
    donor, recipient = donor_and_recipient(paged)
    with pytest.raises(StorageError, match=rf"float32.*{re.escape(donor)}, which is torch.float16.*owner"):
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
    bank = AliasBank(paged.plan.tensors)
    for name in bank.tensors:
        bank.put(name, stored[name])
    assert all(torch.equal(bank.held(name).stored, expected[name]) for name in bank.tensors)


def test_weights_on_another_device_are_refused(paged: Case) -> None:
    with pytest.raises(StorageError, match="meta"):
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
    tensors = paged.plan.tensors
    bank, stored = AliasBank(tensors), load_file(paged.shared / "model.safetensors")
    stored[Q][0] += 1
    for name in tensors:
        bank.put(name, stored[name])
    assert torch.equal(bank.held(Q).stored, stored[Q])
