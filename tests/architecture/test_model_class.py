"""The class of a model whose configuration names none, or one that transformers does not have."""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.architecture.model_class import class_name
from headshare.errors import CheckpointError, EvaluationError
from headshare.evaluation.perplexity import evaluate
from headshare.integrations.transformers.loading import empty_model, load_model
from support import tiny
from support.command_line import Run
from support.texts import a_text, add_tokenizer

OLD_SPELLINGS = (None, [], ["LLaMAForCausalLM"], ["somebodys.Model"], ["logging"])


def naming(folder: Path, architectures: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    return folder


@pytest.mark.parametrize("name", sorted({*tiny.FAMILIES} - {"bert", "roberta", "mpnet"}))
def test_a_model_without_a_named_class_is_of_the_class_that_transformers_picks_for_text(
    name: str, tmp_path: Path
) -> None:
    folder = naming(tiny.make(name, tmp_path / "model"), None)
    stock = tf.AutoModelForCausalLM.from_pretrained(folder)
    found = load_model(hs.open_checkpoint(folder))
    assert type(found) is type(stock)
    assert found(tiny.tokens()).logits.equal(stock(tiny.tokens()).logits)


@pytest.mark.parametrize("architectures", OLD_SPELLINGS, ids=str)
def test_a_class_that_transformers_does_not_have_is_as_none(architectures: object, llama: Path) -> None:
    checkpoint = hs.open_checkpoint(naming(llama, architectures))
    assert class_name(checkpoint.config, checkpoint.tensors) == "LlamaForCausalLM"
    assert type(empty_model(checkpoint)) is tf.LlamaForCausalLM


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet"])
def test_an_encoder_without_a_named_class_is_the_bare_model(name: str, tmp_path: Path) -> None:
    folder = naming(tiny.make(name, tmp_path / "model"), None)
    found = load_model(hs.open_checkpoint(folder))
    stock = tf.AutoModel.from_pretrained(folder)
    assert type(found) is type(stock)
    assert found(tiny.tokens())[0].equal(stock.eval()(tiny.tokens())[0])


def test_a_bare_model_without_a_named_class_and_without_a_head_stays_bare(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tf.LlamaModel(tf.LlamaConfig(**tiny.GROUPED)).save_pretrained(tmp_path / "bare")
    found = load_model(hs.open_checkpoint(naming(tmp_path / "bare", None)))
    assert type(found) is tf.LlamaModel


def test_classes_that_are_no_list_are_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"architectures 5; it should be a list"):
        load_model(hs.open_checkpoint(naming(llama, 5)))


def test_commands_do_the_same_for_a_model_that_names_no_class(llama: Path, tmp_path: Path, run: Run) -> None:
    text = a_text(tmp_path / "text.txt")
    add_tokenizer(llama)
    words = ("--text", str(text), "--window", "16", "--json")
    named = run("eval", str(llama), *words).out
    for architectures in (None, ["LLaMAForCausalLM"]):
        naming(llama, architectures)
        assert run("eval", str(llama), *words).out == named
        shared = tmp_path / str(architectures)
        assert run("share", str(llama), str(shared)).status == 0
        assert run("verify", str(shared), "--against", str(llama)).out.startswith("ok")


def test_a_head_that_is_missing_is_said_and_is_not_taken_for_an_encoder(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    checkpoint = hs.open_checkpoint(add_tokenizer(llama))
    with caplog.at_level(logging.WARNING, logger="headshare"), pytest.raises(EvaluationError) as refused:
        evaluate(checkpoint, "w5 w6 w7 " * 20, window=16)
    assert "LlamaModel is a model without a head (its checkpoint has no weights for one)" in str(refused.value)
    assert "encoder" not in str(refused.value)
    (note,) = caplog.messages
    assert "has no weights for the head of LlamaForCausalLM" in note


def test_a_model_with_a_head_for_something_else_is_not_said_to_lack_one(llama: Path) -> None:
    tf.LlamaForSequenceClassification.from_pretrained(llama).save_pretrained(llama)
    with pytest.raises(EvaluationError, match=r"LlamaForSequenceClassification does not predict the next token"):
        evaluate(hs.open_checkpoint(add_tokenizer(llama)), "w5 w6 w7 " * 20, window=16)


def test_a_tensor_of_another_shape_than_the_configuration_says_is_named(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "vocab_size": 90}))
    with pytest.raises(CheckpointError, match=r"holds lm_head.weight as \(101, 32\).*in which it is \(90, 32\)"):
        load_model(hs.open_checkpoint(llama))
