"""Rows of every task, and a folder with a file for each."""

import csv
import io
import json
import zipfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headshare.evaluation import harness
from headshare.evaluation.harness import Runner, chosen_tasks
from headshare.evaluation.results import TaskResult

# all the tasks of the harness, fourteen thousand files
all_tasks = harness.tasks_of_harness


@cache
def some_tasks(*, any_at_all: bool = True) -> Any:
    """A few of the harness's tasks in the place of all, whose files take sixteen seconds to read."""
    found = find_spec("lm_eval.tasks")
    assert found is not None
    assert found.origin is not None
    folders = [Path(found.origin).parent / name for name in ("hellaswag", "piqa", "super_glue")]
    with harness._hushed():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_defaults=False, include_path=folders if any_at_all else None)


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


def zipped(path: Path, members: dict[str, list[list[str]]]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in members.items():
            text = io.StringIO()
            csv.writer(text).writerows(rows)
            archive.writestr(name, text.getvalue())
    return path


def make_data(folder: Path) -> Path:
    """A folder with a file for every task."""
    folder.mkdir()
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = [{**ROWS["race_middle"][3], "example_id": f"{level}7"} for level in ("high", "middle")]
    (folder / "race_sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sample))
    zipped(folder / "mmlu.zip", EXAM)
    heading = ["id", "question", "A", "B", "C", "D", "answer"]
    zipped(folder / "ceval.zip", {"val/art_val.csv": [heading, ["0", "\u8c01", "1", "2", "3", "4", "B"]]})
    return folder


def measured(runner: Runner, data: Path, *names: str) -> list[TaskResult]:
    return [runner.run(one, one.name) for one in chosen_tasks(names, data)]
