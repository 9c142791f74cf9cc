"""The format stays: shared checkpoints that were written once, and never again, are read, verified, expanded and saved
byte for byte as on the day they were written. `format/make.py` beside this file says what they are and how they came
to be.

A failure here means that the format changed. The digests are not to be brought up to date.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from blake3 import blake3

import headshare as hs
from headshare.checkpoint.fingerprint import content_digest
from headshare.evaluation.verify import verify
from headshare.files.model_files import CARD
from support.folders import numbers
from support.packed import PackedMatrix, write_packed

FOLDER = Path(__file__).parent / "format"
EXPECTED = FOLDER / "expected.json"
NAMES = ("ties", "scaled", "factored", "removed", "packed", "everything")
COPIED = ("ties", "removed")  # every stored number is the dense model's, and so is in the expansion
SAME_SUMS = ("ties", "packed")  # the loaded model multiplies what its expansion multiplies, in the same order
MANIFEST = "headshare.json"  # names the version that wrote it
INDEX = "model.safetensors.index.json"
WEIGHTS = "*.safetensors"

every = pytest.mark.parametrize("name", NAMES)
every_storage = pytest.mark.parametrize(
    ("name", "storage"),
    [(name, storage) for name in NAMES for storage in ("owner", "alias") if (name, storage) != ("packed", "alias")],
)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: Path, pattern: str = "*", *, but: str = "") -> dict[str, str]:
    """SHA-256 of the folder's files by their names."""
    return {path.name: digest(path) for path in sorted(folder.glob(pattern)) if path.name != but}


