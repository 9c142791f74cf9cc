"""Every method at every ratio, cell after cell; each is kept when it is done, so that a stopped grid goes on."""

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headshare.calibration.gptq import Rounded, round_by_gptq
from headshare.calibration.run import refit_on
from headshare.checkpoint.checkpoint import Checkpoint, open_checkpoint
from headshare.checkpoint.refit_record import MAX_TEXT
from headshare.errors import EvaluationError, HeadshareError, OutputError, TrainingError
from headshare.evaluation.generation import Parallel
from headshare.evaluation.harness import Chosen, Runner, Settings, chosen_tasks
from headshare.evaluation.measuring import Text
from headshare.evaluation.perplexity import Predictions, losses_and_divergences
from headshare.evaluation.results import Measured, kept_results, key_of, not_left_empty, versions
from headshare.experiments.cells import CELLS, DENSE, Compared, GivenUp, kept_cells
from headshare.experiments.methods import (
    METHODS,
    REFIT,
    ROUNDED,
    TRAINED,
    TYING,
    Case,
    Common,
    Edit,
    base_of,
    reads_text,
)
from headshare.experiments.report.tables import as_csv, in_words
from headshare.files.atomic import write_whole
from headshare.files.resume import Workspace, fingerprint
from headshare.integrations.transformers.loading import unique_parameter_bytes
from headshare.plan.describe import given_up
from headshare.plan.plan import SharePlan
from headshare.progress import say, track
from headshare.sharing.safetensors_writer import file_digest
from headshare.sharing.share import share
from headshare.sharing.size import estimate_plan, parameter_infos
from headshare.text.tokens import Calibration
from headshare.training import TrainSettings, train
from headshare.training.state import RECORD as TRAINING_RECORD
from headshare.training.state import settle

ABOUT = "about.json"
# hidden: a folder of the user's is not called so
MADE, MADE_ROUNDED, WORK = ".headshare-model", ".headshare-rounded", ".headshare-prices"
WRITTEN = ("table.md", "cells.csv", ABOUT)
UNTRAINED = "no step of training was better than none on the text held out, so the weights are those from before it"


