"""The command line: every command's help, its one JSON object, its words, and one line for whatever goes wrong."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file
from torch.nn import functional

import headshare as hs
from headshare.cli import app
from headshare.demo import Row
from headshare.table import HEADERS
from support import tiny
from support.command_line import Outcome, Run, assert_one_error_line
from support.nearest import stand_in
from support.texts import a_text, add_tokenizer, windows_by_hand

WEIGHTS = "model.safetensors"
COMMANDS = (
    "bench", "estimate", "score", "plan", "share", "refit", "train", "quantize", "inspect", "verify", "expand", "eval",
    "compare", "report", "generate", "demo",
)  # fmt: skip


@pytest.fixture
def model(llama: Path) -> Path:
    """A tiny Llama with a tokenizer: 4 layers x 2 groups."""
    return add_tokenizer(llama)


@pytest.fixture
def shared(model: Path, tmp_path: Path) -> Path:
    """The same, shared at a ratio of a half."""
    dense = hs.open_checkpoint(model)
    return hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "shared")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return a_text(tmp_path / "text.txt")


# ---- help


def options_of(command: str) -> list[str]:
    group: Any = typer.main.get_command(app)
    return [name for parameter in group.commands[command].params for name in parameter.opts if name.startswith("-")]


def test_the_commands_are_those_of_the_design() -> None:
    group: Any = typer.main.get_command(app)
    assert sorted(group.commands) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_a_command_does_and_lists_its_options(command: str, flag: str, run: Run) -> None:
    found = run(command, flag)
    assert (found.status, found.err) == (0, "")
    assert f"headshare {command}" in found.out
    options = options_of(command)
    assert "--json" in options
    for option in options:
        assert option in found.out
    assert found.out.count("\n") > len(options)
    assert "Traceback" not in found.out


def test_help_of_the_whole_lists_the_commands(run: Run) -> None:
    for flag in ("--help", "-h"):
        found = run(flag)
        assert (found.status, found.err) == (0, "")
        for command in COMMANDS:
            assert f" {command} " in found.out


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version") == Outcome(0, f"headshare {version('headshare')}\n", "")


def test_no_command_at_all_shows_the_help(run: Run) -> None:
    found = run()
    assert "Usage: headshare" in found.out + found.err
    assert "Traceback" not in found.err


# ---- one JSON object

ESTIMATED = {"units", "recipients", "dense_bytes", "shared_bytes", "saved_bytes", "saved_fraction", "parts_fraction"}
ESTIMATED |= {"removed_units", "removed_neurons"}
SHARED = ESTIMATED | {
    "seconds",
    "peak_anonymous_bytes",
    "plan_digest",
    "price",
    "price_unit",
    "refitted_tensors",
    "measured",
}


def a_finished_comparison(folder: Path) -> Path:
    """What `compare` leaves, of no cells."""
    folder.mkdir()
    about = {"title": "None", "model": "m", "text": "", "calibration": "", "training": "", "limit": None}
    (folder / "about.json").write_text(json.dumps({**about, "versions": {}, "keys": []}))
    (folder / "cells.json").write_text("[]")
    return folder


KEYS: dict[str, set[str]] = {
    "estimate": ESTIMATED,
    "score": {"output", "units", "tables", "digest", "seconds"},
    "plan": {"output", "ties", "plan_digest", "saved_bytes", "price", "price_unit", "measured"},
    "share": SHARED,
    "refit": {"tensors", "text", "text_digest", "tokens", "window", "seed", "seconds", "out"},
    "train": {"method", "steps", "best_step", "loss_before", "loss_after", "ties", "curve", "settings"},
    "quantize": {"matrices", "group", "bytes_before", "bytes", "seconds", "out"},
    "inspect": {"model_type", "plan_digest", "ties", "selections", "removals", "factored", "stored_bytes", "refit"},
    "verify": {"ok", "max_logit_diff"},
    "expand": {"out", "bytes"},
    "eval": {"perplexity", "tokens", "window"},
    "compare": {"cells", "verdict"},
    "report": {"tables"},
    "generate": {"prompts", "texts"},
    "demo": {"rows", "sentence"},
    "bench": {"tasks", "loading", "memory", "repeats", "loads", "threads"},
}


@pytest.fixture
def valid(
    model: Path, shared: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[object]]:
    """For every command, words that it accepts."""
    stand_in(monkeypatch)
    with hs.open_checkpoint(model) as dense:
        hs.score_units(dense).save(tmp_path / "scores")
    long = add_tokenizer(tiny.make_llama(tmp_path / "long", max_position_embeddings=1024))
    return {
        "estimate": [model],
        "score": [model],
        "plan": [tmp_path / "scores"],
        "share": [model, "out"],
        "refit": [shared, "--calibration", text, "--calibration-window", 16, "--calibration-tokens", 128],
        "train": [model, "trained", "--data", text, "--context", 16, "--max_steps", 1, "--use_cpu", "true"],
        "quantize": [shared, "rounded", "--calibration", text, "--calibration-window", 16],
        "inspect": [shared],
        "verify": [shared, "--against", model],
        "expand": [shared, "expanded"],
        "eval": [model, "--text", text, "--window", 32],
        "generate": [model, "--prompt", "w4 w5", "--tokens", 2],
        "compare": [model, "--out", "grid", "--text", text, "--window", 32, "--methods", "directshare"],
        "report": [a_finished_comparison(tmp_path / "finished")],
        "bench": [shared, "--repeats", 2, "--loads", 1, "--tokens", "1,8"],
        "demo": [long, "--text", a_text(tmp_path / "long.txt", 2200), "--tokens", 1022],
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_object_with_its_keys_and_nothing_else(
    command: str, valid: dict[str, list[object]], run: Run
) -> None:
    found = run(command, *valid[command], "--json")
    assert found.status == 0, found.err
    assert found.data.keys() >= KEYS[command]
    assert "error" not in found.err


@pytest.mark.parametrize("command", COMMANDS)
def test_words_are_for_people(command: str, valid: dict[str, list[object]], run: Run) -> None:
    found = run(command, *valid[command])
    assert found.status == 0, found.err
    assert found.out.strip()
    assert not found.out.startswith("{")
    assert found.err == "" or command in ("demo", "train", "compare")  # which say how far they are


OPTIONS = ["", "--ratio 0.5 --parts qkvo+ffn", "--match separate", "--ratio 0", "--dtype bfloat16",
           "--parts ffn --ffn-groups 4 --ffn-ratio 0.7"]  # fmt: skip


@pytest.mark.parametrize("words", OPTIONS)
def test_an_estimate_is_what_share_then_does_and_what_torch_counts(
    words: str, model: Path, run: Run, tmp_path: Path
) -> None:
    options = words.split()
    estimated = run("estimate", model, *options, "--json").data
    shared = run("share", model, "out", *options, "--json").data
    assert estimated == {key: shared[key] for key in ESTIMATED}
    assert set(shared) == {*SHARED, "out"}
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16 if "--dtype" in options else "auto"
    )
    assert estimated["dense_bytes"] == sum(parameter.nbytes for parameter in stock.parameters())
    written = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / WEIGHTS).values())
    assert written == estimated["shared_bytes"] == estimated["dense_bytes"] - estimated["saved_bytes"]
    assert estimated["saved_fraction"] == pytest.approx(estimated["saved_bytes"] / estimated["dense_bytes"])
    assert estimated["saved_fraction"] <= estimated["parts_fraction"] <= 1
    assert 0 < shared["seconds"] < 60
    assert shared["peak_anonymous_bytes"] > 10**6


def test_an_estimate_in_words_has_the_numbers_of_its_json(model: Path, run: Run) -> None:
    data, words = run("estimate", model, "--json").data, run("estimate", model).out
    assert f"{data['recipients']} of {data['units']} units" in words
    assert f"{data['saved_fraction']:.1%} less" in words


def test_a_perplexity_past_any_float_is_null_in_every_json() -> None:
    # Infinity is no JSON.
    counts = dict.fromkeys(("recipients", "disk_bytes", "memory_bytes", "pss_bytes", "tokens", "window"), 1)
    beyond = dict.fromkeys(("shared", "deleted", "random_donors", "refit"), math.inf)
    row = Row(ratio=0.1, verified=True, dense=1.0, **counts, **beyond)
    assert json.loads(json.dumps(row.to_dict(), allow_nan=False))["shared"] is None


# ---- step by step is the same as at once

STEPS: dict[str, tuple[list[object], list[object], list[object]]] = {
    # for score and share, for plan and share
    "as is": ([], [], []),
    "another ratio": ([], ["--ratio", 0.6], []),
    "each part by itself": (["--match", "separate"], ["--ratio", 0.5], []),
    "the paper's pairs": (["--match", "v"], ["--mode", "root", "--ratio", 0.7], []),
    "as released": (["--match", "qkv"], ["--mode", "published", "--ratio", 0.7], []),
    "a protected layer": ([], ["--protect", "1,3", "--ratio", 0.25], []),
    "feed-forward groups": (["--ffn-groups", 4], ["--ffn-ratio", 0.5], ["--parts", "qkvo+ffn"]),
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_score_then_plan_then_share_is_share(
    steps: tuple[list[object], list[object], list[object]], model: Path, run: Run, tmp_path: Path
) -> None:
    scoring, planning, both = steps
    scored = run("score", model, *scoring, *both, "-o", "s.safetensors", "--json").data
    planned = run("plan", "s.safetensors", *planning, *both, "-o", "p.json", "--json").data
    stepped = run("share", model, "stepped", "--plan", "p.json", "--json").data
    at_once = run("share", model, "at-once", *scoring, *planning, *both, "--json").data
    assert stepped["plan_digest"] == planned["plan_digest"] == at_once["plan_digest"]
    assert hs.SharePlan.load(tmp_path / "p.json").digest == planned["plan_digest"]
    assert planned["ties"] == at_once["recipients"] > 0
    assert hs.Scores.load(tmp_path / "s.safetensors").digest == scored["digest"]
    assert (tmp_path / "stepped" / WEIGHTS).read_bytes() == (tmp_path / "at-once" / WEIGHTS).read_bytes()
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("stepped", "at-once")]
    assert configs[0] == configs[1]


def test_an_edited_plan_is_what_is_shared(model: Path, run: Run, tmp_path: Path) -> None:
    run("score", model)
    run("plan", "scores.safetensors")
    data = json.loads((tmp_path / "share_plan.json").read_text())
    data["selections"][0]["ties"] = [[3, 1, 0, 0]]
    (tmp_path / "share_plan.json").write_text(json.dumps(data))
    assert run("share", model, "out", "--plan", "share_plan.json", "--json").data["recipients"] == 1
    name = "model.layers.3.self_attn.k_proj.weight"
    expanded = run("expand", "out", "expanded", "--json")
    assert expanded.status == 0
    whole, original = load_file(tmp_path / "expanded" / WEIGHTS), load_file(model / WEIGHTS)
    assert torch.equal(whole[name][8:], original["model.layers.0.self_attn.k_proj.weight"][:8])
    assert torch.equal(whole[name][:8], original[name][:8])


def test_existing_outputs_are_kept_unless_overwriting_is_asked_for(model: Path, run: Run, tmp_path: Path) -> None:
    for words, output in (
        (["score", model, "-o", "s"], "s"),
        (["plan", "s", "-o", "p.json"], "p.json"),
        (["share", model, "out"], f"out/{WEIGHTS}"),
        (["expand", "out", "dense"], f"dense/{WEIGHTS}"),
    ):
        assert run(*words).status == 0
        before, first = (tmp_path / output).read_bytes(), (tmp_path / output).stat().st_ino
        found = run(*words)
        assert (found.status, found.out) == (1, "")
        assert "exists" in found.err
        assert "--overwrite" in found.err
        assert (tmp_path / output).stat().st_ino == first
        assert run(*words, "--overwrite").status == 0
        assert (tmp_path / output).read_bytes() == before
        assert (tmp_path / output).stat().st_ino != first  # a new file took its place in one step


KEPT = ["score model -o letter", "plan scores -o letter", "share model letter", "plan scores -o model/config.json"]


@pytest.mark.parametrize("words", KEPT)
def test_overwriting_replaces_nothing_that_we_did_not_write(
    words: str, things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things)
    (things / "letter").write_text("Dear diary")
    before = seen(things)
    found = run(*words.split(), "--overwrite")
    after = seen(things)
    (things / "letter").unlink()
    assert_one_error_line(found)
    assert after == before


# ---- inspect, verify, expand


def test_inspect_shows_a_folder_and_a_plan_alike(model: Path, run: Run, tmp_path: Path) -> None:
    run("score", model)
    run("plan", "scores.safetensors", "--ratio", 0.5)
    run("share", model, "out", "--plan", "share_plan.json")
    folder, plan = run("inspect", "out", "--json").data, run("inspect", "share_plan.json", "--json").data
    popped = [folder.pop(key) for key in ("refit", "quantization_config", "base_model")]
    assert popped == [None, None, str(model)]
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


# ---- eval


@pytest.mark.parametrize(("options", "window", "bos", "limit"), [
    (["--window", 32], 32, True, None), (["--window", 50, "--no-bos"], 50, False, None),
    (["--window", 2], 2, True, None), (["--window", 2, "--no-bos"], 2, False, None),
    (["--window", 16, "--tokens", 100], 16, True, 100), (["--window", 64, "--bos"], 64, True, None),
])  # fmt: skip
@pytest.mark.parametrize("which", ["dense", "shared"])
def test_perplexity_is_what_transformers_own_loss_gives(
    options: list[object], window: int, bos: bool, limit: int | None, which: str, model: Path, shared: Path,
    text: Path, run: Run, tmp_path: Path,
) -> None:  # fmt: skip
    folder = model if which == "dense" else shared
    data = run("eval", folder, "--text", text, *options, "--json").data
    stock = folder if which == "dense" else hs.expand(hs.open_checkpoint(shared), tmp_path / "expanded")
    judge = transformers.LlamaForCausalLM.from_pretrained(stock).eval()
    rows = windows_by_hand(model, text, window, bos, limit)
    with torch.inference_mode():
        losses = [judge(input_ids=row[None], labels=row[None]).loss.double().item() for row in rows]
    assert data["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert data["tokens"] == rows.numel() - len(rows)
    assert (data["window"], data["bos"]) == (window, bos)


def test_perplexity_in_words_has_the_numbers_of_its_json(model: Path, text: Path, run: Run) -> None:
    words = ["eval", model, "--text", text, "--window", 32]
    data = run(*words, "--json").data
    assert run(*words).out == (f"perplexity {data['perplexity']:,.3f} over {data['tokens']} tokens in windows of 32\n")


@pytest.mark.parametrize("name", ["bert", "mpnet", "roberta"])
def test_an_encoder_has_no_perplexity_and_is_told_what_it_has(name: str, text: Path, run: Run, tmp_path: Path) -> None:
    folder = add_tokenizer(tiny.make(name, tmp_path / name))
    found = run("eval", folder, "--text", text, "--window", 32)
    assert (found.status, found.out) == (1, "")
    assert "no perplexity" in found.err
    assert "--against" in found.err
    assert_one_error_line(found)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_embeddings_of_an_encoder_are_compared_as_transformers_computes_them(
    name: str, text: Path, run: Run, tmp_path: Path
) -> None:
    folder = add_tokenizer(tiny.make(name, tmp_path / name), bos=False)
    assert run("share", folder, "out", "--ratio", 0.5).status == 0
    words = ["--text", text, "--window", 32, "--against", folder]
    assert run("eval", folder, *words, "--json").data["cosine"] == pytest.approx(1.0, abs=1e-6)
    data = run("eval", "out", *words, "--json").data
    run("expand", "out", "expanded")
    rows = windows_by_hand(folder, text, 32, bos=False)
    cosines = []
    with torch.inference_mode():
        ours, theirs = (transformers.AutoModel.from_pretrained(path).eval() for path in (tmp_path / "expanded", folder))
        for row in rows:
            one, other = (judge(row[None]).last_hidden_state[0].mean(dim=0) for judge in (ours, theirs))
            cosines.append(functional.cosine_similarity(one, other, dim=0).item())
    assert data["cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert data["cosine"] < 0.9999
    with torch.inference_mode():
        for judge, found in ((ours, data["retrieved"]), (theirs, data["dense_retrieved"])):
            halves = [
                [judge(part[None]).last_hidden_state[0].mean(dim=0) for part in (row[:16], row[16:])] for row in rows
            ]
            right = 0
            for number, (query, _) in enumerate(halves):
                near = [functional.cosine_similarity(query, answer, dim=0).item() for _, answer in halves]
                right += near.index(max(near)) == number
            assert found == pytest.approx(right / len(rows))
    assert data["tokens"] == rows.numel()
    assert "mean cosine" in run("eval", "out", *words).out


# ---- demo


def test_the_demo_measures_what_it_prints(run: Run, tmp_path: Path) -> None:
    dense = add_tokenizer(tiny.make_llama(tmp_path / "dense", max_position_embeddings=1024))
    text = a_text(tmp_path / "text.txt", 2400)
    words = ["demo", dense, "--text", text, "--tokens", 1100, "--work", "new/work"]
    table = run(*words)
    assert table.status == 0, table.err
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.out.splitlines() if line[:1] == "|"
    ]
    assert tuple(lines[0]) == HEADERS
    assert {"on disk", "parameters", "PSS", "shared", "deleted", "random donors", "dense"} <= set(lines[0])
    assert [line[0] for line in lines[2:]] == ["0", "0.1", "0.2", "0.3"]

    data = run(*words, "--json").data
    judge = transformers.LlamaForCausalLM.from_pretrained(dense).eval()
    rows = windows_by_hand(dense, text, 512, True, 1100)
    with torch.inference_mode():
        losses = [judge(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    expected = math.exp(sum(losses) / len(losses))
    stock_bytes = sum(parameter.nbytes for parameter in judge.parameters())
    for row, line in zip(data["rows"], lines[2:], strict=True):
        folder = tmp_path / "new" / "work" / f"shared-{row['ratio']:g}"
        stored = load_file(folder / WEIGHTS)
        assert row["disk_bytes"] == (folder / WEIGHTS).stat().st_size
        assert row["memory_bytes"] == sum(tensor.nbytes for tensor in stored.values())
        assert row["recipients"] == int(row["ratio"] * 10) * 8 // 10
        assert row["dense"] == pytest.approx(expected, rel=1e-5)
        assert row["verified"] is True
        assert line[1] == str(row["recipients"])
        assert row["pss_bytes"] is not None
        assert line[5:] == [f"{row[key]:,.1f}" for key in ("shared", "deleted", "random_donors", "dense", "refit")]
    first, last = data["rows"][0], data["rows"][-1]
    assert first["memory_bytes"] == stock_bytes
    assert first["shared"] == first["deleted"] == first["random_donors"] == pytest.approx(expected, rel=1e-5)
    assert last["memory_bytes"] < stock_bytes
    assert len({last["shared"], last["deleted"], last["random_donors"], last["dense"]}) == 4


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_the_demo_does_not_measure_beyond_the_models_length(name: str, run: Run, tmp_path: Path) -> None:
    # gpt2 has no position beyond, and a Llama was never trained there; stories15M, of 256 positions, is such a model.
    folder = add_tokenizer(tiny.make(name, tmp_path / name))  # 64 positions
    found = run("demo", folder, "--text", a_text(tmp_path / "long.txt", 1100), "--tokens", 1100)
    assert "windows of 64" in found.out or (found.status == 1 and "64" in found.err)


# ---- one line for whatever goes wrong


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bit of everything: a model, shared, its scores and plan, and broken ones."""
    tmp_path = tmp_path_factory.mktemp("things")
    model = add_tokenizer(tiny.make_llama(tmp_path / "model"))
    opened = hs.open_checkpoint(model)
    hs.share(opened, hs.make_plan(hs.score_units(opened), 0.5)).save(tmp_path / "shared")
    with hs.open_checkpoint(tmp_path / "model") as dense:
        scores = hs.score_units(dense)
        scores.save(tmp_path / "scores")
        plan = hs.make_plan(scores, 0.25)
        plan.save(tmp_path / "plan.json")
    header, matrix = json.loads(scores._header()), scores.tables[0].scores
    for name, changed in {
        "nan-scores": (header, matrix.where(matrix == 0, float("nan"))),
        "small-scores": (header, matrix[:4, :4].contiguous()),
        "float-scores": (header, matrix.float()),
        "no-scores": ({}, matrix),
        "list-scores": ([], matrix),
        "deep-scores": ("[" * 100_000, matrix),
    }.items():
        text = changed[0] if isinstance(changed[0], str) else json.dumps(changed[0])
        save_file({"0": changed[1]}, tmp_path / name, metadata={"headshare": text})
    header["tables"][0]["layout"]["groups"] = 3
    save_file({"0": matrix}, tmp_path / "wide-scores", metadata={"headshare": json.dumps(header)})
    cycle = plan.model_dump(mode="json")
    cycle["selections"][0]["ties"] = [[1, 0, 2, 0], [2, 0, 1, 0]]
    (tmp_path / "cycle.json").write_text(json.dumps(cycle))
    foreign = plan.model_dump(mode="json")
    foreign["selections"][0]["layout"]["layers"] = 9
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    (tmp_path / "broken.json").write_text("{")
    bare = tiny.make_llama(tmp_path / "bare")
    add_tokenizer(tiny.make_llama(tmp_path / "no-bos"), bos=False)
    add_tokenizer(tiny.make_llama(tmp_path / "more-words"), extra=50)
    add_tokenizer(tiny.make("roberta", tmp_path / "roberta"), bos=False)
    (add_tokenizer(tiny.make_llama(tmp_path / "odd-tokenizer")) / "tokenizer.json").write_text("{")
    config = json.loads((bare / "config.json").read_text())
    for name, changes in {
        "quantised": {"quantization_config": {"quant_method": "gptq"}},
        "strange": {"architectures": ["logging"]},
        "odd": {"architectures": 5},
        "contradictory": {"num_attention_heads": 5},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS).symlink_to(bare / WEIGHTS)
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **changes}))
        add_tokenizer(tmp_path / name)
    (tmp_path / "empty").write_text(" \n ")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "short").write_text("w5 w6 w7")
    (tmp_path / "file").write_text("")
    a_text(tmp_path / "text")
    a_text(tmp_path / "long", 1100)
    (tmp_path / "alien").write_text(" ".join(["w110"] * 100))
    return tmp_path


