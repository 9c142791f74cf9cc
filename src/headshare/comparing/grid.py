"""Every method at every ratio, cell after cell; each is kept when it is done, so that a stopped grid goes on."""

import csv
import io
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from headshare.accounting import estimate_plan, parameter_infos
from headshare.calibrating import refit_on
from headshare.calibration import Calibration
from headshare.checkpoints import Checkpoint, open_checkpoint
from headshare.comparing.methods import (
    DELETING,
    METHODS,
    REFIT,
    ROUNDED,
    SHARING,
    TRAINED,
    Case,
    Common,
    Edit,
    base_of,
    rounding,
)
from headshare.errors import EvaluationError, HeadshareError, OutputError, TrainingError
from headshare.evaluating.harness import Chosen, Runner, Settings, chosen_tasks
from headshare.evaluating.measuring import Text
from headshare.evaluating.results import Measured, key_of
from headshare.evaluation import Windows, losses_and_divergences
from headshare.files import write_whole
from headshare.models import unique_parameter_bytes
from headshare.plans import SharePlan
from headshare.progress import say, track
from headshare.sharing import expand, share
from headshare.training import TrainSettings, train
from headshare.training.run import RECORD as TRAINING_RECORD
from headshare.workspace import Workspace, fingerprint
from headshare.writing import file_digest

ABOUT = "about.json"
CELLS = "cells.json"
DENSE = "dense"


@dataclass(frozen=True)
class Grid:
    """What is compared: methods (with `+refit` where that is wanted) at ratios, on a text and on tasks."""

    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    tasks: tuple[str, ...] = ()
    data: Path | None = None
    text: Text | None = None
    settings: Settings = field(default_factory=Settings)
    seed: int = 0
    training: TrainSettings | None = None

    def __post_init__(self) -> None:
        for name in self.methods:
            method = METHODS.get(base_of(name))
            if method is None:
                raise EvaluationError(f"there is no method {name!r:.60}. There are: {', '.join(METHODS)}.")
            if REFIT in name and not method.refits:
                raise EvaluationError(f"{method.name} has no readout that a refit could change. Leave out {REFIT}.")
            if name.endswith(ROUNDED) and method.name not in SHARING:
                raise EvaluationError(f"{method.name} shares nothing that could be rounded after. Leave out {ROUNDED}.")
        if self.training is None and (trained := [name for name in self.methods if name in TRAINED]):
            raise EvaluationError(f"{trained[0]} trains: say on what, with --train FILE or `train` in the recipe.")
        if not self.methods or not self.ratios:
            raise EvaluationError("there is nothing to compare: name methods and ratios.")
        if wrong := [ratio for ratio in self.ratios if not 0 < ratio < 1]:
            raise EvaluationError(f"a ratio of {wrong[0]} leaves nothing, or nothing to do; use one between 0 and 1.")
        if not self.tasks and self.text is None:
            raise EvaluationError("there is nothing to measure by: give --text FILE, or --tasks and --data-dir.")


@dataclass(frozen=True)
class Compared:
    """One method at one ratio. Bytes on disk are those of the weights' files as they were written, in memory those of
    the loaded model's parameters, each once; `saved_bytes` are counted, and of an edit what it would save. `losses` and
    `divergences` are those of the text's windows, nats a token: what predictions lose, and how far they are from the
    dense model's. `failed` says why there is nothing else."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    key: str
    method: str
    ratio: float
    saved_bytes: int = 0
    saved_fraction: float = 0.0
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    seconds: float = 0.0
    note: str = ""
    failed: str = ""
    results: tuple[Measured, ...] = ()
    losses: tuple[float, ...] = ()
    divergences: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float | None:
        """Of the text, if there is one."""
        return math.exp(min(statistics.mean(self.losses), 700)) if self.losses else None

    def loses_more_than(self, other: "Compared") -> tuple[float, float]:
        """By how many nats a token, and the standard error over windows, which are the same."""
        more = [one - two for one, two in zip(self.losses, other.losses, strict=True)]
        return statistics.mean(more), statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else math.nan


_CELLS: TypeAdapter[list[Compared]] = TypeAdapter(list[Compared])


def read_cells(file: Path) -> list[Compared]:
    """The cells of a file.

    Raises:
        EvaluationError: if it holds none.
    """
    if not file.is_file():
        raise EvaluationError(f"there is no {file}. `headshare compare` writes it.")
    try:
        return _CELLS.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        what = str(error).splitlines()[0]
        raise EvaluationError(f"{file} holds no cells of `headshare compare` ({what}). Move it.") from None


class _Kept:
    """The cells that are done, and the file that keeps them."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / CELLS
        self.cells = read_cells(self.file) if self.file.is_file() else []

    def find(self, key: str) -> Compared | None:
        """The cell of this key."""
        return next((cell for cell in self.cells if cell.key == key), None)

    def add(self, cell: Compared) -> None:
        """Keep it, in the file too."""
        self.cells.append(cell)
        write_whole(self.file, _CELLS.dump_json(self.cells, indent=1))


