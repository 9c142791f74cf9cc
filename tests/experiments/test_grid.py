"""The grid of methods: equal bytes, cells that are kept, rows that say why there is nothing, errors."""

import csv
import io
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import headshare as hs
from headshare.errors import CalibrationError, EvaluationError, OptionError, TrainingError
from headshare.evaluation import EvalText, Parallel, Settings, measure
from headshare.evaluation.harness import named
from headshare.evaluation.perplexity import evaluate
from headshare.evaluation.task_files import TASKS
from headshare.experiments import METHODS, Compared, Grid, Recipe, compare
from headshare.experiments.case import REFIT, TRAINED, Case, Common
from headshare.experiments.cells import CELLS, Asked, TakenUnits, read_cells
from headshare.experiments.methods import DELETING, SHARING, TYING
from headshare.experiments.peers.registry import PEERS
from headshare.experiments.report.tables import as_csv, table, verdict
from headshare.files.state_files import Workspace
from headshare.integrations.transformers.loading import load_model, unique_parameter_bytes
from headshare.matching.estimate import estimate
from headshare.plan.units import HeadUnit
from headshare.text.tokens import Calibration
from headshare.training import Sharing, TrainSettings, train
from support import tiny
from support.nearest import stand_in
from support.texts import a_text, add_tokenizer

EDITS = [name for name, method in METHODS.items() if not method.refits and name not in (*TRAINED, "gptq4")]
PLANS = [name for name, method in METHODS.items() if method.refits and name not in PEERS]
# fewer heads change there than are asked for
LESS = ("directshare-published",)


@pytest.fixture(scope="module")
def compared(place: Path) -> dict[str, Compared]:
    """Every method, plain and refitted, at a half."""
    names = [*EDITS, *PLANS, *(f"{name}{REFIT}" for name in PLANS)]
    cells = run(place, place / "all", *names, ratios=(0.5,))
    return {cell.method: cell for cell in cells}


def run(place: Path, out: Path, *methods: str, ratios: tuple[float, ...] = (0.25,), **more: Any) -> list[Compared]:
    dense = hs.open_checkpoint(place / "model")
    text = Calibration.load(str(place / "calibration"), dense, tokens=1024, window=32, seed=0)
    grid = Grid(methods, ratios, text=EvalText(place / "test", 32))
    return compare(dense, grid, out, **{"calibration": text, **more})


def value(cell: Compared) -> float:
    assert cell.perplexity is not None
    return cell.perplexity


@pytest.mark.parametrize("name", PLANS)
def test_a_method_saves_at_least_the_bytes_that_sharing_saves(
    name: str, compared: dict[str, Compared], place: Path
) -> None:
    dense = hs.open_checkpoint(place / "model")
    wanted, cell, plain = estimate(dense, 0.5, parts="qkv").saved_bytes, compared[name], compared["dense"]
    assert not cell.failed
    assert (0 if name in LESS else wanted) < cell.saved_bytes + 1 <= 1.4 * wanted
    assert plain.memory_bytes is not None
    assert cell.memory_bytes == plain.memory_bytes - cell.saved_bytes
    assert plain.disk_bytes is not None
    assert cell.disk_bytes is not None
    assert abs(plain.disk_bytes - cell.disk_bytes - cell.saved_bytes) < 8192  # headers
    assert value(cell) != value(plain)


def test_the_dense_row_is_the_dense_model(compared: dict[str, Compared], place: Path) -> None:
    checkpoint = hs.open_checkpoint(place / "model")
    found = evaluate(checkpoint, (place / "test").read_text(), window=32)
    assert value(compared["dense"]) == pytest.approx(found.perplexity)
    assert compared["dense"].memory_bytes == unique_parameter_bytes(load_model(checkpoint))
    assert compared["dense"].disk_bytes == (place / "model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", PLANS)