# each line is a command that must end in one line and status 1, and what that line must say
MISTAKES = """
share model out --ratio -0.1                            | ratio of -0.1
share model out --ratio 0.99                            | from 0 to 0.7500
share model out --ratio nan                             | ratio
share model out --ratio inf                             | ratio
share model out --ratio abc                             | abc|number
share model out --parts xyz                             | 'xyz' does not name parts
share model out --parts ,                               | does not name parts
share model out --match xx                              | xx
share model out --mode xx                               | xx
share model out --dtype int8                            | int8
share model out --protect 1,x                           | '1,x'
share model out --protect 99                            | 99
share model out --protect -1                            | -1
share model out --ratio 0.6 --protect 1,2               | 0.2500
share model out --parts ffn --ffn-groups 5              | 48 neurons
share model out --parts ffn --ffn-groups 0              | neurons
share model out --parts ffn --ffn-groups -4             | neurons
share model out --parts qkv+ffn --ffn-ratio 2           | ratio
share model out --parts qkv+ffn --ffn-ratio nan         | ratio
share model out --plan nothing.json                     | no plan file
share model out --plan broken.json                      | not JSON
share model out --plan cycle.json                       | earlier layer
share model out --plan foreign.json                     | another model
share model out --plan text                             | not JSON
share model out --plan model                            | no plan file
share model shared                                      | exists
share model file --overwrite                            | not a checkpoint folder
share model gone/out                                    | no folder
share model model/out                                   | inside the input
share model . --overwrite                               | not a checkpoint folder|inside the output
share gone out                                          | gone
share ./gone out                                        | no folder
share file out                                          | is a file
share quantised out                                     | gptq
share shared out                                        | already shared
share contradictory out                                 | heads
estimate model --ratio -0.1                             | ratio of -0.1
estimate model --ratio 0.99                             | from 0 to 0.7500
estimate model --ratio nan                              | ratio
estimate model --ratio abc                              | abc|number
estimate model --parts xyz                              | 'xyz' does not name parts
estimate model --match xx                               | xx
estimate quantised                                      | gptq
estimate shared                                         | already shared
estimate nobody/nothing                                 | fetched
score gone                                              | gone
score quantised                                         | gptq
score model --parts xyz                                 | 'xyz' does not name parts
score model --match xx                                  | xx
score model -o gone/scores                              | no folder
score model -o model                                    | exists
score model -o model --overwrite                        | model
score model --parts ffn --ffn-groups 7                  | 48 neurons
plan gone                                               | no scores file
plan text                                               | not a scores file
plan file                                               | not a scores file
plan model                                              | no scores file
plan model/model.safetensors                            | not a scores file
plan nan-scores                                         | not a scores file
plan small-scores                                       | not a scores file
plan float-scores                                       | not a scores file
plan no-scores                                          | not a scores file
plan list-scores                                        | not a scores file
plan deep-scores                                        | not a scores file
plan wide-scores                                        | does not fit
plan scores --ratio -0.1                                | ratio of -0.1
plan scores --ratio 0.99                                | from 0 to 0.7500
plan scores --ratio nan                                 | ratio
plan scores --parts xyz                                 | 'xyz' does not name parts
plan scores --parts ffn                                 | no ffn units
plan scores --protect 99                                | 99
plan scores -o plan.json                                | exists
plan scores -o gone/plan.json                           | no folder
inspect model                                           | dense checkpoint
inspect gone.json                                       | no plan file
inspect broken.json                                     | not JSON
inspect cycle.json                                      | earlier layer
inspect ./gone                                          | no folder
verify model                                            | not a shared checkpoint
verify ./gone                                           | no folder
verify shared --against ./gone                          | no folder
expand model out                                        | not a shared checkpoint
expand shared model                                     | exists
expand shared shared/out                                | inside the input
eval ./gone --text text                                 | no folder
eval model --text gone                                  | gone
eval model --text model                                 | model
eval model --text empty                                 | empty
eval model --text binary                                | UTF-8
eval model --text short --window 16                     | 3 tokens, less than one window of 16
eval model --text text                                  | window
eval model --text text --window 65                      | --window 64
eval model --text text --window 1                       | window
eval model --text text --window 0                       | window
eval model --text text --window -8                      | window
eval model --text text --window 32 --tokens 8           | less than one window
eval model --text text --window 32 --tokens 0           | limit
eval model --text text --window 32 --tokens -50         | limit
eval bare --text text --window 32                       | no tokenizer
eval odd-tokenizer --text text --window 32              | no tokenizer
eval no-bos --text text --window 32 --bos               | beginning-of-text
eval more-words --text alien --window 32                | vocabulary
eval roberta --text text --window 32                    | no perplexity
eval roberta --text text --window 64 --against roberta  | window
eval strange --text text --window 32                    | logging
eval odd --text text --window 32                        | architectures
demo ./gone                                             | no folder
demo bare --text text                                   | no tokenizer
demo model --text gone                                  | gone
demo model --text short                                 | 3 tokens
demo model --text long --tokens 128 --work file          | file
demo model --text long --tokens 0                       | --tokens
demo model --text long --tokens -1                      | --tokens
share model out --refit                                 | needs text
share model out --match output                          | needs text
share model out --save 10%                              | needs text
share model out --allow remove                          | needs text
share model out --calibration text                      | would not be used
share model out --calibration text --plan plan.json     | would not be used
share model out --device cpu                            | --device would not be used
share model out --restart                               | --restart would not be used
share model out --measure                               | --measure would not be used
share model out --seed 3                                | --seed would not be used
share model out --no-refit-ffn                          | --refit-ffn would not be used
share model out --reconstruct 8                         | --reconstruct would not be used
share model out --no-probe                              | --probe would not be used
share model out --refit --no-probe --calibration text   | --probe would not be used
share model out --save 5% --calibration text --calibration-window 32 --calibration-tokens 64 | text gave 2 windows
share model out --plan plan.json --ratio 0.2            | --ratio would not be used
share model out --plan plan.json --allow remove         | --allow would not be used
share model out --plan plan.json --save 5%              | --save would not be used
share model out --plan plan.json --match output         | --match would not be used
share model out --parts auto                            | 'auto' does not name parts
share model out --refit --calibration text --plan foreign.json | another model
share shared out --refit --calibration text             | already shared
share quantised out --refit --calibration text          | gptq
share model out --refit --calibration gone --calibration-window 32 | no file
share model out --refit --calibration empty --calibration-window 32 | less than one window
share model out --refit --calibration text              | --calibration-window 64
share model out --refit --calibration short --calibration-window 16 | less than one window
share model out --refit --calibration text --calibration-window 32 --calibration-tokens 32 | two windows
share model out --refit --calibration text --calibration-window 32 --device tpu | no device
share model out --refit --calibration text --calibration-window 32 --device cuda:99 | no device
share bare out --refit --calibration text --calibration-window 32 | no tokenizer
share model out --save 0% --calibration text            | cannot be saved
share model out --save 150% --calibration text          | cannot be saved
share model out --save 100% --calibration text          | cannot be saved
share model out --save abc --calibration text           | no amount to save
share model out --save -5% --calibration text           | no amount to save
share model out --save 1e99999999 --calibration text    | no amount to save
share model out --save 1/3 --calibration text           | no amount to save
share model out --save nan --calibration text           | no amount to save
share model out --save 5% --ratio 0.2 --calibration text | --ratio would not be used
share model out --save 5% --match qk --calibration text | --match would not be used
share model out --allow all --calibration text          | all
share model out --match output --mode root --calibration text | --mode would not be used
share model out --match output --ffn-ratio 0.2 --calibration text | --ffn-ratio would not be used
share model out --match output --ffn-groups 4 --calibration text | --ffn-groups would not be used
share model out --match output --parts ffn --calibration text | 'ffn'
share model out --match output --parts xyz --calibration text | 'xyz'
share model out --match output --ratio 0.99 --calibration text | from 0 to 0.7500
share model out --match output --ratio nan --calibration text | ratio
share model out --match output --parts auto --ratio 0.99 --calibration text | from 0 to 0.7500
share model out --match output --protect 99 --calibration text | no layer 99
share model out --save 5% --protect 99 --calibration text | no layer 99
share model out --save 5% --protect -1 --calibration text | no layer -1
plan scores --save 5%                                   | --save would not be used
plan scores --allow remove                              | --allow would not be used
plan scores --no-measure                                | --measure would not be used
plan scores --restart                                   | --restart would not be used
plan scores --no-probe                                  | --probe would not be used
plan scores --revision v1                               | --revision would not be used
plan scores --ffn-groups 2                              | --ffn-groups would not be used
plan scores --calibration text                          | is a file
plan gone --calibration text                            | gone
plan shared --calibration text                          | already shared
plan model --calibration text --mode root               | --mode would not be used
plan model --calibration text --save 0%                 | cannot be saved
plan model --calibration text --protect 99              | no layer 99
plan model --calibration text --calibration-window 32 --calibration-tokens 64 | text gave 2 windows
plan model --calibration text -o plan.json              | exists
plan model --calibration text -o model/plan.json        | inside the model
plan model --calibration text -o gone/plan.json         | no folder
refit model --calibration text                          | not a shared checkpoint
refit ./gone --calibration text                         | no folder
refit someone/model --calibration text                  | --out
refit shared                                            | calibration
refit shared --calibration gone --calibration-window 32 | no file
refit shared --calibration text                         | --calibration-window 64
refit shared --calibration text --dense ./gone          | no folder
refit shared --calibration text --dense shared          | already shared
refit shared --calibration text --dense roberta         | another model
refit shared --calibration text --out model             | exists
refit shared --calibration text --out gone/new          | no folder
refit shared --calibration text --calibration-window 32 --out shared/new | inside the input
refit shared --calibration text --calibration-window 32 --device tpu | no device
"""


