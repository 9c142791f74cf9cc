"""The command tasks."""

from pathlib import Path
from typing import Annotated

import typer

from headshare.cli.options import CHOOSE, JsonOption, listed, print_result


def tasks(
    out: Annotated[Path, typer.Argument(metavar="TASKS", help="The folder to write; it must not exist.")],
    data_dir: Annotated[
        Path,
        typer.Option(rich_help_panel=CHOOSE, help="Read the tasks' files, piqa.jsonl and so on, from this folder."),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            rich_help_panel=CHOOSE,
            metavar="NAMES",
            show_default="those whose files are there",
            help="Write these tasks of ours, joined by commas.",
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Write tasks of ours as files for the command line of lm-evaluation-harness, which asks the same there."""
    from headshare.errors import EvaluationError
    from headshare.evaluation.harness_tasks import write_tasks
    from headshare.evaluation.task_files import TASKS

    there = [name for name, task in TASKS.items() if any((data_dir / file).exists() for file in task.files)]
    names = listed(tasks) or there
    if not names:
        raise EvaluationError(f"{data_dir} has no file of a task. There are {', '.join(TASKS)}.")
    written = write_tasks(names, data_dir, out)
    words = f"{len(written)} tasks in {out}\nRun: lm_eval --include_path {out} --tasks {','.join(written)}"
    print_result({"out": str(out), "tasks": written}, words, as_json, written=out)
