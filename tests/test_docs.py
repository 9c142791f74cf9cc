"""What the README says, runs; and the public names are the ones that are meant."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import headshare as hs
from headshare.cli.app import main
from support.nearest import stand_in
from support.texts import a_text, add_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """The headshare commands of the README, in order, without comments."""
    found = re.findall(r"^    (headshare .*)$|`(headshare [a-z]+ [^`]*)`", README, re.M)
    return [shlex.split(indented or inline, comments=True) for indented, inline in found]


def test_the_readmes_commands_run_in_their_order(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stand_in(monkeypatch)
    a_text(tmp_path / "FILE", 1200)
    add_tokenizer(llama).rename(tmp_path / "MODEL")
    (tmp_path / "DATA").mkdir()
    for name in ("piqa", "boolq"):
        (tmp_path / "DATA" / f"{name}.jsonl").write_text('{"query": "w4 w5", "choices": ["w6", "w7 w8"], "gold": 1}\n')
    seen = set()
    for words in commands():
        if words[:2] == ["headshare", "share"] and "--plan" in words:
            words[3] = "OUT2"
        if words[1] in ("eval", "compare") and "--text" in words:
            words += ["--window", "32"]
        if "--calibration" in words:
            words += ["--calibration-window", "32", "--calibration-tokens", "512"]
        if words[1] == "train":
            words += ["--context", "32", "--use_cpu", "true", "--max_steps", "1"]
        if words[1] == "generate":
            words += ["--tokens", "2"]
        if words[1] == "bench":
            words += ["--repeats", "2", "--loads", "1"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, (words, capsys.readouterr().err)
        seen.add(words[1])
    assert seen == {
        "estimate",
        "share",
        "inspect",
        "verify",
        "eval",
        "compare",
        "report",
        "generate",
        "bench",
        "expand",
        "quantize",
        "score",
        "plan",
        "refit",
        "train",
    }


def test_the_readmes_python_runs(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama.rename(tmp_path / "llama-2-7b")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict[str, object] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


def test_the_readmes_tree_lists_every_module() -> None:
    tree = README[README.index("## Files") : README.index("## Cite")]
    source = ROOT / "src" / "headshare"
    paths = [
        path
        for folder in ("", "storage", "integrations", "training", "evaluating", "comparing")
        for path in (source / folder).glob("*.py")
    ]
    modules = {path.name for path in paths if not path.name.startswith("__")}
    assert {name for name in modules if name not in tree} == set()
    assert {name for name in re.findall(r"(\w+\.py)", tree) if name != "smollm2.py"} == modules


def test_the_readmes_families_are_the_tables() -> None:
    from headshare.architecture.families import FAMILIES

    listed = README[README.index("Families:") :]
    named = {"llama": "Llama", "phi3": "Phi-3", "gpt2": "GPT-2", "gpt_neox": "GPT-NeoX", "opt": "OPT", "bert": "BERT"}
    named |= {"baichuan": "Baichuan 2", "falcon": "Falcon", "mpnet": "MPNet"}
    assert {family.name for family in FAMILIES} == set(named)
    assert all(name in listed for name in named.values())


def test_the_public_names_are_these() -> None:
    assert hs.__all__ == sorted(hs.__all__)
    assert set(hs.__all__) == {
        *("ArchitectureError", "CheckpointError", "EvaluationError", "HeadshareError", "OutputError", "PlanError"),
        *("Budget", "Calibration", "CalibrationError", "budget_of", "calibration_from", "plan_on", "refit_on"),
        *("Checkpoint", "Estimate", "HeadUnit", "HeadshareConfig", "Part", "Parts", "Scores", "SharePlan"),
        *("SharedCheckpoint", "StorageError", "Tie", "estimate", "estimate_plan", "expand", "load"),
        *("make_plan", "match_function"),
        *("open_checkpoint", "score_units", "share"),
    }


def test_importing_headshare_changes_nothing_but_what_registration_promises() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZATION_CONFIG_MAPPING["headshare"] is hs.HeadshareConfig
    assert AUTO_QUANTIZER_MAPPING["headshare"].__module__ == "headshare.integrations.transformers.quantizer"
