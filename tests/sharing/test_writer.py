"""The files of a shared or expanded folder: modes, companions, shards, types of number."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.errors import CheckpointError, OptionError
from headshare.evaluation.verify import verify
from support import tiny
from support.folders import INDEX, MANIFEST, WEIGHTS, contents, nothing_changes, numbers
from support.shares import a_plan, share, spoil


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask(mask: int, file_mode: int, folder_mode: int, llama: Path, tmp_path: Path) -> None:
    (llama / "1_Pooling").mkdir()
    (llama / "1_Pooling" / "config.json").write_text("{}")
    (llama / "modules.json").write_text('[{"path": "1_Pooling"}]')
    (llama / "tokenizer.json").write_text("{}")
    for path in llama.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o644)
    before = os.umask(mask)
    try:
        out = share(llama, tmp_path / "out")
        expanded = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
        with hs.open_checkpoint(llama) as dense:
            hs.score_units(dense).save(tmp_path / "scores.safetensors")
        a_plan(llama).save(tmp_path / "plan.json")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    written = [
        *out.rglob("*"),
        *expanded.rglob("*"),
        *(tmp_path / name for name in ("plan.json", "scores.safetensors")),
    ]
    assert out / "1_Pooling" / "config.json" in written
    for path in (out, expanded, *written):
        assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else file_mode), path


@pytest.mark.parametrize("private", ["config.json", "tokenizer.json", "LICENSE"])
def test_what_few_may_read_is_not_passed_on_to_more(private: str, llama: Path, tmp_path: Path) -> None:
    """Weights are no copies, and follow the umask: the library that saves them lets nobody read any."""
    for name in ("tokenizer.json", "LICENSE"):
        (llama / name).write_text("{}")
    (llama / private).chmod(0o600)
    out = share(llama, tmp_path / "out")
    again = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    for folder in (out, again):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert {name for name, mode in modes.items() if mode != 0o644} == {private}
        assert modes[private] == 0o600


COPIED = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.txt",
    "merges.txt",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "sentence_bert_config.json",
    "training.json",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
]
LEFT = [
    ".git/config",
    ".gitattributes",
    ".cache/x.txt",
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "rng_state.pth",
    "last.ckpt",
    "tf_model.h5",
    "flax_model.msgpack",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/tokenizer.json",
    "pytorch_model_fsdp_0/__0_0.distcp",
    "model.nemo",
    "old.tar.gz",
    "wandb/run-1.wandb",
    "model.gguf",
    "pytorch_model.bin.index.json",
    "original/consolidated.00.pth",
    "original/params.json",
    "extra.safetensors",
    "headshare.json",
    "scheduler.pkl",
    "state.pickle",
    "scaler.joblib",
    "LICENSE.pkl",
    "2_Dense/pytorch_model.bin",
    "2_Dense/.hidden.json",
    "eval_results.json",
    "notes.txt",
    "modeling_own.py",
]


@pytest.mark.parametrize("verb", ["share", "expand"])
def test_what_a_model_needs_comes_along_and_nothing_else(verb: str, llama: Path, tmp_path: Path) -> None:
    source = llama if verb == "share" else share(llama, tmp_path / "source")
    for name in (*COPIED, *LEFT):
        if name == MANIFEST and verb == "expand":
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"this is {name}")
    (source / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
    with nothing_changes(source):
        if verb == "share":
            out = share(source, tmp_path / "out")
        else:
            out = hs.expand(hs.open_checkpoint(source), tmp_path / "out")
    for name in COPIED:
        assert (out / name).read_text() == f"this is {name}"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {*COPIED, "config.json", "modules.json", "README.md", WEIGHTS, MANIFEST}


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "1_Pooling/config.json", "1_Pooling"])
def test_a_link_that_leaves_the_folder_is_refused(name: str, llama: Path, tmp_path: Path) -> None:
    """Else a stranger's checkpoint would put a file of one's own into what one publishes."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "config.json").write_text("secret")
    (llama / "modules.json").write_text('[{"path": "1_Pooling"}]')
    (llama / name).parent.mkdir(exist_ok=True)
    (llama / name).symlink_to(private if name == "1_Pooling" else private / "config.json")
    with pytest.raises(CheckpointError, match=rf"{name}\S* is a link to .*private.*outside its folder"):
        share(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_within_the_folder_is_followed(llama: Path, tmp_path: Path) -> None:
    (llama / "real.json").write_text("{}")
    (llama / "tokenizer.json").symlink_to("real.json")
    out = share(llama, tmp_path / "out")
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json"])
def test_a_file_that_may_not_be_read_is_blamed_and_not_the_output(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (llama / "modules.json").write_text('[{"path": "1_Pooling"}]')
    (llama / name).parent.mkdir(exist_ok=True)
    (llama / name).write_text("{}")
    really_open = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path == llama / name:
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=rf"llama/{name} cannot be read: Permission denied"):
        share(llama, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_weights_of_a_sentence_embedders_own_modules_come_along(tmp_path: Path) -> None:
    # A Dense module of sentence-transformers keeps its weights in a folder of its own (2_Dense).
    dense = tiny.make("mpnet", tmp_path / "dense")
    (dense / "2_Dense").mkdir()
    (dense / "2_Dense" / "config.json").write_text("{}")
    (dense / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]')
    save_file({"linear.weight": torch.ones(2, 2)}, dense / "2_Dense" / WEIGHTS)
    out = share(dense, tmp_path / "out")
    assert contents(out)["2_Dense/model.safetensors"] == contents(dense)["2_Dense/model.safetensors"]


@pytest.mark.parametrize("verb", ["share", "expand"])
def test_a_sharded_input_gives_a_sharded_output_with_a_right_index(verb: str, tmp_path: Path) -> None:
    dense = tiny.make_llama(tmp_path / "dense", save={"max_shard_size": "50KB"})
    out = share(dense, tmp_path / "shared")
    if verb == "expand":
        out = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    files = sorted(path.name for path in dense.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(path.name for path in out.glob("*.safetensors")) == files
    index = json.loads((out / INDEX).read_text())
    found, size = {}, 0
    for file in files:
        with safe_open(out / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                found[name] = file
                size += opened.get_tensor(name).nbytes
    assert index["weight_map"] == found == json.loads((dense / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == size
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    same = transformers.AutoModelForCausalLM.from_pretrained(share(dense, tmp_path / "again"))
    with torch.inference_mode():
        assert torch.equal(model(tiny.tokens()).logits, same(tiny.tokens()).logits)


def test_a_sharded_and_a_single_file_share_alike(tmp_path: Path) -> None:
    one = share(tiny.make_llama(tmp_path / "one"), tmp_path / "shared one")
    many = share(tiny.make_llama(tmp_path / "many", save={"max_shard_size": "50KB"}), tmp_path / "shared many")
    theirs: dict[str, torch.Tensor] = {}
    for file in many.glob("*.safetensors"):
        theirs |= load_file(file)
    ours = load_file(one / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_weights_are_converted_as_torch_converts_them(stored: str, wanted: str, tmp_path: Path) -> None:
    dense = tiny.make_llama(tmp_path / "dense", tie_word_embeddings=True)
    original = {name: tensor.to(DTYPES[stored]) for name, tensor in load_file(dense / WEIGHTS).items()}
    counter = {"model.step": torch.arange(3)}
    save_file(original | counter, dense / WEIGHTS, metadata={"format": "pt"})
    plan = a_plan(dense)
    shared = hs.share(hs.open_checkpoint(dense), plan, dtype=wanted)
    out = shared.save(tmp_path / "out")
    written = load_file(out / WEIGHTS)
    assert torch.equal(written.pop("model.step"), torch.arange(3))
    given = {tie.recipient for tie in plan.selections[0].ties}
    for name, tensor in written.items():
        expected = original[name].to(DTYPES[wanted])
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            layer, rows = int(name.split(".")[2]), len(expected) // 2
            groups = [expected[:rows], expected[rows:]]
            expected = torch.cat([groups[g] for g in (0, 1) if (layer, g) not in given] or [expected[:0]])
        assert tensor.dtype == DTYPES[wanted]
        assert torch.equal(tensor, expected), name
    assert sum(tensor.nbytes for tensor in written.values()) + 24 == shared.estimate.shared_bytes
    assert json.loads((out / "config.json").read_text())["dtype"] == wanted
    assert verify(hs.open_checkpoint(out), hs.open_checkpoint(dense), logits=False).ok
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == DTYPES[wanted]


def test_a_conversion_that_overflows_is_not_silent(llama: Path, tmp_path: Path) -> None:
    # 1e6 is infinity in float16.
    spoil(llama, "model.layers.0.mlp.up_proj.weight", 1e6)
    with pytest.raises(hs.HeadshareError, match="up_proj"):
        share(llama, tmp_path / "out", dtype="float16")


def test_an_unknown_type_is_refused(llama: Path, tmp_path: Path) -> None:
    with nothing_changes(tmp_path), pytest.raises(OptionError, match="'int8' is not one of"):
        share(llama, tmp_path / "out", dtype="int8")


def test_sharing_nothing_writes_the_same_weights_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    out = share(llama, tmp_path / "out", 0.0)
    assert numbers(out / WEIGHTS) == numbers(llama / WEIGHTS)  # and the plan's digest in the header
    assert load_file(out / WEIGHTS).keys() == load_file(llama / WEIGHTS).keys()