def test_a_refit_changes_what_is_measured_and_no_bytes(name: str, compared: dict[str, Compared]) -> None:
    plain, refitted = compared[name], compared[f"{name}{REFIT}"]
    assert value(plain) != value(refitted)
    assert (plain.saved_bytes, plain.memory_bytes) == (refitted.saved_bytes, refitted.memory_bytes)


@pytest.mark.parametrize("name", EDITS)
def test_edits_say_what_is_to_be_known_of_their_bytes(name: str, compared: dict[str, Compared]) -> None:
    cell = compared[name]
    assert cell.note
    assert (cell.disk_bytes, cell.memory_bytes) == (None, None)
    assert (cell.saved_bytes == 0) == (name == "magnitude-zeros")
    assert value(cell) != value(compared["dense"])
    assert cell.note in table([cell])


def test_every_cell_is_measured_once_and_a_stopped_grid_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, stop = list[str](), [True]
    for name in ("directshare", "magnitude", "random-donors"):
        monkeypatch.setitem(METHODS, name, counted(METHODS[name], made, stop))
    names = ("directshare", "magnitude", "random-donors")
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path, *names)
    kept = json.loads((tmp_path / "cells.json").read_text())
    assert [cell["method"] for cell in kept] == ["dense", "directshare"]
    assert not (tmp_path / "table.md").exists()
    cells = run(place, tmp_path, *names)
    assert made == ["directshare", "magnitude", "magnitude", "random-donors"]
    assert run(place, tmp_path, *names) == cells
    assert len(made) == 4
    more = run(place, tmp_path, *names, ratios=(0.25, 0.5))
    assert [cell.ratio for cell in more] == [0.0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5]
    assert len(made) == 7
    assert not (tmp_path / "model").exists()


def test_what_saves_the_same_at_every_ratio_is_measured_once(place: Path, tmp_path: Path) -> None:
    cells = run(place, tmp_path, "directshare", "int8", ratios=(0.25, 0.5))
    assert [cell.title for cell in cells] == ["dense", "int8", "directshare 0.25", "directshare 0.5"]
    assert [("int8" in line, line[:8]) for line in verdict(cells).splitlines()] == [
        (True, "At 0.25,"),
        (True, "At 0.5, "),
    ]


def counted(method: Any, made: list[str], stop: list[bool]) -> Any:
    def make(case: Any) -> Any:
        made.append(method.name)
        if method.name == "magnitude" and stop.pop() if stop else False:
            raise KeyboardInterrupt
        return method.make(case)

    return replace(method, make=make)


def test_folders_of_other_names_are_left_alone(tmp_path: Path) -> None:
    """The model that is compared may lie in the folder that the comparison is written to."""
    dense = add_tokenizer(tiny.make_llama(tmp_path / "model"))
    (tmp_path / "rounded").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis").write_text("mine")
    text = EvalText(a_text(tmp_path / "text", 200), 32)
    compare(hs.open_checkpoint(dense), Grid(("directshare",), (0.5,), text=text), tmp_path)
    assert hs.open_checkpoint(dense).plan is None
    assert (tmp_path / "rounded").is_dir()
    assert (tmp_path / "work" / "thesis").read_text() == "mine"
    assert not list(tmp_path.glob(".headshare-*"))


def test_translations_are_compared_too(model: Path, tmp_path: Path) -> None:
    """As `headshare eval` measures them."""
    (tmp_path / "en").write_text("a cat\nthe wind\n")
    (tmp_path / "fr").write_text("un chat\nle vent\n")
    parallel = Parallel(tmp_path / "en", tmp_path / "fr", "English: {source}\nFrench:", tokens=8)
    dense = hs.open_checkpoint(model)
    cells = compare(dense, Grid(("directshare",), (0.5,), parallel=parallel), tmp_path / "out")
    shared = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "shared")
    for cell, folder in zip(cells, (model, shared), strict=True):
        (row,) = measure([folder], parallel=parallel)
        (found,) = cell.results
        assert (found.task, found.metrics) == ("translation of en", row.metrics)
    assert (
        "| ratio | method | plan | saved | disk, MiB | memory, MiB | perplexity | divergence | translation of en |"
        in (tmp_path / "out/table.md").read_text()
    )
    with pytest.raises(EvaluationError, match="both a source and a reference"):
        Recipe(source=tmp_path / "en").grid()


