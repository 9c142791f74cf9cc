"""A plan and the weights that were written by it belong together: neither is read with another in its place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors import safe_open

import headshare as hs
from headshare.errors import CheckpointError
from support import tiny
from support.calibrated import edit
from support.shares import share

FORMAT = Path(__file__).parents[1] / "sharing" / "format"
OPENED: dict[str, Callable[[Path], Any]] = {
    "headshare": hs.open_checkpoint,
    "hs.load": hs.load,
    "transformers": transformers.AutoModelForCausalLM.from_pretrained,
}

every_way = pytest.mark.parametrize("way", OPENED)


def metadata_of(folder: Path) -> list[dict[str, str]]:
    """The metadata of each file, read by the library that defines the format."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.append(file.metadata())
    return found


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """In several files."""
    return share(tiny.make_llama(tmp_path / "dense", save={"max_shard_size": "60KB"}), tmp_path / "shared")


def swap_donors(entry: dict[str, Any]) -> None:
    """Another valid plan for the same shapes."""
    ties = entry["plan"]["selections"][0]["ties"]
    ties[0][2:] = [0, 1 - ties[0][3]] if ties[0][2] == 0 else [0, 0]


def test_every_file_carries_the_plans_digest(shared: Path, tmp_path: Path) -> None:
    digest = hs.open_checkpoint(shared).plan.digest
    found = metadata_of(shared)
    assert len(found) > 1
    assert all((one["format"], one["headshare.plan"]) == ("pt", digest) for one in found)
    hs.load(shared).save_pretrained(tmp_path / "again")
    assert metadata_of(tmp_path / "again") == [{"format": "pt"}]  # more keys would come in another order each time
    expanded = hs.expand(hs.open_checkpoint(shared), tmp_path / "expanded")
    assert all(one == {"format": "pt"} for one in metadata_of(expanded))


@every_way
def test_an_edited_plan_is_refused(way: str, shared: Path) -> None:
    OPENED[way](shared)
    edit(shared, swap_donors)
    with pytest.raises(CheckpointError, match=r"does not hold the plan by which model.* was written"):
        OPENED[way](shared)


@every_way
def test_one_file_of_another_checkpoint_is_refused_by_its_name(way: str, shared: Path, tmp_path: Path) -> None:
    """Of equal names and shapes: only the donors differ."""
    plan = hs.open_checkpoint(shared).plan.model_dump(mode="json")
    swap_donors({"plan": plan})
    other = hs.share(hs.open_checkpoint(tmp_path / "dense"), hs.SharePlan.from_dict(plan)).save(tmp_path / "other")
    file = sorted(path.name for path in shared.glob("*.safetensors"))[-1]
    shutil.copyfile(other / file, shared / file)
    with pytest.raises(CheckpointError, match=file):
        OPENED[way](shared)


def test_a_plan_that_was_taken_out_of_the_configuration_is_missed(shared: Path) -> None:
    config = json.loads((shared / "config.json").read_text())
    del config["quantization_config"]
    (shared / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not hold the plan by which"):
        hs.open_checkpoint(shared)


def test_headers_on_the_hub_are_held_against_the_plan_too(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub as hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata

    def headers(*_: object, **__: object) -> SafetensorsRepoMetadata:
        files = {
            path.name: SafetensorsFileMetadata(metadata=metadata, tensors={})
            for path, metadata in zip(sorted(shared.glob("*.safetensors")), metadata_of(shared), strict=True)
        }
        return SafetensorsRepoMetadata(metadata=None, sharded=True, weight_map={}, files_metadata=files)

    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(shared / "config.json"))
    monkeypatch.setattr(hub, "get_safetensors_metadata", headers)
    monkeypatch.setattr(hub, "model_info", lambda *_, **__: None)
    assert hs.open_checkpoint("someone/shared", weights=False).plan == hs.open_checkpoint(shared).plan
    edit(shared, swap_donors)
    with pytest.raises(CheckpointError, match="does not hold the plan by which"):
        hs.open_checkpoint("someone/shared", weights=False)


@pytest.mark.parametrize("name", ["ties", "packed"])
def test_a_checkpoint_from_before_there_were_seals_is_read_and_saved_without_one(name: str, tmp_path: Path) -> None:
    hs.load(FORMAT / name).save_pretrained(tmp_path / "again")
    assert metadata_of(tmp_path / "again") == [{"format": "pt"}]
    assert hs.open_checkpoint(tmp_path / "again").plan == hs.open_checkpoint(FORMAT / name).plan
