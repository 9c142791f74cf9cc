"""Methods out of a person's own file: the one in the docs is compared, and files that cannot be used are refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headshare.errors import OptionError
from headshare.experiments import METHODS
from headshare.experiments.own_methods import methods_from
from support.command_line import Run, assert_one_error_line

DOCS = Path(__file__).parents[2] / "docs" / "comparing.md"
BEGIN = "from headshare.experiments import method\n"


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The file of the docs."""
    lines = DOCS.read_text().split("\n")
    first = lines.index("    from headshare.experiments import Case, method")
    last = lines.index('        return case.directshare("v")')
    file = tmp_path / "mine.py"
    file.write_text("\n".join(line[4:] for line in lines[first : last + 1]) + "\n")
    return file


def cells(found: Any) -> dict[str, dict[str, Any]]:
    return {cell["method"]: cell for cell in found.data["cells"]}


def test_the_method_of_the_docs_is_compared_like_any_other(mine: Path, place: Path, run: Run, tmp_path: Path) -> None:
    words = ["compare", place / "model", "--text", place / "test", "--window", 32, "--ratios", 0.25, "--json"]
    words += ["--methods-from", mine]
    found = cells(run(*words, "--methods", "by-values,match-v"))
    assert found["by-values"]["losses"] == found["match-v"]["losses"]
    # what was measured is kept, until the file changes
    kept = {row["method"]: row["key"] for row in json.loads((tmp_path / "compared" / "cells.json").read_text())}
    mine.write_text(mine.read_text().replace('"v"', '"k"'))
    again = cells(run(*words, "--methods", "by-values,match-v"))
    assert again["match-v"]["key"] == kept["match-v"]
    assert again["by-values"]["key"] != kept["by-values"]
    # a file whose methods nobody asks for is refused
    refused = run(*words, "--methods", "directshare")
    assert_one_error_line(refused)
    assert "--methods-from would not be used" in refused.err
    assert "by-values" in refused.err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "there is no file"),
        ("x = 1", "registers no method"),
        ("x = 1\n1 / 0\n", "fails at line 2: division by zero"),
        ("x = (", "fails"),
        (f"{BEGIN}@method('int8', 'ours')\ndef f(case): ...\n", "'int8', which is a method already"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_changes_nothing(text: str | None, why: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    before = dict(METHODS)
    with pytest.raises(OptionError, match=why):
        methods_from(file)
    assert before == METHODS


def test_a_recipe_cannot_name_a_file_to_run(mine: Path, place: Path, run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {place / 'model'}\ntext: {place / 'test'}\nmethods_from: {mine}\n")
    found = run("compare", "--config", recipe)
    assert_one_error_line(found)
    assert "methods_from" in found.err
    assert "by-values" not in METHODS