def compare(
    dense: Checkpoint,
    grid: Grid,
    out: Path,
    *,
    calibration: Calibration | None = None,
    device: str = "cpu",
    restart: bool = False,
    title: str = "",
) -> list[Compared]:
    """Measure every cell, the dense model first, and write `table.md`, `cells.csv`, `cells.json` and `about.json` (what
    was compared on what, by which versions) into `out`.

    Cells that are there, of the same model, text, questions and settings, are not measured again. A method that cannot
    be had of this model, or not at this ratio, is a row that says why.

    Raises:
        EvaluationError: if a task, a text or the folder's cells cannot be used.
        CheckpointError: if the model cannot be loaded.
    """
    dense.require_dense("compare with it")
    chosen = chosen_tasks(grid.tasks, grid.data)
    out.mkdir(parents=True, exist_ok=True)
    kept = _Kept(out)
    work = Workspace(out / "work", _what(dense, calibration, device), restart=restart)
    try:
        bench = _Bench(dense, grid, chosen, calibration, work, out / "model", device)
        cells = [(DENSE, 0.0), *((name, ratio) for ratio in grid.ratios for name in grid.methods)]
        found = []
        for name, ratio in track(cells, "cells", len(cells)):
            key = bench.key(name, ratio)
            cell = kept.find(key)
            if cell is None:
                cell = bench.cell(name, ratio, key)
                kept.add(cell)
                say(f"{name} at {ratio:g}: {cell.failed or f'{cell.saved_fraction:.2%} saved, {cell.seconds:.0f} s'}")
            found.append(cell)
    finally:
        for folder in (out / "model", out / "stock"):
            shutil.rmtree(folder, ignore_errors=True)
        work.close()
    write_whole(out / "table.md", f"{table(found)}\n\n{verdict(found)}\n".encode())
    write_whole(out / "cells.csv", as_csv(found).encode())
    about = About.of(dense, grid, calibration, title, tuple(cell.key for cell in found))
    write_whole(out / ABOUT, json.dumps(asdict(about), indent=1).encode())
    return found


@dataclass(frozen=True)
class About:
    """What a table of cells is of: names without folders, numbers of tokens, versions; and the keys of its cells."""

    title: str
    model: str
    text: str
    calibration: str
    training: str
    limit: int | None
    versions: dict[str, str]
    keys: tuple[str, ...]

    @classmethod
    def of(
        cls, dense: Checkpoint, grid: Grid, calibration: Calibration | None, title: str, keys: tuple[str, ...]
    ) -> "About":
        """Of a grid that was measured."""
        text, trained = grid.text, grid.training
        return cls(
            title,
            Path(dense.name).name,
            "" if text is None else f"{text.path.name}, windows of {text.window}, {text.tokens or 'all'} tokens",
            "" if calibration is None else f"{Path(calibration.source).name}, {calibration.tokens.numel()} tokens",
            "" if trained is None else f"{Path(trained.text.data).name}{_shown(trained.learning.arguments)}",
            grid.settings.limit,
            {name: version(name) for name in ("headshare", "torch", "transformers")},
            keys,
        )


def _what(dense: Checkpoint, calibration: Calibration | None, device: str) -> dict[str, str]:
    return {
        "headshare": version("headshare"),
        "model": fingerprint(dense),
        "text": "" if calibration is None else f"{calibration.digest} {calibration.seed}",
        "device": device,
    }


def _shown(arguments: Mapping[str, Any]) -> str:
    """The Trainer's arguments that say how long it learnt, and how fast."""
    named = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate")
    return "".join(f", {name} {arguments[name]}" for name in named if name in arguments)


