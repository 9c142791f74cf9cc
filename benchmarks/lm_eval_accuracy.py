"""Every option's log-likelihood and every accuracy beside those of lm-evaluation-harness, on the same questions.

    pip install lm_eval==0.4.13
    python benchmarks/lm_eval_accuracy.py MODEL --data-dir DIR [--tasks piqa,boolq] [--limit 20] [--longest N] [--json]

The harness runs its own task files with its own prompts and splitting; only the rows come from DIR, put back into the
columns of the published data sets. Both compute with one model, in float32. `--longest` tells both that the model
takes no more tokens than that, so that contexts are cut. Exits 1 if likelihoods or accuracies differ.

Found with SmolLM2-135M, lm_eval 0.4.13 and torch 2.13 on a CPU, first 20 questions of each task, 280 options in all:
accuracies and standard errors equal, log-likelihoods within 4.3e-5 (their means lie at -3 to -64). With --limit 8
--longest 100, for a checkpoint shared at 0.2: within 4.8e-5.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from headshare.checkpoints import open_checkpoint
from headshare.choices import TASKS, Accuracy, accuracy_of, log_likelihoods, read_questions
from headshare.models import load_model, load_tokenizer
from machine import machine

TOLERANCE = 1e-3  # of a log-likelihood: sums of a hundred float32 terms
Row = dict[str, Any]


# ---- rows as the published data sets have them


def piqa(row: Row) -> Row:
    """Columns goal, sol1, sol2, label."""
    goal = row["query"][len("Question: ") : -1]
    return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}


def openbook_qa(row: Row) -> Row:
    """Columns question_stem, choices, answerKey."""
    choices = {"text": row["choices"], "label": list("ABCD")}
    return {"question_stem": row["query"], "choices": choices, "answerKey": "ABCD"[row["gold"]]}


def winogrande(row: Row) -> Row:
    """Columns sentence, option1, option2, answer; an option here brings all that stands before it."""
    one, other = row["context_options"]
    return {"sentence": f"_ {row['continuation']}", "option1": one, "option2": other, "answer": str(row["gold"] + 1)}


def boolq(row: Row) -> Row:
    """Columns passage, question, label."""
    passage, _, question = row["query"].rpartition("\nQuestion: ")
    return {"passage": passage[len("Passage: ") :], "question": question[:-1], "label": row["gold"]}


def race(rows: list[Row]) -> list[Row]:
    """Columns article and problems, which is Python's text of a list."""
    columns = ("question", "options", "answer")
    return [
        {"article": same[0]["article"], "problems": repr([{name: row[name] for name in columns} for row in same])}
        for same in (list(group) for _, group in groupby(rows, key=lambda row: row["example_id"]))
    ]


def each(turn: Callable[[Row], Row], rows: list[Row]) -> list[Row]:
    """Row by row."""
    return [turn(row) for row in rows]


# our task: the harness's file, and how its rows come about
HARNESS: dict[str, tuple[str, Callable[[list[Row]], list[Row]]]] = {
    "piqa": ("piqa/piqa.yaml", partial(each, piqa)),
    "openbook_qa": ("openbookqa/openbookqa.yaml", partial(each, openbook_qa)),
    "winogrande": ("winogrande/default.yaml", partial(each, winogrande)),
    "boolq": ("super_glue/boolq/default.yaml", partial(each, boolq)),
    "race_middle": ("race/race.yaml", race),
}


def harness_task(name: str, data: Path) -> ConfigurableTask:
    """The harness's own task, over these rows."""
    file, turn = HARNESS[name]
    rows = turn([json.loads(line) for line in data.read_text(encoding="utf-8").split("\n") if line])
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file)
    split = config.get("test_split") or config["validation_split"]
    unused = dict.fromkeys(("dataset_path", "dataset_name", "training_split", "validation_split", "test_split"))
    columns = Dataset.from_list(rows)
    changes = {"task": name, "test_split": split, "custom_dataset": lambda **_: {split: columns}}
    return ConfigurableTask(config={**config, **unused, **changes})


# ---- both


def harness_results(model: HFLM, names: list[str], data_dir: Path, limit: int | None) -> Row:
    """What the harness measures, with each option's log-likelihood."""
    tasks = [harness_task(name, data_dir / TASKS[name].file) for name in names]
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, limit=limit, bootstrap_iters=1, log_samples=True)
    return {
        name: {
            "likelihoods": [[one[0] for one in sample["filtered_resps"]] for sample in found["samples"][name]],
            "accuracy": found["results"][name]["acc,none"],
            "standard_error": found["results"][name]["acc_stderr,none"],
            "normalised_accuracy": found["results"][name].get("acc_norm,none"),
        }
        for name in names
    }


def compared(mine: list[list[float]], measured: Accuracy, theirs: Row) -> Row:
    """The largest difference of two log-likelihoods, and both accuracies."""
    pairs = [
        (a, b) for one, two in zip(mine, theirs["likelihoods"], strict=True) for a, b in zip(one, two, strict=True)
    ]
    own = measured.to_dict()
    fields = ("accuracy", "standard_error", "normalised_accuracy")
    both = {name: [own[name], theirs[name]] for name in fields if theirs[name] not in (None, "N/A")}
    return {
        "questions": len(mine),
        "options": len(pairs),
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "mean_log_likelihood": sum(a for a, _ in pairs) / len(pairs),
        **both,
        "same": all(abs(a - b) <= TOLERANCE for a, b in pairs)
        and all(abs(a - b) < 1e-9 for a, b in both.values()),
    }  # fmt: skip


def main() -> None:
    """Measure both ways; print one line for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--longest", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = arguments.tasks.split(",")
    with open_checkpoint(arguments.model) as checkpoint:
        model, tokenizer = load_model(checkpoint, dtype="float32"), load_tokenizer(checkpoint)
    if arguments.longest:
        model.config.max_position_embeddings = arguments.longest
    theirs = harness_results(HFLM(pretrained=model, tokenizer=tokenizer), names, arguments.data_dir, arguments.limit)
    found = {}
    for name in names:
        questions = read_questions(arguments.data_dir / TASKS[name].file, TASKS[name], limit=arguments.limit)
        mine = log_likelihoods(model, tokenizer, questions)
        found[name] = compared(mine, accuracy_of(mine, questions, TASKS[name]), theirs[name])
    where = {**machine(), "lm_eval": version("lm_eval")}
    if arguments.json:
        print(json.dumps({**found, "machine": where}))
    else:
        for name, one in found.items():
            pairs = "; ".join(f"{key} {v[0]:.4f} {v[1]:.4f}" for key, v in one.items() if isinstance(v, list))
            print(
                f"{name:12} {one['questions']} questions, {one['options']} options: log-likelihoods differ by at most "
                f"{one['largest_difference']:.1e}, mean {one['mean_log_likelihood']:.1f}; {pairs}"
            )
        print(json.dumps(where))
    sys.exit(not all(one["same"] for one in found.values()))


if __name__ == "__main__":
    main()
