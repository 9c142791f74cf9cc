"""Opening: whole checkpoints read as safetensors reads them, everything else is one clear CheckpointError, at once."""

import json
import pickle
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, filter_repo_objects
from huggingface_hub.utils import TensorInfo as HubTensorInfo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.checkpoint.header import MAX_HEADER_BYTES, read_header
from headshare.errors import CheckpointError
from headshare.plan.describe import describe
from support import tiny
from support.stored_types import STORED

SHARDED: dict[str, object] = {"max_shard_size": "40KB"}
INDEX = "model.safetensors.index.json"


def raw(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, whether or not it makes sense."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    """One tensor of a header, a vector of floats unless told otherwise."""
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def folder_of(path: Path, content: bytes) -> Path:
    """A checkpoint folder whose one weight file holds these bytes."""
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_bytes(content)
    return path


@contextmanager
def cheaply(*, allocated: int = 8 * 2**20) -> Iterator[None]:
    """Fail if the block allocates as much as an absurd number in a file asks for."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < allocated


def refused(path: str | Path, match: str | None = None, **options: Any) -> str:
    """The one line that opening this ends in, as a CheckpointError."""
    with cheaply(), pytest.raises(CheckpointError, match=match) as found:
        hs.open_checkpoint(path, **options)
    text = str(found.value)
    assert "\n" not in text or "Type-check error" in text  # which only jaxtyping, switched on for tests, says
    assert len(text) < 1000 or "Type-check error" in text
    return text


DAMAGED: dict[str, bytes] = {
    "an empty file": b"",
    "a file of three bytes": b"abc",
    "a header of no bytes": struct.pack("<Q", 0),
    "a header longer than its file": struct.pack("<Q", 64) + b"{}",
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 2**64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "bytes that are no text": raw(b"\xff\xfe\x00garbage"),
    "text that is no JSON": raw(b"{'a': 1}"),
    "a list": raw([]),
    "a number": raw(b"7"),
    "a number of ten thousand digits": raw(b'{"a":' + b"9" * 10_000 + b"}"),
    "brackets a hundred thousand deep": raw(b"[" * 100_000),
    "a tensor that is no object": raw({"a": [1, 2]}),
    "a tensor without a type": raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "a tensor without a shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "a tensor without offsets": raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "three offsets": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(4)),
    "an unknown type": raw({"a": entry(0, 4, dtype="F33")}, bytes(4)),
    "a type that is a list": raw({"a": entry(0, 4, dtype=["F32"])}, bytes(4)),
    "a shape that is too small": raw({"a": entry(0, 8, shape=[1])}, bytes(8)),
    "a shape that is too large": raw({"a": entry(0, 8, shape=[3])}, bytes(8)),
    "a negative shape": raw({"a": entry(0, 4, shape=[-1, -1])}, bytes(4)),
    "a shape of fractions": raw({"a": entry(0, 4, shape=[1.0])}, bytes(4)),
    "a shape of truths": raw({"a": entry(0, 4, shape=[True])}, bytes(4)),
    "a shape that is text": raw({"a": entry(0, 4, shape="1")}, bytes(4)),
    "a shape that wraps around 64 bits": raw({"a": entry(0, 0, shape=[2**32, 2**32])}),
    "an absurd shape": raw({"a": entry(0, 4 * 2**40, shape=[2**40])}),
    # Its product has two million bits, and printing it would take longer still.
    "a shape of fifty thousand dimensions": raw({"a": entry(0, 4, shape=[2**47 - 1] * 50_000)}, bytes(4)),
    "two tensors in the same bytes": raw({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "two tensors that overlap": raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "a hole between two tensors": raw({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "a hole before the first tensor": raw({"a": entry(4, 8)}, bytes(8)),
    "offsets past the end": raw({"a": entry(0, 4), "b": entry(4, 400)}, bytes(8)),
    "negative offsets": raw({"a": entry(-4, 0), "b": entry(0, 4)}, bytes(4)),
    "offsets that go backwards": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
    "offsets that are fractions": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}, bytes(4)),
    "one byte too few": raw({"a": entry(0, 8)}, bytes(7)),
    "one byte too many": raw({"a": entry(0, 8)}, bytes(9)),
    "bytes that no tensor owns": raw({}, bytes(4)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_weight_file_is_one_clear_error_and_allocates_nothing(content: bytes, tmp_path: Path) -> None:
    text = refused(folder_of(tmp_path / "damaged", content), match=r"model\.safetensors")
    assert "ownload it again" in text or "damaged" in text


def test_a_header_above_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "large", struct.pack("<Q", MAX_HEADER_BYTES + 1))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(3 * MAX_HEADER_BYTES)  # a sparse file: large in name, empty on disk
    refused(folder, match=r"model\.safetensors is not a whole safetensors file")


# ---- whole checkpoints


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi3", "falcon-gqa", "mpnet"])
@pytest.mark.parametrize("save", [{}, SHARDED], ids=["one file", "sharded"])
def test_names_types_shapes_and_numbers_are_those_that_safetensors_reads(
    name: str, save: dict[str, object], tmp_path: Path
) -> None:
    folder = tiny.make(name, tmp_path / "model", **save)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == bool(save)
    with hs.open_checkpoint(folder) as checkpoint:
        seen = set()
        for file in files:
            with safe_open(file, framework="pt") as theirs:
                for key in theirs.keys():  # noqa: SIM118 - safe_open is no mapping
                    info, piece = checkpoint.tensors[key], theirs.get_slice(key)
                    assert (info.dtype, info.shape, info.file) == (
                        piece.get_dtype(), tuple(piece.get_shape()), file.name,
                    )  # fmt: skip
                    assert torch.equal(checkpoint.read(key), theirs.get_tensor(key))
                    seen.add(key)
        assert seen == set(checkpoint.tensors)
        assert checkpoint.config == json.loads((folder / "config.json").read_text())
        assert checkpoint.plan is None


def test_every_type_scalars_and_empty_tensors_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {code: torch.arange(6).reshape(3, 2).to(dtype) for code, dtype in STORED.items()}
    tensors |= {"scalar": torch.tensor(3.5), "no rows": torch.zeros(0, 4), "no columns": torch.zeros(4, 0)}
    folder = folder_of(tmp_path / "types", b"")
    save_file(tensors, folder / "model.safetensors")
    with hs.open_checkpoint(folder) as checkpoint:
        for name, theirs in load_file(folder / "model.safetensors").items():
            ours = checkpoint.read(name)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.reshape(-1).view(torch.uint8).tolist() == theirs.reshape(-1).view(torch.uint8).tolist()


@given(start=st.integers(0, 64), count=st.integers(0, 64))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reading_rows_gives_those_rows(start: int, count: int, llama: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    with hs.open_checkpoint(llama) as checkpoint:
        rows = checkpoint.tensors[name].shape[0]
        start, stop = min(start, rows), min(start + count, rows)
        assert torch.equal(checkpoint.read(name, start, stop), load_file(llama / "model.safetensors")[name][start:stop])


def test_a_checkpoint_that_was_closed_reads_again(llama: Path) -> None:
    checkpoint = hs.open_checkpoint(llama)
    before = len(list(Path("/proc/self/fd").iterdir()))
    first = checkpoint.read("lm_head.weight")
    checkpoint.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert torch.equal(checkpoint.read("lm_head.weight"), first)
    checkpoint.close()


def test_opening_reads_headers_and_no_weight(llama: Path) -> None:
    """The weights can be anything, even a hole in the file, until somebody reads them."""
    header = (llama / "model.safetensors").read_bytes()
    length = 8 + struct.unpack("<Q", header[:8])[0]
    with (llama / "model.safetensors").open("wb") as file:
        file.write(header[:length])
        file.truncate(len(header))
    before = len(list(Path("/proc/self/fd").iterdir()))
    checkpoint = hs.open_checkpoint(llama)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert checkpoint.read("lm_head.weight").abs().max() == 0
    checkpoint.close()


# ---- what may be missing or wrong around the weights


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "model", **SHARDED)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(folder, match=rf"{shard.name} is \d+ bytes, but its header describes \d+. It is truncated or damaged")


def test_a_shard_with_bytes_behind_its_end_is_named(tmp_path: Path) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "model", **SHARDED)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes() + b"\0")
    refused(folder, match=shard.name)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "model", **SHARDED)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, match=rf"lacks 1 of its \d+ weight files: {shard.name}")


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "model", **SHARDED)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors, name = load_file(second), next(iter(load_file(first)))
    save_file({**tensors, name: torch.zeros(2)}, second)
    refused(folder, match=rf"{name} is in both {first.name} and {second.name}")


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path: Path) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "model", **SHARDED)
    index = json.loads((folder / INDEX).read_text())
    name = "model.norm.weight"
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, match=f"lists {name}")
    index["weight_map"] = {**index["weight_map"], "nowhere.weight": files[0]}
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, match=r"lists nowhere\.weight")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "./a/../b", "a/"])
def test_an_index_that_names_files_outside_its_folder_is_refused(file: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", raw({}))
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    refused(folder, match=r"names files outside its folder|lacks 1 of its 1 weight files")


NONSENSE = [
    *("", "not JSON", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ""}}'),
    *('{"weight_map": {"a": ".."}}', '{"weight_map": {"a": "config.json"}}'),
]