@dataclass(frozen=True)
class _Bench:
    """What all cells have in common."""

    dense: Checkpoint
    grid: Grid
    tasks: Sequence[Chosen]
    calibration: Calibration | None
    work: Workspace
    folder: Path
    device: str

    def key(self, name: str, ratio: float) -> str:
        """Tells this cell from all others."""
        model, settings = fingerprint(self.dense), self.grid.settings
        measured = [task.key(model, settings) for task in self.tasks]
        measured += [self.grid.text.key(model, settings)] if self.grid.text else []
        made: object = None if self.calibration is None else [self.calibration.digest, self.calibration.seed]
        if name in TRAINED and self.grid.training is not None:
            data = Path(self.grid.training.text.data)
            made = [self.grid.training.model_dump_json(), file_digest(data) if data.is_file() else ""]
        return key_of(name, ratio, measured, made if name != DENSE else None, self.grid.seed, version("headshare"))

    def cell(self, name: str, ratio: float, key: str) -> Compared:
        """Make the model, write it where it is smaller, and measure it."""
        begun = time.monotonic()
        if name == DENSE:
            return self._measured(Compared(key, name, ratio), self.dense)
        case = Case(self._common, ratio, self.grid.seed)
        try:
            made = METHODS[base_of(name)].make(case)
            if isinstance(made, TrainSettings):
                return self._trained(Compared(key, name, ratio), made, begun)
            if isinstance(made, Edit):
                return self._edited(Compared(key, name, ratio, note=made.note), made, begun)
            return self._written(Compared(key, name, ratio), made, case, begun)
        except HeadshareError as error:
            ours = isinstance(error, EvaluationError) and self.calibration is None
            if ours or isinstance(error, TrainingError | OutputError):  # not the method's: it may go well next time
                raise
            return Compared(key, name, ratio, failed=str(error))

    def _written(self, cell: Compared, plan: SharePlan, case: Case, begun: float) -> Compared:
        shared = share(self.dense, plan)
        if REFIT in cell.method:
            shared = refit_on(shared, case.common.text, device=self.device)
        folder = shared.save(self.folder, overwrite=True)
        found = estimate_plan(self.dense, plan)
        with open_checkpoint(folder) as written:
            if cell.method.endswith(ROUNDED):
                stock = open_checkpoint(expand(written, self.folder.with_name("stock"), overwrite=True))
                edit = rounding(written, case.common.text, self.device, already=found.saved_bytes)
                return self._edited(replace(cell, note=edit.note), edit, begun, of=stock)
            seconds = time.monotonic() - begun
            return self._measured(cell, written, saved=found.saved_bytes, seconds=seconds)

    def _trained(self, cell: Compared, settings: TrainSettings, begun: float) -> Compared:
        """In a folder of its own, so that a training run that was stopped goes on and no other one's is in the way."""
        folder = self.folder.parent / f"{self.folder.name}-{cell.key[:16]}"
        if not (folder / TRAINING_RECORD).is_file():
            train(self.dense.path, folder, settings, overwrite=True)
        seconds = time.monotonic() - begun
        with open_checkpoint(folder) as written:
            assert written.plan is not None
            saved = estimate_plan(self.dense, written.plan).saved_bytes
            found = self._measured(cell, written, saved=saved, seconds=seconds)
        shutil.rmtree(folder)
        return found

    def _edited(self, cell: Compared, edit: Edit, begun: float, of: Checkpoint | None = None) -> Compared:
        """An edit of a stock model: the dense one, unless it is another's."""
        runner = Runner.of(of or self.dense, self.grid.settings, name=cell.method)
        saved = edit.change(runner.model)
        return self._filled(cell, runner, saved=saved, seconds=time.monotonic() - begun)

    def _measured(self, cell: Compared, checkpoint: Checkpoint, *, saved: int = 0, seconds: float = 0.0) -> Compared:
        runner = Runner.of(checkpoint, self.grid.settings, name=cell.method)
        disk = sum(path.stat().st_size for path in checkpoint.path.glob("*.safetensors"))
        memory = unique_parameter_bytes(runner.model)
        return self._filled(cell, runner, saved=saved, seconds=seconds, disk=disk, memory=memory)

    def _filled(
        self, cell: Compared, runner: Runner, *, saved: int, seconds: float, disk: int | None = None,
        memory: int | None = None,
    ) -> Compared:  # fmt: skip
        whole = sum(info.nbytes for info in parameter_infos(self.dense).values())
        losses, divergences = self._on_text(runner)
        results = tuple(runner.run(task, cell.key) for task in self.tasks)
        return replace(
            cell,
            saved_bytes=saved,
            saved_fraction=saved / whole,
            disk_bytes=disk,
            memory_bytes=memory,
            seconds=round(seconds, 1),
            results=results,
            losses=losses,
            divergences=divergences,
        )

    def _on_text(self, runner: Runner) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.grid.text is None:
            return (), ()
        found = losses_and_divergences(runner.model, self._stock.model, self._windows)
        losses, divergences = (tuple(round(value, 7) for value in one.tolist()) for one in found)
        return losses, divergences

    @cached_property
    def _common(self) -> Common:
        return Common(self.dense, self.calibration, self.work, self.device, self.grid.training)

    @cached_property
    def _windows(self) -> Windows:
        """The text's, the same for every cell."""
        assert self.grid.text is not None
        return self.grid.text.windows(self._stock)

    @cached_property
    def _stock(self) -> Runner:
        """The dense model, which predictions are compared with."""
        return Runner.of(self.dense, self.grid.settings)


