"""One page from the folders that `headshare compare` wrote: each table, what the paper has for the same model, and what
becomes of the paper's claims."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from headshare.checkpoint.refit_record import is_shown
from headshare.errors import EvaluationError
from headshare.evaluation.harness import named
from headshare.evaluation.results import RESULTS, current, read_results, table_of
from headshare.evaluation.results import Measured as Row
from headshare.experiments.cells import CELLS, Compared, read_cells
from headshare.experiments.grid import ABOUT, About
from headshare.experiments.report.claims import ACCURACY, Checked, checked
from headshare.experiments.report.tables import in_words
from headshare.files.atomic import read_yaml

_ABOUT: TypeAdapter[About] = TypeAdapter(About)
MAX_TABLES = 100


Word = Annotated[str, AfterValidator(lambda text: _shown(text))]


def _shown(text: str) -> str:
    """A text that can stand in a table and on a terminal."""
    if not is_shown(text) or "|" in text:
        raise ValueError(f"{text!a:.60} cannot be shown in a table")
    return text


def _check_shown(file: Path, *words: str) -> None:
    """Raise EvaluationError if one of the texts that somebody else may have written cannot be shown in a table."""
    try:
        for text in words:
            _shown(text)
    except ValueError as error:
        raise EvaluationError(f"{file}: {error}.") from None


def _words_of(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield from (row.task, *row.metrics)


class Published(BaseModel):
    """A table of the paper: percent, by row (a method and its ratio, as `directshare 0.3`), in the order of `tasks`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    table: Word
    model: Word
    tasks: tuple[Word, ...]
    rows: dict[Word, tuple[float, ...]]


_PUBLISHED: TypeAdapter[list[Published]] = TypeAdapter(Annotated[list[Published], Field(max_length=MAX_TABLES)])


@dataclass(frozen=True)
class Measured:
    """What one folder holds."""

    about: About
    cells: list[Compared]

    @classmethod
    def load(cls, folder: Path) -> "Measured":
        """The cells of the last comparison in a folder.

        Raises:
            EvaluationError: if `headshare compare` did not finish there.
        """
        try:
            about = _ABOUT.validate_json((folder / ABOUT).read_bytes())
            words = (about.title, about.model, about.text, about.calibration, about.training, about.dtype)
            for text in (*words, *about.versions, *about.versions.values()):
                _shown(text)
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"{folder} holds no finished comparison ({' '.join(str(error).split()):.100}). Run headshare compare "
                f"with --out {folder} first."
            ) from None
        by_key = {cell.key: cell for cell in read_cells(folder / CELLS)}
        for cell in by_key.values():
            _check_shown(folder / CELLS, cell.method, cell.note, cell.failed, *_words_of(cell.results))
        if len({len(cell.losses) for cell in by_key.values() if cell.key in about.keys and cell.losses}) > 1:
            raise EvaluationError(
                f"{folder / CELLS} has cells of one text with other numbers of windows. Compare again."
            )
        if missing := [key for key in about.keys if key not in by_key]:
            raise EvaluationError(f"{folder / CELLS} lacks {len(missing)} cells that {ABOUT} names. Compare again.")
        return cls(about, [by_key[key] for key in about.keys])

    def to_dict(self) -> dict[str, Any]:
        """What it is of, and its claims, as `--json` prints them."""
        return {**asdict(self.about), "claims": [asdict(one) for one in checked(self.cells)]}


@dataclass(frozen=True)
class Evaluated:
    """What `headshare eval --out` keeps in one folder, of models by their names without folders."""

    title: str
    rows: list[Row]

    def tells_more_than(self, measured: Measured | None) -> bool:
        """Whether there is more than what a comparison in the same folder measured of its dense model."""
        known = {row.task for cell in measured.cells for row in cell.results} if measured else set()
        return any(measured is None or row.model != measured.about.model or row.task not in known for row in self.rows)

    @classmethod
    def load(cls, folder: Path) -> "Evaluated":
        """All results of a folder.

        Raises:
            EvaluationError: if it holds something else, or two models of one name.
        """
        rows = current(read_results(folder / RESULTS))
        _check_shown(folder / RESULTS, *_words_of(rows))
        short = {row.model: Path(row.model).name for row in rows}
        if len(set(short.values())) < len(short) or not all(map(is_shown, short.values())):
            raise EvaluationError(f"{folder / RESULTS} has models whose names cannot be told apart: {sorted(short)}.")
        return cls(folder.name, [replace(row, model=short[row.model]) for row in rows])


def published(path: Path) -> list[Published]:
    """The paper's tables, from YAML.

    Raises:
        EvaluationError: if the file cannot be read, or holds none.
    """
    data = read_yaml(path, EvaluationError)
    try:
        found = _PUBLISHED.validate_python(data)
    except ValueError as error:
        raise EvaluationError(f"{path} holds no tables of figures: {' '.join(str(error).split()):.200}") from None
    for one in found:
        if wrong := [name for name, values in one.rows.items() if len(values) != len(one.tasks)]:
            raise EvaluationError(
                f"{path}: table {one.table} has {len(one.tasks)} tasks, and another number in {wrong[0]}."
            )
    return found


