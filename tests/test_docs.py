"""What the README says, runs; and the public names are the ones that are meant."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

import headshare as hs
from headshare.cli.app import main
from headshare.integrations.transformers.config import HeadshareConfig
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
        "shrink",
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


def test_the_page_about_shrinking_runs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "shrink.md").read_text()
    small = {"tokens": 256, "window": 16}
    monkeypatch.chdir(tmp_path)
    a_text(tmp_path / "FILE", 600)
    add_tokenizer(llama).rename(tmp_path / "MODEL")
    for line in re.findall(r"^    (headshare .*)$", page, re.M):
        words = shlex.split(line)
        if "--calibration" in words:
            words += [f"--calibration-{name}={value}" for name, value in small.items()]
        monkeypatch.setattr(sys, "argv", words + ["--window", "16"] * ("eval" in words))
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, (words, capsys.readouterr().err)
    code = "\n".join(re.findall(r"^    ((?:import|small|print).*)$", page, re.M))
    names: dict[str, object] = {}
    exec(code.replace('calibration="FILE"', f'calibration="FILE", prices="prices.json", **{small}'), names)
    assert (tmp_path / "SMALLER" / "config.json").exists()


def test_the_readmes_python_runs(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama.rename(tmp_path / "llama-2-7b")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict[str, object] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


def test_the_architectures_tree_lists_every_package() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    tree = text[text.index("## Packages") : text.index("## Contracts")]
    packages = {path.parent.name for path in (ROOT / "src" / "headshare").glob("*/**/__init__.py")}
    assert set(re.findall(r"── (\w+)/", tree)) == packages


def test_the_glossary_has_the_architectures_words() -> None:
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    words = architecture[architecture.index("## Words") : architecture.index("## Packages")]
    in_order = sorted(re.findall(r"^\| .*", words, re.M)[1:], key=str.casefold)
    assert re.findall(r"^\| .*", (ROOT / "docs" / "glossary.md").read_text(), re.M)[1:] == in_order


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_index_lists_every_page() -> None:
    listed = re.findall(r"\]\(([\w./]+)\)", (ROOT / "docs" / "index.md").read_text())
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages - set(listed) == {"index.md"}


def test_lines_of_documentation_pages_end_at_100_columns() -> None:
    """Tables, pictures and words that cannot be broken, such as commands, are as long as they are."""
    long = [
        f"{page.name}:{number}"
        for page in (ROOT / "docs").glob("*.md")
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > 100 and not line.startswith(("|", "!")) and not re.search(r"`[^`]{40,}`|^ {4}|`$", line)
    ]
    assert long == []


def test_a_folder_holds_at_most_fourteen_modules_and_a_file_at_most_320_lines() -> None:
    source = ROOT / "src" / "headshare"
    folders = [source, *(path.parent for path in source.rglob("*/__init__.py"))]
    crowded = {str(folder): len(many) for folder in folders if len(many := list(folder.glob("*.py"))) > 14}
    lengths = {str(path): len(path.read_text().splitlines()) for path in source.rglob("*.py")}
    assert crowded == {}
    assert {path: lines for path, lines in lengths.items() if lines > 320} == {}


def test_the_readmes_families_are_the_tables() -> None:
    from headshare.architecture.families import FAMILIES

    listed = README[README.index("Families:") :]
    named = {"llama": "Llama", "phi3": "Phi-3", "gpt2": "GPT-2", "gpt_neox": "GPT-NeoX", "opt": "OPT", "bert": "BERT"}
    named |= {"baichuan": "Baichuan 2", "falcon": "Falcon", "mpnet": "MPNet", "olmo2": "OLMo 2", "roberta": "RoBERTa"}
    assert {family.name for family in FAMILIES} == set(named)
    assert all(name in listed for name in named.values())


def test_the_public_names_are_these() -> None:
    assert hs.__all__ == sorted(hs.__all__)
    assert set(hs.__all__) == {
        *("open_checkpoint", "Checkpoint", "load"),
        *("score_units", "make_plan", "match_function", "SharePlan"),
        *("Calibration", "Budget", "plan_by_output"),
        *("share", "refit", "expand", "verify", "estimate", "shrink"),
        "HeadshareError",
    }


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("errors", None),
        (
            "plan",
            "Choice HeadUnit Layout LowRankUnits Part Parts Place Removal Section Selection SharePlan Sublayer Tie "
            "section_kind",
        ),
        (
            "evaluation",
            "EvalText Metric Parallel Runner Settings TaskResult Writing continuations measure read_results samples_of "
            "table_of",
        ),
        (
            "training",
            "Closed Learning Loss Sharing SharingTrainer TrainSettings Trained TrainingMethod TrainingText train",
        ),
        ("experiments", "Case Compared Edit Grid METHODS Recipe compare method"),
    ],
)
def test_the_names_of_public_packages_are_these(package: str, names: str | None) -> None:
    module = importlib.import_module(f"headshare.{package}")
    if names is None:  # every error, drawn in the tree of the docstring
        errors = {name for name, value in vars(module).items() if isinstance(value, type)}
        assert all(name in module.__doc__ for name in errors)
    else:
        assert set(module.__all__) == set(names.split())


def test_importing_headshare_changes_nothing_but_what_registration_promises() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZATION_CONFIG_MAPPING["headshare"] is HeadshareConfig
    assert AUTO_QUANTIZER_MAPPING["headshare"].__module__ == "headshare.integrations.transformers.quantizer"
