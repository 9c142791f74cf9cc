"""--bits and --to on the commands that plan, share and shrink: one rounded folder, from one command or from a plan."""

import json
from pathlib import Path

import pytest

import headshare as hs
from headshare.evaluation.verify import verify
from support import tiny
from support.command_line import Run, assert_one_error_line
from support.folders import WEIGHTS, left_behind
from support.texts import a_text, add_tokenizer

TEXT = ["--calibration", "text", "--calibration-window", "16", "--calibration-tokens", "256"]
KEPT = [*TEXT, "--prices", "prices.json"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    add_tokenizer(tiny.make_llama(folder / "model", num_hidden_layers=3))
    a_text(folder / "text", 600)
    return folder


@pytest.fixture
def things(source: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").symlink_to(source / "model")
    for path in source.glob("*[!l]"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_plan_says_the_bits_and_share_rounds_to_them(things: Path, run: Run) -> None:
    words = ["--to", "20%", "--bits", "auto", "--no-probe", *KEPT]
    planned = run("plan", "model", "-o", "plan.json", "--no-measure", *words)
    assert planned.status == 0, planned.err
    assert "bits (by count of layers" in planned.out
    plan = hs.SharePlan.load(things / "plan.json")
    assert plan.bits is not None
    assert plan.sections
    # the next size comes from the same prices, and a plan's file and one command give the same numbers
    again = run("share", "model", "first", "--refit", *words)
    assert again.status == 0, again.err
    refit = run("share", "model", "second", "--plan", "plan.json", "--refit", *TEXT, "--json")
    assert refit.status == 0, refit.err
    assert (things / "first" / WEIGHTS).read_bytes() == (things / "second" / WEIGHTS).read_bytes()
    assert refit.data["shared_bytes"] <= 0.2 * refit.data["dense_bytes"]
    with hs.open_checkpoint(things / "second") as out, hs.open_checkpoint(things / "model") as dense:
        assert verify(out, dense).ok
        assert out.require_sharing().rounding is not None
    assert left_behind(things) == []


def test_bits_that_are_enough_are_priced_alone(things: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headshare.calibration.choose.price_units", None)
    done = run("shrink", "model", "out", "--to", "50%", "--bits", "auto", *TEXT, "--json")
    assert done.status == 0, done.err
    assert "bits alone reach this size" in done.err
    assert done.data["bytes"]["memory"]["after"] <= 0.5 * done.data["bytes"]["memory"]["before"]
    assert done.data["refitted_tensors"] == 0
    assert done.data["verified"]["ok"]
    card = (things / "out" / "README.md").read_text()
    assert "16 bits" not in card
    assert left_behind(things) == []


def test_a_rounded_folder_is_counted_in_the_type_that_is_written(things: Path, run: Run) -> None:
    done = run("shrink", "model", "out", "--to", "45%", "--bits", "8", "--dtype", "bfloat16", *TEXT, "--yes", "--json")
    assert done.status == 0, done.err
    half = done.data["bytes"]["memory"]["before"] / 2  # the model has 32-bit numbers
    assert 0.4 * half < done.data["bytes"]["memory"]["after"] <= 0.45 * half


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["shrink", "model", "out", "--save", "20%", "--bits", "3"], "'3' is not one of '16', '8', '4', 'auto'"),
        (["share", "model", "out", "--bits", "8", *TEXT, "--refit"], "no size is asked for"),
        (["share", "model", "out", "--to", "20%", "--save", "20%", *TEXT, "--refit"], "both of --save and --to"),
        (["share", "model", "out", "--to", "20%", "--ratio", "0.3", *TEXT, "--refit"], "--ratio would not be used"),
        (["shrink", "model", "out", "--to", "20%", "--bits", "8", "--target", "gguf", *TEXT], "its own numbers"),
        (["plan", "model", "--to", "1%", "--bits", "auto", "--no-probe", *TEXT], "cannot be reached"),
    ],
)
def test_what_cannot_be_done_is_one_line(words: list[str], why: str, things: Path, run: Run) -> None:
    done = run(*words)
    assert_one_error_line(done)
    assert why in done.err
    assert not (things / "out").exists()


def test_prices_of_rounding_that_somebody_changed_are_one_error(things: Path, run: Run) -> None:
    words = ["plan", "model", "--to", "50%", "--bits", "8", "--no-probe", "--no-measure", *KEPT]
    assert run(*words, "-o", "first.json").status == 0
    kept = json.loads((things / "prices.json").read_text())
    kept["rounding"][0]["costs"] = "none"
    (things / "prices.json").write_text(json.dumps(kept))
    done = run(*words, "-o", "second.json")
    assert_one_error_line(done)
    assert "costs of rounding are not valid" in done.err
