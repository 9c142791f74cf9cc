"""Experts that are copies: stored once, and loaded though transformers stacks the experts of a layer."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.errors import StorageError
from headshare.integrations.transformers.loading import unique_parameter_bytes
from support import tiny
from support.folders import WEIGHTS
from support.merges import merged, same_outputs


@pytest.fixture(params=["mixtral", "qwen3-moe"])
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny mixture whose second layer has one expert four times, as where it was made from a dense model."""
    folder = tiny.make(request.param, tmp_path / "mixture")
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if ".layers.1." in name and ".experts." in name]:
        before, _, after = name.partition(".experts.")
        tensors[name] = tensors[f"{before}.experts.0.{after.partition('.')[2]}"].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_equal_experts_are_stored_once_and_loaded(mixture: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(mixture)
    plan = hs.exact_plan(dense)
    assert len(plan.copies) == 3 * 3
    assert all(".experts.0." in donor for donor in plan.copies.values())
    shared = hs.share(dense, plan)
    out = shared.save(tmp_path / "out")
    assert sum(tensor.nbytes for tensor in load_file(out / WEIGHTS).values()) == shared.estimate.shared_bytes
    assert same_outputs(hs.load(out), tf.AutoModelForCausalLM.from_pretrained(mixture).eval())
    assert hs.verify(hs.open_checkpoint(out), dense).ok
    written = load_file(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded") / WEIGHTS)
    original = load_file(mixture / WEIGHTS)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)


def test_repeated_layers_of_a_mixture_are_held_once(mixture: Path, tmp_path: Path) -> None:
    model = hs.load(hs.repeat_layers(hs.open_checkpoint(mixture), "1-2").save(tmp_path / "out"))
    stock = tf.AutoModelForCausalLM.from_pretrained(mixture)
    assert same_outputs(model, merged(stock, [0, 1, 2, 1, 2, 3]))
    assert unique_parameter_bytes(model) == unique_parameter_bytes(stock)
    plain = model.dequantize()
    assert same_outputs(plain, merged(stock, [0, 1, 2, 1, 2, 3]))
    with torch.no_grad():
        next(parameter for name, parameter in plain.model.layers[3].named_parameters() if "experts" in name).zero_()
    assert not same_outputs(plain, merged(stock, [0, 1, 2, 1, 2, 3]))


def test_saving_and_training_them_is_refused_in_words(mixture: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(mixture)
    model = hs.load(hs.share(dense, hs.exact_plan(dense)).save(tmp_path / "out"))
    with pytest.raises(StorageError, match="cannot be saved again"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(StorageError, match="cannot be trained"):
        _ = model.hf_quantizer.is_trainable