def test_what_eval_kept_of_the_dense_model_is_not_measured_again(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "en").write_text("a cat\nthe wind\n")
    (tmp_path / "fr").write_text("un chat\nle vent\n")
    parallel = Parallel(tmp_path / "en", tmp_path / "fr", tokens=8)
    measure([model], parallel=parallel, out=tmp_path / "out")
    asked: list[str] = []
    real = Parallel.run
    monkeypatch.setattr(Parallel, "run", lambda self, runner, key: asked.append(runner.name) or real(self, runner, key))
    grid = Grid(("directshare",), (0.5,), parallel=parallel)
    cells = compare(hs.open_checkpoint(model), grid, tmp_path / "out")
    assert asked == ["directshare"]
    assert (cells[0].results[0].model, cells[0].results[0].key) == ("dense", cells[0].key)
    asked.clear()
    compare(hs.open_checkpoint(model), grid, tmp_path / "new")
    measure([model], parallel=parallel, out=tmp_path / "new")
    assert asked == ["dense", "directshare"]


def test_a_page_says_by_which_versions_each_cell_was_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headshare.experiments.cell_runner.versions", lambda *_: {"torch": "1.0"})
    run(place, tmp_path, "directshare")
    monkeypatch.undo()
    run(place, tmp_path, "directshare", "magnitude")
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["versions"]["torch"] == f"1.0 and {version('torch')}"
    assert (about["dtype"], about["training"]) == ("auto", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "9"], "--tokens would not be used: there is no --text"),
        (["--few-shot", "1"], "--few-shot would not be used"),
        (["--language", "french"], "--language would not be used"),
        (["--calibration-tokens", "99"], "--calibration-tokens would not be used"),
        (["--limit", "3"], "--limit would not be used"),
        (["--batch-size", "4"], "--batch-size would not be used"),
    ],
)
@pytest.mark.parametrize("name", ["compare", "eval"])
def test_options_that_would_not_be_used_are_refused(
    name: str, words: list[str], message: str, place: Path, tmp_path: Path, command: Callable
) -> None:
    if name == "eval" and words[0].startswith("--calibration"):
        return
    given = ["--text", place / "test"] if words[0] != "--tokens" else ["--tasks", "piqa", "--data-dir", tmp_path]
    status, _, err = command(name, place / "model", "--out", tmp_path / "out", *given, *words)
    assert status == 1
    assert message in err


def test_another_text_or_model_is_another_cell(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, "directshare")
    other = tmp_path / "other"
    other.mkdir()
    (other / "test").write_text((place / "test").read_text() + " w4 w5" * 40)
    (other / "model").symlink_to(place / "model")
    (other / "calibration").symlink_to(place / "calibration")
    run(other, tmp_path, "directshare")
    assert len(json.loads((tmp_path / "cells.json").read_text())) == 4


def test_a_method_that_this_model_cannot_have_is_a_row_that_says_why(place: Path, tmp_path: Path) -> None:
    found = run(place, tmp_path, "magnitude", "directshare", ratios=(0.9,))
    assert {cell.method for cell in found if cell.failed} == {"magnitude", "directshare"}
    assert all(cell.failed.split(".")[0] in table(found) for cell in found)