@pytest.mark.parametrize("index", NONSENSE)
def test_an_index_that_makes_no_sense_is_refused(index: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", raw({}))
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(index)
    refused(folder)


def test_a_pickle_is_named_refused_and_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return eval, (f"open({str(tmp_path / 'sprung')!r}, 'w')",)

    folder = folder_of(tmp_path / "model", b"")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    text = refused(folder, match=r"pytorch_model\.bin")
    assert "pickle" in text
    assert "save_pretrained" in text
    assert not (tmp_path / "sprung").exists()


def test_a_weight_file_that_is_a_link_to_nothing_is_called_missing(tmp_path: Path) -> None:
    """A hub cache looks like this when a blob was removed."""
    folder = folder_of(tmp_path / "model", b"")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/gone")
    text = refused(folder, match=r"model\.safetensors")
    assert "pickle" not in text


def test_a_folder_with_no_config_is_refused(llama: Path) -> None:
    (llama / "config.json").unlink()
    refused(llama, match=r"there is no config\.json in .*llama")


@pytest.mark.parametrize(
    "text", ["", "model_type: llama", "[]", "null", "7", '{"a": }', "[" * 100_000, "\x00", "9" * 10_000]
)
def test_a_config_that_is_no_json_object_is_refused(text: str, llama: Path) -> None:
    (llama / "config.json").write_text(text)
    refused(llama, match=r"config\.json")


def test_a_config_of_absurd_size_is_refused_unread(llama: Path) -> None:
    with (llama / "config.json").open("r+b") as file:
        file.truncate(2 * MAX_HEADER_BYTES)
    refused(llama, match=r"config\.json is 200,000,000 bytes, too large")


@pytest.mark.parametrize("entry", [7, "headshare", [], ["headshare"], {"quant_method": 7}])
def test_a_quantisation_entry_of_any_shape_can_be_opened_and_is_not_shared(entry: object, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    checkpoint = hs.open_checkpoint(llama)
    assert checkpoint.plan is None
    if entry:
        with pytest.raises(CheckpointError, match="quantised"):
            hs.score_units(checkpoint)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, match=r"there is no config\.json")


def test_a_folder_without_weights_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    refused(llama, match=r"holds no model\.safetensors and no model\.safetensors\.index\.json")


def test_a_file_in_place_of_a_folder_is_refused(llama: Path) -> None:
    refused(llama / "model.safetensors", match=r"is a file. Give the folder")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing/at/all", "a/b/c", "gone/"])
def test_a_folder_that_does_not_exist_is_called_that_without_asking_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    refused(name, match="there is no folder")


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "no body/no thing", "a" * 150, "-"])
@pytest.mark.parametrize("weights", [True, False])
def test_a_model_that_cannot_be_fetched_is_one_clear_error(name: str, weights: bool) -> None:
    refused(name, match="neither a folder here nor a model that can be fetched", weights=weights)


