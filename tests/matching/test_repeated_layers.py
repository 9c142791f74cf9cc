"""Models with repeated layers compute what a stock model of copied layers does, and hold each weight once."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

import headshare as hs
from headshare.errors import CheckpointError, OptionError
from headshare.integrations.transformers.loading import unique_parameter_bytes
from headshare.matching.exact.repeat import read_blocks, repeated
from support import tiny
from support.folders import WEIGHTS
from support.merges import merged, same_outputs

DENSE = [name for name, (_, _, ffn) in tiny.FAMILIES.items() if ffn]


@pytest.mark.parametrize(
    ("text", "times", "order"),
    [
        ("1-2", 2, [0, 1, 2, 1, 2, 3]),
        ("0", 3, [0, 0, 0, 1, 2, 3]),
        ("0-1,2-3", 2, [0, 1, 0, 1, 2, 3, 2, 3]),
        ("0-3", 2, [0, 1, 2, 3, 0, 1, 2, 3]),
        ("1, 3", 2, [0, 1, 1, 2, 3, 3]),
    ],
)
def test_blocks_run_several_times_in_a_row(text: str, times: int, order: list[int]) -> None:
    assert list(repeated(read_blocks(text, 4), 4, times)) == order


@pytest.mark.parametrize(
    ("text", "times", "why"),
    [
        ("", 2, "10-16,20"),
        ("1-", 2, "10-16,20"),
        ("-1", 2, "10-16,20"),
        ("1-2-3", 2, "10-16,20"),
        ("2-1", 2, "ends before it begins"),
        ("2-4", 2, "no layer 4"),
        ("1-2,2-3", 2, "does not come behind"),
        ("2,1", 2, "does not come behind"),
        ("1", 1, "repeats nothing"),
        ("1", 100_000, "more than 10000 layers"),
    ],
)
def test_wrong_layers_are_one_error_each(text: str, times: int, why: str, llama: Path) -> None:
    with pytest.raises(OptionError, match=why):
        hs.repeat_layers(hs.open_checkpoint(llama), text, times=times)


@pytest.mark.parametrize("name", DENSE)
def test_a_repeated_model_equals_a_stock_model_of_copied_layers(name: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "dense")
    made = hs.repeat_layers(hs.open_checkpoint(folder), "1-2")
    model = hs.load(made.save(tmp_path / "out"))
    stock = merged(tiny.FAMILIES[name][0].from_pretrained(folder), [0, 1, 2, 1, 2, 3])
    assert same_outputs(model, stock)
    assert unique_parameter_bytes(model) == made.estimate.shared_bytes == unique_parameter_bytes(hs.load(folder))
    expanded = hs.load(hs.expand(hs.open_checkpoint(tmp_path / "out"), tmp_path / "expanded"))
    assert same_outputs(model, expanded)
    assert expanded.config.to_dict().keys() == stock.config.to_dict().keys()


@pytest.mark.parametrize("storage", ["alias", "owner", "indirect"])
def test_every_storage_holds_repeated_layers_once(storage: str, llama: Path, tmp_path: Path) -> None:
    out = hs.repeat_layers(hs.open_checkpoint(llama), "1-2", times=3).save(tmp_path / "out")
    model = hs.load(out, storage=storage)
    layers = model.model.layers
    for first, later in ((1, 3), (1, 5), (2, 4), (2, 6)):
        pairs = zip(layers[first].parameters(), layers[later].parameters(), strict=True)
        assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    assert same_outputs(model, merged(tf.AutoModelForCausalLM.from_pretrained(llama), [0, 1, 2, 1, 2, 1, 2, 3]))


def test_each_layer_has_keys_and_values_of_its_own(llama: Path, tmp_path: Path) -> None:
    model = hs.load(hs.repeat_layers(hs.open_checkpoint(llama), "1-2").save(tmp_path / "out"))
    stock = merged(tf.AutoModelForCausalLM.from_pretrained(llama), [0, 1, 2, 1, 2, 3])
    ids = tiny.tokens(batch=1)
    ours = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    theirs = stock.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.sequences, theirs)
    assert len(ours.past_key_values) == 6


def test_windows_of_layers_go_along(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = tf.Qwen2Config(**tiny.GROUPED, layer_types=kinds, sliding_window=4, use_sliding_window=True)
    stock = tf.Qwen2ForCausalLM(config).eval()
    stock.save_pretrained(tmp_path / "dense")
    model = hs.load(hs.repeat_layers(hs.open_checkpoint(tmp_path / "dense"), "1-2").save(tmp_path / "out"))
    order = [0, 1, 2, 1, 2, 3]
    assert model.config.layer_types == [kinds[layer] for layer in order]
    assert same_outputs(model, merged(stock, order))


def test_windows_that_a_configuration_leaves_to_transformers_go_along_too(tmp_path: Path) -> None:
    folder = tiny.make("gemma2", tmp_path / "dense")
    raw = json.loads((folder / "config.json").read_text())
    kinds = raw.pop("layer_types")
    (folder / "config.json").write_text(json.dumps(raw))
    made = hs.repeat_layers(hs.open_checkpoint(folder), "1")
    assert made.dense.config["layer_types"] == [kinds[layer] for layer in (0, 1, 1, 2, 3)]


def test_layers_that_a_rule_tells_apart_are_refused(tmp_path: Path) -> None:
    folder = tiny.make("qwen3-moe", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_sparse_step": 2}))
    with pytest.raises(CheckpointError, match="decoder_sparse_step: 2"):
        hs.repeat_layers(hs.open_checkpoint(folder), "1")


def test_it_is_saved_again_as_it_was_written(llama: Path, tmp_path: Path) -> None:
    out = hs.repeat_layers(hs.open_checkpoint(llama), "1-2").save(tmp_path / "out")
    model = hs.load(out)
    model.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "gathered", state_dict=model.state_dict())
    again = hs.load(tmp_path / "again")
    assert same_outputs(again, model)
    assert unique_parameter_bytes(again) == unique_parameter_bytes(model)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "gathered" / WEIGHTS).read_bytes()
    assert hs.verify(hs.open_checkpoint(tmp_path / "again")).ok


def test_dequantizing_gives_each_layer_weights_of_its_own(llama: Path, tmp_path: Path) -> None:
    model = hs.load(hs.repeat_layers(hs.open_checkpoint(llama), "1-2").save(tmp_path / "out"))
    stock = merged(tf.AutoModelForCausalLM.from_pretrained(llama), [0, 1, 2, 1, 2, 3])
    plain = model.dequantize()
    assert same_outputs(plain, stock)
    with torch.no_grad():
        plain.model.layers[3].mlp.up_proj.weight.zero_()
    assert plain.model.layers[1].mlp.up_proj.weight.abs().sum() > 0


def test_repeated_layers_train_as_one(llama: Path, tmp_path: Path) -> None:
    model = hs.load(hs.repeat_layers(hs.open_checkpoint(llama), "1-2").save(tmp_path / "out"), storage="owner")
    stock = merged(tf.AutoModelForCausalLM.from_pretrained(llama), [0, 1, 2, 1, 2, 3])
    ids = tiny.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    stock(input_ids=ids, labels=ids).loss.backward()
    ours = model.model.layers[1].mlp.up_proj.weight.grad
    theirs = [stock.model.layers[layer].mlp.up_proj.weight.grad for layer in (1, 3)]
    assert torch.allclose(ours, theirs[0] + theirs[1], rtol=1e-4, atol=1e-7)


def test_a_shared_checkpoint_is_refused(llama: Path, tmp_path: Path) -> None:
    out = hs.repeat_layers(hs.open_checkpoint(llama), "1").save(tmp_path / "out")
    with pytest.raises(CheckpointError, match="already shared"):
        hs.repeat_layers(hs.open_checkpoint(out), "1")
