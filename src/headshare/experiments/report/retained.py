"""The share of the dense model's accuracy that is left, and accuracies by subject of an exam (figure 4)."""

from collections.abc import Iterator, Sequence

from headshare.evaluation.results import TaskResult
from headshare.experiments.cells import DENSE, Compared
from headshare.experiments.report.scores import ACCURACY
from headshare.tables import Table

RETAINED = (
    "What is left of the dense model's accuracy. The paper divides the sum over all tasks by the dense model's, "
    "whatever guessing would give. The last column takes the tasks on which the dense model is above guessing, "
    "and divides what is above it."
)


def retained(cells: Sequence[Compared]) -> Table | None:
    """A table of the share that each cell has of the dense model's accuracy; None without tasks.

    Its first row says what guessing would be said to retain.
    """
    dense = next((cell for cell in cells if cell.method == DENSE), None)
    whole = {} if dense is None else _chosen(dense)
    if not whole:
        return None
    above = [task for task, row in whole.items() if not row.at_chance]
    named = ", ".join(above) if len(above) < 4 else f"{len(above)} tasks"
    heads = ["ratio", "method", "saved", f"of {len(whole)} tasks", f"above guessing: {named or 'no task'}"]
    guessed = sum(max(row.guessed) for row in whole.values()) / _total(whole, whole)
    rows = [["", "guessing", "", f"{guessed:.1%}", "0.0%" if above else ""]]
    for cell in cells:
        own = _chosen(cell)
        if cell.method == DENSE or not whole.keys() <= own.keys():
            continue
        floor = sum(max(whole[task].guessed) for task in above)
        left = (_total(own, above) - floor) / (_total(whole, above) - floor) if above else None
        share = f"{_total(own, whole) / _total(whole, whole):.1%}"
        rows.append(
            [str(cell.asked), cell.method, f"{cell.saved_fraction:.2%}", share, "" if left is None else f"{left:.1%}"]
        )
    return Table(heads, rows, words=(1,)) if len(rows) > 1 else None


def left_out(cells: Sequence[Compared]) -> str:
    """A sentence about the tasks that tell nothing, as the dense model guesses there; empty where there is none."""
    dense = next((cell for cell in cells if cell.method == DENSE), None)
    tasks = [] if dense is None else [row.task for row in dense.results if row.at_chance]
    if not tasks:
        return ""
    return (
        f"Left out of verdicts, as the dense model is not two standard errors above guessing there: {', '.join(tasks)}."
    )


def subjects(cells: Sequence[Compared]) -> Iterator[tuple[str, Table]]:
    """A sentence and a table for each task with subjects: accuracies in percent, a row for each subject."""
    done = [cell for cell in cells if not cell.failed]
    parts = {cell.title: {row.task: row.parts for row in cell.results if row.parts} for cell in done}
    for task in dict.fromkeys(task for of in parts.values() for task in of):
        some = {title: of[task] for title, of in parts.items() if task in of}
        first = next(iter(some.values()))
        rows = [
            [subject_of(task, subject), str(first[subject][1])]
            + [f"{100 * shares[subject][0]:.0f}" if subject in shares else "" for shares in some.values()]
            for subject in first
        ]
        better = {
            title: sum(shares[of][0] >= first[of][0] for of in first if of in shares) for title, shares in some.items()
        }
        counts = ", ".join(f"{title} {count}" for title, count in list(better.items())[1:])
        words = (
            f"{task} by subject (figure 4 of the paper), percent. Of {len(first)} subjects, as good as dense or better"
        )
        yield (
            f"{words}: {counts}." if counts else f"{words.partition(' Of')[0]}",
            Table(["subject", "questions", *some], rows, words=(0,)),
        )


def subject_of(task: str, part: str) -> str:
    """The name of a subject for people, from that of a part of a task."""
    return part.removeprefix(f"{task.partition(':')[0]}_").replace("_", " ")


def _chosen(cell: Compared) -> dict[str, TaskResult]:
    """The results on tasks that choose among options."""
    return {
        row.task: row
        for row in cell.results
        if row.chance is not None and row.main[0] == ACCURACY and row.main[1].value is not None
    }


def _total(rows: dict[str, TaskResult], tasks: Sequence[str] | dict[str, TaskResult]) -> float:
    return sum(rows[task].main[1].value or 0.0 for task in tasks)