def test_a_name_longer_than_any_file_system_allows_is_refused() -> None:
    # Path.is_dir raises OSError 36 for it on Python 3.11.
    refused("a" * 5000)


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_and_not_a_crash(llama: Path) -> None:
    with hs.open_checkpoint(llama) as checkpoint:
        (llama / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:2000])
        with pytest.raises(CheckpointError, match="replaced or changed while it was in use"):
            hs.score_units(checkpoint)


def test_a_file_that_vanishes_after_it_was_opened_is_an_error_and_not_a_crash(llama: Path) -> None:
    with hs.open_checkpoint(llama) as checkpoint:
        (llama / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            hs.score_units(checkpoint)


# ---- the header against safetensors' own reader


def opens_in_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """What safetensors finds in a file, or None if it refuses it."""
    try:
        with safe_open(path, framework="pt") as file:
            pieces = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            return {key: (piece.get_dtype(), tuple(piece.get_shape())) for key, piece in pieces.items()}
    except (SafetensorError, OSError):
        return None


def opens_here(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """What headshare finds in a file, or None if it refuses it with a CheckpointError."""
    try:
        return {info.name: (info.dtype, info.shape) for info in read_header(path)}
    except CheckpointError:
        return None


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "model.safetensors"


@given(content=st.binary(max_size=200) | st.builds(raw, st.binary(max_size=80), st.binary(max_size=40)))
@settings(max_examples=150, deadline=None)
def test_random_bytes_raise_nothing_but_a_checkpoint_error(content: bytes, scratch: Path) -> None:
    scratch.write_bytes(content)
    assert opens_here(scratch) == opens_in_safetensors(scratch)


SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner))
SMALL = st.integers(-2, 20) | st.sampled_from([2**31, 2**32, 2**63, 2**64])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*STORED, "F31"]) | SCALARS,
        "shape": st.lists(SMALL, max_size=4) | JSON,
        "data_offsets": st.lists(SMALL, min_size=2, max_size=2) | JSON,
    }
)


