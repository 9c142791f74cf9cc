"""One page from the folders that `headshare compare` wrote: each table, what the paper has for the same model, and what
becomes of the paper's claims."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from headshare.comparing.claims import ACCURACY, Checked, checked
from headshare.comparing.grid import ABOUT, CELLS, About, Compared, read_cells, table, verdict
from headshare.errors import EvaluationError
from headshare.refits import is_shown

_ABOUT: TypeAdapter[About] = TypeAdapter(About)
MAX_TABLES = 100


Word = Annotated[str, AfterValidator(lambda text: _shown(text))]


def _shown(text: str) -> str:
    """A text that can stand in a table and on a terminal."""
    if not is_shown(text) or "|" in text:
        raise ValueError(f"{text!a:.60} cannot be shown in a table")
    return text


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
            for text in (about.title, about.model, about.text, about.calibration, about.training, *about.versions):
                _shown(text)
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"{folder} holds no finished comparison ({' '.join(str(error).split()):.100}). Run headshare compare "
                f"with --out {folder} first."
            ) from None
        by_key = {cell.key: cell for cell in read_cells(folder / CELLS)}
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


def published(path: Path) -> list[Published]:
    """The paper's tables, from YAML.

    Raises:
        EvaluationError: if the file cannot be read, or holds none.
    """
    try:
        found = _PUBLISHED.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise EvaluationError(f"{path} holds no tables of figures: {' '.join(str(error).split()):.200}") from None
    for one in found:
        if wrong := [name for name, values in one.rows.items() if len(values) != len(one.tasks)]:
            raise EvaluationError(
                f"{path}: table {one.table} has {len(one.tasks)} tasks, and another number in {wrong[0]}."
            )
    return found


def report(measured: Sequence[Measured], tables: Sequence[Published] = ()) -> str:
    """The page, in Markdown."""
    claims = [(one, found) for one in measured for found in checked(one.cells)]
    lines = ["# Results", "", *_summary(claims)]
    for one in measured:
        lines += ["", f"## {one.about.title or one.about.model}", "", _about(one.about), "", table(one.cells), ""]
        lines += [verdict(one.cells), *_beside(one, tables), *_claims(checked(one.cells))]
    return "\n".join(lines).rstrip() + "\n"


def _about(about: About) -> str:
    parts = [f"{about.model}"]
    parts += [f"measured on {about.text}"] if about.text else []
    parts += [f"the first {about.limit} questions of each task"] if about.limit else []
    parts += [f"calibrated on {about.calibration}"] if about.calibration else []
    parts += [f"trained on {about.training}"] if about.training else []
    return "; ".join([*parts, ", ".join(f"{name} {value}" for name, value in about.versions.items())]) + "."


def _summary(claims: Sequence[tuple[Measured, Checked]]) -> list[str]:
    """How often each claim holds, model by model."""
    if not claims:
        return ["No claim of the paper can be checked on these tables."]
    counted: dict[str, dict[str, Counter[str]]] = {}
    for one, found in claims:
        counted.setdefault(found.claim, {}).setdefault(one.about.model, Counter())[found.says.value] += 1
    lines = ["What the paper says, and how often it holds here (at how many ratios, or of how many methods):", ""]
    lines += ["| claim | model | |", "|---|---|---|"]
    lines += [
        f"| {claim} | {model} | {', '.join(f'{says}: {count}' for says, count in sorted(counts.items()))} |"
        for claim, by_model in counted.items()
        for model, counts in by_model.items()
    ]
    return lines


def _claims(claims: Sequence[Checked]) -> list[str]:
    if not claims:
        return []
    lines = ["", "| claim | at, or of | says | figures |", "|---|---|---|---|"]
    return lines + [f"| {one.claim} | {one.where} | {one.says.value} | {one.evidence} |" for one in claims]


def _beside(one: Measured, tables: Sequence[Published]) -> list[str]:
    """Our accuracies beside the paper's, in percent, where it has this model."""
    lines: list[str] = []
    for found in (found for found in tables if found.model.casefold() == one.about.model.casefold()):
        ours = {_row(cell): {row.task: row for row in cell.results} for cell in one.cells}
        common = [task for task in found.tasks if any(task in results for results in ours.values())]
        if not common:
            continue
        lines += ["", f"Beside table {found.table} of the paper (ours / the paper's, percent):", ""]
        lines += ["| | " + " | ".join(common) + " |", "|---" + "|--:" * len(common) + "|"]
        for name, values in found.rows.items():
            paper = dict(zip(found.tasks, values, strict=True))
            cells = [f"{_percent(ours.get(name, {}), task)} / {paper[task]:.2f}" for task in common]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _row(cell: Compared) -> str:
    return cell.method if not cell.ratio else f"{cell.method} {cell.ratio:g}"


def _percent(results: Mapping[str, Any], task: str) -> str:
    metric = results[task].metrics.get(ACCURACY) if task in results else None
    return "" if metric is None or metric.value is None else f"{100 * metric.value:.2f}"