def test_what_could_not_be_had_is_tried_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package may be installed by then."""
    for name in ("gptqmodel", "gptqmodel.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install" in run(place, tmp_path, "gptq4", "directshare")[1].failed
    stand_in(monkeypatch)
    found = run(place, tmp_path, "gptq4", "directshare")
    assert found[1].disk_bytes
    assert [cell.method for cell in read_cells(tmp_path / CELLS)] == ["dense", "directshare", "gptq4"]
    assert run(place, tmp_path, "gptq4", "directshare") == found


@pytest.mark.parametrize(("grid", "says"), [
    ({"methods": ("int8+refit",)}, "no readout"),
    ({"methods": ()}, "nothing to compare"),
    ({"ratios": ()}, "nothing to compare"),
    ({"ratios": (0.1, 1.0)}, "ratio of 1.0"),
    ({"text": None}, "nothing to measure by"),
    ({"methods": ("postshare",)}, "postshare trains: say on what"),
])  # fmt: skip
def test_grids_that_mean_nothing_are_refused(grid: dict[str, Any], says: str, place: Path) -> None:
    given = {"methods": ("directshare",), "ratios": (0.1,), "text": EvalText(place / "test", 32), **grid}
    with pytest.raises(EvaluationError, match=says):
        Grid(**given)


def test_a_method_that_does_not_exist_is_refused(place: Path) -> None:
    with pytest.raises(OptionError, match=r"no method 'cats'\. There are: .*directshare"):
        Grid(methods=("cats",), ratios=(0.1,), text=EvalText(place / "test", 32))


def test_what_cannot_be_compared_leaves_no_folder(place: Path, tmp_path: Path) -> None:
    grid = Grid(("directshare",), (0.5,), text=EvalText(a_text(tmp_path / "text", 20), 32))
    with hs.open_checkpoint(place / "model") as dense, pytest.raises(EvaluationError, match="window"):
        compare(dense, grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_methods_that_look_at_a_text_ask_for_one(place: Path, tmp_path: Path) -> None:
    for name in ("auto", "llm-pruner", "directshare+refit", "gptq4", "directshare+gptq4"):
        with pytest.raises(EvaluationError, match=f"^{re.escape(name)} looks at a text: .* --calibration"):
            run(place, tmp_path, "directshare", name, calibration=None)
    assert not list(tmp_path.iterdir())  # nothing is measured before
    assert not run(place, tmp_path, "directshare", calibration=None)[1].failed


def test_a_folder_with_other_cells_is_refused_and_left(place: Path, tmp_path: Path) -> None:
    (tmp_path / "cells.json").write_text('{"a": 1}')
    with pytest.raises(EvaluationError, match="holds no cells"):
        run(place, tmp_path, "directshare")
    assert (tmp_path / "cells.json").read_text() == '{"a": 1}'


def test_a_page_of_the_users_is_not_written_over(place: Path, tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("my notes")
    with pytest.raises(EvaluationError, match=r"has a table\.md and no cells\.json.* Move it"):
        run(place, tmp_path, "directshare")
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert (tmp_path / "table.md").read_text() == "my notes"


def test_the_same_units_are_deleted_best_matched_first(place: Path, tmp_path: Path) -> None:
    """A unit that is deleted saves more than one that is tied, so fewer are: those that DirectShare would tie first."""
    dense = hs.open_checkpoint(place / "model")
    case = Case(Common(dense, None, Workspace(tmp_path / "work", CalibrationError)), Asked(0.5), 0)
    plan = METHODS["deletion-same"].make(case)
    assert isinstance(plan, hs.SharePlan)
    gone = {HeadUnit(layer, group) for layer in range(4) for group in plan.removals[0].indices(layer)}
    scores = hs.score_units(dense)
    first = [
        {tie.recipient for tie in hs.make_plan(scores, few / 8).selections[0].ties} for few in range(1, len(gone) + 1)
    ]
    assert first[-1] == gone
    assert len(gone) < case.directshare().ties


def cell(method: str, *losses: float, ratio: float = 0.3) -> Compared:
    return Compared(f"{method}{ratio}", method, ratio, losses=losses, divergences=losses)


def test_the_verdict_follows_from_the_numbers() -> None:
    cells = [
        cell("dense", 0.0, 0.0, 0.0, ratio=0.0),
        cell("auto+refit", 1.0, 2.0, 3.0),
        cell("deletion+refit", 1.5, 2.4, 3.6),
    ]
    cells.append(cell("int8", 0.1, 0.2, 0.3, ratio=0.0))
    words = verdict(cells).splitlines()
    assert words[0] == ("At 0.3, by perplexity, best first: int8 (1.221), auto+refit (7.389), deletion+refit (12.18).")
    error = statistics.stdev([0.5, 0.4, 0.6]) / 3**0.5
    assert words[1].startswith(
        "The best that shares, auto+refit, is ahead of the best that only deletes, deletion+refit"
    )
    assert words[1].endswith(f": -0.5000 nats a token (standard error {error:.4f}).")
    assert "is behind" in verdict([cell("auto", 1.5, 2.4, 3.6), cell("deletion", 1.0, 2.0, 3.0)])
    assert "is level with" in verdict([cell("auto", 1.5, 1.4, 3.6), cell("deletion", 1.0, 2.0, 3.0)])
    trained = [cell("postshare", 0.1, 0.2, 0.3), cell("directshare+gptq4", 0.1, 0.2, 0.3)]
    assert verdict([*cells, *trained]).splitlines()[1] == words[1]
    neurons = cell("neurons+refit", 0.5, 1.4, 2.6)
    assert "is behind the best that only deletes, neurons+refit" in verdict([*cells, neurons])
    assert "standard error" not in verdict([cell("auto", 1.0), cell("deletion", 2.0)])  # of one window there is none
    assert set(SHARING) | set(DELETING) | set(TYING) <= set(METHODS)


def test_a_plan_that_ties_nothing_deletes() -> None:
    """Methods that may share, and need not."""
    mixed, output = cell("auto+refit", 1.0, 2.0, 3.0), cell("output", 1.2, 2.1, 3.1)
    cells = [mixed, output, cell("deletion", 1.5, 2.4, 3.6)]
    assert "The best that shares, auto+refit, is ahead of the best that only deletes, deletion: " in verdict(cells)
    cells[0] = replace(mixed, given_up=TakenUnits(3, 1, 0))
    assert "shares, auto+refit (3 tied, 1 removed), is ahead of the best that only deletes, deletion" in verdict(cells)
    cells[0] = replace(mixed, given_up=TakenUnits(0, 4, 1024))
    told = "The best that shares, output, is behind the best that only deletes, auto+refit (4 removed, 1,024 neurons): "
    assert told in verdict(cells)


def test_a_unit_that_is_tied_part_by_part_counts_once(place: Path) -> None:
    dense = hs.open_checkpoint(place / "model")
    plan = hs.make_plan(hs.score_units(dense, "separate"), 0.5)
    units = {tie.recipient for selection in plan.selections for tie in selection.ties}
    assert TakenUnits.of(plan) == TakenUnits(len(units), 0, 0)
    assert len(units) < plan.ties


def test_a_note_names_the_ratio_where_it_is_another_at_another() -> None:
    zeros = [replace(cell("magnitude-zeros", 1.0, ratio=ratio), note=f"{ratio} zeros") for ratio in (0.1, 0.3)]
    means = [replace(cell("mean-unit", 1.0, ratio=ratio), note="counted") for ratio in (0.1, 0.3)]
    pulled = [replace(cell("postshare", 1.0, ratio=ratio), note=note) for ratio, note in ((0.1, ""), (0.5, "in vain"))]
    notes = table([*zeros, *means, *pulled]).split("\n\n")[1].splitlines()
    assert notes == [
        "magnitude-zeros 0.1: 0.1 zeros.", "magnitude-zeros 0.3: 0.3 zeros.", "mean-unit: counted.",
        "postshare 0.5: in vain.",
    ]  # fmt: skip


def test_a_cell_says_what_its_plan_takes(compared: dict[str, Compared]) -> None:
    given = {name: cell.given_up for name, cell in compared.items()}
    half = 4 * 2 // 2  # int(ratio x layers x units): four layers, two units each
    assert given["directshare"] == given["directshare+refit"] == given["random-donors"] == TakenUnits(half, 0, 0)
    for name in ("deletion", "deletion-same", "magnitude", "llm-pruner"):
        assert given[name] == TakenUnits(0, round(2 * sum(compared[name].by_layer)), 0) != TakenUnits(0, 0, 0)
    assert given["neurons"] is not None
    assert (given["neurons"].tied, given["neurons"].removed) == (0, 0)
    assert f"| neurons | {given['neurons'].neurons:,} neurons | " in table([compared["neurons"]])
    assert f"neurons,0.5,0,0,{given['neurons'].neurons}," in as_csv([compared["neurons"]])
    assert {given[name] for name in ("dense", *EDITS)} == {None}


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].reads and name not in TRAINED])
def test_methods_that_look_at_no_text_need_none(place: Path, tmp_path: Path, name: str) -> None:
    assert not any(cell.failed for cell in run(place, tmp_path, name, calibration=None))


def test_what_is_saved_is_of_what_is_stored_whatever_it_is_measured_in(place: Path, tmp_path: Path) -> None:
    dense, names = hs.open_checkpoint(place / "model"), ("int8", "magnitude-zeros", "mean-unit", "directshare")
    saved = []
    for dtype in ("float32", "bfloat16"):
        grid = Grid(names, (0.5,), text=EvalText(place / "test", 32), settings=Settings(dtype=dtype))
        saved.append([one.saved_bytes for one in compare(dense, grid, tmp_path / dtype)])
    assert saved[0] == saved[1]
    assert saved[0][1] > 0


def test_divergence_is_from_the_dense_model_and_zero_for_itself(compared: dict[str, Compared]) -> None:
    assert max(map(abs, compared["dense"].divergences)) < 1e-6
    for name in ("directshare", "deletion", "int8"):
        assert min(compared[name].divergences) > 0
    assert sum(compared["int8"].divergences) < sum(compared["directshare"].divergences)


def test_the_tables_hold_every_cell(compared: dict[str, Compared]) -> None:
    cells = list(compared.values())
    lines = table(cells).split("\n\n")[0].splitlines()
    assert len(lines) == len(cells) + 2
    assert len({line.count("|") for line in lines}) == 1
    rows = list(csv.DictReader(io.StringIO(as_csv(cells))))
    measured = [row for row in rows if row["metric"] == "perplexity"]
    assert [row["method"] for row in measured] == [one.method for one in cells]
    assert [float(row["value"]) for row in measured] == [value(one) for one in cells]
    assert len(rows) == 2 * len(cells)


def training(place: Path, **more: Any) -> TrainSettings:
    """Four large steps."""
    arguments = {"use_cpu": True, "learning_rate": 0.1, "optim": "sgd", "max_steps": 4, **more}
    text = {"data": str(place / "calibration"), "context": 16, "held_out": 4}
    return TrainSettings.made({"method": "postshare", "text": text, "learning": {"arguments": arguments}})


def test_methods_that_train_are_measured_as_they_are_written(place: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(place / "model")
    grid = Grid(("directshare", *TRAINED), (0.5,), text=EvalText(place / "test", 32), training=training(place))
    cells = {one.method: one for one in compare(dense, grid, tmp_path)}
    plain, pulled, recovered = (cells[name] for name in ("directshare", *TRAINED))
    assert not [one.failed for one in cells.values() if one.failed]
    assert plain.saved_bytes == pulled.saved_bytes == recovered.saved_bytes
    assert plain.memory_bytes == pulled.memory_bytes == recovered.memory_bytes
    assert len({value(plain), value(pulled), value(recovered)}) == 3
    assert pulled.note == recovered.note == ""
    settings = training(place).model_copy(update={"sharing": Sharing(ratio=0.5)})
    train(place / "model", tmp_path / "apart", settings)
    with hs.open_checkpoint(tmp_path / "apart") as apart:
        assert value(pulled) == pytest.approx(evaluate(apart, (place / "test").read_text(), window=32).perplexity)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("apart")) == [
        "about.json", "cells.csv", "cells.json", "table.md",
    ]  # fmt: skip


def test_training_that_made_nothing_better_is_said(place: Path, tmp_path: Path) -> None:
    """The weights are those that were not trained, so the figures are DirectShare's: a reader is told why."""
    idle = training(place, learning_rate=0.0, max_steps=2)
    grid = Grid(("directshare", "postshare"), (0.5,), text=EvalText(place / "test", 32), training=idle)
    _, plain, pulled = compare(hs.open_checkpoint(place / "model"), grid, tmp_path)
    assert pulled.losses == plain.losses
    assert "no step of training was better than none" in pulled.note
    assert pulled.note in (tmp_path / "table.md").read_text()