@given(header=st.dictionaries(st.text(max_size=4), ENTRIES | JSON, max_size=3), data=st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_headers_of_any_json_raise_nothing_but_a_checkpoint_error(
    header: dict[str, object], data: bytes, scratch: Path
) -> None:
    scratch.write_bytes(raw(header, data))
    opens_here(scratch)


@st.composite
def plausible(draw: st.DrawFn) -> bytes:
    """A file whose header is right, or wrong in one or two numbers."""
    header: dict[str, Any] = {}
    offset = 0
    for name in draw(st.lists(st.sampled_from("abcdef"), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(STORED)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = torch.Size(shape).numel() * STORED[dtype].itemsize
        wrong = draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1, 4, -4]))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size + wrong]}
        offset += size + draw(st.sampled_from([0, 0, 0, 0, 0, 0, 4, -4]))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return raw(text, bytes(max(0, offset + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))))


@given(content=plausible())
@settings(max_examples=300, deadline=None)
def test_a_header_is_accepted_just_where_safetensors_accepts_it_and_read_alike(content: bytes, scratch: Path) -> None:
    scratch.write_bytes(content)
    assert opens_here(scratch) == opens_in_safetensors(scratch)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_header_with_bytes_changed_raises_nothing_but_a_checkpoint_error(data: st.DataObject, scratch: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 3), "b.weight": torch.ones(2, dtype=torch.bfloat16)}
    save_file(tensors, scratch, metadata={"format": "pt"})
    content = bytearray(scratch.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789-[]{},:"\\ ')))
    scratch.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    ours, theirs = opens_here(scratch), opens_in_safetensors(scratch)
    assert ours is None or theirs is None or ours == theirs


@pytest.mark.parametrize(
    "header",
    [
        # A lone surrogate in a name would end `share` in UnicodeEncodeError when the header is written.
        pytest.param(b'{"__metadata__": 7, "a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', id="metadata"),
        pytest.param(b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', id="lone surrogate"),
    ],
)
def test_what_safetensors_refuses_is_refused(header: bytes, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", raw(header, bytes(4)))
    assert opens_in_safetensors(folder / "model.safetensors") is None
    refused(folder)


# ---- the hub, served from a folder


class Hub:
    """Stands in for huggingface_hub: serves one local folder, and remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository: Path | None = None
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self.problem: Exception | None = None

    def snapshot_download(self, model: str, **options: Any) -> str:
        self._note("snapshot_download", model, options)
        if self.repository is not None:
            names = [
                path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*") if path.is_file()
            ]
            for name in filter_repo_objects(names, allow_patterns=options["allow_patterns"]):
                (self.folder / name).parent.mkdir(exist_ok=True, parents=True)
                shutil.copy(self.repository / name, self.folder / name)
        return str(self.folder)

    def model_info(self, model: str, **options: Any) -> None:
        self._note("model_info", model, options)

    def hf_hub_download(self, model: str, filename: str, **options: Any) -> str:
        self._note("hf_hub_download", model, {"filename": filename, **options})
        return str(self.folder / filename)

    def get_safetensors_metadata(self, model: str, **options: Any) -> SafetensorsRepoMetadata:
        self._note("get_safetensors_metadata", model, options)
        files = {path.name: self._file(path) for path in sorted(self.folder.glob("*.safetensors"))}
        weight_map = {name: file for file, one in files.items() for name in one.tensors}
        return SafetensorsRepoMetadata(
            metadata=None, sharded=len(files) > 1, weight_map=weight_map, files_metadata=files
        )

    @staticmethod
    def _file(path: Path) -> SafetensorsFileMetadata:
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        metadata = header.pop("__metadata__", {})
        tensors = {
            name: HubTensorInfo(one["dtype"], one["shape"], tuple(one["data_offsets"])) for name, one in header.items()
        }
        return SafetensorsFileMetadata(metadata=metadata, tensors=tensors)

    def _note(self, function: str, model: str, options: dict[str, Any]) -> None:
        self.calls.append((function, model, options))
        if self.problem is not None and function != "hf_hub_download":
            raise self.problem

    @property
    def called(self) -> list[str]:
        return [function for function, _, _ in self.calls]


@pytest.fixture
def hub(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with one model: someone/tiny."""
    served = Hub(llama)
    for name in ("snapshot_download", "model_info", "hf_hub_download", "get_safetensors_metadata"):
        monkeypatch.setattr(huggingface_hub, name, getattr(served, name))
    return served


def test_a_hub_id_opens_as_its_folder_does(hub: Hub) -> None:
    ours, local = hs.open_checkpoint("someone/tiny"), hs.open_checkpoint(hub.folder)
    assert ours.tensors == local.tensors
    assert ours.config == local.config
    assert ours.path == hub.folder
    assert set(hub.called) == {"snapshot_download"}


NEVER_FETCHED = [
    *("pytorch_model.bin", "rust_model.ot", "model.nemo", "onnx/model.onnx_data", "pytorch_model_fsdp_0/__0_0.distcp"),
    *("old.tar.gz", "figure.png", "extra.safetensors", "scheduler.pkl", "runs/events.out", "original/params.json"),
]


@pytest.mark.parametrize("shape", ["one file", "shards", "shards beside one file", "named by config.json"])
def test_only_what_a_model_needs_is_fetched_from_the_hub(hub: Hub, shape: str, tmp_path: Path) -> None:
    """All of it would be fetched by a name that is too wide, or that is asked for too early."""
    repository = tiny.make_llama(tmp_path / "all", save={} if shape == "one file" else SHARDED)
    weights = {path.name for path in repository.glob("*.safetensors")}
    if shape == "shards beside one file":
        shutil.copy(hub.folder / "model.safetensors", repository)
        weights = {"model.safetensors"}
    if shape == "named by config.json":
        shutil.copy(hub.folder / "model.safetensors", repository / "ema.safetensors")
        config = json.loads((repository / "config.json").read_text())
        (repository / "config.json").write_text(json.dumps({**config, "transformers_weights": "ema.safetensors"}))
        weights = {"ema.safetensors"}
    needed = ["tokenizer.json", "vocab.txt", "LICENSE", "modules.json", "2_Dense/model.safetensors"]
    for name in (*needed, *NEVER_FETCHED):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text('[{}, {"path": "2_Dense"}]' if name == "modules.json" else "x")
    hub.folder = tmp_path / "cache"
    hub.repository = repository
    with hs.open_checkpoint("someone/tiny") as checkpoint:
        assert {info.file for info in checkpoint.tensors.values()} == weights
    fetched = {path.relative_to(hub.folder).as_posix() for path in hub.folder.rglob("*") if path.is_file()}
    index = {INDEX} - ({INDEX} if shape == "one file" else set())
    assert fetched == {*needed, *weights, *index, "config.json", "generation_config.json"}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("revision", [None, "v1.2"])
def test_the_revision_reaches_every_request(hub: Hub, weights: bool, revision: str | None) -> None:
    hs.open_checkpoint("someone/tiny", revision=revision, weights=weights)
    assert hub.calls
    assert all(model == "someone/tiny" and options["revision"] == revision for _, model, options in hub.calls)


@pytest.mark.parametrize("shard", [False, True])
def test_an_estimate_of_a_hub_model_is_exact_and_fetches_no_weight(hub: Hub, shard: bool, tmp_path: Path) -> None:
    if shard:
        hub.folder = tiny.make_llama(tmp_path / "sharded", save=SHARDED)
    found = hs.estimate(hs.open_checkpoint("someone/tiny", weights=False), 0.3)
    assert found == hs.estimate(hs.open_checkpoint(hub.folder), 0.3)
    assert hub.called == ["model_info", "hf_hub_download", "get_safetensors_metadata"]
    assert hub.calls[1][2]["filename"] == "config.json"


def test_a_shared_hub_model_is_inspected_from_its_headers(hub: Hub, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(hub.folder)
    plan = hs.make_plan(hs.score_units(dense), 0.5)
    hub.folder = hs.share(dense, plan).save(tmp_path / "shared")
    checkpoint = hs.open_checkpoint("someone/tiny", weights=False)
    assert checkpoint.plan == plan
    assert describe(plan)["ties"] == 4
    assert "snapshot_download" not in hub.called


def test_a_model_of_which_only_headers_were_fetched_says_so_when_it_is_read(hub: Hub) -> None:
    checkpoint = hs.open_checkpoint("someone/tiny", weights=False)
    with pytest.raises(CheckpointError, match="only the headers of someone/tiny were fetched"):
        checkpoint.read("lm_head.weight")


def test_a_hostile_plan_on_the_hub_is_refused_from_its_headers(hub: Hub) -> None:
    config = json.loads((hub.folder / "config.json").read_text())
    entry = {"quant_method": "headshare", "format": 1, "plan": {"format": 1, "selections": [{"ties": [[0, 0, 0, 0]]}]}}
    (hub.folder / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    with pytest.raises(CheckpointError):
        hs.open_checkpoint("someone/tiny", weights=False)


def _response() -> Any:
    """A response of whatever HTTP client huggingface_hub uses."""
    import huggingface_hub.errors as errors

    response = errors.Response(404)
    response.request = __import__(type(response).__module__.split(".")[0]).Request("GET", "https://huggingface.co")
    return response


NETWORK_ERROR = HfHubHTTPError.__mro__[1]  # the HTTP client's own, which is no OSError

PROBLEMS: dict[str, Callable[[], Exception]] = {
    "no such model": lambda: RepositoryNotFoundError("404\nRepository Not Found", response=_response()),
    "a gated model": lambda: GatedRepoError("403\nAccess is restricted", response=_response()),
    "a server's error": lambda: HfHubHTTPError("500 Server Error", response=_response()),
    "nothing in the cache": lambda: LocalEntryNotFoundError("offline"),
    "a model without safetensors": lambda: NotASafetensorsRepoError("'someone/tiny' is not a safetensors repo."),
    "a full disk": lambda: OSError(28, "No space left on device"),
    # The first comes from get_safetensors_metadata for a damaged or foreign header, the second where the connection
    # breaks half-way; neither is an OSError.
    "a damaged header": lambda: SafetensorsParsingError("Failed to parse safetensors header"),
    "a broken connection": lambda: NETWORK_ERROR("[Errno 104] Connection reset by peer"),
}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_whatever_the_hub_says_becomes_one_clear_error(
    problem: Callable[[], Exception], weights: bool, hub: Hub
) -> None:
    hub.problem = problem()
    refused("someone/tiny", match="someone/tiny", weights=weights)


def test_a_type_on_the_hub_that_headshare_does_not_know_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    served = hub.get_safetensors_metadata("someone/tiny")
    tensors = served.files_metadata["model.safetensors"].tensors
    tensors["lm_head.weight"] = HubTensorInfo("F4", tensors["lm_head.weight"].shape, (0, 1616))
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: served)
    with pytest.raises(CheckpointError, match="F4"):
        hs.estimate(hs.open_checkpoint("someone/tiny", weights=False))


@pytest.mark.parametrize("problem", ["a broken connection", "offline"])
def test_an_estimate_of_a_model_in_the_cache_needs_no_network(
    problem: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = hs.estimate(hs.open_checkpoint(hub.folder), 0.3)
    problems = {**PROBLEMS, "offline": lambda: OfflineModeIsEnabled("Cannot reach https://huggingface.co")}

    def unreached(model: str, **_: Any) -> None:
        raise problems[problem]()

    monkeypatch.setattr(huggingface_hub, "model_info", unreached)
    assert hs.estimate(hs.open_checkpoint("someone/tiny", weights=False), 0.3) == wanted
    assert set(hub.called) == {"snapshot_download"}  # the functions that fetch files try again for half a minute
    assert all(options["local_files_only"] for _, _, options in hub.calls)


def test_a_name_that_is_nowhere_is_said_with_the_reason_why_the_hub_does_not_answer(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(model: str, **_: Any) -> None:
        raise NETWORK_ERROR("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "model_info", unreached)
    hub.problem = LocalEntryNotFoundError("there is no snapshot")
    said = refused("nosuchfolder", match="neither a folder here nor a model that can be fetched", weights=False)
    assert "Name or service not known" in said
    assert hub.called == ["snapshot_download"]