def mistakes() -> list[Any]:
    lines = [line.partition(" | ") for line in MISTAKES.strip().splitlines()]
    return [pytest.param(words.split(), reason.strip(), id=words.strip()) for words, _, reason in lines]


def seen(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of everything below."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize(("words", "reason"), mistakes())
def test_a_mistake_is_one_line_that_says_so_and_status_1_and_leaves_nothing(
    words: list[str], reason: str, run: Run, things: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things)
    before, there = seen(things), set(things.iterdir())
    found = run(*words)
    after = seen(things)
    for path in set(things.iterdir()) - there:  # the next mistake is made in the same folder
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_one_error_line(found)
    assert any(word in found.err for word in reason.split("|"))
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in before if path != things)


@pytest.mark.parametrize(
    "words", ["share model", "share model out --raito 0.3", "shrae model out", "eval model", "--json"]
)
def test_a_slip_of_the_pen_prints_nothing_on_standard_output(words: str, run: Run) -> None:
    found = run(*words.split())
    assert found.status != 0
    assert found.out == ""
    assert found.err
    assert "Traceback" not in found.err


def test_an_error_with_json_prints_nothing_on_standard_output(things: Path, run: Run) -> None:
    assert_one_error_line(run("verify", things / "model", "--json"))
    assert_one_error_line(run("share", things / "quantised", "out", "--json"))


