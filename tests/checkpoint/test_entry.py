"""What config.json says of sharing is one value, read from a dictionary alone, and written as it was read."""

import copy
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import transformers

import headshare as hs
from headshare.checkpoint.entry import METHOD, Origin, SharingEntry
from headshare.checkpoint.int4 import Packing
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CheckpointError, StorageError
from headshare.integrations.transformers.config import HeadshareConfig
from headshare.plan.plan import FORMAT, SharePlan

Entry = dict[str, Any]

FOLDER = Path(__file__).parents[1] / "sharing" / "format"  # checkpoints of every kind, written once
WRITTEN: dict[str, Entry] = {
    path.parent.name: json.loads(path.read_text())["quantization_config"] for path in FOLDER.glob("*/config.json")
}
PLANS = {
    "nothing": SharePlan(model_type="llama"),
    **{name: SharePlan.from_dict(entry["plan"]) for name, entry in WRITTEN.items()},
}
RECORD = RefitRecord.of(["model.norm.weight"], "a text", "0" * 64, windows=(2, 16), seed=2**63, steps=5)
PACKING = Packing(group=16, ignore=("lm_head",))
ORIGIN = Origin(digest="0" * 64, commit="1" * 40)


@pytest.fixture
def entry() -> Entry:
    """A sound entry with every field, as JSON has it."""
    return as_json(SharingEntry(PLANS["ties"], RECORD, "someone/dense", PACKING, ORIGIN))


def as_json(entry: SharingEntry) -> Entry:
    read: Entry = json.loads(json.dumps(entry.to_config()))
    return read


@pytest.mark.parametrize("origin", [None, ORIGIN, Origin(digest="2" * 64)], ids=["unknown", "of the hub", "local"])
@pytest.mark.parametrize("packing", [None, PACKING], ids=["whole", "packed"])
@pytest.mark.parametrize("base_model", [None, "someone/dense"], ids=["nameless", "named"])
@pytest.mark.parametrize("refit", [None, RECORD], ids=["as shared", "refitted"])
@pytest.mark.parametrize("plan", PLANS)
def test_an_entry_is_read_as_it_was_written(
    plan: str, refit: RefitRecord | None, base_model: str | None, packing: Packing | None, origin: Origin | None
) -> None:
    entry = SharingEntry(PLANS[plan], refit, base_model, packing, origin)
    assert SharingEntry.from_config(entry.to_config()) == entry
    again = SharingEntry.from_config(as_json(entry))
    assert again == entry
    assert again.to_config() == entry.to_config()
    assert again.plan.digest == entry.plan.digest
    config = HeadshareConfig(**as_json(entry))
    assert config.sharing == entry
    assert config.to_dict() == entry.to_config()


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_an_entry_that_was_written_long_ago_is_written_again_as_it_is(name: str) -> None:
    found = SharingEntry.from_config(WRITTEN[name])
    assert as_json(found) == WRITTEN[name]
    assert (found.packing is not None) is (name == "packed")
    assert hs.open_checkpoint(FOLDER / name).sharing == found


def test_an_entry_holds_no_more_than_it_says(entry: Entry) -> None:
    assert list(entry) == ["quant_method", "format", "plan", "refit", "quantization_config", "base_model", "origin"]
    assert (entry["quant_method"], entry["format"]) == (METHOD, FORMAT)
    read = SharingEntry.from_config(entry)
    assert list(as_json(SharingEntry(read.plan))) == ["quant_method", "format", "plan"]


def test_an_entry_does_not_change(entry: Entry) -> None:
    read = SharingEntry.from_config(entry)
    with pytest.raises(FrozenInstanceError):
        read.base_model = "another"
    config = HeadshareConfig(**entry, storage="owner")
    copied = copy.deepcopy(config)
    copied.storage = "auto"
    assert config.storage == "owner"
    assert copied.sharing is config.sharing


@pytest.mark.parametrize("entry", [None, [], "headshare", 1, {}, {"quant_method": "gptq"}, {"plan": {"format": 1}}])
def test_what_is_not_ours_is_no_entry(entry: object, llama: Path) -> None:
    assert SharingEntry.from_config(entry) is None
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    found = hs.open_checkpoint(llama)
    assert found.sharing is None
    assert found.plan is None
    with pytest.raises(CheckpointError, match="is a dense checkpoint: nothing in it is tied"):
        found.require_sharing()