def test_other_settings_of_training_are_other_cells_and_only_of_those_that_train(place: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(place / "model")
    for steps in (2, 3):
        trained = training(place, max_steps=steps)
        compare(
            dense,
            Grid(("directshare", "postshare"), (0.5,), text=EvalText(place / "test", 32), training=trained),
            tmp_path,
        )
    kept = json.loads((tmp_path / "cells.json").read_text())
    assert [one["method"] for one in kept] == ["dense", "directshare", "postshare", "postshare"]


def test_training_that_fails_stops_the_grid_and_is_tried_again(place: Path, tmp_path: Path) -> None:
    dense, text = hs.open_checkpoint(place / "model"), EvalText(place / "test", 32)
    with pytest.raises(TrainingError):
        compare(dense, Grid(("postshare",), (0.5,), text=text, training=training(place, learning_rate=1e30)), tmp_path)
    assert [one["method"] for one in json.loads((tmp_path / "cells.json").read_text())] == ["dense"]
    found = compare(dense, Grid(("postshare",), (0.5,), text=text, training=training(place)), tmp_path)
    assert found[1].losses


def test_restart_is_of_the_training_run_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stopped(*_: Any, restart: bool, **__: Any) -> None:
        seen.append(restart)
        raise TrainingError("stopped")

    monkeypatch.setattr("headshare.experiments.cell_runner.train", stopped)
    grid = Grid(("postshare",), (0.5,), text=EvalText(place / "test", 32), training=training(place))
    for restart in (False, True):
        with pytest.raises(TrainingError):
            compare(hs.open_checkpoint(place / "model"), grid, tmp_path, restart=restart)
    assert seen == [False, True]


def test_another_training_text_under_the_same_name_is_another_cell(place: Path, tmp_path: Path) -> None:
    dense, text = hs.open_checkpoint(place / "model"), EvalText(place / "test", 32)
    settings, own = training(place, max_steps=1), tmp_path / "own"
    settings = settings.model_copy(update={"text": settings.text.model_copy(update={"data": str(own)})})
    for words in (400, 500):
        a_text(own, words)
        compare(dense, Grid(("postshare",), (0.5,), text=text, training=settings), tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "cells.json").read_text())
    assert [one["method"] for one in kept] == ["dense", "postshare", "postshare"]


