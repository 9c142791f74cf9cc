"""The command line: every command's help, its one JSON object and its words; the hub, and a real process."""

import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file

import headshare as hs
from headshare.cli.app import app
from headshare.experiments.demo import DemoRow
from support import gguf_models, tiny
from support.command_line import Outcome, Run, assert_one_error_line
from support.folders import WEIGHTS
from support.nearest import stand_in
from support.questions import make_data
from support.texts import a_text, add_tokenizer

COMMANDS = (
    "shrink", "bench", "estimate", "score", "plan", "share", "repeat", "refit", "train", "quantize", "inspect",
    "verify", "expand", "export", "attention", "eval", "compare", "reproduce", "report", "generate", "demo",
    "push", "register", "tasks",
)  # fmt: skip
FOR_OTHERS = ("run",)  # it becomes the command that it is given, whose words and output are its own


# ---- help


def options_of(command: str) -> list[str]:
    group: Any = typer.main.get_command(app)
    return [name for parameter in group.commands[command].params for name in parameter.opts if name.startswith("-")]


def test_the_commands_are_those_of_the_design() -> None:
    group: Any = typer.main.get_command(app)
    assert sorted(group.commands) == sorted(COMMANDS + FOR_OTHERS)


@pytest.mark.parametrize("command", COMMANDS + FOR_OTHERS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_a_command_does_and_lists_its_options(command: str, flag: str, run: Run) -> None:
    found = run(command, flag)
    assert (found.status, found.err) == (0, "")
    assert f"headshare {command}" in found.out
    options = options_of(command)
    assert ("--json" in options) == (command in COMMANDS)
    for option in options:
        assert option in found.out
    assert found.out.count("\n") > len(options)
    assert "Traceback" not in found.out


def test_help_of_the_whole_lists_the_commands(run: Run) -> None:
    for flag in ("--help", "-h"):
        found = run(flag)
        assert (found.status, found.err) == (0, "")
        for command in COMMANDS + FOR_OTHERS:
            assert f" {command} " in found.out


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version") == Outcome(0, f"headshare {version('headshare')}\n", "")


def test_no_command_at_all_shows_the_help(run: Run) -> None:
    found = run()
    assert "Usage: headshare" in found.out + found.err
    assert "Traceback" not in found.err


# ---- one JSON object

ESTIMATED = {"units", "recipients", "dense_bytes", "shared_bytes", "saved_bytes", "saved_fraction", "parts_fraction"}
ESTIMATED |= {"removed_units", "removed_neurons", "narrow_layers", "identical_tensors"}
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
    "shrink": {"out", "bytes", "predicted", "perplexity", "done", "verified", "load", "seconds"},
    "estimate": ESTIMATED,
    "score": {"output", "units", "tables", "digest", "seconds"},
    "plan": {"output", "ties", "plan_digest", "saved_bytes", "price", "price_unit", "measured"},
    "share": SHARED,
    "repeat": {"layers", "layers_before", "dense_bytes", "shared_bytes", "plan_digest", "seconds", "out"},
    "refit": {"tensors", "text", "text_digest", "tokens", "window", "seed", "seconds", "out"},
    "train": {"method", "steps", "best_step", "loss_before", "loss_after", "ties", "curve", "settings"},
    "quantize": {"matrices", "group", "bytes_before", "bytes", "seconds", "out"},
    "inspect": {"model_type", "plan_digest", "ties", "selections", "removals", "factored", "stored_bytes", "refit"},
    "verify": {"ok", "max_logit_diff"},
    "expand": {"out", "bytes"},
    "export": {"out", "bytes", "architecture", "dtype", "given_back"},
    "attention": {"texts", "agreements", "stability", "most_similar", "layers_alike"},
    "eval": {"perplexity", "tokens", "window"},
    "compare": {"cells", "verdict"},
    "reproduce": {"claims", "not_run"},
    "report": {"tables"},
    "generate": {"prompts", "texts"},
    "push": {"repository", "files", "bytes", "base_model", "license", "address"},
    "register": {"file", "registered", "removed"},
    "tasks": {"out", "tasks"},
    "demo": {"rows", "sentence"},
    "bench": {"tasks", "loading", "memory", "repeats", "loads", "threads"},
}


@pytest.fixture
def valid(
    model: Path, shared: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[object]]:
    """For every command, words that it accepts."""
    stand_in(monkeypatch)
    monkeypatch.setattr("headshare.integrations.transformers.startup.always.place", lambda: tmp_path / "format.pth")
    with hs.open_checkpoint(model) as dense:
        hs.score_units(dense).save(tmp_path / "scores")
    long = add_tokenizer(tiny.make_llama(tmp_path / "long", max_position_embeddings=1024))
    return {
        "shrink": [model, "small", "--save", "5%", "--calibration", text, "--calibration-window", 16],
        "estimate": [model],
        "score": [model],
        "plan": ["--from-scores", tmp_path / "scores"],
        "share": [model, "out"],
        "repeat": [model, "out", "--layers", "1-2"],
        "refit": [shared, "--calibration", text, "--calibration-window", 16, "--calibration-tokens", 128],
        "train": [model, "trained", "--data", text, "--context", 16, "--max_steps", 1, "--use_cpu", "true"],
        "quantize": [shared, "rounded", "--calibration", text, "--calibration-window", 16],
        "inspect": [shared],
        "verify": [shared, "--against", model],
        "expand": [shared, "expanded"],
        "export": [gguf_models.make("llama", tmp_path / "exported"), "one.gguf"],
        "attention": [model, "--text", text, "--window", 32],
        "eval": [model, "--text", text, "--window", 32],
        "push": [shared, "someone/small", "--private", "--dry-run"],
        "register": [],
        "tasks": ["for-lm-eval", "--data-dir", make_data(tmp_path / "data"), "--tasks", "piqa"],
        "generate": [model, "--prompt", "w4 w5", "--tokens", 2],
        "compare": [model, "--out", "grid", "--text", text, "--window", 32, "--methods", "directshare"],
        "reproduce": [
            model,
            "--out",
            "paper",
            "--only",
            "figure-6",
            "--text",
            text,
            "--calibration",
            text,
            "--window",
            32,
        ],
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
    assert found.err == "" or command in ("shrink", "share", "demo", "train", "compare", "reproduce")  # which say more


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
    row = DemoRow("shared", 1, 1, math.inf, 1, 1)
    assert json.loads(json.dumps(row.to_dict(), allow_nan=False))["perplexity"] is None


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
    assert set(asked) == {("someone/model", "v1")}
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
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("note: nothing is repaired")
