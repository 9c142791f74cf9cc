"""Runs of measuring that stop and go on, the results that they keep, and what is wrong with them."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import headshare as hs
from headshare.errors import EvaluationError
from headshare.evaluation import results
from headshare.evaluation.generation import Writing, continuations
from headshare.evaluation.harness import Runner, Settings
from headshare.evaluation.harness_tasks import averaged
from headshare.evaluation.measuring import EvalText, measure
from headshare.evaluation.perplexity import evaluate, perplexity
from headshare.evaluation.results import Metric, TaskResult, current, kept_results, read_results, table_of
from headshare.integrations.transformers.loading import load_tokenizer
from headshare.text.windows import windows_of
from support import tiny
from support.byte_level import SENTENCES
from support.questions import ROWS, measured
from support.texts import add_tokenizer

# ---- runs


def test_what_was_measured_is_not_measured_again_and_a_stopped_run_goes_on(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ran = Runner.run, list[str]()

    def counted(self: Runner, task: Any, key: str) -> TaskResult:
        if task.name == "rte" and "rte" not in ran:
            ran.append("rte")
            raise KeyboardInterrupt
        ran.append(task.name)
        return run(self, task, key)

    monkeypatch.setattr(Runner, "run", counted)
    wanted, out = {"tasks": ["piqa", "rte", "boolq"], "data": data}, tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        measure([model], **wanted, out=out)
    assert [row.task for row in read_results(out / "results.json")] == ["piqa"]
    rows = measure([model], **wanted, out=out)
    assert [row.task for row in rows] == ["piqa", "rte", "boolq"]
    assert ran == ["piqa", "rte", "rte", "boolq"]
    assert measure([model], **wanted, out=out) == rows
    assert len(ran) == 4
    assert measure([model], **wanted) == rows
    assert len(ran) == 7


@pytest.mark.parametrize("change", ["model", "tokenizer", "question", "limit", "few-shot", "dtype", "transformers"])
def test_results_of_other_questions_models_or_settings_are_not_taken(
    change: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    model = Path(shutil.copytree(model, tmp_path / "model"))
    measure([model], tasks=["boolq"], data=data, out=out)
    settings, other = Settings(), model
    match change:
        case "model":
            dense = hs.open_checkpoint(model)
            other = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "shared")
        case "tokenizer":
            file = model / "tokenizer_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "add_bos_token": True}))
        case "question":
            (data / "boolq.jsonl").write_text(json.dumps(ROWS["boolq"][0]) + "\n")
        case "limit":
            settings = Settings(limit=1)
        case "few-shot":
            settings = Settings(few_shot=1)
        case "dtype":
            settings = Settings(dtype="bfloat16")
        case "transformers":
            version = results.version
            monkeypatch.setattr(results, "version", lambda name: "6.0" if name == change else version(name))
    measure([other], tasks=["boolq"], data=data, out=out, settings=settings)
    assert len(read_results(out / "results.json")) == 2


def test_a_text_and_tasks_of_several_models_make_one_table(model: Path, data: Path, tmp_path: Path) -> None:
    dense, text = hs.open_checkpoint(model), " ".join(SENTENCES * 9)
    twin = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.25)).save(tmp_path / "twin")
    (tmp_path / "text").write_text(text)
    rows = measure([model, twin], tasks=["piqa"], data=data, text=EvalText(tmp_path / "text", 32))
    windows = windows_of(load_tokenizer(dense), text, window=32)
    assert rows[0].metrics["perplexity"].value == pytest.approx(perplexity(hs.load(model), windows).perplexity)
    lines = table_of(rows).splitlines()
    assert [line.count("|") for line in lines] == [4] * 5
    assert lines[2] == "| guessing |  | 50.0 |"


def test_what_cannot_be_told_from_guessing_is_marked() -> None:
    def row(value: float, error: float) -> TaskResult:
        return TaskResult("m", "t", f"{value}", {"acc": Metric(value, error)}, 9, chance=0.5)

    assert row(0.58, 0.05).at_chance
    assert row(0.42, 0.05).at_chance
    assert not row(0.61, 0.05).at_chance
    assert "| ~58.0 ± 5.0 |" in table_of([row(0.58, 0.05)])
    assert "| 61.0 ± 5.0 |" in table_of([row(0.61, 0.05)])
    assert not row(1.0, 0.0).at_chance  # all right is no guess
    assert row(0.2, 0.05).at_chance  # nor is it any better that way


def test_always_the_same_answer_is_no_better_than_guessing(runner: Runner, data: Path) -> None:
    rows = [dict(ROWS["boolq"][number == 0], gold=int(number > 2)) for number in range(12)]
    (data / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = measured(runner, data, "boolq", "piqa")
    assert (one.chance, one.constant) == (0.5, 0.75)
    assert other.constant is None  # its questions have options of their own
    assert dataclasses.replace(one, metrics={"acc": Metric(0.8, 0.05)}).at_chance
    assert not dataclasses.replace(one, metrics={"acc": Metric(0.86, 0.05)}).at_chance
    assert "| guessing | 50.0 / 75.0 |" in table_of([one])


def test_what_was_measured_in_another_way_has_a_column_of_its_own() -> None:
    def row(model: str, value: float, **settings: Any) -> TaskResult:
        return TaskResult(model, "t", f"{model}{value}", {"acc": Metric(value, 0.0)}, 9, 0.5, settings=settings)

    same = [row("a", 0.1, limit=9, dtype="auto", device="cpu"), row("b", 0.2, limit=9, dtype="auto", device="cuda:0")]
    assert table_of(same).splitlines()[0] == "| model | t (9) |"
    lines = table_of([*same, row("b", 0.3, limit=9, dtype="float16", device="cpu")]).splitlines()
    assert lines[0] == "| model | t (9), dtype auto | t (9), dtype float16 |"
    assert lines[3:] == ["| a | ~10.0 ± 0.0 |  |", "| b | ~20.0 ± 0.0 | ~30.0 ± 0.0 |"]


def test_runs_that_keep_their_results_in_one_folder_keep_each_others(tmp_path: Path) -> None:
    """One process for each GPU, say."""
    rows = [TaskResult("m", name, name, {"acc": Metric(0.5)}, 9) for name in ("a", "b", "c")]
    with kept_results(tmp_path) as first, kept_results(tmp_path) as second:
        first.add(rows[0])
        second.add(rows[1])
        first.add(rows[2])
    assert read_results(tmp_path / "results.json") == rows


def test_a_result_bears_the_name_that_it_was_asked_for_by(model: Path, data: Path, tmp_path: Path) -> None:
    first = measure([model], tasks=["boolq"], data=data, settings=Settings(few_shot=1), out=tmp_path)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (again,) = measure([other], tasks=["boolq:1"], data=data, out=tmp_path)
    assert (again.model, again.task, again.metrics) == (str(other), "boolq:1", first[0].metrics)
    assert len(read_results(tmp_path / "results.json")) == 1


def test_answers_that_are_partly_right_have_the_error_of_their_spread() -> None:
    assert averaged([{"acc": 0.5}] * 9)["acc"] == Metric(0.5, 0.0)
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    found = averaged([{"acc": value} for value in values])["acc"]
    assert found.error == pytest.approx(math.sqrt(0.6 * 0.4 / 4))  # as the harness has it


def test_results_come_back_as_they_were_kept(tmp_path: Path) -> None:
    row = TaskResult("m", "t", "k", {"acc": Metric(0.1 + 0.2, None)}, 9, 0.25, {"a": (1 / 3, 4)}, {"limit": None})
    with kept_results(tmp_path / "new") as kept:
        kept.add(row)
    with kept_results(tmp_path / "new") as kept:
        assert kept.find("k") == row
        assert kept.find("other") is None


# ---- what is wrong


def test_models_that_choose_nothing_and_settings_that_mean_nothing_are_refused(
    model: Path, data: Path, tmp_path: Path
) -> None:
    encoder = add_tokenizer(tiny.make("bert", tmp_path / "bert"))
    with pytest.raises(EvaluationError, match="does not predict the next token"):
        measure([encoder], tasks=["piqa"], data=data)
    with pytest.raises(EvaluationError, match="nothing to measure"):
        measure([model])
    for wrong in ({"limit": 0}, {"few_shot": -1}, {"batch_size": 0}):
        with pytest.raises(EvaluationError):
            Settings(**wrong)


def test_likelihoods_that_are_no_numbers_are_refused(runner: Runner, data: Path) -> None:
    with torch.no_grad():
        runner.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(EvaluationError, match="damaged or overflow"):
        measured(runner, data, "piqa")


def test_a_folder_that_cannot_be_is_said_before_anything_is_measured(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Runner, "run", None)
    for out in (tmp_path / "file", tmp_path / ("long" * 100)):
        with pytest.raises(EvaluationError, match="cannot be a folder of results"):
            measure([model], tasks=["piqa"], data=data, out=out)


@pytest.mark.parametrize("wrong", ["task", "row", "model"])
def test_what_cannot_be_measured_leaves_no_folder(wrong: str, model: Path, data: Path, tmp_path: Path) -> None:
    task, measured_model = "piqua" if wrong == "task" else "piqa", shutil.copytree(model, tmp_path / "model")
    if wrong == "row":
        (data / "piqa.jsonl").write_text("[1]\n")
    if wrong == "model":
        (measured_model / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "out", tmp_path / "mine"):
        with pytest.raises(hs.HeadshareError):
            measure([measured_model], tasks=[task], data=data, out=out)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine").is_dir()


def test_a_device_that_is_not_there_is_one_error(model: Path, data: Path) -> None:
    for name in ("cuda:99", "nowhere"):
        with pytest.raises(hs.HeadshareError, match=name):
            measure([model], tasks=["piqa"], data=data, settings=Settings(device=name))
        with pytest.raises(hs.HeadshareError, match=name):
            evaluate(hs.open_checkpoint(model), " ".join(SENTENCES * 9), window=32, device_map=name)


def test_a_models_own_habits_of_writing_do_not_count(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "penalised"
    shutil.copytree(model, folder)
    habits: list[dict[str, Any]] = [
        {"repetition_penalty": 9.0, "num_beams": 3, "do_sample": True, "top_k": 2},
        {"suppress_tokens": list(range(3, 40))},
        {"encoder_repetition_penalty": 5.0},
        {"min_p": 0.9, "do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
    ]
    for writing in (Writing(24), Writing(24, temperature=1.0)):
        prompts = ["the cat was there", "the wind"]
        plain = continuations(Runner.of(hs.open_checkpoint(model), Settings()), prompts, writing)
        for own in habits:
            transformers.GenerationConfig(**own).save_pretrained(folder)
            assert continuations(Runner.of(hs.open_checkpoint(folder), Settings()), prompts, writing) == plain


def test_what_was_measured_of_another_model_of_the_same_name_is_not_current() -> None:
    def row(task: str, digest: str) -> TaskResult:
        return TaskResult("m", task, f"{task}{digest}", {"acc": Metric(0.5, 0.1)}, 9, settings={"model": digest})

    rows = [row("a", "old"), row("b", "old"), row("a", "new")]
    assert current(rows) == rows[2:]


def test_a_folder_with_other_results_is_refused_and_left(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"accuracy": 1}')
    with pytest.raises(EvaluationError, match="holds no results"):
        measure([model], tasks=["piqa"], data=data, out=tmp_path)
    assert (tmp_path / "results.json").read_text() == '{"accuracy": 1}'
