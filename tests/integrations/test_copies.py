"""Tensors that stand once under several names, in all that is done with a model: bits, GGUF, copies of it, training."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import headshare as hs
from headshare.calibration.gptq import round_by_gptq
from headshare.errors import PlanError, StorageError
from headshare.integrations.transformers.loading import unique_parameter_bytes
from headshare.sharing.rounded.write import round_to_nearest
from headshare.training import train
from support import gguf_models, tiny
from support.folders import WEIGHTS
from support.merges import layers_of, same_outputs
from support.nearest import stand_in
from support.processes import in_child
from support.texts import a_text, add_tokenizer
from support.trainings import LONGER, killed_after, settings

gguf = pytest.importorskip("gguf")


@pytest.fixture
def repeated(llama: Path, tmp_path: Path) -> Path:
    """A tiny Llama whose layers 1 and 2 run twice; its norms are all the same."""
    return hs.repeat_layers(hs.open_checkpoint(llama), "1-2").save(tmp_path / "repeated")


def is_one(model: Any) -> bool:
    return model.model.layers[1].mlp.up_proj.weight is model.model.layers[3].mlp.up_proj.weight


@pytest.mark.parametrize(("name", "bits"), [("llama-gqa", 8), ("llama-gqa", 4), ("gpt2", 8), ("phi3", 4)])
def test_rounded_matrices_are_stored_and_held_once(name: str, bits: int, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    made = hs.repeat_layers(hs.open_checkpoint(folder), "1-2")
    out = made.save(tmp_path / "out")
    rounded = round_to_nearest(hs.open_checkpoint(out), bits=bits).save(tmp_path / "rounded")
    stored = sum(info.nbytes for info in hs.open_checkpoint(rounded).tensors.values())
    assert stored == hs.estimate(made.dense, made.plan, bits=bits).shared_bytes
    model = hs.load(rounded)
    before = hs.load(round_to_nearest(hs.open_checkpoint(folder), bits=bits).save(tmp_path / "before"))
    assert unique_parameter_bytes(model) == unique_parameter_bytes(before)
    dense = hs.open_checkpoint(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded"))
    report = hs.verify(hs.open_checkpoint(rounded), dense)
    assert report.ok, report.problems
    # the same as the dense model of all layers, rounded
    assert same_outputs(model, hs.load(round_to_nearest(dense, bits=bits).save(tmp_path / "each")))
    model.save_pretrained(tmp_path / "again")
    assert same_outputs(hs.load(tmp_path / "again"), model)
    plain = model.dequantize()
    layers = layers_of(plain)
    with torch.no_grad():
        next(layers[3].parameters()).zero_()
    assert next(layers[1].parameters()).abs().sum() > 0


def test_gptq_rounds_a_copy_on_the_inputs_of_all_its_uses(
    repeated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = stand_in(monkeypatch)
    text = hs.Calibration(tiny.tokens(16, 4), False, "w", 0)
    rounded = round_by_gptq(hs.open_checkpoint(repeated), text)
    assert hs.verify(hs.open_checkpoint(rounded.save(tmp_path / "rounded"))).ok
    counts = sorted(len(each.inputs) for each in seen)
    assert counts == [1] * 14 + [2] * 14  # seven matrices in each of four layers, two of which run twice


def test_a_file_for_llama_cpp_is_that_of_the_ordinary_folder(tmp_path: Path) -> None:
    folder = gguf_models.make("llama", tmp_path / "dense")
    made = hs.repeat_layers(hs.open_checkpoint(folder), "1")
    out = made.save(tmp_path / "out")
    ours = hs.export_gguf(hs.open_checkpoint(out), tmp_path / "ours.gguf", dtype="f32")
    dense = hs.open_checkpoint(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded"))
    hs.export_gguf(dense, tmp_path / "theirs.gguf", dtype="f32")
    files = [gguf.GGUFReader(tmp_path / name).tensors for name in ("ours.gguf", "theirs.gguf")]
    for one, other in zip(*files, strict=True):
        assert one.name == other.name
        assert np.array_equal(one.data, other.data)
    assert ours.given_back.copies == made.estimate.saved_bytes == ours.given_back.all
    assert "copies written out" in ours.in_words()


def test_copies_of_a_model_hold_each_weight_once(repeated: Path) -> None:
    model = hs.load(repeated)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.bfloat16)):
        assert is_one(twin)
    assert is_one(hs.load(repeated, device_map="meta"))


def test_a_state_dictionary_comes_back_as_it_was_saved(repeated: Path, tmp_path: Path) -> None:
    model = hs.load(repeated)
    model.save_pretrained(tmp_path / "again")
    from safetensors.torch import load_file

    held = load_file(tmp_path / "again" / WEIGHTS)
    assert held["model.layers.3.mlp.up_proj.weight"].shape[0] == 0
    other = hs.load(repeated)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.zero_()
    other.load_state_dict(held)
    assert same_outputs(other, model)
    other.load_state_dict(model.state_dict())
    assert same_outputs(other, model)


def test_offloading_is_refused_in_words(repeated: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer == 3 else "cpu" for layer in range(6)}
    with pytest.raises(StorageError, match="offloaded"):
        hs.load(repeated, device_map=places, offload_folder=str(tmp_path / "disk"))


def test_there_is_nothing_to_refit(repeated: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(hs.expand(hs.open_checkpoint(repeated), tmp_path / "dense"))
    text = hs.Calibration(tiny.tokens(16, 4), False, "w", 0)
    with pytest.raises(PlanError, match="loses nothing"):
        hs.refit(hs.share(dense, hs.exact_plan(dense)), text)


def test_training_keeps_layers_as_one_and_goes_on_from_a_kill(tmp_path: Path) -> None:
    folder = add_tokenizer(tiny.make_llama(tmp_path / "dense"))
    repeated = hs.repeat_layers(hs.open_checkpoint(folder), "1-2").save(tmp_path / "repeated")
    text = a_text(tmp_path / "text.txt", 1200)

    def work() -> None:
        killed_after(6)
        train(repeated, tmp_path / "killed", settings(text, "recover", arguments=LONGER))

    assert in_child(work) == -9
    for name in ("killed", "whole"):
        train(repeated, tmp_path / name, settings(text, "recover", arguments=LONGER))
    models = [hs.load(tmp_path / name) for name in ("killed", "whole")]
    assert same_outputs(*models)
    assert not same_outputs(models[0], hs.load(repeated))
    assert is_one(models[0])
    assert hs.verify(hs.open_checkpoint(tmp_path / "whole")).ok


def test_the_stock_class_loads_it_with_as_many_numbers_as_before(tmp_path: Path) -> None:
    folder = tiny.make("llama-gqa", tmp_path / "dense")
    out = hs.repeat_layers(hs.open_checkpoint(folder), "1-2").save(tmp_path / "out")
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    assert is_one(model)
    assert model.num_parameters() == tf.AutoModelForCausalLM.from_pretrained(folder).num_parameters()