def test_tasks_while_training_are_read_from_the_comparisons_folder(tmp_path: Path) -> None:
    train = {"text": {"data": "text"}, "tasks": {"names": ["piqa"], "limit": 5}}
    found = Recipe(methods=("postshare",), tasks=("piqa",), data_dir=tmp_path, train=train).grid().training
    assert found is not None
    assert found.tasks.data_dir == tmp_path
    train = {**train, "tasks": {"names": ["piqa"], "data_dir": "there"}}
    found = Recipe(methods=("postshare",), tasks=("piqa",), data_dir=tmp_path, train=train).grid().training
    assert found is not None
    assert found.tasks.data_dir == Path("there")


def test_settings_of_training_that_would_not_be_used_are_refused(place: Path) -> None:
    for name, value_ in (("method", "both"), ("sharing", {"ratio": 0.1}), ("seed", 3)):
        given = {"text": place / "test", "methods": ["postshare"], "train": {"text": {"data": "x"}, name: value_}}
        with pytest.raises(EvaluationError, match=f"{name} in `train` would not be used"):
            Recipe.load(None, given).grid()


def test_the_command_compares(command: Callable, place: Path, tmp_path: Path) -> None:
    methods = "directshare, deletion-same"
    words = ["compare", place / "model", "--out", tmp_path, "--methods", methods, "--ratios", "0.5"]
    words += ["--text", place / "test", "--window", 32]
    status, out, _ = command(*words)
    assert status == 0
    assert (tmp_path / "table.md").read_text() == out
    status, out, _ = command(*words, "--json")
    assert [one["method"] for one in json.loads(out)["cells"]] == ["dense", "directshare", "deletion-same"]
    for wrong, says in ((["--methods", "cats"], "no method"), (["--ratios", "2"], "ratio of 2.0")):
        status, out, err = command(*words, *wrong)
        assert (status, out) == (1, "")
        assert says in err
    assert command(*words, "--ratios", "half")[0] == 1


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_methods_and_tasks_that_there_are(path: Path, place: Path) -> None:
    given = {"text": place / "test", "train": {"text": {"data": "a text"}}}
    recipe = Recipe.load(path, {name: one for name, one in given.items() if f"\n{name}:" not in path.read_text()})
    grid = recipe.grid()
    assert {named(task)[0] for task in grid.tasks} <= set(TASKS)
    assert f"recipes/{path.name}" in path.read_text().splitlines()[0]
    assert recipe.title


