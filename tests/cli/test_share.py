"""A share step by step: score, plan and share give what share gives at once."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import headshare as hs
from headshare.matching.scores import Scores
from support import tiny
from support.command_line import Run
from support.folders import WEIGHTS

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
    planned = run("plan", "--from-scores", "s.safetensors", *planning, *both, "-o", "p.json", "--json").data
    stepped = run("share", model, "stepped", "--plan", "p.json", "--json").data
    at_once = run("share", model, "at-once", *scoring, *planning, *both, "--json").data
    assert stepped["plan_digest"] == planned["plan_digest"] == at_once["plan_digest"]
    assert hs.SharePlan.load(tmp_path / "p.json").digest == planned["plan_digest"]
    assert planned["ties"] == at_once["recipients"] > 0
    assert Scores.load(tmp_path / "s.safetensors").digest == scored["digest"]
    assert (tmp_path / "stepped" / WEIGHTS).read_bytes() == (tmp_path / "at-once" / WEIGHTS).read_bytes()
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("stepped", "at-once")]
    assert configs[0] == configs[1]


def test_an_edited_plan_is_what_is_shared(model: Path, run: Run, tmp_path: Path) -> None:
    run("score", model)
    run("plan", "--from-scores", "scores.safetensors")
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
        (["plan", "--from-scores", "s", "-o", "p.json"], "p.json"),
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


@pytest.mark.parametrize("verb", ["share", "train", "refit"])
def test_the_command_that_is_printed_loads_the_output(
    verb: str, model: Path, shared: Path, text: Path, run: Run, tmp_path: Path
) -> None:
    words: dict[str, list[object]] = {
        "share": [model, "out"],
        "train": [model, "out", "--data", text, "--max_steps", 1, "--context", 16],
        "refit": [shared, "--calibration", text, "--calibration-window", 16, "--dense", model, "--out", "out"],
    }
    printed = run(verb, *words[verb])
    assert printed.status == 0, printed.err
    found = re.search(r"Written and checked in .* s: out\nLoad it after `import headshare` with (\S+)\.$", printed.out)
    assert found, printed.out
    loaded = eval(found[1], {"transformers": transformers})
    expanded = hs.expand(hs.open_checkpoint(tmp_path / "out"), tmp_path / "expanded")
    stock = transformers.AutoModelForCausalLM.from_pretrained(expanded)
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(tiny.tokens()).logits, stock.eval()(tiny.tokens()).logits)


@pytest.mark.parametrize("keys", [{"model_type": "own", "auto_map": {"AutoModel": "own.Own"}}, {"vocab_size": 3}])
def test_what_cannot_be_loaded_is_not_called_loadable(keys: dict[str, object], model: Path, run: Run) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **keys}))
    printed = run("share", model, "out")
    assert printed.status == 0
    assert "Written and checked" not in printed.out
    assert "Load it" not in printed.out.splitlines()[-1].partition(":")[0]
    assert "Its numbers are checked, but it cannot be loaded here: " in printed.out


def test_sharing_without_repair_says_first_what_it_did_to_models(model: Path, text: Path, run: Run) -> None:
    printed = run("share", model, "out", "--json")
    assert printed.data["recipients"] > 0
    assert printed.err.count("note: nothing is repaired") == 1
    assert "headshare shrink" in printed.err
    nothing = run("share", model, "same", "--ratio", 0)
    assert (nothing.status, nothing.err) == (0, "")
    words = ["--refit", "--calibration", text, "--calibration-window", 16, "--calibration-tokens", 64]
    repaired = run("share", model, "repaired", *words)
    assert repaired.status == 0
    assert "nothing is repaired" not in repaired.err


def test_commands_that_only_count_and_choose_say_what_does_it_all(model: Path, run: Run) -> None:
    run("score", model)
    for words in (
        ["estimate", model],
        ["plan", "--from-scores", "scores.safetensors"],
        ["inspect", "share_plan.json"],
    ):
        assert "headshare shrink" in run(*words).out.splitlines()[-1]
        assert "headshare shrink" in " ".join(run(words[0], "--help").out.split())
