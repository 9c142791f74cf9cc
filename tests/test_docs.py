"""What the pages say, runs; and the public names are the ones that are meant."""

import csv
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import headshare as hs
from headshare.cli.app import main
from headshare.cli.catalogue.commands import COMMANDS
from headshare.integrations.transformers.config import HeadshareConfig
from support import gguf_models
from support.nearest import stand_in
from support.texts import a_text, add_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


# the pages whose commands and Python run, each from top to bottom, in a folder of its own
RUN = [
    "README.md",
    *(f"docs/{name}.md" for name in ("quickstart", "steps", "repair", "loading", "gguf", "duplicates", "paper", "faq")),
]
SMALL = {  # what makes a command of a page small, by the options or the command that it has
    "--calibration": ["--calibration-window", "32", "--calibration-tokens", "512"],
    "--text": ["--window", "32"],
    "train": ["--context", "32", "--use_cpu", "true", "--max_steps", "1"],
    "generate": ["--tokens", "2"],
    "bench": ["--repeats", "2", "--loads", "1"],
}


def commands(page: str) -> list[list[str]]:
    """The headshare commands of a page, in order, without comments."""
    return [shlex.split(line, comments=True) for line in re.findall(r"^    (headshare .*)$", page, re.M)]


OTHERS = {"lm_eval", "accelerate", "trl", "transformers", "torchrun", "jupyter", "python"}


def run(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    became: list[list[str]] = []  # what `headshare run` would become: some is not installed here
    monkeypatch.setattr("headshare.integrations.transformers.startup.command.become", became.append)
    monkeypatch.setattr("headshare.integrations.transformers.startup.always.place", lambda: Path("registered.pth"))
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert [one[0] in OTHERS for one in became] == [True] * (words[1] == "run")
    assert ended.value.code == 0, (words, capsys.readouterr().err)


@pytest.mark.parametrize("name", RUN)
def test_what_a_page_says_runs_in_its_order(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / name).read_text()
    monkeypatch.chdir(tmp_path)
    stand_in(monkeypatch)
    a_text(tmp_path / "FILE", 1200)
    if name == "docs/gguf.md":  # it needs a tokenizer of the kinds that llama.cpp has
        gguf_models.make("llama", tmp_path / "MODEL")
    else:
        add_tokenizer(llama).rename(tmp_path / "MODEL")
    shutil.copytree(tmp_path / "MODEL", tmp_path / "llama-2-7b")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "DATA").mkdir()
    for task in ("piqa", "boolq"):
        (tmp_path / "DATA" / f"{task}.jsonl").write_text('{"query": "w4 w5", "choices": ["w6", "w7 w8"], "gold": 1}\n')
    if name in ("docs/loading.md", "docs/faq.md"):  # they begin where another page ends
        run(["headshare", "share", "MODEL", "OUT", "--ratio", "0.3"], monkeypatch, capsys)
    for words in commands(page):
        more = [option for key, options in SMALL.items() if key in words for option in options]
        if words[1] == "shrink":
            more.append("--yes")  # a random model loses much
        run(words + more, monkeypatch, capsys)
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M):
        exec(code, names)
    assert type(names.get("model")).__name__ == "LlamaForCausalLM" or "from_pretrained" not in page


def test_what_pages_import_is_there() -> None:
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    imports = {line for page in pages for line in re.findall(r"^(?:from|import) headshare.*$", page, re.M)}
    assert len(imports) > 3
    for line in imports:
        exec(line, {})


def test_every_command_stands_on_a_page_that_runs() -> None:
    pages = "\n".join((ROOT / name).read_text() for name in RUN)
    assert {words[1] for words in commands(pages)} == set(COMMANDS) - {"demo"}


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

    listed = README[README.index("## Supported models") :]
    page = (ROOT / "docs" / "models.md").read_text()
    named = {"llama": "Llama", "phi3": "Phi-3", "gpt2": "GPT-2", "gpt_neox": "GPT-NeoX", "opt": "OPT", "bert": "BERT"}
    named |= {"baichuan": "Baichuan 2", "falcon": "Falcon", "mpnet": "MPNet", "olmo2": "OLMo 2", "roberta": "RoBERTa"}
    assert {family.name for family in FAMILIES} == set(named)
    assert all(name in listed and f"| {name} |" in page for name in named.values())


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 9000


def test_figures_of_the_readmes_picture_stand_where_they_are_said_to_stand() -> None:
    """Update studies/loss_against_bytes.csv and draw again when such a figure changes."""
    with (ROOT / "studies" / "loss_against_bytes.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["source"] != "trial"]
    stands = {row["method"]: row["perplexity_over_dense"] in (ROOT / row["source"]).read_text() for row in rows}
    assert rows
    assert all(stands.values()), stands


def test_the_readmes_picture_names_every_method_of_its_figures() -> None:
    drawn = (ROOT / "docs" / "figures" / "loss-against-bytes.svg").read_text()
    with (ROOT / "studies" / "loss_against_bytes.csv").open() as file:
        methods = {row["method"].partition(" + our refit")[0] for row in csv.DictReader(file)} - {"SVD-LLM"}
    assert len(methods) == 10
    assert [name for name in methods if f">{name}<" not in drawn] == []


def test_the_site_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f": {path.name}\n" not in navigation] == []


def test_the_public_names_are_these() -> None:
    assert hs.__all__ == sorted(hs.__all__)
    assert set(hs.__all__) == {
        *("open_checkpoint", "Checkpoint", "load"),
        *("score_units", "make_plan", "match_function", "SharePlan"),
        *("Calibration", "Budget", "plan_by_output"),
        *("share", "refit", "expand", "exact_plan", "repeat_layers", "export_gguf", "verify", "estimate", "shrink"),
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
            "table_of write_tasks",
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