# what is wrong with an entry, and what its error says
DAMAGED: dict[str, tuple[Callable[[Entry], object], str]] = {
    "a later format": (lambda entry: entry.update(format=2), "the checkpoint has format 2; .* Upgrade headshare"),
    "a format of text": (lambda entry: entry.update(format="1"), "the checkpoint has format '1'"),
    "a format of much text": (lambda entry: entry.update(format="1" * 10_000), "the checkpoint has format '1"),
    "no format": (lambda entry: entry.update(format=None), "the checkpoint has format None"),
    "a plan of a later format": (lambda entry: entry["plan"].update(format=2), "the plan has format 2; .* Upgrade"),
    "a plan of no format": (lambda entry: entry["plan"].pop("format"), "the plan has format None"),
    "no plan": (lambda entry: entry.pop("plan"), "should be a JSON object, found NoneType"),
    "a plan that is a list": (lambda entry: entry.update(plan=[]), "should be a JSON object, found list"),
    "a plan of other keys": (lambda entry: entry["plan"].update(code="import os"), "the plan is not valid at code"),
    "a chain": (
        lambda entry: entry["plan"]["selections"][0].update(ties=[[1, 0, 0, 0], [2, 0, 1, 0]]),
        "itself tied to layer 0, group 0",
    ),
    "a record that is a list": (lambda entry: entry.update(refit=[]), "record of its refit is not valid at 'its top'"),
    "a record of nothing": (lambda entry: entry.update(refit={}), "record of its refit is not valid at 'tensors'"),
    "a record of a terminal's escape": (
        lambda entry: entry["refit"].update(text="\x1b[2J"),
        "record of its refit is not valid at 'text'",
    ),
    "an origin that is text": (lambda entry: entry.update(origin="x"), "the dense model .* not valid at 'its top'"),
    "an origin without a digest": (lambda entry: entry["origin"].pop("digest"), "not valid at 'digest'"),
    "an origin of another key": (lambda entry: entry["origin"].update(path="/"), "not valid at 'path'"),
    "a commit that is no commit": (lambda entry: entry["origin"].update(commit="../.."), "not valid at 'commit'"),
    "packing of other groups": (
        lambda entry: entry["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=12),
        "rounded in a way that this headshare does not read",
    ),
    "packing of nothing": (lambda entry: entry.update(quantization_config={}), "rounded in a way"),
    "packing that is text": (lambda entry: entry.update(quantization_config="int4"), "rounded in a way"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_entry_is_one_error_wherever_it_is_read(name: str, entry: Entry, llama: Path) -> None:
    damage, words = DAMAGED[name]
    damage(entry)
    with pytest.raises(CheckpointError, match=words) as found:
        SharingEntry.from_config(entry)
    assert len(str(found.value)) < 1000
    assert str(found.value).isprintable()
    with pytest.raises(CheckpointError, match=words):
        HeadshareConfig(**entry)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    with pytest.raises(CheckpointError, match=words):
        hs.open_checkpoint(llama)
    with pytest.raises(CheckpointError, match=words):
        transformers.AutoModelForCausalLM.from_pretrained(llama)


@pytest.mark.parametrize("name", [5, [], {"a": 1}, "", "x" * 600, "two\nlines", "\x1b[2J", "\ud800"])
def test_a_name_that_cannot_be_shown_is_left_out(name: object, entry: Entry) -> None:
    shown = SharingEntry.from_config(entry)
    assert shown.base_model == "someone/dense"
    found = SharingEntry.from_config({**entry, "base_model": name})
    assert found == replace(shown, base_model="" if name == "" else None)


def test_an_entry_is_read_from_a_dictionary_without_a_folder(entry: Entry) -> None:
    entry["storage"] = "owner"  # what another reader keeps beside it is no concern of it
    found = SharingEntry.from_config(entry)
    assert found.plan == PLANS["ties"]
    assert found.refit == RECORD
    assert found.packing == PACKING
    assert "storage" not in found.to_config()
    headers = hs.Checkpoint(name="headers alone", config={"quantization_config": entry}, tensors={})
    assert headers.sharing == found
    assert headers.plan == found.plan


def test_matrices_of_four_bits_are_for_one_storage(entry: Entry) -> None:
    assert [HeadshareConfig(**entry, storage=name).storage for name in ("auto", "owner")] == ["auto", "owner"]
    with pytest.raises(StorageError, match="held by their owners; storage alias is for others"):
        HeadshareConfig(**entry, storage="alias")
    del entry["quantization_config"]
    assert HeadshareConfig(**entry, storage="alias").storage == "alias"
