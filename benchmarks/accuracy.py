"""Accuracy of models, dense or shared, on multiple-choice tasks: one row for each model, percent and standard error.

    python benchmarks/accuracy.py MODEL... --data-dir DIR [--tasks piqa,boolq] [--limit N] [--dtype float32]
                                  [--device cpu] [--batch-tokens 4096] [--json]

DIR holds a file for each task: piqa.jsonl, openbook_qa.jsonl, winogrande.jsonl, boolq.jsonl, race_middle.jsonl.
`--limit` takes the first N questions of each, as lm-evaluation-harness does. Where the harness gives both, a second
column holds the accuracy by likelihood per character.
"""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

from headshare.checkpoints import open_checkpoint
from headshare.choices import BATCH_TOKENS, TASKS, measure_accuracy, read_questions
from headshare.models import load_model, load_tokenizer
from headshare.progress import shown
from machine import machine

NORMALISED = ("piqa", "openbook_qa")  # where the harness gives both
Row = dict[str, Any]


def accuracies(name: str, questions: dict[str, list], dtype: str, device: str, batch_tokens: int) -> dict[str, Row]:
    """One model on all tasks."""
    with open_checkpoint(name) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        model = load_model(checkpoint, dtype=dtype, device_map=device)
    return {
        task: measure_accuracy(model, tokenizer, asked, task=TASKS[task], batch_tokens=batch_tokens).to_dict()
        for task, asked in questions.items()
    }


def cell(share: float, error: float | None) -> str:
    """Percent, and its standard error."""
    return f"{100 * share:.1f} ± {'?' if error is None else f'{100 * error:.1f}'}"


def table(found: dict[str, dict[str, Row]], tasks: list[str]) -> str:
    """Markdown: models down, tasks across, with how many questions each has and what guessing gives."""
    columns = [(task, kind) for task in tasks for kind in ("", "normalised_") if not kind or task in NORMALISED]
    heads, guesses = ["model"], ["guessing"]
    for task, kind in columns:
        one = next(iter(found.values()))[task]
        heads.append(f"{task}{', per character' if kind else ''} ({one['questions']})")
        guesses.append(f"{100 * one['chance']:.1f}")
    rows = [heads, ["---"] + ["---:"] * len(columns), guesses]
    for name, by_task in found.items():
        cells = [
            cell(by_task[task][f"{kind}accuracy"], by_task[task][f"{kind}standard_error"]) for task, kind in columns
        ]
        rows.append([name, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Measure every model on every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS), type=lambda names: names.split(","))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.tasks) - set(TASKS):
        parser.error(f"there is no task {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}.")
    tasks = [TASKS[name] for name in arguments.tasks]
    questions = {
        task.name: read_questions(arguments.data_dir / task.file, task, limit=arguments.limit) for task in tasks
    }
    found = {}
    with shown():
        for name in arguments.models:
            found[name] = accuracies(name, questions, arguments.dtype, arguments.device, arguments.batch_tokens)
            gc.collect()
    settings = {name: getattr(arguments, name) for name in ("limit", "dtype", "device", "batch_tokens")}
    if arguments.json:
        print(json.dumps({"accuracy": found, **settings, "machine": machine()}))
    else:
        print(table(found, arguments.tasks))
        print(f"\n{json.dumps(settings)}\n{json.dumps(machine())}")


if __name__ == "__main__":
    main()
