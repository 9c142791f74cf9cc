"""The runner of a comparison's cells: it makes a model by a method at a ratio, and measures it."""

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from headshare.calibration.gptq import round_by_gptq
from headshare.calibration.refit.run import refit
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.fingerprint import fingerprint
from headshare.checkpoint.opening import open_checkpoint
from headshare.errors import HeadshareError, OutputError, TrainingError
from headshare.evaluation.harness import Chosen, Runner, chosen_tasks
from headshare.evaluation.perplexity import Predictions, losses_and_divergences
from headshare.evaluation.results import TaskResult, kept_results, key_of_result, versions
from headshare.evaluation.translation import Parallel
from headshare.experiments.case import METHODS, REFIT, ROUNDED, TRAINED, Case, Common, Edit, Noted, base_of
from headshare.experiments.cells import DENSE, Asked, Compared, TakenUnits
from headshare.experiments.recipe import STAR, Grid
from headshare.files.digests import SHA256, file_digest
from headshare.files.printable import MAX_TEXT
from headshare.files.state_files import Workspace
from headshare.integrations.transformers.loading import unique_parameter_bytes
from headshare.plan.describe import given_up
from headshare.plan.plan import SharePlan
from headshare.sharing.rounded.write import RoundedCheckpoint
from headshare.sharing.share import share
from headshare.sharing.size import estimate_plan, parameter_bytes
from headshare.text.tokens import Calibration
from headshare.training import TrainSettings, train
from headshare.training.state import RECORD as TRAINING_RECORD
from headshare.training.state import is_trained

# hidden names, which no folder of the user's has
MADE = ".headshare-model"
MADE_ROUNDED = ".headshare-rounded"
WORK = ".headshare-prices"
UNTRAINED = "no step of training was better than none on the text held out, so the weights are those from before it"


