"""Train and share, or share and train, from a folder to a folder; a run that was stopped goes on.

The Trainer's own folder (checkpoints with optimiser states) lies beside the output until that is written.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from jaxtyping import Int
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainingArguments, default_data_collator, set_seed

from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.contents import companions
from headshare.checkpoint.entry import Origin
from headshare.checkpoint.fingerprint import fingerprint, origin_of
from headshare.checkpoint.opening import open_checkpoint
from headshare.defaults import OUTPUT_DTYPES
from headshare.errors import TrainingError
from headshare.files.folder import check_output, check_vacant, narrow
from headshare.files.model_files import CARD, CONFIG
from headshare.integrations.transformers.loading import load_model, quiet
from headshare.plan.plan import SharePlan
from headshare.sharing.rewrite import write_trained
from headshare.sharing.share import share
from headshare.sharing.writer import copy_named
from headshare.storage.projection import shared_projections
from headshare.storage.registry import TRAINABLE
from headshare.text.windows import is_causal, not_causal
from headshare.training.adapters import with_adapters, without_adapters
from headshare.training.arguments import arguments_of, given_of, metric_of
from headshare.training.checks import (
    check_engine,
    enough_room,
    explained_set_up,
    open_teacher,
    plan_to_train,
    try_optimizer,
)
from headshare.training.choices import TrainingMethod
from headshare.training.hub import HUB_ARGUMENTS, Hub
from headshare.training.penalty import TiePenalty
from headshare.training.result import Closed, Trained
from headshare.training.settings import TrainSettings
from headshare.training.state import RECORD, resumed, trainer_run, work_of
from headshare.training.tasks import MeasuredTasks
from headshare.training.trainer import SharingTrainer
from headshare.training.windows import Packed, Streamed, sized_for, training_windows

# arguments that may change when a run goes on: how fast it learns and in what pieces, and what is logged, kept, pushed
CHANGEABLE = (
    "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "activation_checkpointing", "bf16", "logging_steps", "dataloader_num_workers",
    "save_total_limit", *HUB_ARGUMENTS,
)  # fmt: skip


def train(
    model: str | Path,
    out: str | Path,
    settings: TrainSettings,
    *,
    overwrite: bool = False,
    restart: bool = False,
    revision: str | None = None,
) -> Trained:
    """Train a model by these settings, and write the result.

    The output is a shared checkpoint, or a dense one by the method dense. If a run was stopped at any moment, the same
    call goes on from the last of the Trainer's checkpoints; `restart` throws those away. `revision` is that of a model
    on the hub.

    Under `accelerate launch` every process calls this function. The first process writes.

    Raises:
        TrainingError: if the text, the settings or the model cannot be trained on, the folder is of another run, the
            loss is not finite, or memory is too small.
        CheckpointError, PlanError, OutputError: as `share` does.
    """
    begun = time.monotonic()
    target = Path(out)
    check_vacant(target, overwrite=overwrite)
    with open_checkpoint(model, revision=revision) as source:
        check_output(target, source.path, overwrite=overwrite)
        if settings.loss.teacher and Path(settings.loss.teacher).is_dir():
            check_output(target, Path(settings.loss.teacher), overwrite=overwrite)
        run = _TrainingRun.checked(source, target, settings)
        processes = PartialState()  # the Trainer's arguments have said which there are
        first = processes.is_main_process
        with trainer_run(run.work, run.identity(), restart=restart) if first else nullcontext() as resumable:
            processes.wait_for_everyone()
            with enough_room(run.work):
                result = run.trained(begun)
            if resumable is not None:
                resumable.mark_committing(target, holds=RECORD)
                run.write(result, overwrite=overwrite)
        if first and run.hub:
            run.hub.push(target)
        processes.wait_for_everyone()
    return result


@dataclass(frozen=True)
class _TrainingRun:
    """A checked run: the model, the plan, the windows, the Trainer's arguments and the places to write to."""

    source: Checkpoint
    plan: SharePlan
    windows: Packed | Streamed
    held_out: Packed
    target: Path
    settings: TrainSettings
    arguments: TrainingArguments
    tasks: MeasuredTasks | None
    teacher: Checkpoint | None
    origin: Origin
    hub: Hub | None

    @classmethod
    def checked(cls, source: Checkpoint, target: Path, settings: TrainSettings) -> "_TrainingRun":
        """Check all that can be wrong before anything is loaded."""
        settings = settings.model_copy(update={"text": sized_for(source, settings.text)})
        hub = Hub.of(given_of(settings), target)
        plan = plan_to_train(source, settings)
        windows, held_out = training_windows(source, settings.text)
        arguments = arguments_of(settings, work_of(target), held_out=len(held_out))
        tasks = MeasuredTasks.of(source, settings.tasks) if settings.tasks.names else None
        teacher = open_teacher(source, settings.loss)
        return cls(source, plan, windows, held_out, target, settings, arguments, tasks, teacher, origin_of(source), hub)

    def identity(self) -> dict[str, str]:
        """All that makes it this run: a folder with other values is that of another.

        Arguments that may change when a run goes on are left out.
        """
        learning = self.settings.learning
        kept = {name: value for name, value in learning.arguments.items() if name not in CHANGEABLE}
        settings = self.settings.model_copy(update={"learning": learning.model_copy(update={"arguments": kept})})
        return {
            "model": fingerprint(self.source),
            "plan": self.plan.digest,
            "text": _digest(self.windows.beginning if isinstance(self.windows, Streamed) else self.windows.tokens),
            "text held out": _digest(self.held_out.tokens),
            "number of processes": str(PartialState().num_processes),
            **_flat(settings.model_dump(mode="json")),
        }

    @property
    def work(self) -> Path:
        """The Trainer's folder."""
        return work_of(self.target)

    @property
    def pulls(self) -> bool:
        """Whether a dense model is trained, with the penalty that pulls its pairs together."""
        return self.settings.method is TrainingMethod.POSTSHARE

    # ---- training

    def trained(self, begun: float) -> Trained:
        """Train to the end, from the last checkpoint if there is one; keep the best step in the Trainer's folder."""
        loss = self.settings.loss
        set_seed(self.settings.seed)  # adapters are drawn before the Trainer is made
        model = self._model()
        # distances before training stand in the result beside those after it
        penalty = TiePenalty(model, self.plan, loss.distance) if self.pulls else None
        apart = [] if penalty is None else penalty.distances().tolist()
        callbacks = [EarlyStoppingCallback(patience)] if (patience := self.settings.learning.patience) else []
        adapted = with_adapters(model, self.settings.learning.lora) if self.settings.learning.lora else model
        teacher = self._teacher()
        # what cannot work is refused before the first step
        with explained_set_up():
            trainer = SharingTrainer(
                model=adapted,
                args=self.arguments,
                data_collator=default_data_collator,
                train_dataset=self.windows,
                eval_dataset=self.held_out,
                penalty=penalty,
                loss=loss,
                teacher=teacher,
                tasks=self.tasks,
                callbacks=callbacks,
            )
            try_optimizer(trainer)
        check_engine(trainer, lora=bool(self.settings.learning.lora), tasks=bool(self.tasks))
        with quiet(), resumed(trainer, self.work) as last:
            trainer.train(resume_from_checkpoint=last)
        first, best = self._measured(trainer)
        self._save(trainer)
        return Trained(
            method=self.settings.method,
            steps=trainer.state.global_step,
            best_step=best["step"],
            seconds=time.monotonic() - begun,
            loss_before=first["eval_loss"],
            loss_after=best["eval_loss"],
            shared_before=first.get("eval_shared_loss"),
            shared_after=best.get("eval_shared_loss"),
            ties=() if penalty is None else _closed(penalty, apart, moved=best["step"] > 0),
            curve=tuple(trainer.state.log_history),
            settings=self.settings,
        )

    def _measured(self, trainer: SharingTrainer) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Measurements before the first step and at the best step, whose weights the Trainer has loaded again."""
        key = metric_of(self.settings)
        measured = [row for row in trainer.state.log_history if math.isfinite(row.get(key, math.nan))]
        if not measured or measured[0]["step"]:
            raise TrainingError("the loss is no number before the first step. Train in float32.")
        best = min(measured, key=lambda row: row[key])
        kept = Path(trainer.state.best_model_checkpoint or "").name
        if best["step"] and kept != f"checkpoint-{best['step']}":
            raise TrainingError(
                f"step {best['step']} was the best, and its checkpoint is not in {self.work} any more. Train again: "
                "--restart"
            )
        return measured[0], best

    def _model(self) -> Any:
        options = {"dtype": getattr(torch, self.settings.dtype)}
        if self.settings.method is TrainingMethod.BOTH:
            folder = self.work / "shared"
            if PartialState().is_main_process:  # anew each time: one that is there may be damaged
                share(self.source, self.plan).save(folder, overwrite=True)
            PartialState().wait_for_everyone()
            model = load_model(open_checkpoint(folder), storage=TRAINABLE, **options)
        else:
            model = load_model(self.source, storage=TRAINABLE, **options)
        if not is_causal(model):
            raise TrainingError(f"{not_causal(model)}, which is what is trained.")
        model.config.use_cache = False
        if shared := {type(module).__name__ for _, module in shared_projections(model)}:
            # FSDP shards them by themselves, before their layers: other layers call them too
            model._no_split_modules = {*(model._no_split_modules or ()), *shared}
        return model

    def _teacher(self) -> nn.Module | None:
        if self.teacher is None:
            return None
        teacher: nn.Module = load_model(self.teacher, dtype=getattr(torch, self.settings.dtype))
        return teacher

    def _save(self, trainer: SharingTrainer) -> None:
        """Write the trained model as a checkpoint in the Trainer's folder."""
        folder = self.work / "trained"
        with quiet():
            if self.settings.learning.lora:
                whole = without_adapters(trainer.accelerator.unwrap_model(trainer.model))
                if trainer.args.should_save:
                    whole.save_pretrained(folder)
            else:
                trainer.save_model(str(folder))
        if trainer.args.should_save:
            card = [CARD] if (self.source.path / CARD).is_file() else []  # for the licence that it names
            copy_named(self.source.path, folder, [*companions(self.source.path), *card])
            narrow(folder / CONFIG, self.source.path / CONFIG)

    # ---- the end

    def write(self, result: Trained, *, overwrite: bool) -> None:
        """Write the output: the trained model, shared, in the type that most of the model's numbers came in."""
        numbers = dict.fromkeys(OUTPUT_DTYPES, 0)
        for info in self.source.tensors.values():
            for name, code in OUTPUT_DTYPES.items():
                numbers[name] += math.prod(info.shape) * (info.dtype == code)
        dtype = max(numbers, key=numbers.__getitem__)
        notes = {RECORD: result.to_dict()}
        with open_checkpoint(self.work / "trained") as saved:
            shared_first = self.settings.method is TrainingMethod.BOTH
            before = open_checkpoint(self.work / "shared") if shared_first else self.source
            # where no step was better than none, the weights from before training are written
            trained = _named_as(before, saved) if result.best_step else before
            if self.pulls:
                # the model that it is compared with later is the one before training, which is still there
                shared = share(trained, self.plan, dtype=dtype, origin=self.origin)
                shared.save(self.target, overwrite=overwrite, notes=notes)
                return
            origin = self.source.name if shared_first else None  # as its entry says
            write_trained(trained, self.target, dtype=dtype, base_model=origin, overwrite=overwrite, notes=notes)


def _named_as(before: Checkpoint, trained: Checkpoint) -> Checkpoint:
    """The trained checkpoint with the tensors' names and the configuration that it had before.

    transformers saves a base model's tensors with a prefix, and configurations as its own version writes them.
    """
    tensors = {}
    for name, info in trained.tensors.items():
        _, _, short = name.partition(".")
        kept = short if name not in before.tensors and short in before.tensors else name
        tensors[kept] = dataclasses.replace(info, name=kept)
    return dataclasses.replace(trained, name=before.name, tensors=tensors, config=dict(before.config))


def _digest(windows: Int[Tensor, "windows context"]) -> str:
    return hashlib.sha256(windows.numpy().data).hexdigest()


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Every setting, by its place, such as text.context."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": json.dumps(value)}
    return flat


def _closed(penalty: TiePenalty, before: list[float], *, moved: bool) -> tuple[Closed, ...]:
    after = penalty.distances().tolist() if moved else before
    return tuple(Closed(tie, *each) for (_, tie), *each in zip(penalty.ties, before, after, strict=True))
