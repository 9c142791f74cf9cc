"""What stands twice in a checkpoint is found, bit for bit, and stored and held once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.errors import CheckpointError
from headshare.integrations.transformers.loading import unique_parameter_bytes
from headshare.matching.exact import find
from headshare.matching.exact.find import bytes_to_read, identical_tensors
from support import tiny
from support.folders import WEIGHTS
from support.merges import make_merge, same_outputs


def rewritten(folder: Path, **changes: torch.Tensor) -> Path:
    """The folder with these tensors in the place of its own; dots in names are written as two underscores."""
    tensors = load_file(folder / WEIGHTS)
    tensors |= {name.replace("__", "."): value.clone() for name, value in changes.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_copied_layers_are_found_and_taken_from_the_first(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(make_merge(tmp_path / "merge", order=(0, 1, 2, 1, 2, 1)))
    plan = hs.exact_plan(dense)
    assert len(plan.copies) == 3 * 9
    for name, donor in plan.copies.items():
        layer = int(name.split(".")[2])
        assert donor == name.replace(f"layers.{layer}.", f"layers.{(0, 1, 2, 1, 2, 1)[layer]}.")
    assert plan.ties == 0


def test_a_model_in_which_nothing_stands_twice_has_an_empty_plan(llama: Path) -> None:
    # the norms of a fresh model are all ones, and stand in every layer
    dense = hs.open_checkpoint(tiny.make("llama-gqa", llama.parent / "random"))
    assert hs.exact_plan(dense).sections == ()
    assert {len(group) for group in identical_tensors(hs.open_checkpoint(llama))} == {9}


def test_one_bit_makes_another_tensor(tmp_path: Path) -> None:
    folder = make_merge(tmp_path / "merge")
    name = "model.layers.3.mlp.up_proj.weight"
    whole = load_file(folder / WEIGHTS)[name]
    whole.view(torch.int32)[-1, -1] ^= 1
    plan = hs.exact_plan(hs.open_checkpoint(rewritten(folder, **{name.replace(".", "__"): whole})))
    assert name not in plan.copies
    assert len(plan.copies) == 2 * 9 - 1


def test_zeros_of_another_sign_are_other_numbers(tmp_path: Path) -> None:
    folder = tiny.make("llama-biased", tmp_path / "model")
    bias = "model__layers__{}__self_attn__k_proj__bias"
    zeros = torch.zeros(16)
    rewritten(folder, **{bias.format(1): zeros, bias.format(2): -zeros, bias.format(3): zeros})
    plan = hs.exact_plan(hs.open_checkpoint(folder))
    assert dict(plan.copies) == {"model.layers.3.self_attn.k_proj.bias": "model.layers.1.self_attn.k_proj.bias"}


def test_a_head_that_equals_the_embedding_is_found_though_not_declared_tied(tmp_path: Path) -> None:
    folder = tiny.make("llama-mha", tmp_path / "model")
    rewritten(folder, lm_head__weight=load_file(folder / WEIGHTS)["model.embed_tokens.weight"])
    dense = hs.open_checkpoint(folder)
    plan = hs.exact_plan(dense)
    assert dict(plan.copies) == {"lm_head.weight": "model.embed_tokens.weight"}
    model = hs.load(hs.share(dense, plan).save(tmp_path / "out"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    assert same_outputs(model, hs.load(folder))


def test_a_digest_is_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "digest", lambda *_: b"the same")
    found = identical_tensors(hs.open_checkpoint(make_merge(tmp_path / "merge")))
    assert sorted(map(len, found)) == [2] * 18


def test_only_tensors_that_could_be_equal_are_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = hs.open_checkpoint(make_merge(tmp_path / "merge"))
    read: list[int] = []
    original = Checkpoint.read_into
    monkeypatch.setattr(find, "same_tensors", lambda *_: True)
    monkeypatch.setattr(
        Checkpoint,
        "read_into",
        lambda self, buffer, *rest: (read.append(len(buffer)), original(self, buffer, *rest))[1],
    )
    identical_tensors(dense)
    alone = dense.tensors["model.embed_tokens.weight"].nbytes  # the only one of its shape
    assert sum(read) == bytes_to_read(dense) == sum(info.nbytes for info in dense.tensors.values()) - alone


def test_memory_is_bounded_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "PIECE_BYTES", 1000)  # which no tensor's bytes are a multiple of
    dense = hs.open_checkpoint(make_merge(tmp_path / "merge"))
    sizes = {len(piece) for info in dense.tensors.values() for piece in find.pieces(dense, info)}
    assert max(sizes) == 1000
    assert len(hs.exact_plan(dense).copies) == 18


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "40KB"}], ids=["one file", "shards"])
def test_bytes_are_those_of_the_estimate_and_of_no_copy(shards: dict[str, str], tmp_path: Path) -> None:
    dense = hs.open_checkpoint(make_merge(tmp_path / "merge", **shards))
    plan = hs.exact_plan(dense)
    estimate = hs.estimate(dense, match="exact")
    assert estimate == hs.estimate(dense, plan) == hs.share(dense, plan).estimate
    out = hs.share(dense, plan).save(tmp_path / "out")
    before = hs.open_checkpoint(tmp_path / "merge-before")
    stored = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    assert stored.keys() == dense.tensors.keys()
    assert sum(value.nbytes for value in stored.values()) == estimate.shared_bytes
    assert estimate.shared_bytes == sum(info.nbytes for info in before.tensors.values())
    assert unique_parameter_bytes(hs.load(out)) == estimate.shared_bytes
    assert {stored[name].shape[0] for name in plan.copies} == {0}


def test_expanding_gives_the_dense_weights_byte_for_byte(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(make_merge(tmp_path / "merge"))
    out = hs.share(dense, hs.exact_plan(dense)).save(tmp_path / "out")
    expanded = hs.expand(hs.open_checkpoint(out), tmp_path / "expanded")
    assert (expanded / WEIGHTS).read_bytes() == (dense.path / WEIGHTS).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (expanded, dense.path)]
    assert configs[0] == configs[1]


def test_verify_compares_every_number_and_every_copy(tmp_path: Path) -> None:
    folder = make_merge(tmp_path / "merge")
    dense = hs.open_checkpoint(folder)
    out = hs.share(dense, hs.exact_plan(dense)).save(tmp_path / "out")
    report = hs.verify(hs.open_checkpoint(out), dense)
    assert (report.ok, report.max_logit_diff, report.notes) == (True, 0.0, [])
    name = "model.layers.3.mlp.up_proj.weight"
    other = load_file(folder / WEIGHTS)[name] + 1
    report = hs.verify(
        hs.open_checkpoint(out),
        hs.open_checkpoint(rewritten(folder, **{name.replace(".", "__"): other})),
        any_base=True,
    )
    assert not report.ok
    assert any(name in problem for problem in report.problems)


def test_a_shared_checkpoint_is_refused(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(make_merge(tmp_path / "merge"))
    out = hs.share(dense, hs.exact_plan(dense)).save(tmp_path / "out")
    with pytest.raises(CheckpointError, match="already shared"):
        hs.exact_plan(hs.open_checkpoint(out))


@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "gpt2", "gpt_neox"])
def test_units_that_are_equal_are_tied_where_their_tensors_differ(name: str, tmp_path: Path) -> None:
    folder = tiny.make(name, tmp_path / "model")
    layout = hs.open_checkpoint(folder).layouts.attention
    tensors = load_file(folder / WEIGHTS)
    for place in layout.parts.values():
        (start, stop), (first, last) = place.span(1), place.span(0)
        donor = tensors[place.name(0)].narrow(place.axis, start, stop - start).clone()
        tensors[place.name(2)].narrow(place.axis, first, last - first).copy_(donor)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    dense = hs.open_checkpoint(folder)
    plan = hs.exact_plan(dense)
    assert [list(map(str, selection.ties)) for selection in plan.selections] == [
        ["layer 2, group 0 takes its weights from layer 0, group 1"]
    ]
    assert plan.selections[0].layout.parts.keys() == layout.parts.keys()
    out = hs.share(dense, plan).save(tmp_path / "out")
    report = hs.verify(hs.open_checkpoint(out), dense)
    assert (report.ok, report.max_logit_diff) == (True, 0.0)
    assert same_outputs(hs.load(out), hs.load(folder))
    written = load_file(hs.expand(hs.open_checkpoint(out), tmp_path / "expanded") / WEIGHTS)
    assert all(torch.equal(written[each], tensors[each]) for each in tensors)


def test_a_part_is_tied_alone_and_a_tensor_that_stands_twice_lends_but_borrows_no_unit(tmp_path: Path) -> None:
    folder = make_merge(tmp_path / "merge", order=(0, 1, 2, 1))
    tensors = load_file(folder / WEIGHTS)
    key = "model.layers.{}.self_attn.k_proj.weight"
    tensors[key.format(2)][8:] = tensors[key.format(1)][:8]  # of a tensor that layer 3 has too
    tensors[key.format(1)][8:] = tensors[key.format(3)][8:] = tensors[key.format(0)][:8]
    save_file({name: each.clone() for name, each in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    dense = hs.open_checkpoint(folder)
    plan = hs.exact_plan(dense)
    assert plan.copies[key.format(3)] == key.format(1)
    assert [
        (list(each.layout.parts), [[*tie.recipient, *tie.donor] for tie in each.ties]) for each in plan.selections
    ] == [(["k"], [[2, 1, 1, 0]])]
    out = hs.share(dense, plan).save(tmp_path / "out")
    assert hs.verify(hs.open_checkpoint(out), dense).ok
    assert same_outputs(hs.load(out), hs.load(folder))