def entry_of(folder: Path) -> dict[str, Any]:
    """The entry in config.json, which holds all that the format says of sharing."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def expanded(name: str, out: Path, *, unpacked: bool = False) -> Path:
    with hs.open_checkpoint(FOLDER / name) as shared:
        return hs.expand(shared, out, unpacked=unpacked)


def saved(name: str, out: Path, storage: str = "owner") -> Path:
    """What transformers writes of the loaded model."""
    hs.load(FOLDER / name, storage=storage, dtype="auto").save_pretrained(out)
    return out


def plan_file(name: str, path: Path) -> Path:
    """The plan as a file of its own."""
    hs.SharePlan.from_dict(entry_of(FOLDER / name)["plan"]).save(path)
    return path


def found_of(name: str, work: Path) -> dict[str, Any]:
    """All digests of a checkpoint as `expected.json` has them: what `make.py` found, once."""
    found: dict[str, Any] = {
        "shared": digests(FOLDER / name),
        "plan": hs.SharePlan.from_dict(entry_of(FOLDER / name)["plan"]).digest,
        "plan file": digest(plan_file(name, work / "plan.json")),
        "expanded": digests(expanded(name, work / "expanded"), but=MANIFEST),
        "saved": digests(saved(name, work / "saved"), WEIGHTS),
    }
    if name == "packed":
        found["unpacked"] = digests(expanded(name, work / "unpacked", unpacked=True), but=MANIFEST)
    return found


@pytest.fixture(name="expected")
def what_was_found(name: str) -> Any:
    return json.loads(EXPECTED.read_text())[name]


def test_every_checkpoint_in_the_folder_is_tested() -> None:
    assert sorted(json.loads(EXPECTED.read_text())) == sorted(NAMES)
    assert sorted(path.parent.name for path in FOLDER.glob("*/config.json")) == sorted(NAMES)


@every
def test_the_files_are_the_ones_that_were_written(name: str, expected: Any) -> None:
    assert digests(FOLDER / name) == expected["shared"]


@every
def test_it_verifies(name: str) -> None:
    found = verify(hs.open_checkpoint(FOLDER / name))
    assert found.ok, found.problems
    assert found.files_checked == len(list((FOLDER / name).glob(WEIGHTS))) + 1
    assert found.max_logit_diff is not None
    if name in SAME_SUMS:
        assert found.max_logit_diff == 0


@every_storage
def test_it_computes_what_stock_transformers_computes_of_its_expansion(name: str, storage: str, tmp_path: Path) -> None:
    """Bit for bit in the type that it is stored in; or, where sums are rounded in another way, closely in float32."""
    exact = name in SAME_SUMS
    dtype = "auto" if exact else torch.float32
    tokens = torch.arange(3, 39).view(2, 18)
    with hs.open_checkpoint(FOLDER / name) as shared:
        whole = hs.expand(shared, tmp_path / "whole", rounded=False, unpacked=True)
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=dtype)
    with torch.no_grad():
        ours = hs.load(FOLDER / name, storage=storage, dtype=dtype)(input_ids=tokens).logits
        theirs = stock.eval()(input_ids=tokens).logits
    assert ours.isfinite().all()
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0 if exact else 1e-5, atol=0 if exact else 2e-5)


@every
def test_it_is_expanded_byte_for_byte(name: str, expected: Any, tmp_path: Path) -> None:
    out = expanded(name, tmp_path / "expanded")
    (out / CARD).unlink()  # words, and no part of the format
    assert digests(out, but=MANIFEST) == expected["expanded"]
    listed = json.loads((out / MANIFEST).read_text())
    assert listed["format"] == 1
    assert listed["digest"] == "blake3"
    written = {file: one["blake3"] for file, one in listed["files"].items()}
    assert written == {
        path.name: blake3(path.read_bytes()).hexdigest() for path in out.glob("*") if path.name in written
    }
    assert {"config.json", *(path.name for path in out.glob(WEIGHTS))} == set(written)


@pytest.mark.parametrize("name", ["packed"])
def test_it_is_expanded_and_unpacked_byte_for_byte(name: str, expected: Any, tmp_path: Path) -> None:
    out = expanded(name, tmp_path / "unpacked", unpacked=True)
    (out / CARD).unlink()
    assert digests(out, but=MANIFEST) == expected["unpacked"]


@every_storage
def test_transformers_saves_it_again_byte_for_byte(name: str, storage: str, expected: Any, tmp_path: Path) -> None:
    out = saved(name, tmp_path / "saved", storage)
    assert digests(out, WEIGHTS) == expected["saved"]
    assert entry_of(out) == entry_of(FOLDER / name)


@every
def test_its_plan_is_read_and_written_again_as_the_same_text(name: str, expected: Any, tmp_path: Path) -> None:
    data = entry_of(FOLDER / name)["plan"]
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    plan = hs.SharePlan.from_json(text)
    assert plan.to_json() == text
    assert plan.digest == hashlib.sha256(text.encode()).hexdigest() == expected["plan"]
    path = plan_file(name, tmp_path / "plan.json")
    assert digest(path) == expected["plan file"]
    assert json.loads(path.read_text()) == data
    assert hs.SharePlan.load(path) == plan == hs.open_checkpoint(FOLDER / name).plan


# ---- and sharing writes today what it wrote then


def header(path: Path) -> str:
    """The beginning of a safetensors file: names, types, shapes and places of its tensors.

    What was not written then is left out: the plan's digest, and the empty tensors that guard packed matrices.
    """
    data = path.read_bytes()
    found = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found["__metadata__"] = {key: value for key, value in found["__metadata__"].items() if "headshare" not in key}
    guarded = {name.removesuffix("_packed") for name in found if name.endswith(".weight_packed")}
    return json.dumps({name: entry for name, entry in found.items() if name not in guarded})


def named(dense: hs.Checkpoint) -> dict[str, Any]:
    """What an entry says of the dense model; what that was, only since later."""
    return {"base_model": dense.name, "origin": {"digest": content_digest(dense)}}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "packed"])
def test_its_expansion_is_shared_by_its_plan_as_the_same_files(name: str, tmp_path: Path) -> None:
    """Byte for byte where every number is a copy; else with the same headers, as scales and factors begin anew."""
    dense = hs.open_checkpoint(expanded(name, tmp_path / "dense"))
    out = hs.share(dense, hs.SharePlan.from_dict(entry_of(FOLDER / name)["plan"])).save(tmp_path / "again")
    entry = {key: value for key, value in entry_of(FOLDER / name).items() if key != "refit"}
    assert entry_of(out) == {**entry, **named(dense)}
    assert digests(out, INDEX) == digests(FOLDER / name, INDEX)
    assert {path.name: header(path) for path in out.glob(WEIGHTS)} == {
        path.name: header(path) for path in (FOLDER / name).glob(WEIGHTS)
    }
    if name in COPIED:
        assert {path.name: numbers(path) for path in out.glob(WEIGHTS)} == {
            path.name: numbers(path) for path in (FOLDER / name).glob(WEIGHTS)
        }


def test_its_expansion_is_packed_by_its_plan_as_the_same_file(tmp_path: Path) -> None:
    shared = hs.open_checkpoint(FOLDER / "packed")
    whole = hs.open_checkpoint(expanded("packed", tmp_path / "whole"))
    dense = hs.open_checkpoint(expanded("packed", tmp_path / "dense", unpacked=True))
    entry = shared.require_sharing()
    assert entry.packing is not None
    stems = [name.removesuffix(".weight_packed") for name in whole.tensors if name.endswith(".weight_packed")]
    matrices = {
        f"{stem}.weight": PackedMatrix(whole.read(f"{stem}.weight_packed"), whole.read(f"{stem}.weight_scale"))
        for stem in stems
    }
    again = hs.open_checkpoint(hs.share(dense, entry.plan).save(tmp_path / "again"))
    out = write_packed(again, matrices, entry.packing, tmp_path / "packed")
    (written,) = out.glob(WEIGHTS)
    assert header(written) == header(FOLDER / "packed" / written.name)
    assert numbers(written) == numbers(FOLDER / "packed" / written.name)
    assert entry_of(out) == {**entry_of(FOLDER / "packed"), **named(dense)}
