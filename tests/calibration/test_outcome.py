"""A calibrated run's prediction of its outcome, and its measurement."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import headshare as hs
import headshare.calibration.run
from headshare.calibration.budget import Budget
from headshare.calibration.choose import plan_on
from headshare.calibration.costs.to_plan import Budgeted
from headshare.calibration.measure import measure
from headshare.checkpoint.refit_record import RefitRecord
from headshare.errors import CalibrationError, PlanError
from headshare.evaluation.verify import verify
from headshare.files.state_files import Workspace
from headshare.plan.units import Sublayer
from headshare.text.tokens import Calibration
from support import tiny
from support.calibrated import BY_OUTPUT, PLAN, TEXT, entry_of
from support.command_line import Run
from support.folders import WEIGHTS, left_behind
from support.texts import add_tokenizer


def by_hand(folder: Path, rows: torch.Tensor) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        losses = [model(input_ids=row[None], labels=row[None]).loss.double() for row in rows]
    return float(torch.stack(losses).mean().exp())


@pytest.fixture
def loud(things: Path) -> Path:
    """The same folder with a model whose units matter to what it predicts; those of the other one hardly do."""
    (things / "model").unlink()
    add_tokenizer(tiny.make_llama(things / "model", initializer_range=0.15))
    return things


def planned(*, probe: bool) -> Budgeted:
    """What PLAN asks for, without the command."""
    with hs.open_checkpoint("model") as dense:
        text = Calibration.load("text", dense, tokens=256, window=16)
        return plan_on(dense, text, Budget.parse(dense, save="3%", allow=["remove"]), probe=probe)


def test_a_plan_of_a_model_has_its_price_beside_what_its_refit_measures(loud: Path, run: Run) -> None:
    data = run(*PLAN, "--json").data
    assert left_behind(loud) == []
    assert data["price"] > 0
    assert (data["price"], data["price_unit"]) == (planned(probe=True).price, "nats")
    assert data["saved_bytes"] >= int(0.03 * sum(one.nbytes for one in load_file(loud / "model" / WEIGHTS).values()))
    assert run("share", "model", "out", "--plan", "plan.json", "--refit", *TEXT).status == 0
    with hs.open_checkpoint("model") as dense:
        held = Calibration.load("text", dense, tokens=256, window=16).split()[1].tokens
    assert data["measured"]["dense"] == pytest.approx(by_hand(loud / "model", held), rel=1e-5)
    assert data["measured"]["shared"] == pytest.approx(by_hand(loud / "out", held), rel=1e-5)
    assert data["measured"]["shared"] != data["measured"]["dense"]
    assert (data["measured"]["tokens"], data["measured"]["window"]) == (held.numel() - len(held), 16)
    words = run(*PLAN, "--overwrite").out
    assert f"divergence from the dense model {data['price']:.4g} nats a token" in words
    assert f"{data['measured']['shared']:,.3f}, dense {data['measured']['dense']:,.3f}" in words


def test_without_probing_a_plan_is_priced_in_relative_errors(loud: Path, run: Run) -> None:
    found = planned(probe=False)
    assert not found.in_nats
    assert found.plan != planned(probe=True).plan
    data = run(*PLAN, "--no-probe", "--no-measure", "--json").data
    assert (data["price"], data["price_unit"]) == (found.price, "relative error")
    assert hs.SharePlan.load(loud / "plan.json") == found.plan
    words = run(*PLAN, "--no-probe", "--no-measure", "--overwrite").out
    assert f"predicted price {found.price:.6g} (sum of squared relative errors)" in words
    assert "nats" not in words


def test_share_says_what_it_predicts_as_plan_does(loud: Path, run: Run) -> None:
    data = run(*BY_OUTPUT, "--json").data
    assert data["price_unit"] == "nats"
    assert 0 < data["price"] < 1
    assert "sum of squared relative errors" in run(*BY_OUTPUT, "--no-probe", "--overwrite").out
    again = run(*BY_OUTPUT, "--no-probe", "--overwrite", "--json").data
    assert again["price_unit"] == "relative error"
    planned(probe=False).plan.save(loud / "plan.json")
    given = run("share", "model", "out", "--plan", "plan.json", "--refit", *TEXT, "--overwrite", "--json").data
    assert (given["price"], given["price_unit"]) == (None, None)


def test_a_plan_that_is_not_measured_is_the_same_plan(things: Path, run: Run) -> None:
    measured = run(*PLAN, "--json").data
    data = run(*PLAN, "--overwrite", "--no-measure", "--json").data
    assert data["measured"] is None
    assert {**data, "measured": 0} == {**measured, "measured": 0}


def test_share_measures_what_it_wrote_if_asked(things: Path, run: Run) -> None:
    data = run(*BY_OUTPUT, "--measure", "--json").data
    with hs.open_checkpoint("model") as dense:
        held = Calibration.load("text", dense, tokens=256, window=16).split()[1]
    assert data["measured"] == measure(hs.open_checkpoint("model"), things / "out", held).to_dict()
    assert data["measured"]["shared"] == pytest.approx(by_hand(things / "out", held.tokens), rel=1e-5)
    assert data["refitted_tensors"] == len(RefitRecord.from_dict(entry_of(things / "out")["refit"]).tensors) > 0


def test_an_encoder_is_refitted_and_says_that_it_has_no_perplexity(things: Path, run: Run) -> None:
    add_tokenizer(tiny.make("bert", things / "bert"), bos=False)
    words = ["share", "bert", "out", "--ratio", "0.5", "--refit", "--measure", *TEXT]
    data = run(*words, "--json").data
    assert (data["measured"]["dense"], data["measured"]["shared"]) == (None, None)
    assert "does not predict the next token" in data["measured"]["note"]
    assert data["refitted_tensors"] > 0
    assert verify(hs.open_checkpoint("out"), hs.open_checkpoint("bert")).ok
    assert "not measured: BertForMaskedLM does not predict the next token" in run(*words, "--overwrite").out


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_an_encoder_is_planned_by_relative_errors_as_it_predicts_no_next_token(
    name: str, things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_tokenizer(tiny.make(name, things / name), bos=False)
    monkeypatch.setattr("headshare.calibration.choose.probe_prices", None)
    data = run("plan", name, "-o", "plan.json", "--save", "3%", *TEXT, "--no-measure", "--json").data
    assert data["price_unit"] == "relative error"
    assert data["price"] > 0
    assert hs.SharePlan.load("plan.json").removals


@pytest.mark.parametrize(("save", "allow"), [("3%", []), ("5000", ["remove"])])
def test_a_budget_is_met(save: str, allow: list[str], source: Path) -> None:
    with hs.open_checkpoint(source / "model") as dense:
        whole = sum(tensor.nbytes for tensor in load_file(source / "model" / WEIGHTS).values())
        budget = Budget.parse(dense, save=save, allow=allow)
    assert budget.saved_bytes == (5000 if save == "5000" else int(whole * 0.03))


def test_units_may_be_removed_under_a_budget_unless_told_otherwise(source: Path) -> None:
    with hs.open_checkpoint(source / "model") as dense:
        names = {
            words: [action.name for action in Budget.parse(dense, **dict(words)).actions]
            for words in [
                (("save", "3%"),),
                (("save", "3%"), ("allow", ())),
                (("save", "3%"), ("parts", "qkv")),
                (("save", "3%"), ("parts", "qkv"), ("allow", ("remove",))),
                (("ratio", 0.3),),
            ]
        }
    assert list(names.values()) == [
        ["remove", "sublayers", "narrow_values"],
        ["qkvo", "low_rank"],
        ["qkv"],
        ["qkv", "remove"],
        ["qkvo", "low_rank"],
    ]


@pytest.mark.parametrize(
    ("words", "removes"),
    [(["--save", "3%"], True), (["--save", "3%", "--allow", "none"], False), (["--allow", "none"], False)],
)
def test_the_command_line_says_whether_units_may_be_removed(
    words: list[str], removes: bool, things: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Budget] = []

    def stop(dense: object, budget: Budget, *_: object, **__: object) -> None:
        seen.append(budget)
        raise PlanError("stopped")

    monkeypatch.setattr("headshare.calibration.run.plan_calibrated", stop)
    assert run("plan", "model", "-o", "plan.json", *words, *TEXT).status != 0
    assert any(action.removes for action in seen[0].actions) == removes


def test_layers_keep_multiples_of_neurons_and_other_prices_are_not_taken(source: Path, tmp_path: Path) -> None:
    state = Workspace(tmp_path, CalibrationError)
    with hs.open_checkpoint(source / "model") as dense:
        text = Calibration.load(source / "text", dense, tokens=256, window=16)
        for multiple in (1, 16, 1):
            budget = Budget.parse(dense, save="7%", parts="gateup", allow=["remove"], multiple=multiple)
            plan = plan_on(dense, text, budget, probe=False, workspace=state).plan
            (neurons,) = (removal for removal in plan.removals if removal.layout.kind is Sublayer.FFN)
            counts = {neurons.layout.groups - len(neurons.indices(layer)) for layer in range(4)}
            assert all(count % 16 == 0 for count in counts) == (multiple == 16)
