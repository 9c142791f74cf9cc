"""The commands that look at a shared checkpoint and undo it: inspect, verify, expand."""

import json
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

import headshare as hs
from headshare.checkpoint.fingerprint import content_digest
from support.command_line import Run
from support.folders import WEIGHTS


def test_inspect_shows_a_folder_and_a_plan_alike(model: Path, run: Run, tmp_path: Path) -> None:
    run("score", model)
    run("plan", "--from-scores", "scores.safetensors", "--ratio", 0.5)
    run("share", model, "out", "--plan", "share_plan.json")
    folder, plan = run("inspect", "out", "--json").data, run("inspect", "share_plan.json", "--json").data
    popped = [folder.pop(key) for key in ("refit", "quantization_config", "base_model")]
    assert popped == [None, None, str(model)]
    assert folder.pop("origin") == {"digest": content_digest(hs.open_checkpoint(model))}
    assert folder.pop("stored_bytes") == sum(t.nbytes for t in load_file(tmp_path / "out" / WEIGHTS).values())
    assert folder == plan
    (selection,) = plan["selections"]
    assert (selection["layers"], selection["groups"], selection["recipients"], plan["ties"]) == (4, 2, 4, 4)
    assert selection["ties"] == json.loads((tmp_path / "share_plan.json").read_text())["selections"][0]["ties"]


def test_inspect_draws_one_line_a_layer(shared: Path, run: Run) -> None:
    words, (selection,) = run("inspect", shared).out, run("inspect", shared, "--json").data["selections"]
    layers = [line for line in words.splitlines() if line.strip().startswith("layer")]
    assert len(layers) == selection["layers"]
    drawn = {(n, g) for n, line in enumerate(layers) for g, sign in enumerate(line.split()[2]) if sign == "·"}
    assert drawn == {(layer, group) for layer, group, _, _ in selection["ties"]}
    for layer, group, donor_layer, donor_group in selection["ties"]:
        assert f"{group}<-{donor_layer}.{donor_group}" in layers[layer]


@pytest.mark.parametrize("against", [True, False])
def test_verify_ends_well_on_what_share_wrote(against: bool, model: Path, shared: Path, run: Run) -> None:
    words = ["verify", shared, *(["--against", model] if against else [])]
    data = run(*words, "--json").data
    assert data["ok"] is True
    assert data["max_logit_diff"] == 0
    assert data["problems"] == []
    found = run(*words)
    assert found.status == 0
    assert found.out.startswith("ok: 2 files")
    assert run(*words, "--no-logits", "--json").data["max_logit_diff"] is None


def test_verify_ends_with_status_1_and_the_reason_on_what_was_damaged(shared: Path, run: Run) -> None:
    content = bytearray((shared / WEIGHTS).read_bytes())
    content[-3] ^= 16
    (shared / WEIGHTS).write_bytes(content)
    found = run("verify", shared, "--json")
    assert found.status == 1
    assert found.data["ok"] is False
    assert WEIGHTS in found.data["problems"][0]
    words = run("verify", shared)
    assert words.status == 1
    assert words.out.startswith("NOT ok")
    assert f"{WEIGHTS} is not as it was written" in words.out
    assert "Traceback" not in words.err


def test_an_expanded_folder_is_as_large_as_the_dense_one_and_loads_as_stock(
    model: Path, shared: Path, run: Run, tmp_path: Path
) -> None:
    data = run("expand", shared, "expanded", "--json").data
    assert data["bytes"] == sum(tensor.nbytes for tensor in load_file(model / WEIGHTS).values())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "expanded")
    assert not hasattr(config, "quantization_config")