@dataclass(frozen=True)
class CellRunner:
    """The settings and data that all cells of a comparison have in common, and the steps that make a cell."""

    dense: Checkpoint
    grid: Grid
    tasks: Sequence[Chosen | Parallel]
    calibration: Calibration | None
    work: Workspace
    folder: Path
    device: str
    restart: bool

    def key(self, name: str, asked: Asked) -> str:
        """Cache key of a cell."""
        model = fingerprint(self.dense)
        settings = self.grid.settings
        # all that the measurements depend on, then all that making the model depends on
        measured = [task.key(model, settings) for task in self.tasks]
        measured += [self.grid.text.key(model, settings)] if self.grid.text else []
        made: Any = None if self.calibration is None else [self.calibration.digest, self.calibration.seed]
        if name in TRAINED and self.grid.training is not None:
            training = self.grid.training
            texts = [Path(place) for place in (training.text.data, training.text.held_out_data) if place]
            made = [
                training.model_dump_json(),
                *(file_digest(file, SHA256) if file.is_file() else "" for file in texts),
            ]
            made += [task.digest for task in chosen_tasks(training.tasks.names, training.tasks.data_dir)]
        if name == DENSE:
            made = None
        packages = ("headshare", *self._packages(name))
        amount = f"save {asked.save}" if asked.save else asked.ratio
        if own := METHODS[base_of(name)].digest if base_of(name) in METHODS else "":
            name = f"{name} {own}"
        if self.grid.mode != STAR and name != DENSE:
            name = f"{name} {self.grid.mode}"
        return key_of_result(name, amount, measured, made, self.grid.seed, packages=packages)

    def _packages(self, method: str) -> list[str]:
        """Packages beside transformers and torch that decide what a cell of this method holds."""
        tasks = ["lm_eval"] if self.grid.tasks else []
        training = ["peft"] if method in TRAINED else []
        rounding = ["gptqmodel", "compressed-tensors"] if ROUNDED.removeprefix("+") in method else []
        return [*tasks, *training, *rounding]

    def cell(self, name: str, asked: Asked, key: str) -> Compared:
        """Make the model, write it where it is smaller, and measure it."""
        begun = time.monotonic()
        cell = Compared(key, name, asked.ratio, save=asked.save)
        if name == DENSE:
            return self._measured(cell, self.dense)
        case = Case(self._common, asked, self.grid.seed, self.grid.mode)
        try:
            made = METHODS[base_of(name)].make(case)
            if isinstance(made, TrainSettings):
                return self._trained(cell, made, begun)
            if isinstance(made, RoundedCheckpoint):
                return self._rounded(cell, made, begun)
            if isinstance(made, Edit):
                return self._edited(replace(cell, note=made.note), made, begun)
            if isinstance(made, Noted):
                return self._written(replace(cell, note=made.note), made.plan, case, begun)
            return self._written(cell, made, case, begun)
        except HeadshareError as error:
            if isinstance(error, TrainingError | OutputError):  # not the method's
                raise
            return replace(cell, failed=_in_one_line(error))

    def _written(self, cell: Compared, plan: SharePlan, case: Case, begun: float) -> Compared:
        shared = share(self.dense, plan)
        if REFIT in cell.method:
            shared = refit(shared, case.common.text, device=self.device)
        folder = shared.save(self.folder, overwrite=True)
        estimated = estimate_plan(self.dense, plan)
        cell = _with_plan(cell, plan)
        with open_checkpoint(folder) as written:
            if cell.method.endswith(ROUNDED):
                return self._rounded(cell, round_by_gptq(written, case.common.text, device=self.device), begun)
            seconds = time.monotonic() - begun
            return self._measured(cell, written, saved=estimated.saved_bytes, seconds=seconds)

    def _trained(self, cell: Compared, settings: TrainSettings, begun: float) -> Compared:
        """The measured cell of a training run.

        Each run has a folder of its own, so that a stopped run goes on and no other run's state is in the way.
        """
        folder = self.folder.parent / f"{self.folder.name}-{cell.key[:16]}"
        if not is_trained(folder):
            train(self.dense.path, folder, settings, overwrite=True, restart=self.restart)
        seconds = time.monotonic() - begun
        with open_checkpoint(folder) as written:
            assert written.plan is not None
            record = json.loads((folder / TRAINING_RECORD).read_text(encoding="utf-8"))
            note = "" if record["best_step"] else UNTRAINED
            cell = replace(_with_plan(cell, written.plan), curve=tuple(_curve(record)), note=note)
            saved = estimate_plan(self.dense, written.plan).saved_bytes
            measured = self._measured(cell, written, saved=saved, seconds=seconds)
        shutil.rmtree(folder)
        return measured

    def _rounded(self, cell: Compared, rounded: RoundedCheckpoint, begun: float) -> Compared:
        with open_checkpoint(rounded.save(self.folder.with_name(MADE_ROUNDED), overwrite=True)) as written:
            whole, left = map(parameter_bytes, (self.dense, written))
            return self._measured(cell, written, saved=whole - left, seconds=time.monotonic() - begun)

    def _edited(self, cell: Compared, edit: Edit, begun: float) -> Compared:
        runner = Runner.of(self.dense, self.grid.settings, name=cell.method)
        change = edit.refit if REFIT in cell.method and edit.refit is not None else edit.change
        saved = change(runner.model)
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
        whole = parameter_bytes(self.dense)
        losses, divergences = self._on_text(runner)
        results = tuple(self._on_task(task, runner, cell) for task in self.tasks)
        return replace(
            cell,
            versions=versions("headshare", *self._packages(cell.method)),
            saved_bytes=saved,
            saved_fraction=saved / whole,
            disk_bytes=disk,
            memory_bytes=memory,
            seconds=round(seconds, 1),
            results=results,
            losses=losses,
            divergences=divergences,
        )

    def _on_task(self, task: Chosen | Parallel, runner: Runner, cell: Compared) -> TaskResult:
        """The result of a task; what `headshare eval --out` kept of the dense model in this folder is used again."""
        if cell.method != DENSE:
            return task.run(runner, cell.key)
        key = task.key(fingerprint(self.dense), self.grid.settings)
        with kept_results(self.folder.parent) as kept:
            result = kept.find(key)
            if result is None:
                result = replace(task.run(runner, key), model=self.dense.name)
                kept.add(result)
        return replace(result, model=DENSE, task=task.name, key=cell.key)

    def _on_text(self, runner: Runner) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.grid.text is None:
            return (), ()
        both = losses_and_divergences(runner.model, self._predictions)
        losses, divergences = (tuple(round(value, 7) for value in values.tolist()) for values in both)
        return losses, divergences

    @cached_property
    def _common(self) -> Common:
        return Common(self.dense, self.calibration, self.work, self.device, self.grid.training)

    @cached_property
    def _predictions(self) -> Predictions:
        """The dense model's predictions of the text, the same for every cell."""
        assert self.grid.text is not None
        return Predictions(self._stock.model, self.grid.text.windows(self._stock))

    @cached_property
    def _stock(self) -> Runner:
        """The dense model that makes those predictions."""
        return Runner.of(self.dense, self.grid.settings)


def _in_one_line(error: HeadshareError) -> str:
    """An error's message, no longer than a cell keeps."""
    return " ".join(str(error).split())[:MAX_TEXT]


def _with_plan(cell: Compared, plan: SharePlan) -> Compared:
    """The cell with what the plan takes, in all and layer by layer."""
    return replace(cell, given_up=TakenUnits.of(plan), by_layer=tuple(given_up(plan)))


def _curve(record: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """Points of the curve that was measured while a model was trained."""
    for row in record["curve"]:
        loss = row.get("eval_shared_loss", row.get("eval_loss"))
        if loss is not None and math.isfinite(loss):  # JSON has no other numbers
            accuracies = {key.removeprefix("eval_"): row[key] for key in row if key.endswith(("_acc", "_acc_error"))}
            yield {"step": float(row["step"]), "loss": loss, **accuracies}
