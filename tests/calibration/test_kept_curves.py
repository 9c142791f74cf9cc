"""Cost curves kept in a file serve every budget and every protected layer, and no other model, text or setting."""

import json
import shutil
from pathlib import Path

import pytest

import headshare as hs
from headshare.calibration import choose
from support import tiny
from support.calibrated import TEXT
from support.command_line import Run
from support.texts import add_tokenizer

PLAN = ["plan", "model", "--no-measure", "--no-probe", "--prices", "prices.json", *TEXT, "--json"]


@pytest.fixture
def priced(things: Path, run: Run) -> Path:
    """A folder in which a plan was made, and its prices kept."""
    assert run(*PLAN, "-o", "first.json", "--save", "3%").status == 0
    return things


def test_other_budgets_and_protected_layers_come_from_the_same_prices(
    priced: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ["plan", "model", "--no-measure", "--no-probe", *TEXT, "--json"]
    asked = {"more": ["--save", "6%"], "kept": ["--save", "3%", "--protect", "2,3"]}
    for name, words in asked.items():
        assert run(*plain, "-o", f"{name}-anew.json", *words).status == 0
    before = (priced / "prices.json").read_bytes()
    monkeypatch.setattr(choose, "price_units", None)
    for name, words in asked.items():
        assert run(*PLAN, "-o", f"{name}.json", *words).status == 0
        assert (priced / f"{name}.json").read_bytes() == (priced / f"{name}-anew.json").read_bytes()
    assert hs.SharePlan.load(priced / "kept.json") != hs.SharePlan.load(priced / "first.json")
    assert (priced / "prices.json").read_bytes() == before


def test_share_reads_the_prices_that_plan_kept(priced: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "price_units", None)
    words = ["--save", "3%", "--no-probe", "--prices", "prices.json", *TEXT]
    assert run("share", "model", "out", *words).status == 0
    assert hs.open_checkpoint(priced / "out").plan == hs.SharePlan.load(priced / "first.json")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--seed", "1"], "another text"),
        (["--multiple", "2"], "another multiple of neurons: 1, not 2"),
        (["--parts", "qk+qkvo", "--allow", "remove"], "no costs of qk"),
    ],
)
def test_prices_of_another_kind_are_refused(words: list[str], what: str, priced: Path, run: Run) -> None:
    done = run(*PLAN, "-o", "second.json", "--save", "3%", *words)
    assert done.status != 0
    assert done.err.count("\n") == 1
    assert what in done.err
    assert "--prices" in done.err
    assert not (priced / "second.json").exists()


def test_prices_of_another_model_or_text_are_refused(priced: Path, run: Run) -> None:
    (priced / "text").write_text((priced / "text").read_text()[::-1])
    assert "it is of another text" in run(*PLAN, "-o", "second.json", "--save", "3%").err
    (priced / "model").unlink()
    add_tokenizer(tiny.make_llama(priced / "model", initializer_range=0.15))
    assert "it is of another model" in run(*PLAN, "-o", "second.json", "--save", "3%").err


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda _: "{", "not JSON"),
        (lambda _: "[]", "no file of cost curves"),
        (lambda text: text.replace('"headshare_prices":1', '"headshare_prices":2'), "its format is 2"),
        (lambda text: text.replace('"layer":1', '"layer":-1'), "there is no layer -1"),
        (lambda text: text.replace('"layer":1', '"layer":99'), "is not of this model"),
        (lambda text: json.dumps({**json.loads(text), "more": 1}), "more"),
    ],
)
def test_a_damaged_file_of_prices_is_one_error_and_stays(
    change: "type[str]", what: str, priced: Path, run: Run
) -> None:
    damaged = change((priced / "prices.json").read_text())
    (priced / "prices.json").write_text(damaged)
    done = run(*PLAN, "-o", "second.json", "--save", "3%")
    assert done.status != 0
    assert what in done.err
    assert done.err.count("\n") == 1
    assert (priced / "prices.json").read_text() == damaged


def test_prices_are_of_no_use_to_a_plan_by_weights(things: Path, run: Run) -> None:
    done = run("share", "model", "out", "--prices", "prices.json")
    assert done.status != 0
    assert "--prices would not be used" in done.err
    shutil.rmtree(things / "out", ignore_errors=True)
