"""The content of a report: what was measured, its tables and figures, and what became of the paper's claims."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headshare.attention.page import Attended
from headshare.evaluation.results import results_table
from headshare.experiments.case import base_of
from headshare.experiments.cells import Asked, Compared
from headshare.experiments.report.claims import Checked, checked
from headshare.experiments.report.figures import figures_of
from headshare.experiments.report.paper import beside
from headshare.experiments.report.retained import RETAINED, left_out, retained, subjects
from headshare.experiments.report.sources import Comparison, Evaluated, Published
from headshare.experiments.report.tables import cells_table, notes_of, verdict
from headshare.pages.svg import Figure
from headshare.tables import Table

# what the summary counts
COUNTED = (
    "What the paper says, and at how many ratios, or of how many methods, it holds here. Comparisons that agree in "
    "all that both measured are one; those on other windows are not."
)
# the rules by which claims are judged, as the page lists them
JUDGED = (
    "What decides is the mean difference of the losses on the same windows of the text, from two standard errors on; "
    "without a text, that of the mean accuracy, on tasks where the dense model is two standard errors above guessing, "
    "or that of BLEU. What differs by less is level, or cannot be told.",
    "Errors of a text are those of the circular block bootstrap, with blocks of four windows, as neighbours are alike. "
    "Errors of tasks are those of a paired bootstrap of questions or lines, where the outcome of each was kept, and "
    "otherwise as if each model had been asked other questions.",
    "The best of several rivals is chosen on those windows too, which favours it. Errors are of the text or the "
    "questions alone, not of the seed of a training run or of a draw.",
    "More sharing has less quality where the slope of a straight line over the ratios says so, and no step from one "
    "ratio to the next says otherwise.",
    "What was trained has read text that neither the dense model nor what was not trained has.",
    "In tables, `~` is before an accuracy that is not two standard errors above guessing or, where that is more, above "
    "always the same answer: the row `guessing` has both.",
)

# what starts from the paper's pairs
PAIRED = ("directshare", "match-", "random-donors", "mean-unit", "deletion-same", "postshare", "both")


@dataclass(frozen=True)
class Judged:
    """A claim of the paper on one model: how often each verdict was given."""

    claim: str
    model: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Compare:
    """One comparison: what was measured, how, and what came out.

    `facts` are pairs of a name and what it is here. `beside` has tables of the paper's numbers beside ours, each with a
    sentence before it.
    """

    title: str
    model: str
    facts: Sequence[tuple[str, str]]
    table: Table
    notes: Sequence[str]
    verdict: Sequence[str]
    beside: Sequence[tuple[str, Table]]
    claims: Sequence[Checked]
    figures: Sequence[Figure]

    @property
    def heading(self) -> str:
        """The title, and the model."""
        return f"{self.title}, on {self.model}" if self.title else self.model


@dataclass(frozen=True)
class Report:
    """All of a report: the claims on each model, the comparisons, results of `headshare eval` with their titles, and
    those of `headshare attention`.

    `absent` names what was not run, each with the reason.
    """

    judged: Sequence[Judged]
    comparisons: Sequence[Compare]
    evaluated: Sequence[tuple[str, Table]]
    attended: Sequence[Attended] = ()
    absent: Sequence[tuple[str, str]] = ()


def report_of(
    measured: Sequence[Comparison],
    tables: Sequence[Published] = (),
    evaluated: Sequence[Evaluated] = (),
    attended: Sequence[Attended] = (),
    absent: Sequence[tuple[str, str]] = (),
) -> Report:
    """The report of these comparisons, beside the paper's tables, of these results, and of what was not run."""
    comparisons = [
        Compare(
            one.about.title,
            one.about.model,
            list(_facts(one)),
            cells_table(one.cells),
            [*notes_of(one.cells), *filter(None, [left_out(one.cells)])],
            verdict(one.cells).splitlines(),
            [*_retained(one.cells), *beside(one, tables), *subjects(one.cells)],
            checked(one.cells),
            figures_of(one.cells),
        )
        for one in measured
    ]
    results = [(one.title, results_table(one.rows)) for one in evaluated]
    return Report(_judged(measured), comparisons, results, attended, absent)


def _retained(cells: Sequence[Compared]) -> Iterable[tuple[str, Table]]:
    table = retained(cells)
    if table is not None:
        yield RETAINED, table


def _facts(one: Comparison) -> Iterable[tuple[str, str]]:
    about = one.about
    yield "model", about.model
    if about.text:
        yield "measured on", about.text
    if about.limit:
        yield "questions", f"the first {about.limit} questions of each task or subject"
    if about.dtype:
        yield "run in", about.dtype
    if about.few_shot is not None:
        yield "examples", f"{about.few_shot} examples before each"
    if about.calibration:
        yield "calibrated on", about.calibration
    if about.training:
        yield "trained on", about.training
    if any(base_of(cell.method).startswith(PAIRED) for cell in one.cells):
        yield "pairs", f"in mode {about.mode} where a method names no other"
    yield "versions", ", ".join(f"{name} {value}" for name, value in about.versions.items())


def _judged(measured: Sequence[Comparison]) -> list[Judged]:
    """How often each claim holds by model. Comparisons of the same cells count once."""
    counted: dict[tuple[str, str], Counter[str]] = {}
    claims: dict[str, None] = {}
    for model, cells in _pooled(measured):
        for claim in checked(cells):
            claims.setdefault(claim.claim)
            counted.setdefault((claim.claim, model), Counter())[claim.says.value] += 1
    return [
        Judged(claim, model, dict(sorted(counts.items())))
        for of in claims
        for (claim, model), counts in counted.items()
        if claim == of
    ]


def _pooled(measured: Sequence[Comparison]) -> list[tuple[str, list[Compared]]]:
    """Pairs of a model and the cells of its comparisons.

    Comparisons of a model are merged if they have cells in common and agree in all of them; others stay apart.
    """
    pools: list[tuple[str, dict[tuple[str, Asked], Compared]]] = []
    for comparison in measured:
        cells = {(cell.method, cell.asked): cell for cell in comparison.cells if not cell.failed}
        for model, pool in pools:
            both = pool.keys() & cells.keys()
            agree = bool(both) and all(_results_of(pool[key]) == _results_of(cells[key]) for key in both)
            if model == comparison.about.model and agree:
                pool |= cells
                break
        else:
            pools.append((comparison.about.model, cells))
    return [(model, list(pool.values())) for model, pool in pools]


def _results_of(cell: Compared) -> object:
    """The results that claims are judged by: losses, or without a text the metrics of tasks."""
    return cell.losses or [(row.task, row.metrics) for row in cell.results]
