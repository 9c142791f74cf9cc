"""A shared checkpoint that headshare has opened is not opened a second time while transformers loads it."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import transformers

import headshare as hs
from headshare.errors import CheckpointError
from headshare.integrations.transformers import quantizer, sized
from support.shares import share

OPENED: dict[str, Any] = {"headshare": hs.load, "transformers": transformers.AutoModelForCausalLM.from_pretrained}


@pytest.fixture
def shared(llama: Path, tmp_path: Path) -> Path:
    return share(llama, tmp_path / "shared")


def test_headers_are_read_once_and_the_model_is_built_once(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    monkeypatch.setattr(quantizer, "read_whole_header", None)
    monkeypatch.setattr(sized, "built", lambda *asked: built.append(asked))
    hs.load(shared)
    assert built == []
    with pytest.raises(TypeError):
        transformers.AutoModelForCausalLM.from_pretrained(shared)


@pytest.mark.parametrize("way", OPENED)
def test_a_shared_model_far_larger_than_its_tensors_is_refused_before_it_takes_memory(way: str, shared: Path) -> None:
    config = json.loads((shared / "config.json").read_text())
    (shared / "config.json").write_text(json.dumps({**config, "intermediate_size": 4_000_000}))
    with pytest.raises(CheckpointError, match=r"describes a model of 1,5\d\d,\d{3},\d{3} numbers"):
        OPENED[way](shared)


def test_a_loaded_model_does_not_hold_on_to_the_checkpoint(shared: Path) -> None:
    model = hs.load(shared)
    stock = transformers.AutoModelForCausalLM.from_pretrained(shared)
    assert model.config.quantization_config.opened is None
    assert model.config.to_dict()["quantization_config"] == stock.config.to_dict()["quantization_config"]
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert config.quantization_config.sharing == stock.config.quantization_config.sharing


def test_a_file_cannot_say_that_it_was_opened(shared: Path) -> None:
    config = json.loads((shared / "config.json").read_text())
    config["quantization_config"]["opened"] = {"checkpoint": str(shared)}
    (shared / "config.json").write_text(json.dumps(config))
    (weights,) = shared.glob("*.safetensors")
    for load in OPENED.values():
        assert load(shared).config.quantization_config.sharing == hs.open_checkpoint(shared).entry
    weights.write_bytes(weights.read_bytes()[:-4])
    for load in OPENED.values():
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load(shared)
