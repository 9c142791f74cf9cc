"""Storage `alias`: saving, and files that change under a model, are as safe as with a dense model."""

import copy
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.integrations.transformers.loading import load_model
from headshare.storage.projection import shared_projections
from support import tiny
from support.aliases import PAGED, Case, logits, make_case, stored_bytes
from support.pages import assert_rows_are_the_donors_own, in_memory
from support.processes import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="aliases are for Linux")


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
