"""The command shrink: a smaller model in one command, its refusals, and what it says."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import headshare as hs
from headshare.cli.shrinking import command
from headshare.errors import PlanError
from headshare.evaluation.verify import Verification
from headshare.files.folder import not_written_by_us
from headshare.files.resume import run_folder
from headshare.sharing.size import parameter_bytes
from support import tiny
from support.byte_level import make_encoder, make_writer
from support.command_line import Run, assert_one_error_line
from support.folders import WEIGHTS, left_behind
from support.texts import a_text, add_tokenizer

TEXT = ["--calibration", "text", "--calibration-window", "16", "--calibration-tokens", "256"]
KEPT = [*TEXT, "--prices", "prices.json"]
WORDS = ["shrink", "model", "out", "--save", "20%", *KEPT]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text, and what it costs to give its parts up, which all tests of this file read."""
    folder = tmp_path_factory.mktemp("source")
    add_tokenizer(tiny.make_llama(folder / "model"))
    a_text(folder / "text", 600)
    options: dict[str, Any] = {"tokens": 256, "window": 16, "prices": folder / "prices.json"}
    shrunk = hs.shrink(folder / "model", folder / "whole", save="20%", calibration=str(folder / "text"), **options)
    (folder / "result.json").write_text(json.dumps(shrunk.to_dict()))
    return folder


