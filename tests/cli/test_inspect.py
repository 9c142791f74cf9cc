"""The commands that look at a shared checkpoint and undo it: inspect, verify, expand."""

import json
import re
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

import headshare as hs
from headshare.checkpoint.entry import SharingEntry
from headshare.checkpoint.fingerprint import content_digest
from headshare.checkpoint.header import TensorInfo
from headshare.checkpoint.int4 import Packing
from headshare.sharing.picture.page import Inspected, plan_page
from support.command_line import Run, assert_one_error_line
from support.folders import WEIGHTS
from support.mixed import mixed_plan


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


def test_inspect_draws_a_page_of_a_folder_and_of_a_plan(shared: Path, run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):  # over a page too
        words = run("inspect", shared, "--html", page)
        assert words.out == run("inspect", shared).out
    html = page.read_text()
    stored = run("inspect", shared, "--json").data["stored_bytes"]
    rows = re.findall(r"<tr>\s*<td>(\d+|elsewhere)</td>\s*<td>([\d,]+)</td>\s*<td>([\d,]+)</td>", html)
    assert [name for name, _, _ in rows] == ["0", "1", "2", "3", "elsewhere"]
    assert sum(int(size.replace(",", "")) for _, size, _ in rows) == stored
    dense = run("verify", shared, "--no-logits", "--json").data["parameter_bytes"]
    assert sum(int(size.replace(",", "")) for _, size, _ in rows) == dense
    (selection,) = run("inspect", shared, "--json").data["selections"]
    for layer, group, donor_layer, donor_group in selection["ties"]:
        told = f"layer {layer}, group {group} takes its weights from layer {donor_layer}, group {donor_group}"
        assert f"<title>{told}</title>" in html
    run("expand", shared, "expanded")
    whole = sum(tensor.nbytes for tensor in load_file(tmp_path / "expanded" / WEIGHTS).values())
    assert sum(int(spared.replace(",", "")) for *_, spared in rows) == whole - stored
    hs.open_checkpoint(shared).require_sharing().plan.save(tmp_path / "plan.json")
    assert run("inspect", "plan.json", "--html", page, "--json").status == 0
    assert "numbers stored" in page.read_text()
    page.write_text("notes")
    assert_one_error_line(run("inspect", shared, "--html", page))
    assert page.read_text() == "notes"


def test_the_page_of_a_plan_shows_all_kinds_of_sections_and_escapes_strangers_words(run: Run, tmp_path: Path) -> None:
    mixed_plan("<script>alert(1)</script>").save(tmp_path / "<b>plan.json")
    assert run("inspect", "<b>plan.json", "--html", "page.html").status == 0
    html = (tmp_path / "page.html").read_text()
    assert html.count("<script>") == 1  # that which sorts tables
    assert "<b>plan" not in html
    for told in ("layer 9, group 0 takes its weights from layer 3, group 1", "layer 28, group 1: removed",
                 "layer 6, group 2: W_o is a product of rank 16", "layer 11: 40 of 64", "layer 29: 0 of 1,536",
                 "layer 3 lends 1 to layer 9"):  # fmt: skip
        assert f"<title>{told}</title>" in html
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", html)


def test_the_page_of_a_checkpoint_in_four_bits_says_what_is_rounded(shared: Path, run: Run, tmp_path: Path) -> None:
    plan = hs.open_checkpoint(shared).require_sharing().plan
    tensors = {
        "model.layers.0.mlp.up_proj.weight_packed": TensorInfo("x", "I32", (64, 4), "f", 0, 1024),
        "model.layers.0.mlp.up_proj.weight_scale": TensorInfo("x", "F16", (64, 1), "f", 1024, 128),
    }
    entry = SharingEntry(plan, packing=Packing(group=32, ignore=("lm_head",)))
    html = plan_page(Inspected("x", plan, entry, tensors))
    assert "matrices of 4 bits, a scale for every 32 inputs" in html
    assert "bytes of 4 bits" in html
    assert "1,152" in html
    assert "1,024" in html


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