# ---- what is printed


def table(cells: Sequence[Compared]) -> str:
    """Markdown: a row a cell; bytes in MiB, divergences in nats a token and accuracies in percent, both with standard
    errors, a tilde where an accuracy cannot be told from guessing."""
    tasks = list(dict.fromkeys(row.task for cell in cells for row in cell.results))
    heads = ["ratio", "method", "saved", "disk, MiB", "memory, MiB", "perplexity", "divergence", *tasks, "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|--:|---" + "|--:" * (len(heads) - 2) + "|"]
    chances = {row.task: row.chance for cell in cells for row in cell.results if row.chance is not None}
    if chances:
        guesses = [f"{100 * chances[task]:.1f}" if task in chances else "" for task in tasks]
        lines.append("| | guessing | | | | | | " + " | ".join(guesses) + " | |")
    for cell in cells:
        ratio = "" if cell.method == DENSE else f"{cell.ratio:g}"
        if cell.failed:
            lines.append(f"| {ratio} | {cell.method} | {cell.failed} |" + " |" * (len(heads) - 3))
            continue
        by_task = {row.task: row.in_cell for row in cell.results}
        values = [ratio, cell.method, f"{cell.saved_fraction:.2%}", *map(_mib, (cell.disk_bytes, cell.memory_bytes))]
        values += ["" if cell.perplexity is None else f"{cell.perplexity:,.3f}", _with_error(cell.divergences)]
        values += [by_task.get(task, "") for task in tasks]
        lines.append("| " + " | ".join([*values, f"{cell.seconds:.0f}"]) + " |")
    notes = dict.fromkeys(f"{cell.method}: {cell.note}." for cell in cells if cell.note)
    return "\n".join(lines) + ("\n\n" + "\n".join(notes) if notes else "")


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"


def _with_error(values: Sequence[float]) -> str:
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{error}"


def verdict(cells: Sequence[Compared]) -> str:
    """For each ratio, in words that follow from the numbers: the methods by perplexity, best first, and the best that
    shares beside the best that only deletes, with the standard error of the difference over windows."""
    lines = []
    for ratio in dict.fromkeys(cell.ratio for cell in cells if cell.method != DENSE):
        some = [cell for cell in cells if cell.ratio == ratio and cell.losses and cell.method != DENSE]
        some.sort(key=lambda cell: statistics.mean(cell.losses))
        if not some:
            continue
        words = ", ".join(f"{cell.method} ({cell.perplexity:,.4g})" for cell in some)
        lines.append(f"At {ratio:g}, by perplexity, best first: {words}.")
        sharing, deleting = (
            next((cell for cell in some if base_of(cell.method) in names), None) for names in (SHARING, DELETING)
        )
        if sharing and deleting:
            more, error = sharing.loses_more_than(deleting)
            word = "ahead of" if more < -2 * error else "behind" if more > 2 * error else "level with"
            lines.append(
                f"The best that shares, {sharing.method}, is {word} the best that only deletes, {deleting.method}: "
                f"{more:+.4f} nats a token (standard error {error:.4f})."
            )
    return "\n".join(lines)


def as_csv(cells: Sequence[Compared]) -> str:
    """A line a cell and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("method", "ratio", "saved_bytes", "disk_bytes", "memory_bytes", "seconds")
    writer.writerow([*names, "task", "metric", "value", "standard_error", "chance", "questions"])
    for row in _rows(cells):
        writer.writerow(row)
    return text.getvalue()


def _rows(cells: Sequence[Compared]) -> Iterator[list[Any]]:
    for cell in cells:
        start = [cell.method, cell.ratio, cell.saved_bytes, cell.disk_bytes, cell.memory_bytes, cell.seconds]
        if cell.losses:
            yield [*start, "text", "perplexity", cell.perplexity, "", "", len(cell.losses)]
            yield [*start, "text", "divergence", statistics.mean(cell.divergences), "", "", len(cell.divergences)]
        for row in cell.results:
            for name, metric in row.metrics.items():
                yield [*start, row.task, name, metric.value, metric.error, row.chance, row.questions]


def to_dict(cells: Sequence[Compared]) -> dict[str, Any]:
    """The same as `--json` prints it."""
    return {"cells": [asdict(cell) for cell in cells], "verdict": verdict(cells)}