@pytest.fixture
def things(source: Path, tmp_path: Path) -> Path:
    """These in the folder that commands run in."""
    (tmp_path / "model").symlink_to(source / "model")
    for name in ("text", "prices.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    return tmp_path


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss is large."""
    monkeypatch.setattr("headshare.shrinking.prediction.LARGE", -1.0)


def test_one_command_makes_verifies_and_measures_a_smaller_model(things: Path, run: Run) -> None:
    ended = run("shrink", "model", "out", "--save", "20%", *KEPT, "--text", "text")
    assert ended.status == 0, ended.err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in ended.out.splitlines() if "|" in line]
    assert [row[0] for row in rows if not row[0].startswith("--")] == [
        *("", "on disk", "in memory", "perplexity, held-out calibration text", "perplexity, text"),
    ]
    assert re.search(r"^Done: .*neurons removed.*; \d+ tensors refitted on 256 tokens of text\.$", ended.out, re.M)
    names: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in ended.out.splitlines()[-2:]), names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
    assert ended.err.index("predicted: ") < ended.err.index("2 of 4: repair")
    assert left_behind(things) == []


@pytest.mark.parametrize(
    ("make", "named", "source"),
    [
        (make_writer, "text that the model writes", "text written by model"),
        (make_encoder, "the mix of texts that comes with headshare", "headshare's mix of texts"),
    ],
)
def test_without_a_text_the_model_writes_one_or_else_has_the_mix_and_that_is_said(
    make: Callable[[Path], Path], named: str, source: str, tmp_path: Path, run: Run
) -> None:
    make(tmp_path / "model")
    words = ["--calibration-window", "32", "--calibration-tokens", "512"]
    ended = run("shrink", "model", "out", "--save", "10%", "--yes", *words)
    assert ended.status == 0, ended.err
    assert ended.err.count(f"calibrated on {named}: ") == 1
    assert "--calibration FILE" in ended.err
    assert ("model writes 496 tokens\n" in ended.err) == (make is make_writer)
    assert f"refitted on 512 tokens of {source}" in ended.out


def test_in_python_too_the_model_writes_where_no_text_is_given(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*given: Any, **_: object) -> None:
        raise LookupError(given[3].source)

    monkeypatch.setattr("headshare.shrinking.run.shrink_checkpoint", asked)
    for more, text in (({}, "self"), ({"calibration": "mix"}, "mix")):
        with pytest.raises(LookupError, match=f"^{text}$"):
            hs.shrink(source / "model", source / "out", save="10%", **more)


def test_the_result_has_what_was_measured(source: Path, run: Run) -> None:
    data = json.loads((source / "result.json").read_text())
    assert set(data) == {
        *("out", "bytes", "predicted", "perplexity", "done", "plan_digest", "refitted_tensors", "verified", "load"),
    }
    with hs.open_checkpoint(source / "model") as dense, hs.open_checkpoint(source / "whole") as written:
        before, after = (parameter_bytes(each) for each in (dense, written))
        assert data["bytes"]["memory"] == {"before": before, "after": after}
        assert after <= 0.8 * before
        refit = written.require_sharing().refit
        assert refit is not None
        assert len(refit.tensors) == data["refitted_tensors"]
    sizes = {name: (source / name / WEIGHTS).stat().st_size for name in ("model", "whole")}
    assert data["bytes"]["disk"] == {"before": sizes["model"], "after": sizes["whole"]}
    assert data["verified"]["ok"]
    assert data["verified"]["tensors_checked"] > 0


@pytest.mark.parametrize(
    ("words", "saved"),
    [
        (["--to", "80%"], 0.2),
        (["--save", "30kB"], 30_000 / 149_888),
        (["--to", "60kB", "--dtype", "bfloat16"], 1 - 60_000 / 74_944),
        (["--save", "20%", "--dtype", "bfloat16"], 0.2),
    ],
)
def test_amounts_are_of_the_weights_that_are_written(words: list[str], saved: float, things: Path, run: Run) -> None:
    data = run("shrink", "model", "out", *words, *KEPT, "--dry-run", "--json").data
    assert saved <= data["predicted"]["saved_fraction"] < saved + 0.02
    assert not (things / "out").exists()


REFUSALS = """
shrink model out                                                  | neither of --save and --to is given
shrink model out --save 20% --to 4GB                              | both of --save and --to is given
shrink model out --save some --calibration text                   | no amount to save
shrink model out --to 4XB --calibration text                      | no amount to shrink to
shrink model out --to 4GB --calibration text                      | the model's weights have 149.9 kB
shrink model out --to 100kB --dtype bfloat16 --calibration text   | have 74.9 kB in bfloat16
shrink model out --to 0 --calibration text                        | cannot be saved
shrink model out --save 0% --calibration text                     | cannot be saved
shrink model out --save 20% --calibration nothing.txt             | there is no file
shrink model text --save 20% --calibration text                   | exists
shrink model model/out --save 20% --calibration text              | inside the input
shrink model out --save 20% --calibration text --text nothing.txt | nothing.txt
shrink model out --save 20% --calibration text --protect one      | not a list of whole numbers
"""


@pytest.mark.parametrize("line", REFUSALS.strip().splitlines())
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(line: str, things: Path, run: Run) -> None:
    words, reason = (part.strip() for part in line.split(" | "))
    before = sorted(path.name for path in things.iterdir())
    ended = run(*words.split())
    assert_one_error_line(ended)
    assert reason in ended.err
    assert sorted(path.name for path in things.iterdir()) == before


@pytest.mark.usefixtures("large")
def test_a_large_loss_is_gone_on_with_only_when_that_is_said(things: Path, run: Run) -> None:
    refused = run("shrink", "model", "out", "--save", "20%", *KEPT)
    assert (refused.status, refused.out) == (1, "")
    assert not (things / "out").exists()
    warning, error = refused.err.splitlines()[-2:]
    assert warning.index("bfloat16") < warning.index("8 bits") < warning.index("a smaller saving: --save 10%")
    assert error.startswith("error: ")
    assert "--yes" in error
    assert run("shrink", "model", "out", "--save", "20%", *KEPT, "--yes").status == 0
    assert left_behind(things) == []


def test_a_dry_run_keeps_what_it_measured_for_the_run_that_follows(
    things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry = run("shrink", "model", "out", "--save", "20%", *TEXT, "--dry-run", "--json").data
    assert dry["dry_run"]
    assert not (things / "out").exists()

    def again(*_: object, **__: object) -> None:
        raise AssertionError("it was done already")

    monkeypatch.setattr("headshare.calibration.costs.local._paths", again)
    monkeypatch.setattr("headshare.calibration.costs.measured._Walk", again)
    smaller = run("shrink", "model", "out", "--save", "10%", *TEXT, "--json").data
    assert smaller["predicted"]["nats"] < dry["predicted"]["nats"]
    assert left_behind(things) == []


@pytest.mark.usefixtures("large")
def test_on_a_terminal_it_asks(things: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, True])
    judged: list[object] = []
    monkeypatch.setattr(command, "_is_terminal", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: next(answers))
    assert run(*WORDS).status == 1
    assert not (things / "out").exists()

    def repair(*arguments: object, **_: object) -> None:
        judged.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("headshare.calibration.run.CalibratedRun.refit", repair)
    assert run(*WORDS).status == 130
    assert len(judged) == 1


@pytest.mark.parametrize(
    "place",
    ["headshare.sharing.writer._write_files", "headshare.calibration.run.measure"],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_model(
    place: str, source: Path, things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(place, run, monkeypatch)
    assert run_folder(things / "out", "calibrating").exists()
    gone_on = run(*WORDS, "--json").data
    assert (things / "out" / WEIGHTS).read_bytes() == (source / "whole" / WEIGHTS).read_bytes()
    assert gone_on["perplexity"] == json.loads((source / "result.json").read_text())["perplexity"]
    assert left_behind(things) == []


def test_an_output_that_another_request_wrote_is_not_taken_for_its_own(
    things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped("headshare.shrinking.run.verify", run, monkeypatch)
    other = run("shrink", "model", "out", "--save", "10%", *KEPT)
    assert (other.status, other.out) == (1, "")
    assert "out exists" in other.err
    assert run("shrink", "model", "out", "--save", "10%", *KEPT, "--overwrite").status == 0
    assert left_behind(things) == []


def stopped(place: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the command as Ctrl-C does, in this function."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, stop)
        ended = run(*WORDS)
    assert (ended.status, ended.out) == (130, "")
    assert ended.err.endswith("stopped. Run the same command to go on.\n")


def test_in_python_a_large_loss_is_an_error_that_keeps_what_was_measured(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": 256, "window": 16, "prices": source / "prices.json"}
    options |= {"save": "20%", "calibration": str(source / "text")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headshare.shrinking.prediction.LARGE", -1.0)
        with pytest.raises(PlanError, match=r"that is a large loss\. What costs less: .* 8 bits") as refused:
            hs.shrink(source / "model", tmp_path / "out", **options)
    assert "yes=True" in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert hs.shrink(source / "model", tmp_path / "out", **options).verified.ok


def test_an_output_that_does_not_verify_is_an_error(things: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "headshare.shrinking.run.verify", lambda *_: Verification(ok=False, problems=["a tensor differs"])
    )
    ended = run(*WORDS)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.splitlines()[-1] == "error: out is not as it should be: a tensor differs. Do not use it."


def test_an_encoder_is_made_smaller_and_has_no_perplexity(tmp_path: Path, run: Run) -> None:
    add_tokenizer(tiny.make("mpnet", tmp_path / "model"))
    a_text(tmp_path / "text", 600)
    refused = run("shrink", "model", "out", "--save", "10%", *TEXT, "--text", "text")
    assert_one_error_line(refused)
    assert "--text would not be used" in refused.err
    ended = run("shrink", "model", "out", "--save", "10%", *TEXT)
    assert ended.status == 0, ended.err
    assert "perplexity not measured" in ended.out
    assert "relative error" in ended.err
    assert "perplexity not measured" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_says_what_was_measured(source: Path) -> None:
    card = (source / "whole" / "README.md").read_text()
    measured = json.loads((source / "result.json").read_text())["perplexity"]["held_out"]
    row = f"| {measured['dense']:,.2f} | {measured['shared']:,.2f} |"
    assert row in re.sub(" +", " ", card)
    assert "was not measured" not in card
    assert list(not_written_by_us(source / "whole")) == []
