"""Tasks: prompts and likelihoods beside the harness's own, accuracies by hand, files that are wrong, runs that stop."""

import csv
import dataclasses
import io
import json
import math
import re
import shutil
import statistics
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import sacrebleu
import torch
import transformers
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

import headshare as hs
from headshare.errors import EvaluationError
from headshare.evaluating import harness
from headshare.evaluating.generating import Parallel, Writing, bleu_and_meteor, continuations
from headshare.evaluating.harness import Runner, Settings, _as_task, _hushed, chosen_tasks, tasks_of_harness
from headshare.evaluating.measuring import Text, measure
from headshare.evaluating.questions import Question
from headshare.evaluating.results import Measured, Metric, current, kept_results, read_results, table_of
from headshare.evaluating.tasks import TASKS, Part
from headshare.evaluation import evaluate, perplexity, windows_of
from headshare.models import load_tokenizer
from support import tiny
from support.byte_level import SENTENCES
from support.texts import add_tokenizer

NONE = tasks_of_harness(any_at_all=False)
OPTIONS = ["wind.", "rain.", "snow.", "ice."]
ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"query": "Question: warm the house \n", "choices": ["light a fire", "open all of the windows"], "gold": 0},
        {"query": "Question: the Question: again\n", "choices": ["it\u2019s so", "it was never so"], "gold": 1},
    ],
    "openbook_qa": [
        {"query": "A cat eats", "choices": ["fish", "winter", "the wind", "a house"], "gold": 0},
        {"query": "When it is cold the river", "choices": ["flies", "freezes", "sings", "falls"], "gold": 1},
    ],
    "openbook_qa_fact": [
        {"fact1": "cats eat fish", "query": "A cat eats", "choices": ["fish", "winter", "the wind", "it"], "gold": 0},
    ],
    "winogrande": [
        {
            "context_options": ["The cat saw the pig and the cat", "The cat saw the pig and the pig"],
            "continuation": "went away.",
            "gold": 1,
        },
    ],
    "boolq": [
        {
            "query": "Passage: Pigs fly.\nQuestion: or do they\nQuestion: do pigs fly?",
            "choices": ["no", "yes"],
            "gold": 1,
        },
        {"query": "Passage: Cats sing.\nQuestion: do cats sing?", "choices": ["no", "yes"], "gold": 0},
    ],
    "race_middle": [
        {"example_id": "middle1", "article": "Kites fly.", "question": question, "options": OPTIONS, "answer": answer}
        for question, answer in (("What do kites need?", "A"), ("Kites need  _  .", "B"), ("And we need  _", "C"))
    ]
    + [{"example_id": "b", "article": "Pigs fly.", "question": "Do pigs?", "options": OPTIONS, "answer": "D"}],
    "rte": [
        {"premise": "The river froze.", "hypothesis": "It was cold.", "label": "entailment", "idx": 0},
        {"premise": "The cat sat.", "hypothesis": "The pig sat.", "label": "not_entailment", "idx": 1},
    ],
    "ax_g": [{"premise": "He sat.", "hypothesis": "She sat.", "label": "not_entailment"}],
    "ax_b": [{"sentence1": "He sat.", "sentence2": "She sat.", "label": "entailment", "logic": "x"}],
    "cmnli": [
        {"sentence1": "\u732b\u5750\u7740", "sentence2": "\u732b\u7ad9\u7740", "label": "contradiction"},
        {"sentence1": "\u732b\u5750\u7740", "sentence2": "\u732b\u7ad9\u7740", "label": "-"},
        {"sentence1": "\u732b\u5750\u7740", "sentence2": "\u732b\u5728", "label": "entailment"},
    ],
    "ocnli": [{"sentence1": "\u732b", "sentence2": "\u72d7", "label": "neutral", "id": 3}],
    "tnews": [{"sentence": "\u80a1\u5e02", "label_desc": "news_stock", "label": 114}],
    "csl": [{"abst": "\u6458\u8981", "keyword": ["\u4e00", "\u4e8c"], "label": "1", "id": 3}],
}
EXAM = {
    "dev/history_dev.csv": [["Who was first?", "a cat", "a pig", "a kite", "a river", "B"]],
    "test/history_test.csv": [["What was there?", "wind", "rain", "snow", "ice", "A"],
                              ['With "quotes", and\na line', "1", "2", "3", "4", "D"]],
    "test/river_law_test.csv": [["Who rules?", "winter", "wind", "pigs", "cats", "C"]],
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a file for every task."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = [{**ROWS["race_middle"][3], "example_id": f"{level}7"} for level in ("high", "middle")]
    (folder / "race_sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sample))
    zipped(folder / "mmlu.zip", EXAM)
    heading = ["id", "question", "A", "B", "C", "D", "answer"]
    zipped(folder / "ceval.zip", {"val/art_val.csv": [heading, ["0", "\u8c01", "1", "2", "3", "4", "B"]]})
    return folder


def zipped(path: Path, members: dict[str, list[list[str]]]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in members.items():
            text = io.StringIO()
            csv.writer(text).writerows(rows)
            archive.writestr(name, text.getvalue())
    return path


@pytest.fixture
def runner(model: Path) -> Runner:
    return Runner.of(hs.open_checkpoint(model), Settings(batch_size=3))


def measured(runner: Runner, data: Path, *names: str) -> list[Measured]:
    return [runner.run(one, one.name) for one in chosen_tasks(names, data)]


# ---- prompts and likelihoods, beside the harness's own tasks


def as_published(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row with the columns of the data set that the harness's own task reads."""
    match name:
        case "piqa":
            goal = row["query"][len("Question: ") : -1]
            return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}
        case "openbook_qa":
            choices = {"text": row["choices"], "label": list("ABCD")}
            return {"question_stem": row["query"], "choices": choices, "answerKey": "ABCD"[row["gold"]]}
        case "winogrande":
            one, other = row["context_options"]
            return {"sentence": f"_ {row['continuation']}", "option1": one, "option2": other,
                    "answer": str(row["gold"] + 1)}  # fmt: skip
        case "boolq":
            passage, _, question = row["query"].rpartition("\nQuestion: ")
            return {"passage": passage[len("Passage: ") :], "question": question[:-1], "label": row["gold"]}
    return {**row, "label": int(row["label"] != "entailment")}


def race(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["article"], []).append({key: row[key] for key in ("question", "options", "answer")})
    return [{"article": article, "problems": repr(problems)} for article, problems in found.items()]


FILES = {
    "piqa": "piqa/piqa.yaml",
    "openbook_qa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "race_middle": "race/race.yaml",
    "rte": "super_glue/rte/default.yaml",
}


@pytest.mark.parametrize("name", FILES)
def test_a_task_asks_and_scores_as_the_harnesss_own_does(name: str, runner: Runner, data: Path) -> None:
    rows = race(ROWS[name]) if name == "race_middle" else [as_published(name, row) for row in ROWS[name]]
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / FILES[name])
    split = config.get("test_split") or config["validation_split"]
    unused = dict.fromkeys(("dataset_path", "dataset_name", "training_split", "validation_split", "test_split"))
    given = {"task": name, "test_split": split, "custom_dataset": lambda **_: {split: Dataset.from_list(rows)}}
    (chosen,) = chosen_tasks([name], data)
    with _hushed():
        theirs = ConfigurableTask(config={**config, **unused, **given})
        ours = _as_task(name, *next(iter((chosen.parts or {}).items())))
        samples = [
            lm_eval.simple_evaluate(model=runner._for_harness, tasks=[task], bootstrap_iters=0, task_manager=NONE)[
                "samples"
            ][name]
            for task in (ours, theirs)
        ]
    assert [one["arguments"] for one in samples[0]] == [one["arguments"] for one in samples[1]]
    assert [one["filtered_resps"] for one in samples[0]] == [one["filtered_resps"] for one in samples[1]]
    assert [one["acc"] for one in samples[0]] == [one["acc"] for one in samples[1]]
    assert len(samples[0]) == len(rows)


def test_exams_ask_as_the_harness_does_with_examples_of_their_own_subject(runner: Runner, data: Path) -> None:
    (chosen,) = chosen_tasks(["mmlu"], data)
    parts = chosen.parts or {}
    assert parts.keys() == {"history", "river_law"}
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    own = load_yaml(folder / "mmlu_high_school_us_history.yaml")["description"]
    assert parts["river_law"].heading == own.replace("high school us history", "river law")
    with _hushed():
        task = _as_task("mmlu", "history", parts["history"])
        found = lm_eval.simple_evaluate(
            model=runner._for_harness, tasks=[task], num_fewshot=1, bootstrap_iters=0, task_manager=NONE
        )
    prompt = found["samples"]["mmlu_history"][0]["arguments"][0][0]
    assert prompt == (
        "The following are multiple choice questions (with answers) about history.\n\n"
        "Who was first?\nA. a cat\nB. a pig\nC. a kite\nD. a river\nAnswer: B\n\n"
        "What was there?\nA. wind\nB. rain\nC. snow\nD. ice\nAnswer:"
    )
    assert [one.answer for one in parts["history"].questions] == [0, 3]


def test_a_task_shows_as_many_examples_as_its_name_says(runner: Runner, data: Path) -> None:
    plain, one = chosen_tasks(["rte", "rte:1"], data)
    other = dataclasses.replace(runner, settings=dataclasses.replace(runner.settings, few_shot=1))
    found = runner.run(one, "key")
    assert (found.task, found.settings["few_shot"]) == ("rte:1", 1)
    assert found.metrics == other.run(plain, "key").metrics
    assert one.key("m", runner.settings) == plain.key("m", other.settings) != plain.key("m", runner.settings)
    assert chosen_tasks(["hellaswag:3"], None)[0].few_shot == 3


def test_examples_of_an_exam_are_shown_in_their_order(runner: Runner, data: Path) -> None:
    """As the harness shows those of MMLU and C-Eval."""
    shown = [[f"Who was number {number}?", "a", "b", "c", "d", "ABCD"[number % 4]] for number in range(5)]
    zipped(data / "mmlu.zip", {**EXAM, "dev/history_dev.csv": shown})
    (chosen,) = chosen_tasks(["mmlu"], data)
    with _hushed():
        task = _as_task("mmlu", "history", (chosen.parts or {})["history"])
        found = lm_eval.simple_evaluate(
            model=runner._for_harness, tasks=[task], num_fewshot=5, bootstrap_iters=0, task_manager=NONE
        )
    for sample in found["samples"]["mmlu_history"]:
        assert re.findall(r"Who was number (\d)", sample["arguments"][0][0]) == list("01234")


def test_chinese_prompts_have_no_space_before_their_answers(runner: Runner, data: Path) -> None:
    for name in ("cmnli", "ocnli", "tnews", "csl", "ceval"):
        (chosen,) = chosen_tasks([name], data)
        with _hushed():
            task = _as_task(name, *next(iter((chosen.parts or {}).items())))
            samples = lm_eval.simple_evaluate(
                model=runner._for_harness, tasks=[task], bootstrap_iters=0, task_manager=NONE
            )["samples"]
        (found,) = samples.values()
        for context, ending in found[0]["arguments"]:
            assert not context.endswith(" ")
            assert ending == ending.strip()
        assert "\uff1a" in found[0]["arguments"][0][0]


def test_rows_on_which_annotators_did_not_agree_are_left_out(data: Path) -> None:
    parts = TASKS["cmnli"].parts(data)
    assert [one.answer for one in parts["cmnli"].questions] == [1, 0]


def test_news_that_is_kept_class_by_class_is_mixed(data: Path) -> None:
    """The first so many questions are of many classes, and always the same ones."""
    names = ["news_story", "news_culture", "news_sports", "news_stock"]
    rows = [{"sentence": f"{name} {n}", "label_desc": name} for name in names for n in range(25)]
    orders = []
    for order in (rows, rows[::-1]):
        for file in ("tnews.jsonl", "tnews_dev.jsonl"):
            (data / file).write_text("".join(json.dumps(row) + "\n" for row in order))
        part = TASKS["tnews"].parts(data)["tnews"]
        assert sorted(one.contexts for one in part.questions) == sorted(one.contexts for one in part.examples)
        orders.append(part.questions)
        for some in (part.questions, part.examples):
            classes = [one.contexts[0].split()[0] for one in some[:20]]
            assert {classes.count(name) for name in names} <= set(range(2, 10))
    assert orders[0] == orders[1]
    assert len(orders[0]) == 100


def test_race_is_taken_apart_by_level(data: Path) -> None:
    assert len(TASKS["race_high"].parts(data)["race_high"].questions) == 1
    assert len(TASKS["race_middle"].parts(data)["race_middle"].questions) == 2
    (data / "race_middle.jsonl").unlink()
    assert len(TASKS["race_middle"].parts(data)["race_middle"].questions) == 1


@torch.inference_mode()
def token_by_token(model: Any, tokenizer: Any, context: str, ending: str) -> float:
    """The log-likelihood by its definition: one call of the model for each token, in float64."""
    before = tokenizer.encode(context)
    tokens = before + tokenizer.encode(context + ending)[len(before) :]
    total = 0.0
    for at in range(len(before), len(tokens)):
        logits = model(input_ids=torch.tensor([tokens[:at]])).logits[0, -1].double()
        total += (logits[tokens[at]] - logits.logsumexp(0)).item()
    return total


def test_the_likeliest_ending_is_chosen_and_accuracy_has_its_standard_error(runner: Runner, data: Path) -> None:
    rows = [
        {"query": f"Question: {text}\n", "choices": ["the cat was there", "the river", "winter"], "gold": gold}
        for text in ("does the pig fly", "who went", "why is it", "where was the cat", "what falls")
        for gold in (0, 1, 2, 2)
    ]
    (data / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right, normalised = [], []
    for row in rows:
        context = f"{row['query'].strip()}\nAnswer:"
        found = [token_by_token(runner.model, runner.tokenizer, context, f" {text}") for text in row["choices"]]
        right.append(found.index(max(found)) == row["gold"])
        each = [value / len(text) for value, text in zip(found, row["choices"], strict=True)]
        normalised.append(each.index(max(each)) == row["gold"])
    (one,) = measured(runner, data, "piqa")
    for name, wanted in (("acc", right), ("acc_norm", normalised)):
        assert one.metrics[name].value == pytest.approx(sum(wanted) / 20)
        assert one.metrics[name].error == pytest.approx(statistics.stdev(map(float, wanted)) / math.sqrt(20))
    assert (one.questions, one.chance) == (20, pytest.approx(1 / 3))
    assert 5 <= sum(right) <= 10


def test_subjects_count_by_their_questions_and_are_reported_each(runner: Runner, data: Path) -> None:
    (one,) = measured(runner, data, "mmlu")
    assert one.questions == 3
    assert {name: count for name, (_, count) in one.parts.items()} == {"mmlu_history": 2, "mmlu_river_law": 1}
    total = sum(share * count for share, count in one.parts.values()) / 3
    assert one.metrics["acc"].value == pytest.approx(total)
    assert one.chance == 0.25


def test_a_shared_model_is_measured_as_its_expanded_twin(model: Path, data: Path, tmp_path: Path) -> None:
    dense = hs.open_checkpoint(model)
    shared = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.5)).save(tmp_path / "shared")
    twin = hs.expand(hs.open_checkpoint(shared), tmp_path / "twin")
    one, other = (
        measured(Runner.of(hs.open_checkpoint(folder), Settings()), data, "mmlu", "openbook_qa")
        for folder in (shared, twin)
    )
    assert [row.metrics for row in one] == [row.metrics for row in other]


# ---- runs


def test_what_was_measured_is_not_measured_again_and_a_stopped_run_goes_on(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ran = Runner.run, list[str]()

    def counted(self: Runner, task: Any, key: str) -> Measured:
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


@pytest.mark.parametrize("change", ["model", "tokenizer", "question", "limit", "few-shot", "dtype"])
def test_results_of_other_questions_models_or_settings_are_not_taken(
    change: str, model: Path, data: Path, tmp_path: Path
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
    measure([other], tasks=["boolq"], data=data, out=out, settings=settings)
    assert len(read_results(out / "results.json")) == 2


def test_a_text_and_tasks_of_several_models_make_one_table(model: Path, data: Path, tmp_path: Path) -> None:
    dense, text = hs.open_checkpoint(model), " ".join(SENTENCES * 9)
    twin = hs.share(dense, hs.make_plan(hs.score_units(dense), 0.25)).save(tmp_path / "twin")
    (tmp_path / "text").write_text(text)
    rows = measure([model, twin], tasks=["piqa"], data=data, text=Text(tmp_path / "text", 32))
    windows = windows_of(load_tokenizer(dense), text, window=32)
    assert rows[0].metrics["perplexity"].value == pytest.approx(perplexity(hs.load(model), windows).perplexity)
    lines = table_of(rows).splitlines()
    assert [line.count("|") for line in lines] == [4] * 5
    assert lines[2] == "| guessing |  | 50.0 |"


def test_what_cannot_be_told_from_guessing_is_marked() -> None:
    def row(value: float, error: float) -> Measured:
        return Measured("m", "t", f"{value}", {"acc": Metric(value, error)}, 9, chance=0.5)

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
    def row(model: str, value: float, **settings: Any) -> Measured:
        return Measured(model, "t", f"{model}{value}", {"acc": Metric(value, 0.0)}, 9, 0.5, settings=settings)

    same = [row("a", 0.1, limit=9, dtype="auto", device="cpu"), row("b", 0.2, limit=9, dtype="auto", device="cuda:0")]
    assert table_of(same).splitlines()[0] == "| model | t (9) |"
    lines = table_of([*same, row("b", 0.3, limit=9, dtype="float16", device="cpu")]).splitlines()
    assert lines[0] == "| model | t (9), dtype auto | t (9), dtype float16 |"
    assert lines[3:] == ["| a | ~10.0 ± 0.0 |  |", "| b | ~20.0 ± 0.0 | ~30.0 ± 0.0 |"]


def test_runs_that_keep_their_results_in_one_folder_keep_each_others(tmp_path: Path) -> None:
    """One process for each GPU, say."""
    one, other = kept_results(tmp_path), kept_results(tmp_path)
    rows = [Measured("m", name, name, {"acc": Metric(0.5)}, 9) for name in ("a", "b", "c")]
    one.add(rows[0])
    other.add(rows[1])
    one.add(rows[2])
    assert read_results(tmp_path / "results.json") == rows


def test_a_result_bears_the_name_that_it_was_asked_for_by(model: Path, data: Path, tmp_path: Path) -> None:
    first = measure([model], tasks=["boolq"], data=data, settings=Settings(few_shot=1), out=tmp_path)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (again,) = measure([other], tasks=["boolq:1"], data=data, out=tmp_path)
    assert (again.model, again.task, again.metrics) == (str(other), "boolq:1", first[0].metrics)
    assert len(read_results(tmp_path / "results.json")) == 1


def test_answers_that_are_partly_right_have_the_error_of_their_spread() -> None:
    assert harness._averaged([{"acc": 0.5}] * 9)["acc"] == Metric(0.5, 0.0)
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    found = harness._averaged([{"acc": value} for value in values])["acc"]
    assert found.error == pytest.approx(math.sqrt(0.6 * 0.4 / 4))  # as the harness has it


def test_results_come_back_as_they_were_kept(tmp_path: Path) -> None:
    kept = kept_results(tmp_path / "new")
    row = Measured("m", "t", "k", {"acc": Metric(0.1 + 0.2, None)}, 9, 0.25, {"a": (1 / 3, 4)}, {"limit": None})
    kept.add(row)
    assert kept_results(tmp_path / "new").find("k") == row
    assert kept_results(tmp_path / "new").find("other") is None


# ---- what is wrong


@pytest.mark.parametrize(("line", "says"), [
    ('{"query": "q", "choices": ["a", "b"]}', "gold"),
    ('{"query": "q", "choices": ["a", "b"], "gold": "1"}', "gold"),
    ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "the answer is option 2"),
    ('{"query": "q", "choices": ["a", "b"], "gold": -1}', "the answer is option -1"),
    ('{"query": "q", "choices": ["a"], "gold": 0}', "two options"),
    ('{"query": "q", "choices": ["a", " "], "gold": 0}', "blank"),
    ('{"query": "q", "choices"', "EOF"),
    ("[1]", "no row of piqa"),
])  # fmt: skip
def test_a_malformed_row_is_one_error_that_says_where(line: str, says: str, data: Path) -> None:
    good = json.dumps(ROWS["piqa"][0])
    (data / "piqa.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(EvaluationError, match=r"piqa\.jsonl, line 3") as found:
        chosen_tasks(["piqa"], data)
    assert says in str(found.value)
    assert "\n" not in str(found.value)


def test_a_class_that_is_none_is_named(data: Path) -> None:
    (data / "tnews.jsonl").write_text(json.dumps({**ROWS["tnews"][0], "label_desc": "news_cats"}))
    with pytest.raises(EvaluationError, match=r"line 1: there is no class 'news_cats'"):
        chosen_tasks(["tnews"], data)


def spoil(data: Path, how: str) -> str:
    """Make something wrong with the files; the task that reads it."""
    match how:
        case "missing":
            (data / "piqa.jsonl").unlink()
        case "empty":
            (data / "piqa.jsonl").write_text("\n")
        case "not text":
            (data / "piqa.jsonl").write_bytes(b"\xff\xfe\x00")
        case "no zip":
            (data / "mmlu.zip").write_text("no")
        case "no subjects":
            zipped(data / "mmlu.zip", {"test/other.csv": [["q", "a", "b", "c", "d", "A"]]})
        case "short row":
            zipped(data / "mmlu.zip", {"test/a_test.csv": [["q", "a", "b", "c"]]})
    return "piqa" if (data / "mmlu.zip").stat().st_size > 300 and how in ("missing", "empty", "not text") else "mmlu"


@pytest.mark.parametrize(("how", "says"), [
    ("missing", "--data-dir"), ("empty", "no question"), ("not text", "UTF-8"), ("no zip", "zip"),
    ("no subjects", "SUBJECT_test.csv"), ("short row", "line 1 is no row of mmlu"),
])  # fmt: skip
def test_files_that_cannot_be_used_are_one_error(how: str, says: str, data: Path) -> None:
    name = spoil(data, how)
    with pytest.raises(EvaluationError, match=says):
        chosen_tasks([name], data)


def test_a_zip_that_unpacks_to_too_much_is_not_unpacked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headshare.evaluating.questions.FILE_BYTES", 20)
    with pytest.raises(EvaluationError, match="more than 20 bytes"):
        chosen_tasks(["mmlu"], data)


def test_a_folder_serves_as_well_as_a_zip(data: Path) -> None:
    before = TASKS["mmlu"].parts(data)
    with zipfile.ZipFile(data / "mmlu.zip") as archive:
        archive.extractall(data / "mmlu")
    (data / "mmlu.zip").unlink()
    assert TASKS["mmlu"].parts(data) == before


def test_a_wrong_name_is_told_which_are_near(data: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no task 'piqqa'\. Did you mean piqa"):
        chosen_tasks(["piqqa"], data)
    with pytest.raises(EvaluationError, match=r"cmnli is read from cmnli\.jsonl"):
        chosen_tasks(["cmnli"], None)


def test_the_harnesss_own_tasks_go_by_their_names(data: Path) -> None:
    own, theirs = chosen_tasks(["boolq", "hellaswag"], data)
    assert own.parts is not None
    assert theirs.parts is None
    assert chosen_tasks(["boolq"], None)[0].parts is None


def only_tasks(monkeypatch: pytest.MonkeyPatch, folder: Path, *tasks: str) -> None:
    """Let the harness have these tasks alone, each of the sentences in one file."""
    (folder / "rows.json").write_text(json.dumps([{"text": one} for one in SENTENCES]))
    for number, task in enumerate(tasks):
        (folder / f"{number}.yaml").write_text(
            f"{task}dataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.json'}}}, cache_dir: {folder / 'cache'}}}\n"
        )
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    monkeypatch.setattr(harness, "tasks_of_harness", lambda **_: manager)


def test_a_task_of_the_harness_that_does_not_choose_reports_its_own_metrics(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = "task: bits\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    tasks += "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]\n"
    only_tasks(monkeypatch, tmp_path, tasks)
    (one,) = measured(runner, data, "bits")
    nats = 0.0
    for text in SENTENCES:
        tokens = [runner.tokenizer.eos_token_id, *runner.tokenizer.encode(text)]
        logits = runner.model(input_ids=torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
        nats -= sum(row[token].item() for row, token in zip(logits, tokens[1:], strict=True))
    size = sum(len(text.encode()) for text in SENTENCES)
    assert one.metrics["bits_per_byte"].value == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert (one.questions, one.chance) == (3, None)
    assert "bits_per_byte" in table_of([one]) or "word_perplexity" in table_of([one])


def test_answers_taken_from_the_text_in_several_ways_are_each_reported(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gsm8k does: its questions count once."""
    only_tasks(
        monkeypatch,
        tmp_path,
        "task: twice\noutput_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: nothing\n"
        "generation_kwargs: {until: ['x'], do_sample: false, max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        "filter_list:\n"
        "- {name: always, filter: [{function: regex, regex_pattern: 'cannot be', fallback: nothing}, "
        "{function: take_first}]}\n"
        "- {name: never, filter: [{function: regex, regex_pattern: 'cannot be', fallback: other}, "
        "{function: take_first}]}\n",
    )
    (one,) = measured(runner, data, "twice")
    assert {name: metric.value for name, metric in one.metrics.items()} == {
        "exact_match,always": 1.0,
        "exact_match,never": 0.0,
    }
    assert one.questions == len(SENTENCES)


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


def test_a_damaged_archive_is_one_error(data: Path) -> None:
    content = bytearray((data / "mmlu.zip").read_bytes())
    with zipfile.ZipFile(data / "mmlu.zip") as archive:
        first = archive.infolist()[0]
    start = first.header_offset + 30 + len(first.filename)
    content[start : start + first.compress_size] = b"\xff" * first.compress_size
    (data / "mmlu.zip").write_bytes(content)
    with pytest.raises(EvaluationError, match="cannot be read as a zip"):
        chosen_tasks(["mmlu"], data)


def test_a_tag_of_the_harness_is_told_its_tasks(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    tasks += "metric_list: [{metric: word_perplexity}]\n"
    only_tasks(monkeypatch, tmp_path, *(f"tag: both\ntask: {name}\n{tasks}" for name in ("one", "two")))
    with pytest.raises(EvaluationError, match=r"both is several tasks.*one, two"):
        runner.run(harness.Chosen("both", "harness"), "key")


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
    def row(task: str, digest: str) -> Measured:
        return Measured("m", task, f"{task}{digest}", {"acc": Metric(0.5, 0.1)}, 9, settings={"model": digest})

    rows = [row("a", "old"), row("b", "old"), row("a", "new")]
    assert current(rows) == rows[2:]


def test_a_folder_with_other_results_is_refused_and_left(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"accuracy": 1}')
    with pytest.raises(EvaluationError, match="holds no results"):
        measure([model], tasks=["piqa"], data=data, out=tmp_path)
    assert (tmp_path / "results.json").read_text() == '{"accuracy": 1}'


def test_a_question_is_one_context_or_one_ending() -> None:
    for contexts, endings in ((("a", "b"), ("c", "d")), ((), ("c", "d")), (("a",), ())):
        with pytest.raises(EvaluationError):
            Question(contexts, endings, 0)
    assert Part((Question(("a", "b"), ("c",), 1),)).questions[0].chance == 0.5


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """The command, as its status and what it wrote."""
    from headshare.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["headshare", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_the_command_prints_a_table_or_one_object(model: Path, data: Path, run: Callable, tmp_path: Path) -> None:
    words = ["eval", model, "--tasks", "piqa, rte", "--data-dir", data, "--limit", 1, "--out", tmp_path / "out"]
    status, out, _ = run(*words)
    assert status == 0
    assert out.splitlines()[0] == "| model | piqa (1) | rte (1) |"
    status, out, _ = run(*words, "--json")
    assert [row["task"] for row in json.loads(out)["results"]] == ["piqa", "rte"]
    status, out, err = run("eval", model, "--tasks", "cats", "--data-dir", data)
    assert (status, out) == (1, "")
    assert err.startswith("error: there is no task 'cats'.")
    status, out, err = run("eval", model, "--tasks", "piqa", "--data-dir", data, "--against", model)
    assert (status, out) == (1, "")
    assert "--against" in err
    text = tmp_path / "text"
    text.write_text("the cat was there and the pig went " * 40)
    for option, value in (("--limit", 4), ("--few-shot", 1), ("--data-dir", data), ("--prompt", "x")):
        status, out, err = run("eval", model, "--text", text, option, value)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert f"{option} would not be used" in err
    said = [run("eval", model, "--text", text, "--window", 32, "--dtype", name)[1] for name in ("float32", "bfloat16")]
    assert said[0] != said[1]


# ---- what models write


def test_what_is_written_in_company_is_what_is_written_alone(runner: Runner) -> None:
    prompts = ["the cat", "Question: does the river freeze in winter?\nAnswer:", "a kite", "when it is cold the pig"]
    together = continuations(dataclasses.replace(runner, settings=Settings(batch_size=3)), prompts, Writing(9))
    assert together == [continuations(runner, [one], Writing(9))[0] for one in prompts]
    for prompt, text in zip(prompts, together, strict=True):
        tokens = runner.tokenizer.encode(prompt)
        for _ in range(9):
            with torch.inference_mode():
                tokens.append(int(runner.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == runner.tokenizer.eos_token_id:
                break
        assert text == runner.tokenizer.decode(tokens[len(runner.tokenizer.encode(prompt)) :], skip_special_tokens=True)


def test_what_is_drawn_depends_on_the_seed_and_on_nothing_else(runner: Runner) -> None:
    def drawn(prompts: list[str], seed: int) -> list[str]:
        return continuations(runner, prompts, Writing(8, None, 1.0, seed))

    assert drawn(["the cat", "a kite"], 3) == [drawn(["the cat"], 3)[0], drawn(["a kite"], 3)[0]]
    assert drawn(["the cat"], 3) != drawn(["the cat"], 4)


def test_what_is_written_ends_before_the_stop(runner: Runner) -> None:
    (whole,) = continuations(runner, ["the cat"], Writing(12))
    stop = whole[len(whole) // 2]
    assert continuations(runner, ["the cat"], Writing(12, stop)) == [whole.partition(stop)[0]]


def test_translations_are_measured_as_sacrebleu_and_nltk_measure_them(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "en").write_text("the cat was there\nthe pig went\n")
    written = continuations(runner, ["the cat was there\n", "the pig went\n"], Writing(64, "\n"))
    (tmp_path / "fr").write_text(f"{written[0].strip()}\nand {' '.join(written[1].split()[:3])} so\n")
    references = (tmp_path / "fr").read_text().rstrip("\n").split("\n")
    parallel = Parallel(tmp_path / "en", tmp_path / "fr")
    one = parallel.run(runner, "key")
    wanted = sacrebleu.corpus_bleu([text.strip() for text in written], [references]).score
    assert one.metrics["bleu"].value == pytest.approx(wanted)
    assert one.questions == 2
    assert one.settings["bleu"].startswith("nrefs:1|") or "|v:" in one.settings["bleu"]
    assert re.fullmatch(r"bleu [\d.]+ ± [\d.]+, meteor [\d.]+ ± [\d.]+", one.in_cell)


def test_errors_of_translations_are_those_of_their_lines() -> None:
    references = [f"the cat number {n} went to the house of the pig {n % 3}" for n in range(40)]
    written = [
        " ".join(word for k, word in enumerate(text.split()) if (n * k) % 7 != 1) for n, text in enumerate(references)
    ]
    found, _ = bleu_and_meteor(written, references)
    alone = [bleu_and_meteor([one], [other])[0]["meteor"] for one, other in zip(written, references, strict=True)]
    assert all(metric.error is None for metric in alone)
    values = torch.tensor([metric.value for metric in alone])
    assert found["meteor"].error == pytest.approx(float(values.std() / len(values) ** 0.5), rel=1e-4)
    drawn = torch.Generator().manual_seed(0)
    resampled = []
    for _ in range(400):
        some = torch.randint(40, (40,), generator=drawn).tolist()
        resampled.append(sacrebleu.corpus_bleu([written[n] for n in some], [[references[n] for n in some]]).score)
    assert found["bleu"].error == pytest.approx(float(torch.tensor(resampled).std()), rel=0.2)
    # Nothing right is 0 without a doubt, and no reason to fail.
    assert bleu_and_meteor(["x", "y"], ["a b c d", "e f g h"])[0]["bleu"] == Metric(0.0, 0.0)


def test_meteor_rewards_order_and_stems_and_needs_no_dictionary() -> None:
    def meteor(written: str, reference: str, language: str | None = "english") -> float:
        return bleu_and_meteor([written], [reference], language)[0]["meteor"].value or 0.0

    assert meteor("a b c d e f", "a b c d e f") == pytest.approx(100 * (1 - 0.5 / 6**3), rel=1e-6)
    assert meteor("a b c d", "a b c d") > meteor("d c b a", "a b c d") > 0
    assert meteor("cats", "cat") > 0
    assert meteor("cats", "cat", None) == 0
    assert meteor("une maisons blanches", "une maison blanche", "french") == meteor("a b c", "a b c")
    assert meteor("une maisons blanches", "une maison blanche", None) < meteor("a b c", "a b c")
    assert meteor("A dog.", "a dog .") == meteor("a b c", "a b c")  # words and stops apart, in small letters
    assert meteor("dog", "cat") == 0


def test_parallel_texts_and_prompts_that_do_not_fit_are_refused(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("a\nb\n")
    (tmp_path / "other").write_text("a\n")
    with pytest.raises(EvaluationError, match=r"2 lines and .* 1"):
        Parallel(tmp_path / "one", tmp_path / "other")
    with pytest.raises(EvaluationError, match=r"put \{source\} there"):
        Parallel(tmp_path / "one", tmp_path / "one", prompt="translate")
    with pytest.raises(EvaluationError, match="stems no 'klingon'"):
        Parallel(tmp_path / "one", tmp_path / "one", language="klingon")
    with pytest.raises(EvaluationError, match="has no tokens"):
        continuations(runner, [""], Writing(4))
    with pytest.raises(EvaluationError, match="more than the model's 256"):
        continuations(runner, ["the cat"], Writing(256))
    for wrong in ({"tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(EvaluationError):
            Writing(**wrong)


def test_the_command_writes_side_by_side(model: Path, run: Callable, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("the cat\n\na | kite\n")
    words = ["generate", model, model, "--prompts", tmp_path / "prompts", "--prompt", "the river", "--tokens", 4]
    status, out, _ = run(*words)
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith("**")] == [
        "**the river**",
        "**the cat**",
        "**a \\| kite**",
    ]
    assert len([line for line in out.splitlines() if line.startswith(f"| {model} |")]) == 6
    data = json.loads(run(*words, "--json")[1])
    assert data["prompts"] == ["the river", "the cat", "a | kite"]
    status, out, err = run("generate", model)
    assert (status, out) == (1, "")
    assert "--prompt" in err
    (tmp_path / "en").write_text("the cat\n")
    status, out, _ = run("eval", model, "--source", tmp_path / "en", "--reference", tmp_path / "en", "--limit", 1)
    assert status == 0
    assert "translation of en (1)" in out
    assert run("eval", model, "--source", tmp_path / "en")[0] == 1


def test_without_the_harness_texts_are_measured_and_tasks_say_what_to_install(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "text").write_text(" ".join(SENTENCES * 9))
    assert measure([model], text=Text(tmp_path / "text", 32))[0].metrics["perplexity"].value is not None
    for folder in (data, None):
        with pytest.raises(EvaluationError, match=r"not installed\. Run: pip install 'headshare\[eval\]'"):
            measure([model], tasks=["boolq"], data=folder)
