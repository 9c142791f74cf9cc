"""A shared model that transformers saved under other names is verified, expanded, refitted and trained like another."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import headshare as hs
from headshare.calibration.run import refit_checkpoint
from headshare.calibration.settings import CalibrationSettings
from headshare.checkpoint.entry import SharingEntry
from headshare.checkpoint.names import follow
from headshare.checkpoint.refit_record import RefitRecord
from headshare.evaluation.verify import verify
from headshare.training import train
from support import tiny
from support.folders import WEIGHTS
from support.shares import a_plan, share
from support.texts import a_text, add_tokenizer
from support.trainings import settings


def renamed(folder: Path, name: Callable[[str], str], **config: object) -> Path:
    """The folder with other names for its tensors, and other settings."""
    tensors = {name(old): tensor for old, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def gpt2_of_the_hub(folder: Path) -> Path:
    """Without the prefix, and with masks that transformers does not save."""
    renamed(tiny.make("gpt2", folder), lambda name: name.removeprefix("transformer."))
    tensors = load_file(folder / WEIGHTS)
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril().clone() for layer in range(4)}
    save_file({**tensors, **masks}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def bare_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.BertModel(tiny.FAMILIES["bert"][1]).save_pretrained(folder)
    return folder


# the dense folder, the class that loads and saves it again, and where its layers are before and after
CASES = {
    "GPT-2 as on the hub": (gpt2_of_the_hub, transformers.AutoModelForCausalLM, "h.0", "transformer.h.0"),
    "an encoder under a head": (
        bare_bert,
        transformers.AutoModelForSequenceClassification,
        "encoder.layer.0",
        "bert.encoder.layer.0",
    ),
    "a causal model loaded bare": (tiny.make_llama, transformers.AutoModel, "model.layers.0", "layers.0"),
}

KEPT = ("0.attn.c_proj.weight", "0.self_attn.o_proj.weight", "0.output.dense.weight")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A dense model, its shared folder, and what transformers saved of that."""
    make, kind, _, _ = CASES[request.param]
    dense = add_tokenizer(make(tmp_path / "dense"))
    model = kind.from_pretrained(share(dense, tmp_path / "shared"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a new head is not random from one test to the next
            if "classifier" in name:
                parameter.fill_(0.1)
    model.save_pretrained(tmp_path / "again")
    add_tokenizer(tmp_path / "again")
    return str(request.param)


def test_the_plan_is_read_under_the_names_that_are_there(case: str, tmp_path: Path) -> None:
    _, _, before, after = CASES[case]
    first, again = (hs.open_checkpoint(tmp_path / name) for name in ("shared", "again"))
    template = next(iter(again.plan.layouts[0].parts.values())).tensor
    assert template.startswith(after.replace("0", "{layer}"))
    assert template in again.plan.to_json()
    changed = first.plan.to_json().replace(f'"{before[:-1]}', f'"{after[:-1]}')
    assert again.plan.to_json() == changed != first.plan.to_json()


def test_it_is_verified_expanded_and_compared_with_its_dense_model(case: str, tmp_path: Path) -> None:
    shared = hs.open_checkpoint(tmp_path / "again")
    for against in (None, hs.open_checkpoint(tmp_path / "dense")):
        found = verify(shared, against)
        assert found.ok, found.problems
        assert found.max_logit_diff == 0
        assert bool(found.tensors_checked) is (against is not None)
    out = hs.expand(shared, tmp_path / "expanded")
    kind = CASES[case][1]
    tokens = {"input_ids": tiny.tokens(), "attention_mask": torch.ones_like(tiny.tokens())}
    with torch.no_grad():
        ours, theirs = (kind.from_pretrained(folder)(**tokens)[0] for folder in (tmp_path / "again", out))
    assert torch.equal(ours, theirs)
    # a difference is still found
    tensors = load_file(tmp_path / "dense" / WEIGHTS)
    next(tensor for name, tensor in tensors.items() if name.endswith(KEPT))[0, 0] += 1
    save_file(tensors, tmp_path / "dense" / WEIGHTS, metadata={"format": "pt"})
    assert any("differs" in each for each in verify(shared, hs.open_checkpoint(tmp_path / "dense")).problems)


def test_it_is_refitted_as_before_it_was_saved_again(case: str, tmp_path: Path) -> None:
    setting = CalibrationSettings(str(a_text(tmp_path / "text", 600)), 256, 16)
    for name in ("shared", "again"):
        with hs.open_checkpoint(tmp_path / name) as shared, hs.open_checkpoint(tmp_path / "dense") as dense:
            refit_checkpoint(shared, dense, setting, tmp_path / f"refitted {name}")
    _, _, before, after = CASES[case]
    first, again = (hs.open_checkpoint(tmp_path / f"refitted {name}") for name in ("shared", "again"))
    record, theirs = (each.require_sharing().refit.tensors for each in (again, first))
    assert sorted(record) == sorted(name.replace(before[:-1], after[:-1]) for name in theirs)
    for ours, name in zip(sorted(record), sorted(theirs), strict=True):
        assert torch.equal(again.read(ours), first.read(name))
    assert verify(again, hs.open_checkpoint(tmp_path / "dense")).ok
    # and once more saved by transformers, from its first names, with a record
    CASES[case][1].from_pretrained(first.path).save_pretrained(tmp_path / "later")
    later = hs.open_checkpoint(tmp_path / "later")
    assert sorted(later.require_sharing().refit.tensors) == sorted(record)
    found = verify(later, hs.open_checkpoint(tmp_path / "dense"))
    assert found.ok, found.problems


def test_a_causal_model_is_trained(tmp_path: Path) -> None:
    dense = add_tokenizer(gpt2_of_the_hub(tmp_path / "dense"))
    transformers.AutoModelForCausalLM.from_pretrained(share(dense, tmp_path / "shared")).save_pretrained(
        tmp_path / "again"
    )
    text = a_text(tmp_path / "text", 600)
    arguments = {"max_steps": 2}
    taught = settings(text, "recover", loss={"distill": 0.5}, arguments=arguments)
    found = train(add_tokenizer(tmp_path / "again"), tmp_path / "out", taught)
    assert found.steps == 2
    assert verify(hs.open_checkpoint(tmp_path / "out")).ok
    assert set(hs.open_checkpoint(tmp_path / "out").tensors) == set(hs.open_checkpoint(tmp_path / "again").tensors)


def test_names_follow_only_where_all_of_a_plan_says_where_to(llama: Path) -> None:
    record = RefitRecord.of(["model.layers.1.mlp.down_proj.weight"], "text", "0" * 64, windows=(1, 2), seed=0)
    entry = SharingEntry(a_plan(llama), record)
    names = {name for name in hs.open_checkpoint(llama).tensors if ".layers." in name}
    bare = {name.removeprefix("model.") for name in names}
    found = follow(entry, bare)
    assert found.refit.tensors == ("layers.1.mlp.down_proj.weight",)
    assert follow(found, names) == entry
    assert follow(entry, names) is entry
    # damage is no renaming, and two places are none
    for other in (
        {*list(bare)[:3]},
        bare - {"layers.0.self_attn.v_proj.weight"},
        set(),
        bare | {f"a.{n}" for n in bare},
    ):
        assert follow(entry, other) is entry
    assert follow(entry, bare - {"layers.3.mlp.up_proj.weight"}) == found


def test_a_model_that_is_not_there_under_any_names_is_one_error(llama: Path, tmp_path: Path) -> None:
    shared = renamed(share(llama, tmp_path / "shared"), lambda name: name.replace("self_attn", "attention"))
    (shared / "headshare.json").unlink()
    with pytest.raises(hs.HeadshareError, match=r"q_proj.weight should have shape .* has no such tensor"):
        hs.expand(hs.open_checkpoint(shared), tmp_path / "out")
