"""Tasks: prompts and likelihoods beside the harness's own, accuracies by hand, files that are wrong."""

import dataclasses
import json
import math
import re
import statistics
import zipfile
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

import headshare as hs
from headshare.errors import EvaluationError
from headshare.evaluation.harness import Runner, Settings, _hushed, _only_results, chosen_tasks, tasks_of_harness
from headshare.evaluation.harness_tasks import as_task
from headshare.evaluation.questions import Question
from headshare.evaluation.task_files import TASKS, TaskPart
from support.questions import EXAM, ROWS, measured, zipped

NONE = tasks_of_harness(any_at_all=False)


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
    with _hushed(), _only_results():
        theirs = ConfigurableTask(config={**config, **unused, **given})
        ours = as_task(name, *next(iter((chosen.parts or {}).items())))
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
    with _hushed(), _only_results():
        task = as_task("mmlu", "history", parts["history"])
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
    with _hushed(), _only_results():
        task = as_task("mmlu", "history", (chosen.parts or {})["history"])
        found = lm_eval.simple_evaluate(
            model=runner._for_harness, tasks=[task], num_fewshot=5, bootstrap_iters=0, task_manager=NONE
        )
    for sample in found["samples"]["mmlu_history"]:
        assert re.findall(r"Who was number (\d)", sample["arguments"][0][0]) == list("01234")


def test_chinese_prompts_have_no_space_before_their_answers(runner: Runner, data: Path) -> None:
    for name in ("cmnli", "ocnli", "tnews", "csl", "ceval"):
        (chosen,) = chosen_tasks([name], data)
        with _hushed(), _only_results():
            task = as_task(name, *next(iter((chosen.parts or {}).items())))
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
    monkeypatch.setattr("headshare.evaluation.questions.FILE_BYTES", 20)
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


def test_a_damaged_archive_is_one_error(data: Path) -> None:
    content = bytearray((data / "mmlu.zip").read_bytes())
    with zipfile.ZipFile(data / "mmlu.zip") as archive:
        first = archive.infolist()[0]
    start = first.header_offset + 30 + len(first.filename)
    content[start : start + first.compress_size] = b"\xff" * first.compress_size
    (data / "mmlu.zip").write_bytes(content)
    with pytest.raises(EvaluationError, match="cannot be read as a zip"):
        chosen_tasks(["mmlu"], data)


def test_a_question_is_one_context_or_one_ending() -> None:
    for contexts, endings in ((("a", "b"), ("c", "d")), ((), ("c", "d")), (("a",), ())):
        with pytest.raises(EvaluationError):
            Question(contexts, endings, 0)
    assert TaskPart((Question(("a", "b"), ("c",), 1),)).questions[0].chance == 0.5
