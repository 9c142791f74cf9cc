"""A tokenizer that its files do not make is refused, and special tokens stand where we put them."""

import json
from importlib import util
from pathlib import Path

import pytest
import transformers as tf
from tokenizers import Tokenizer, models, processors

import headshare as hs
from headshare.errors import EvaluationError
from headshare.integrations.transformers.loading import load_tokenizer
from support import tiny
from support.texts import add_tokenizer


def without_weights(name: str, folder: Path) -> hs.Checkpoint:
    """A model of this family, of which only config.json is there."""
    folder.mkdir()
    _, config, _ = tiny.FAMILIES[name]
    config.save_pretrained(folder)
    return hs.Checkpoint(name, json.loads((folder / "config.json").read_text()), {}, folder)


@pytest.mark.parametrize("name", sorted({*tiny.FAMILIES} - {"llama-mqa", "llama-biased", "falcon-mha", "falcon-gqa"}))
def test_a_model_without_a_tokenizers_files_is_refused_whatever_transformers_would_make(
    name: str, tmp_path: Path
) -> None:
    checkpoint = without_weights(name, tmp_path / "model")
    with pytest.raises(EvaluationError, match=r"^\S+ has no tokenizer.*there is no tokenizer\.json"):
        load_tokenizer(checkpoint)
    add_tokenizer(checkpoint.path)
    assert len(load_tokenizer(checkpoint)) >= tiny.VOCABULARY


def test_the_files_that_stand_for_tokenizer_json_must_all_be_there(tmp_path: Path) -> None:
    checkpoint = without_weights("gpt2", tmp_path / "model")
    (checkpoint.path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    with pytest.raises(EvaluationError, match=r"no tokenizer that transformers can load \(there is no tokenizer\.json"):
        load_tokenizer(checkpoint)
    (checkpoint.path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert load_tokenizer(checkpoint)("ab")["input_ids"] == [2]


def test_a_vocabulary_of_words_needs_no_other_file(tmp_path: Path) -> None:
    checkpoint = without_weights("bert", tmp_path / "model")
    (checkpoint.path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox"]))
    assert load_tokenizer(checkpoint)("the fox", add_special_tokens=False)["input_ids"] == [5, 6]


def test_a_tokenizer_whose_files_hold_special_tokens_alone_is_refused(tmp_path: Path) -> None:
    checkpoint = without_weights("llama-gqa", tmp_path / "model")
    tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="</s>",
    ).save_pretrained(checkpoint.path)
    with pytest.raises(EvaluationError, match=r"hold 2 tokens, all of them special"):
        load_tokenizer(checkpoint)


def test_the_library_that_is_missing_is_named_not_the_last_that_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "sentencepiece" else found(name, *more))
    monkeypatch.setattr("headshare.integrations.transformers.tokenizer.find_spec", util.find_spec)
    checkpoint = without_weights("llama-gqa", tmp_path / "model")
    (checkpoint.path / "tokenizer.model").write_bytes(b"\x0a\x0e no model of sentences")
    with pytest.raises(EvaluationError, match=r"only as tokenizer\.model, and sentencepiece, which reads it, is not"):
        load_tokenizer(checkpoint)


# ---- special tokens


def with_template(folder: Path, template: str) -> Path:
    """A folder in which the tokenizer puts these special tokens around every text."""
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("template", "before"),
    [("<s> $A </s>", [1]), ("$A </s>", []), ("<s> $A", [1]), ("<s> <s> $A </s> </s>", [1, 1]), ("$A", [])],
)
def test_a_tokenizer_puts_before_texts_what_it_did_and_nothing_behind_them(
    template: str, before: list[int], llama: Path
) -> None:
    tokenizer = load_tokenizer(hs.open_checkpoint(with_template(add_tokenizer(llama), template)))
    for text, ids in (("w5 w6", [5, 6]), ("", []), ("</s> w5", [2, 5]), ("w5 </s>", [5, 2])):
        assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == [*before, *ids]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode([1, 5, 2], skip_special_tokens=True) == "w5"


def test_a_tokenizer_in_python_that_ends_texts_does_not_end_them_here(llama: Path) -> None:
    tf.ByT5Tokenizer().save_pretrained(llama)
    assert tf.AutoTokenizer.from_pretrained(llama)("ab")["input_ids"] == [100, 101, 1]
    assert load_tokenizer(hs.open_checkpoint(llama))("ab")["input_ids"] == [100, 101]
