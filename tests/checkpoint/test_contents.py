"""Which files of a folder are its model: as transformers chooses, or refused."""

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import modeling_utils

import headshare as hs
from headshare.checkpoint.contents import companions, used_files
from headshare.checkpoint.fingerprint import fingerprint
from headshare.errors import CheckpointError
from headshare.files.model_files import SETTINGS, TOKENIZER
from headshare.progress import shown
from support import tiny
from support.folders import INDEX, WEIGHTS
from support.shares import share

SHARDED = {"max_shard_size": "50KB"}
NAMED = (None, "ema.safetensors", "ema.safetensors.index.json")


def change(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(tiny.tokens()).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One configuration with other numbers in one file, in shards, and in files of other names."""
    made = {}
    for number, name in enumerate(("one", "shards", "ema")):
        made[name] = tiny.make_llama(tmp_path_factory.mktemp(name) / "m", save=SHARDED if name == "shards" else {})
        for file in made[name].glob("*.safetensors"):
            scaled = {key: tensor * (1 + number) for key, tensor in load_file(file).items()}
            save_file(scaled, file, metadata={"format": "pt"})
    return made


def folder_with(sets: dict[str, Path], folder: Path, kinds: tuple[str, ...], named: str | None) -> Path:
    """A folder with these sets of weights in it, of which config.json may name one."""
    folder.mkdir()
    shutil.copy(sets["one"] / "config.json", folder)
    for path in (path for kind in kinds for path in sets[kind].iterdir() if kind != "ema"):
        if path.name != "config.json":
            shutil.copy(path, folder)
    if named:
        shutil.copy(sets["ema"] / WEIGHTS, folder / "ema.safetensors")
        weight_map = dict.fromkeys(load_file(folder / "ema.safetensors"), "ema.safetensors")
        (folder / "ema.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        change(folder, transformers_weights=named)
    return folder


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("kinds", [(), ("one",), ("shards",), ("one", "shards")], ids="+".join)
def test_the_files_that_are_read_are_those_that_transformers_resolves(
    kinds: tuple[str, ...], named: str | None, sets: dict[str, Path], tmp_path: Path
) -> None:
    folder = folder_with(sets, tmp_path / "m", kinds, named)
    options = dict.fromkeys(inspect.signature(modeling_utils._get_resolved_checkpoint_files).parameters)
    given = {"pretrained_model_name_or_path": str(folder), "use_safetensors": True, "is_remote_code": False}
    try:
        files, _ = modeling_utils._get_resolved_checkpoint_files(
            **{**options, **given, "transformers_explicit_filename": named}
        )
    except OSError:
        with pytest.raises(CheckpointError, match=r"holds no model.safetensors"):
            hs.open_checkpoint(folder)
        return
    with hs.open_checkpoint(folder) as checkpoint:
        assert {info.file for info in checkpoint.tensors.values()} == {Path(file).name for file in files}


@pytest.mark.parametrize("named", NAMED)
def test_the_shared_folder_computes_what_transformers_loads_from_a_folder_of_several_sets(
    named: str | None, sets: dict[str, Path], tmp_path: Path
) -> None:
    dense = folder_with(sets, tmp_path / "m", ("one", "shards"), named)
    out = share(dense, tmp_path / "out", 0.0)
    assert torch.equal(logits(out), logits(dense))
    # the result has one set of weights, under a name by which it is found, and no key that names another
    written = {path.name for path in out.iterdir() if ".safetensors" in path.name}
    assert written == ({WEIGHTS} if named != "ema.safetensors.index.json" else {INDEX, "ema.safetensors"})
    assert "transformers_weights" not in json.loads((out / "config.json").read_text())
    assert torch.equal(logits(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")), logits(dense))


def test_a_fingerprint_follows_the_set_that_is_loaded(sets: dict[str, Path], tmp_path: Path) -> None:
    """Results that were kept under it are then measured again."""
    folder = folder_with(sets, tmp_path / "m", ("one", "shards"), None)
    before = fingerprint(hs.open_checkpoint(folder))
    shutil.copy(sets["ema"] / WEIGHTS, folder / WEIGHTS)
    assert fingerprint(hs.open_checkpoint(folder)) != before


@pytest.mark.parametrize("name", ["chat_template.jinja", "spiece.model", "2_Dense/model.safetensors", "own.py"])
def test_a_fingerprint_follows_every_file_that_is_loaded(name: str, llama: Path) -> None:
    change(llama, auto_map={"AutoModel": "own.Own"})
    (llama / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (llama / "2_Dense").mkdir()
    before = fingerprint(hs.open_checkpoint(llama))
    (llama / name).write_bytes(b"x")
    assert fingerprint(hs.open_checkpoint(llama)) != before


@pytest.mark.parametrize(
    ("kind", "files", "said"),
    [
        ("models.Dense", ["pytorch_model.bin"], True),
        ("own.Module", ["weights.pt"], True),
        ("sentence_transformers.models.Dense", [], True),  # as the hub's cache has it, which fetches no pickle
        ("models.Dense", ["pytorch_model.bin", "model.safetensors"], False),
        ("models.Pooling", [], False),
    ],
)
def test_a_module_that_is_left_without_its_weights_is_said(
    kind: str, files: list[str], said: bool, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (llama / "modules.json").write_text(json.dumps([{"path": "", "type": "x"}, {"path": "2_Dense", "type": kind}]))
    (llama / "2_Dense").mkdir()
    for name in ("config.json", *files):
        (llama / "2_Dense" / name).write_bytes(b"{}")
    with shown():
        out = share(llama, tmp_path / "out")
    assert [path.name for path in (out / "2_Dense").iterdir() if path.suffix in (".bin", ".pt")] == []
    lines = [line for line in capsys.readouterr().err.splitlines() if "2_Dense" in line]
    assert len(lines) == said
    assert all(re.search("left without its weights.*safetensors first", line) for line in lines)


def test_a_fingerprint_does_not_follow_what_nobody_loads(llama: Path) -> None:
    before = fingerprint(hs.open_checkpoint(llama))
    for name in ("LICENSE", "notes.txt", "results.json", "extra.safetensors"):
        (llama / name).write_text("x")
    assert fingerprint(hs.open_checkpoint(llama)) == before


def test_an_adapter_beside_a_model_is_refused_and_both_are_named(llama: Path) -> None:
    (llama / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"a model \(model.safetensors\) and an adapter \(adapter_config.json\)"):
        hs.open_checkpoint(llama)


def test_an_adapter_alone_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"no config.json.*holds an adapter; merge that into its model"):
        hs.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"transformers_weights": "adapter_model.bin"}, "adapter_model.bin.*not a safetensors file"),
        ({"transformers_weights": ["model.safetensors"]}, "not a safetensors file"),
        ({"transformers_weights": "../model.safetensors"}, "not in the same folder"),
        ({"transformers_weights": "other.safetensors"}, "names other.safetensors as its weights, which is not there"),
        ({"configuration_files": ["config.json", "config.4.0.0.json"]}, r"configuration_files.*config\.4\.0\.0\.json"),
    ],
)
def test_a_configuration_that_names_other_files_is_refused(keys: dict[str, object], reason: str, llama: Path) -> None:
    change(llama, **keys)
    with pytest.raises(CheckpointError, match=reason):
        hs.open_checkpoint(llama)


@pytest.mark.parametrize("named", ["weights.bin", "model-1.safetensors.bin", WEIGHTS])
def test_an_index_may_name_only_safetensors_files_and_no_whole_model(named: str, tmp_path: Path) -> None:
    """transformers reads other files as pickles, and a whole model's file instead of all shards."""
    folder = tiny.make_llama(tmp_path / "m", save=SHARDED)
    index = json.loads((folder / INDEX).read_text())
    first = min(index["weight_map"].values())
    renamed = {name: named if file == first else file for name, file in index["weight_map"].items()}
    (folder / "ema.safetensors.index.json").write_text(json.dumps({**index, "weight_map": renamed}))
    (folder / first).rename(folder / named)
    change(folder, transformers_weights="ema.safetensors.index.json")
    with pytest.raises(CheckpointError, match=f"names '?{named}"):
        hs.open_checkpoint(folder)


def test_a_stray_file_of_weights_in_a_shared_folder_is_noticed(tmp_path: Path) -> None:
    """Its shapes fit, and transformers loads it in the place of the shards."""
    out = share(tiny.make_llama(tmp_path / "m", save=SHARDED), tmp_path / "out")
    everything: dict[str, torch.Tensor] = {}
    for file in out.glob("*.safetensors"):
        everything |= {name: tensor * 2 for name, tensor in load_file(file).items()}
    save_file(everything, out / WEIGHTS, metadata={"format": "pt"})
    found = hs.verify(hs.open_checkpoint(out), logits=False)
    assert not found.ok
    assert "no digest of model.safetensors" in found.problems[0]


def test_weights_that_are_not_loaded_are_mentioned_by_verify(llama: Path, tmp_path: Path) -> None:
    out = share(llama, tmp_path / "out")
    shutil.copy(llama / WEIGHTS, out / "ema.safetensors")
    found = hs.verify(hs.open_checkpoint(out), logits=False)
    assert found.ok
    assert "ema.safetensors is no part of this checkpoint" in found.notes[0]


def test_files_of_every_tokenizer_and_processor_of_transformers_are_named(tmp_path: Path) -> None:
    """Read from its source, since importing all its classes takes minutes."""
    home = Path(transformers.__file__).parent
    sources = [*home.glob("models/*/tokenization_*.py"), *home.glob("tokenization_*.py")]
    text = "\n".join(path.read_text() for path in sources)
    tables = re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", text, re.DOTALL)
    names = {name for table in tables for name in re.findall(r':\s*"([^"]+)"', table)}
    constants = (home / "utils" / "__init__.py").read_text() + (home / "utils" / "hub.py").read_text()
    names |= set(re.findall(r'^\w*(?:PROCESSOR|EXTRACTOR|TEMPLATE|GENERATION)\w* = "([^"]+\.j\w+)"', constants, re.M))
    assert {"vocab.txt", "spiece.model", "chat_template.jinja", "preprocessor_config.json"} < names
    assert len(names) > 25
    for name in names:
        (tmp_path / name).write_text("{}")
    assert set(used_files(tmp_path)) == names


def test_no_name_that_may_be_copied_could_be_one_of_weights() -> None:
    endings = (".bin", ".pt", ".pth", ".pkl", ".safetensors", ".gguf", ".onnx", ".h5")
    assert not [name for name in (*TOKENIZER, *SETTINGS) if name.endswith(endings)]


def test_code_comes_along_only_where_a_configuration_names_some(llama: Path) -> None:
    (llama / "modeling_own.py").write_text("")
    assert "modeling_own.py" not in companions(llama)
    change(llama, auto_map={"AutoModel": "modeling_own.Own"})
    assert "modeling_own.py" in companions(llama)


@pytest.mark.parametrize(
    "listed", ["[]", "no JSON", '{"path": "a"}', '[{"path": "../a"}, {"path": "/"}, {"path": 3}, {"path": ".git"}, 7]']
)
def test_modules_outside_the_folder_are_none(listed: str, llama: Path) -> None:
    for place in (llama.parent / "a", llama / ".git", llama / "a"):
        place.mkdir()
        (place / "config.json").write_text("{}")
    (llama / "modules.json").write_text(listed)
    assert companions(llama) == ["generation_config.json", "modules.json"]