def report(
    measured: Sequence[Measured],
    tables: Sequence[Published] = (),
    figures: Sequence[Sequence[tuple[str, str]]] = (),
    evaluated: Sequence[Evaluated] = (),
) -> str:
    """The page, in Markdown. `figures` are what to show with each comparison: what a figure shows, and its address;
    `evaluated`, what `headshare eval` measured, come last."""
    lines = ["# Results", "", *_summary(measured)]
    for one, shown in zip_longest(measured, figures, fillvalue=()):
        assert isinstance(one, Measured)
        heading = f"{one.about.title}, on {one.about.model}" if one.about.title else one.about.model
        lines += ["", f"## {heading}", "", _about(one.about), "", in_words(one.cells)]
        lines += [*_beside(one, tables), *_claims(checked(one.cells))]
        lines += [line for title, address in shown for line in ("", f"![{title}]({address})")]
    for results in evaluated:
        lines += ["", f"## {results.title}", "", table_of(results.rows)]
    return "\n".join(lines).rstrip() + "\n"


def _about(about: About) -> str:
    parts = [f"{about.model}"]
    parts += [f"measured on {about.text}"] if about.text else []
    parts += [f"the first {about.limit} questions of each task or subject"] if about.limit else []
    parts += [f"run in {about.dtype}"] if about.dtype else []
    parts += [f"{about.few_shot} examples before each"] if about.few_shot is not None else []
    parts += [f"calibrated on {about.calibration}"] if about.calibration else []
    parts += [f"trained on {about.training}"] if about.training else []
    return "; ".join([*parts, ", ".join(f"{name} {value}" for name, value in about.versions.items())]) + "."


JUDGED = (
    "What decides is the mean difference of the losses on the same windows of the text, from two standard errors on; "
    "without a text, that of the mean accuracy or BLEU, as if each had been asked other questions. What differs by "
    "less is level, or cannot be told.",
    "The best of several rivals is chosen on those windows too, which favours it. Errors are of the text alone, not of "
    "the seed of a training run or of a draw.",
    "More sharing has less quality where that is so from each ratio to the next.",
    "What was trained has read text that neither the dense model nor what was not trained has.",
    "In tables, `~` is before an accuracy that is not two standard errors above guessing or, where that is more, above "
    "always the same answer: the row `guessing` has both.",
)


def _summary(measured: Sequence[Measured]) -> list[str]:
    """How often each claim holds, model by model, and by what rule. Comparisons of the same cells count once."""
    counted: dict[str, dict[str, Counter[str]]] = {}
    for model, cells in _pooled(measured):
        for found in checked(cells):
            counted.setdefault(found.claim, {}).setdefault(model, Counter())[found.says.value] += 1
    if not counted:
        return ["No claim of the paper can be checked on these tables."]
    lines = [
        "What the paper says, and at how many ratios, or of how many methods, it holds here. Comparisons that agree in "
        "all that both measured are one; those on other windows are not.",
        "",
    ]
    lines += ["| claim | model | |", "|---|---|---|"]
    lines += [
        f"| {claim} | {model} | {', '.join(f'{says}: {count}' for says, count in sorted(counts.items()))} |"
        for claim, by_model in counted.items()
        for model, counts in by_model.items()
    ]
    return [*lines, "", *(f"* {rule}" for rule in JUDGED)]


def _pooled(measured: Sequence[Measured]) -> list[tuple[str, list[Compared]]]:
    """Models, and the cells of all their comparisons: those on other texts, or where one method gave other numbers,
    apart."""
    pools: list[tuple[str, dict[tuple[str, float], Compared]]] = []
    for one in measured:
        cells = {(cell.method, cell.ratio): cell for cell in one.cells if not cell.failed}
        for model, pool in pools:
            both = pool.keys() & cells.keys()
            if model == one.about.model and both and all(_found(pool[key]) == _found(cells[key]) for key in both):
                pool |= cells
                break
        else:
            pools.append((one.about.model, cells))
    return [(model, list(pool.values())) for model, pool in pools]


def _found(cell: Compared) -> object:
    """What claims go by: losses, or without a text what tasks gave."""
    return cell.losses or [(row.task, row.metrics) for row in cell.results]


def _claims(claims: Sequence[Checked]) -> list[str]:
    if not claims:
        return []
    lines = ["", "| claim | at, or of | says | figures |", "|---|---|---|---|"]
    return lines + [f"| {one.claim} | {one.where} | {one.says.value} | {one.evidence} |" for one in claims]


def _beside(one: Measured, tables: Sequence[Published]) -> list[str]:
    """Our accuracies beside the paper's, in percent, where it has this model."""
    lines: list[str] = []
    for found in (found for found in tables if found.model.casefold() == one.about.model.casefold()):
        ours = {cell.title: {named(row.task)[0]: row for row in cell.results} for cell in one.cells}
        common = [task for task in found.tasks if any(task in results for results in ours.values())]
        if not common:
            continue
        beside = f"Beside table {found.table} of the paper (ours / the paper's, percent, on the paper's own questions):"
        lines += ["", beside, ""]
        lines += ["| | " + " | ".join(common) + " |", "|---" + "|--:" * len(common) + "|"]
        for name, values in found.rows.items():
            paper = dict(zip(found.tasks, values, strict=True))
            cells = [f"{_percent(ours.get(name, {}), task)} / {paper[task]:.2f}" for task in common]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _percent(results: Mapping[str, Any], task: str) -> str:
    metric = results[task].metrics.get(ACCURACY) if task in results else None
    return "" if metric is None or metric.value is None else f"{100 * metric.value:.2f}"