def test_a_recipe_is_run_and_options_go_before_it(command: Callable, place: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"model: {place / 'model'}\nmethods: [directshare, magnitude]\nratios: [0.25]\n"
        f"window: 32\ntext: {place / 'test'}\n"
    )
    words = ["compare", "--config", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--json"]
    assert [one["method"] for one in json.loads(command(*words)[1])["cells"]] == ["dense", "directshare", "magnitude"]
    found = json.loads(command(*words, "--methods", "magnitude", "--ratios", "0.5")[1])["cells"]
    assert [(one["method"], one["ratio"]) for one in found] == [("dense", 0.0), ("magnitude", 0.5)]


@pytest.mark.parametrize(("content", "says"), [
    ("methods: directshare\n", "methods"), ("cats: 1\n", "cats"), ("- 1\n", "no settings"), ("a: [", "YAML"),
    ("title: &a [x, x]\ntasks: [*a, *a]\n", "*a is an alias"),
    ("methods: [directshare]\n", "no model"),
])  # fmt: skip
def test_a_recipe_that_is_none_is_one_error(content: str, says: str, command: Callable, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    status, out, err = command("compare", "--config", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert (status, out) == (1, "")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_killed_grid_goes_on(place: Path, tmp_path: Path, command: Callable) -> None:
    names = [f"match-{name}" for name in ("q", "k", "v", "qkv")] + ["directshare", "random-donors", "magnitude"]
    words = [*("compare", place / "model", "--out", tmp_path, "--methods", ",".join(names), "--ratios", "0.25,0.5"),
             *("--text", place / "test", "--window", 32)]  # fmt: skip
    cells = tmp_path / "cells.json"
    process = subprocess.Popen([sys.executable, "-m", "headshare", *map(str, words)], stderr=subprocess.DEVNULL)
    while not cells.is_file():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = json.loads(cells.read_text())
    assert 1 <= len(before) < 15
    status, out, err = command(*words, "--json")
    assert status == 0
    assert json.loads(out)["cells"][: len(before)] == before
    assert len(json.loads(out)["cells"]) == 15
    assert err.count("saved") == 15 - len(before)
