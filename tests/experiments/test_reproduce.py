"""The paper on any one model: what fits is run once, what does not is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import headshare as hs
from headshare.experiments import reproduce as module
from headshare.experiments.cells import read_cells
from headshare.experiments.controls import layer_by_layer
from headshare.experiments.recipe import Recipe
from headshare.experiments.reproduce import RECIPES, Wanted, recipes_folder, steps_for
from support import tiny
from support.texts import add_tokenizer


def test_every_recipe_of_the_paper_is_run_or_the_reason_is_said(place: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(place / "model")
    steps = {step.name: step for step in steps_for(dense, Wanted(tmp_path))}
    assert set(RECIPES) <= set(steps)
    assert all((step.recipe is None) != (step.why == "") for step in steps.values())
    assert steps["table-7"].why == "on any one model it is table-1"
    assert "fine-tuned to translate" in steps["table-6"].why
    recipes = {path.stem for path in recipes_folder().glob("*.yaml")}
    assert recipes - set(RECIPES) == {"claims", "small"}
    figure = steps["figure-5"]
    assert figure.recipe is not None
    assert figure.recipe.train is not None
    assert figure.recipe.train["learning"]["arguments"]["max_steps"] == 60
    assert "winogrande" in figure.left_out
    assert "without winogrande" in figure.in_words


def test_a_model_of_the_papers_is_measured_as_published(tmp_path: Path) -> None:
    dense = hs.open_checkpoint(add_tokenizer(tiny.make_llama(tmp_path / "Llama-2-13b-hf")))
    steps = {step.name: step for step in steps_for(dense, Wanted(tmp_path, device="cuda:0"))}
    assert steps["table-12"].why == "it is of Baichuan2-7B-Base"
    found = steps["table-10"].recipe
    published = Recipe.load(recipes_folder() / "table-10.yaml", {})
    assert found == published.model_copy(update={"model": str(dense.path), "device": "cuda:0"})


def test_a_rerun_measures_nothing_again_and_writes_the_same_report(
    place: Path, tmp_path: Path, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["reproduce", place / "model", "--out", tmp_path, "--only", "figure-6,figure-1", "--window", 32]
    words += ["--text", place / "test", "--calibration", place / "calibration", "--tokens", 1024]
    status, said, _ = command(*words[:-4], "--text", place / "test", "--dry-run")
    assert (status, said) == (1, "")
    status, said, _ = command(*words)
    assert status == 0
    page = (tmp_path / "report.md").read_text()
    assert said.strip() == page.strip()
    assert "sharing heads is better than sharing layers" in page
    assert "heads are given up evenly over layers" in page
    assert "the authors' code takes" in page
    assert "## Who attends alike, in model" in page
    assert "heads are given up evenly" in (tmp_path / "report.html").read_text()
    cells = read_cells(tmp_path / "figure-6" / "cells.json")
    assert {cell.method for cell in cells} == {"dense", "directshare", "directshare-published", "layerwise", "headwise"}
    monkeypatch.setattr("headshare.experiments.cell_runner.CellRunner.cell", None)
    assert command(*words)[1] == said


def test_the_model_writes_both_texts_where_there_is_none(tmp_path: Path, model: Path) -> None:
    wanted = Wanted(tmp_path, tokens=64, window=32, steps=1, only=("figure-3",))
    report = module.reproduce(hs.open_checkpoint(model), wanted)
    assert [one.title for one in report.comparisons] == ["Table 12 and figure 3 of the paper: match functions"]
    assert sorted(path.name for path in (tmp_path / "texts").iterdir()) == ["calibration.jsonl", "test.txt"]
    assert (
        "Table 12 and figure 3 of the paper: match functions: piqa",
        "its file is not in --data-dir",
    ) in report.absent


def test_what_cannot_be_compared_is_said_and_the_rest_goes_on(place: Path, tmp_path: Path) -> None:
    wanted = Wanted(
        tmp_path, text=place / "test", calibration=place / "calibration", window=32, only=("figure-6", "table-12")
    )
    (tmp_path / "figure-6").mkdir()
    (tmp_path / "figure-6" / "table.md").write_text("mine")
    report = module.reproduce(hs.open_checkpoint(place / "model"), wanted)
    assert len(report.comparisons) == 1
    (why,) = [why for title, why in report.absent if title.endswith("in each layer")]
    assert "not of a comparison" in why
    assert (tmp_path / "figure-6" / "table.md").read_text() == "mine"


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_layers_are_shared_whole_with_a_donor_that_keeps_its_weights(tmp_path: Path, ratio: float) -> None:
    dense = hs.open_checkpoint(tiny.make_llama(tmp_path / "model"))
    plan = layer_by_layer(dense, ratio)
    (selection,) = plan.selections
    layers = {(tie.recipient.layer, tie.donor.layer) for tie in selection.ties}
    assert len(layers) == round(4 * ratio)
    assert len(selection.ties) == 2 * len(layers)
    assert all(tie.recipient.group == tie.donor.group for tie in selection.ties)
    assert not {recipient for recipient, _ in layers} & {donor for _, donor in layers}
    # the best pair, as the paper's cosine of two flat vectors has it
    rows = []
    for layer in range(4):
        names = (f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qk")
        flat = [dense.read(name).double().flatten() for name in names]
        rows.append(torch.cat(flat))
    cosines = {(i, j): float(rows[i] @ rows[j] / rows[i].norm() / rows[j].norm()) for i in range(4) for j in range(i)}
    if ratio == 0.25:
        assert layers == {max(cosines, key=lambda pair: cosines[pair])}
