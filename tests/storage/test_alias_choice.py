"""Storage `alias`: it is chosen where rows fill pages, the system allows it and weights are on the CPU."""

import copy
import gc
import logging
import mmap
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import headshare as hs
import headshare.storage.pooled.alias as alias_module
import headshare.storage.pooled.arena as arena_module
from headshare.errors import StorageError
from headshare.integrations.transformers.loading import unique_parameter_bytes
from headshare.storage.pooled.alias import AliasBank
from support import tiny
from support.aliases import Case, Q, kinds_of, logits, make_case
from support.pages import assert_rows_are_the_donors_own

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="aliases are for Linux")


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
    with pytest.raises(StorageError, match=r"mappings.*max_map_count.*owner"):
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
        used, needed = before - mappings_left(), mappings_needed(racks_of(case.plan.tensors))
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
    with pytest.raises(StorageError, match="owner"):
        paged.load("alias")


def test_memory_that_the_system_refuses_is_an_error_that_names_owner(
    paged: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(StorageError, match=r"Cannot allocate memory.*owner"):
        AliasBank(paged.plan.tensors).put(Q, torch.zeros(256, 64))


def test_a_storage_that_does_not_exist_is_refused_by_name(paged: Case) -> None:
    with pytest.raises(StorageError, match=r"'fast'.*alias.*owner"):
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


class Refusing:
    """The C library on a system that maps no shared pages, or none of these files."""

    def __init__(self, real: Any, refused: Callable[[int], bool]) -> None:
        self.real = real
        self.refused = refused

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def mmap(self, start: Any, length: int, protection: int, flags: int, descriptor: int, offset: int) -> Any:
        if flags & mmap.MAP_SHARED and self.refused(descriptor):
            return arena_module._failed()
        return self.real.mmap(start, length, protection, flags, descriptor, offset)


@pytest.mark.parametrize(
    ("refused", "kept"),
    [
        (lambda _: True, {"owner"}),
        (lambda file: "memfd" not in str(Path(f"/proc/self/fd/{file}").readlink()), {"alias"}),
    ],
    ids=["no shared pages at all", "none of the checkpoint's files"],
)
def test_where_the_system_maps_no_shared_pages_auto_holds_the_model_otherwise(
    refused: Callable[[int], bool], kept: set[str], paged: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = arena_module._libc()
    monkeypatch.setattr(arena_module, "_libc", lambda: Refusing(real, refused))
    arena_module._allowed.cache_clear()
    try:
        model = paged.load("auto")
    finally:
        arena_module._allowed.cache_clear()
    assert kinds_of(model) == kept
    assert torch.equal(logits(model), logits(paged.stock()))