def test_a_pickle_is_refused_in_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    for command in ("estimate", "score", "inspect", "verify"):
        found = run(command, "old")
        assert_one_error_line(found)
        assert "pytorch_model.bin" in found.err


def test_an_interrupted_command_ends_without_a_traceback_and_leaves_nothing(
    model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> Iterator[torch.Tensor]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("headshare.sharing.stream", interrupt)
    before = seen(tmp_path)
    found = run("share", model, "out")
    assert found.status == 130
    assert found.out == ""
    assert "Traceback" not in found.err
    assert seen(tmp_path) == before


# ---- the hub, and a real process


@pytest.mark.parametrize("command", ["estimate", "score", "share", "inspect", "verify", "expand", "eval"])
def test_a_hub_id_and_its_revision_reach_the_hub(
    command: str, valid: dict[str, list[object]], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []
    folder = Path(str(valid[command][0]))

    def refuse(model: str, *_: object, revision: str | None = None, **__: object) -> str:
        asked.append((model, revision))
        raise OSError("not here")

    def serve(model: str, *_: object, revision: str | None = None, **__: object) -> str:
        asked.append((model, revision))
        return str(folder)

    headers_only = command in ("estimate", "inspect")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse if headers_only else serve)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    found = run(command, "someone/model", *valid[command][1:], "--revision", "v1", "--json")
    assert asked == [("someone/model", "v1")]
    if headers_only:
        assert_one_error_line(found)
    else:
        assert found.data.keys() >= KEYS[command] - {"stored_bytes"}


def test_a_real_process_prints_one_object_and_nothing_beside_it(model: Path, tmp_path: Path) -> None:
    """Once, as a user's shell does it: no warning or bar of any library gets between."""
    script = Path(sys.executable).parent / "headshare"
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    found = subprocess.run(
        [script, "share", model, tmp_path / "out", "--json"],
        capture_output=True, text=True, check=False, env=environment, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert Outcome(0, found.stdout, "").data["out"] == str(tmp_path / "out")
    assert found.stderr == ""