@dataclass(frozen=True)
class Grid:
    """What is compared: methods (with `+refit` where that is wanted) at ratios, on a text, on tasks, and on the
    translation of a parallel text."""

    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    tasks: tuple[str, ...] = ()
    data: Path | None = None
    text: Text | None = None
    parallel: Parallel | None = None
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
            if name.endswith(ROUNDED) and method.name not in TYING:
                raise EvaluationError(f"{ROUNDED} is for methods that tie q, k and v alone, as {method.name} does not.")
        if self.training is None and (trained := [name for name in self.methods if name in TRAINED]):
            raise EvaluationError(f"{trained[0]} trains: say on what, with --train FILE or `train` in the recipe.")
        if not self.methods or not self.ratios:
            raise EvaluationError("there is nothing to compare: name methods and ratios.")
        if wrong := [ratio for ratio in self.ratios if not 0 < ratio < 1]:
            raise EvaluationError(f"a ratio of {wrong[0]} leaves nothing, or nothing to do; use one between 0 and 1.")
        if not self.tasks and self.text is None and self.parallel is None:
            raise EvaluationError("there is nothing to measure by: give --text FILE, or --tasks and --data-dir.")


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
    be had of this model, or not at this ratio, is a row that says why, and is tried again the next time: what it lacked
    may be there then. `restart` throws away the prices and the training run of a grid that was stopped, not its cells.

    Raises:
        EvaluationError: if a task, a text or the folder's cells cannot be used, or a method looks at a text and there
            is none.
        CheckpointError: if the model cannot be loaded.
    """
    dense.require_dense("compare with it")
    if calibration is None and (reading := [name for name in grid.methods if reads_text(name)]):
        raise EvaluationError(f"{reading[0]} looks at a text: name one with --calibration FILE, or self.")
    chosen: list[Chosen | Parallel] = [*chosen_tasks(grid.tasks, grid.data)]
    chosen += [] if grid.parallel is None else [grid.parallel]
    with not_left_empty(out):
        found = _cells(dense, grid, chosen, out, calibration, device, restart)
    write_whole(out / "table.md", f"{in_words(found)}\n".encode())
    write_whole(out / "cells.csv", as_csv(found).encode())
    about = About.of(dense, grid, calibration, title, found)
    write_whole(out / ABOUT, json.dumps(asdict(about), indent=1).encode())
    return found


def _cells(
    dense: Checkpoint,
    grid: Grid,
    chosen: Sequence[Chosen | Parallel],
    out: Path,
    calibration: Calibration | None,
    device: str,
    restart: bool,
) -> list[Compared]:
    """Every cell of the grid, in its order; those that are missing are measured and kept one by one."""
    kept = kept_cells(out)
    if not kept.rows and (foreign := [name for name in WRITTEN if (out / name).exists()]):
        raise EvaluationError(
            f"{out} has a {foreign[0]} and no {CELLS}: it is not of a comparison, which would write over it. Move it, "
            "or write elsewhere."
        )
    work = Workspace(out / WORK, _what(dense, calibration, device), restart=restart)
    try:
        bench = _Bench(dense, grid, chosen, calibration, work, out / MADE, device, restart)
        cells = [(DENSE, 0.0), *((name, 0.0) for name in grid.methods if METHODS[base_of(name)].fixed)]
        cells += [(name, ratio) for ratio in grid.ratios for name in grid.methods if not METHODS[base_of(name)].fixed]
        keys = {bench.key(name, ratio): (name, ratio) for name, ratio in cells}
        done = {row.key for row in kept.rows if not row.failed}
        missing = [key for key in keys if key not in done]
        for key in track(missing, "cells", len(missing)):
            cell = bench.cell(*keys[key], key)
            kept.add(cell)
            say(f"{cell.title}: {cell.failed or f'{cell.saved_fraction:.2%} saved, {cell.seconds:.0f} s'}")
        by_key = {row.key: row for row in kept.rows}
        return [by_key[key] for key in keys]
    finally:
        for folder in (out / MADE, out / MADE_ROUNDED):
            shutil.rmtree(folder, ignore_errors=True)
        work.close()


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
    dtype: str = ""
    few_shot: int | None = None
    device: str = ""

    @classmethod
    def of(
        cls, dense: Checkpoint, grid: Grid, calibration: Calibration | None, title: str, cells: Sequence[Compared]
    ) -> "About":
        """Of a grid that was measured."""
        text, parallel = grid.text, grid.parallel
        trained = grid.training if any(name in TRAINED for name in grid.methods) else None
        by_name: dict[str, list[str]] = {}
        for name, one in (pair for cell in cells for pair in cell.versions.items()):
            by_name.setdefault(name, []).append(one)
        measured = (
            [] if text is None else [f"{text.path.name}, windows of {text.window}, {text.tokens or 'all'} tokens"]
        )
        measured += [] if parallel is None else [f"{parallel.source.name} to {parallel.reference.name}"]
        return cls(
            title,
            Path(dense.name).name,
            "; ".join(measured),
            "" if calibration is None else f"{Path(calibration.source).name}, {calibration.tokens.numel()} tokens",
            "" if trained is None else f"{Path(trained.text.data).name}{_shown(trained.learning.arguments)}",
            grid.settings.limit if grid.tasks or parallel else None,
            {name: " and ".join(dict.fromkeys(some)) for name, some in by_name.items()},
            tuple(cell.key for cell in cells),
            grid.settings.dtype,
            grid.settings.few_shot,
            grid.settings.device,
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
    tasks: Sequence[Chosen | Parallel]
    calibration: Calibration | None
    work: Workspace
    folder: Path
    device: str
    restart: bool

    def key(self, name: str, ratio: float) -> str:
        """Tells this cell from all others."""
        model, settings = fingerprint(self.dense), self.grid.settings
        measured = [task.key(model, settings) for task in self.tasks]
        measured += [self.grid.text.key(model, settings)] if self.grid.text else []
        made: Any = None if self.calibration is None else [self.calibration.digest, self.calibration.seed]
        if name in TRAINED and self.grid.training is not None:
            training = self.grid.training
            texts = [Path(one) for one in (training.text.data, training.text.held_out_data) if one]
            made = [training.model_dump_json(), *(file_digest(one) if one.is_file() else "" for one in texts)]
            made += [task.digest for task in chosen_tasks(training.tasks.names, training.tasks.data_dir)]
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
            if isinstance(made, Rounded):
                return self._rounded(Compared(key, name, ratio), made, begun)
            if isinstance(made, Edit):
                return self._edited(Compared(key, name, ratio, note=made.note), made, begun)
            return self._written(Compared(key, name, ratio), made, case, begun)
        except HeadshareError as error:
            if isinstance(error, TrainingError | OutputError):  # not the method's
                raise
            return Compared(key, name, ratio, failed=_in_one_line(error))

    def _written(self, cell: Compared, plan: SharePlan, case: Case, begun: float) -> Compared:
        shared = share(self.dense, plan)
        if REFIT in cell.method:
            shared = refit_on(shared, case.common.text, device=self.device)
        folder = shared.save(self.folder, overwrite=True)
        found, cell = estimate_plan(self.dense, plan), _told(cell, plan)
        with open_checkpoint(folder) as written:
            if cell.method.endswith(ROUNDED):
                return self._rounded(cell, round_by_gptq(written, case.common.text, device=self.device), begun)
            seconds = time.monotonic() - begun
            return self._measured(cell, written, saved=found.saved_bytes, seconds=seconds)

    def _trained(self, cell: Compared, settings: TrainSettings, begun: float) -> Compared:
        """In a folder of its own, so that a training run that was stopped goes on and no other one's is in the way."""
        folder = self.folder.parent / f"{self.folder.name}-{cell.key[:16]}"
        settle(folder)
        if not (folder / TRAINING_RECORD).is_file():
            train(self.dense.path, folder, settings, overwrite=True, restart=self.restart)
        seconds = time.monotonic() - begun
        with open_checkpoint(folder) as written:
            assert written.plan is not None
            record = json.loads((folder / TRAINING_RECORD).read_text())
            note = "" if record["best_step"] else UNTRAINED
            cell = replace(_told(cell, written.plan), curve=tuple(_curve(record)), note=note)
            saved = estimate_plan(self.dense, written.plan).saved_bytes
            found = self._measured(cell, written, saved=saved, seconds=seconds)
        shutil.rmtree(folder)
        return found

    def _rounded(self, cell: Compared, rounded: Rounded, begun: float) -> Compared:
        with open_checkpoint(rounded.save(self.folder.with_name(MADE_ROUNDED), overwrite=True)) as written:
            whole, left = (sum(i.nbytes for i in parameter_infos(one).values()) for one in (self.dense, written))
            return self._measured(cell, written, saved=whole - left, seconds=time.monotonic() - begun)

    def _edited(self, cell: Compared, edit: Edit, begun: float) -> Compared:
        runner = Runner.of(self.dense, self.grid.settings, name=cell.method)
        saved = edit.change(runner.model)
        return self._filled(cell, runner, saved=saved, seconds=time.monotonic() - begun)

    def _measured(self, cell: Compared, checkpoint: Checkpoint, *, saved: int = 0, seconds: float = 0.0) -> Compared:
        if checkpoint is self.dense and self.grid.text is not None:
            runner = replace(self._stock, name=cell.method)
        else:
            runner = Runner.of(checkpoint, self.grid.settings, name=cell.method)
        files = {info.file for info in checkpoint.tensors.values()}
        disk = sum((checkpoint.path / file).stat().st_size for file in files)
        memory = unique_parameter_bytes(runner.model)
        return self._filled(cell, runner, saved=saved, seconds=seconds, disk=disk, memory=memory)

    def _filled(
        self, cell: Compared, runner: Runner, *, saved: int, seconds: float, disk: int | None = None,
        memory: int | None = None,
    ) -> Compared:  # fmt: skip
        whole = sum(info.nbytes for info in parameter_infos(self.dense).values())
        losses, divergences = self._on_text(runner)
        results = tuple(self._on_task(task, runner, cell) for task in self.tasks)
        with_tasks = ["lm_eval"] if self.grid.tasks else []
        rounding = ["gptqmodel", "compressed-tensors"] if ROUNDED.removeprefix("+") in cell.method else []
        return replace(
            cell,
            versions={"headshare": version("headshare"), **versions(*with_tasks, *rounding)},
            saved_bytes=saved,
            saved_fraction=saved / whole,
            disk_bytes=disk,
            memory_bytes=memory,
            seconds=round(seconds, 1),
            results=results,
            losses=losses,
            divergences=divergences,
        )

    def _on_task(self, task: Chosen | Parallel, runner: Runner, cell: Compared) -> Measured:
        """What `headshare eval --out` kept of the dense model in the same folder is not measured again."""
        if cell.method != DENSE:
            return task.run(runner, cell.key)
        kept, key = kept_results(self.folder.parent), task.key(fingerprint(self.dense), self.grid.settings)
        found = kept.find(key)
        if found is None:
            found = replace(task.run(runner, key), model=self.dense.name)
            kept.add(found)
        return replace(found, model=DENSE, task=task.name, key=cell.key)

    def _on_text(self, runner: Runner) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.grid.text is None:
            return (), ()
        found = losses_and_divergences(runner.model, self._predictions)
        losses, divergences = (tuple(round(value, 7) for value in one.tolist()) for one in found)
        return losses, divergences

    @cached_property
    def _common(self) -> Common:
        return Common(self.dense, self.calibration, self.work, self.device, self.grid.training)

    @cached_property
    def _predictions(self) -> Predictions:
        """The dense model's of the text, the same for every cell."""
        assert self.grid.text is not None
        return Predictions(self._stock.model, self.grid.text.windows(self._stock))

    @cached_property
    def _stock(self) -> Runner:
        """The dense model, which predictions are compared with."""
        return Runner.of(self.dense, self.grid.settings)


def _in_one_line(error: HeadshareError) -> str:
    """What went wrong, as it can stand in a table."""
    return " ".join(str(error).replace("|", "/").split())[:MAX_TEXT]


def _told(cell: Compared, plan: SharePlan) -> Compared:
    """With what the plan takes, in all and layer by layer."""
    return replace(cell, given_up=GivenUp.of(plan), by_layer=tuple(given_up(plan)))


def _curve(record: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """What was measured while a model was trained."""
    for row in record["curve"]:
        loss = row.get("eval_shared_loss", row.get("eval_loss"))
        if loss is not None and math.isfinite(loss):  # JSON has no other numbers
            accuracies = {key.removeprefix("eval_"): row[key] for key in row if key.endswith(("_acc", "_acc_error"))}
            yield {"step": float(row["step"]), "loss": loss, **accuracies}
