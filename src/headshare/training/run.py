"""Train and share, or share and train: from a folder to a folder, gone on with after a kill.

The Trainer's own folder (checkpoints with optimiser states) lies beside the output until that is written.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import EarlyStoppingCallback, TrainingArguments, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from headshare.checkpoints import OUTPUT_DTYPES, Checkpoint, open_checkpoint
from headshare.errors import PlanError, TrainingError
from headshare.evaluation import is_causal
from headshare.files import write_whole
from headshare.models import load_model, quiet
from headshare.penalty import TiePenalty
from headshare.planning import make_plan
from headshare.plans import SharePlan
from headshare.sharing import check_fits, check_shared, copy_other_files, share, write_trained
from headshare.similarity import score_units
from headshare.storage.owner import OwnerProjection
from headshare.training.adapters import with_adapters, without_adapters
from headshare.training.settings import RECIPE, Method, Sharing, TrainSettings
from headshare.training.texts import Packed, Streamed, training_windows
from headshare.training.trainer import SharingTrainer
from headshare.units import Tie
from headshare.workspace import fingerprint
from headshare.writing import check_output, check_vacant

RECORD = "training.json"
_WHAT = "run.json"
EVALUATIONS = 10


@dataclass(frozen=True)
class Closed:
    """How far the two ends of a tie lay apart before training and after, summed over parts."""

    tie: Tie
    before: float
    after: float


@dataclass(frozen=True)
class Trained:
    """What a run did. Losses are nats a token on the text held out.

    `loss_before` and `loss_after` are the trained model's, before the first step and at the best; for PostShare,
    `shared_before` and `shared_after` are the same with the plan's ties closed: what sharing gives without training,
    and with it. `best_step` is 0 where no step was better than none. `curve` has all that was logged.
    """

    method: Method
    steps: int
    best_step: int
    seconds: float
    loss_before: float
    loss_after: float
    shared_before: float | None
    shared_after: float | None
    ties: tuple[Closed, ...]
    curve: tuple[Mapping[str, float], ...]
    settings: TrainSettings

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return {**asdict(self), "settings": self.settings.model_dump(mode="json")}

    def in_words(self) -> str:
        """For the person at the keyboard."""
        lines = [f"{self.steps} steps; the best on the text held out is {self.best_step}"]
        lines.append(f"perplexity before training {_exp(self.loss_before)}, at that step {_exp(self.loss_after)}")
        if self.shared_before is not None and self.shared_after is not None:
            lines.append(
                f"shared without training {_exp(self.shared_before)}, shared after it {_exp(self.shared_after)}"
            )
        if self.ties:
            left = sorted(one.after / one.before if one.before else 1.0 for one in self.ties)
            lines.append(
                f"{len(left)} ties: left of their distance {left[len(left) // 2]:.1%} in the middle, "
                f"{left[0]:.1%} to {left[-1]:.1%}"
            )
        if self.best_step == 0:
            lines.append("no step was better than none, so the weights are those from before training")
        return "\n".join(lines)


def _exp(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):,.3f}"


def train(
    model: str | Path, out: str | Path, settings: TrainSettings, *, overwrite: bool = False, restart: bool = False
) -> Trained:
    """Train a model by these settings, and write the shared checkpoint. Stopped at any moment, the same call goes on
    from the last of the Trainer's checkpoints; `restart` throws that away.

    Under `accelerate launch` every process calls this; the first one writes.

    Raises:
        TrainingError: if the text, the settings or the model cannot be trained on, the folder is of another run, the
            loss is not finite, or memory is too small.
        CheckpointError, PlanError, OutputError: as `share` does.
    """
    begun, target = time.monotonic(), Path(out)
    check_vacant(target, overwrite=overwrite)
    with open_checkpoint(model) as source:
        check_output(target, source.path, overwrite=overwrite)
        run = _Run.begun(source, target, settings, restart=restart)
        found = run.trained(begun)
        if PartialState().is_main_process:
            run.write(found, overwrite=overwrite)
            write_whole(target / RECORD, json.dumps(found.to_dict(), indent=2, default=str).encode())
            shutil.rmtree(run.work, ignore_errors=True)
        PartialState().wait_for_everyone()
    return found


@dataclass(frozen=True)
class _Run:
    """A run that may begin: what is trained, by which plan, on what, and where its state lies."""

    source: Checkpoint
    plan: SharePlan
    windows: Packed | Streamed
    held_out: Packed
    target: Path
    settings: TrainSettings
    arguments: TrainingArguments

    @classmethod
    def begun(cls, source: Checkpoint, target: Path, settings: TrainSettings, *, restart: bool) -> "_Run":
        """Check all that can be wrong before anything is loaded, and take up the state that is there."""
        plan = _plan(source, settings)
        windows, held_out = training_windows(source, settings.text)
        arguments = _arguments(settings, _work_of(target))  # these say which processes there are, so they come first
        run = cls(source, plan, windows, held_out, target, settings, arguments)
        what = {
            "model": fingerprint(source),
            "plan": plan.digest,
            "text": "" if isinstance(windows, Streamed) else _digest(windows),
            "text held out": _digest(held_out),
            "settings": hashlib.sha256(settings.model_dump_json().encode()).hexdigest(),
        }
        if PartialState().is_main_process:
            _take_up(run.work, what, restart=restart)
        PartialState().wait_for_everyone()
        return run

    @property
    def work(self) -> Path:
        """The Trainer's folder."""
        return _work_of(self.target)

    @property
    def pulls(self) -> bool:
        """Whether the dense model is trained, its pairs pulled together."""
        return self.settings.method is Method.POSTSHARE

    # ---- training

    def trained(self, begun: float) -> Trained:
        """Train from where the state is to the end, and keep the best in the Trainer's folder."""
        loss = self.settings.loss
        model = self._model()
        penalty = TiePenalty(model, self.plan, loss.distance) if self.pulls else None
        apart = [] if penalty is None else penalty.distances().tolist()
        callbacks = [EarlyStoppingCallback(patience)] if (patience := self.settings.learning.patience) else []
        trainer = SharingTrainer(
            model=with_adapters(model, self.settings.learning.lora) if self.settings.learning.lora else model,
            args=self.arguments,
            data_collator=default_data_collator,
            train_dataset=self.windows,
            eval_dataset=self.held_out,
            penalty=penalty,
            loss=loss,
            teacher=self._teacher(),
            callbacks=callbacks,
        )
        with _room(), quiet():
            trainer.train(resume_from_checkpoint=get_last_checkpoint(str(self.work)))
        measured = [one for one in trainer.state.log_history if math.isfinite(one.get("eval_loss", math.nan))]
        if not measured:
            raise TrainingError("nothing was measured on the text held out. Leave eval_strategy as it is.")
        key = self.arguments.metric_for_best_model
        best = min(measured, key=lambda one: one[key])
        self._save(trainer)
        return Trained(
            method=self.settings.method,
            steps=trainer.state.global_step,
            best_step=best["step"],
            seconds=time.monotonic() - begun,
            loss_before=measured[0]["eval_loss"],
            loss_after=best["eval_loss"],
            shared_before=measured[0].get("eval_shared_loss"),
            shared_after=best.get("eval_shared_loss"),
            ties=() if penalty is None else _closed(penalty, apart, moved=best["step"] > 0),
            curve=tuple(trainer.state.log_history),
            settings=self.settings,
        )

    def _model(self) -> Any:
        options = {"dtype": getattr(torch, self.settings.dtype)}

        if self.settings.method is Method.BOTH:
            folder = self.work / "shared"
            if PartialState().is_main_process and not folder.is_dir():
                share(self.source, self.plan).save(folder)
            PartialState().wait_for_everyone()
            model = load_model(open_checkpoint(folder), storage="owner", **options)
        else:
            model = load_model(self.source, storage="owner", **options)
        if not is_causal(model):
            raise TrainingError(f"{type(model).__name__} does not predict the next token, which is what is trained.")
        model.config.use_cache = False
        if not self.pulls:  # FSDP shards owners by themselves, before their layers: other layers call them too
            model._no_split_modules = {*(model._no_split_modules or ()), OwnerProjection.__name__}
        return model

    def _teacher(self) -> nn.Module | None:
        loss = self.settings.loss
        if not loss.distill:
            return None
        name = loss.teacher or (self.source.base_model if self.source.plan is not None else str(self.source.path))
        if name is None:
            raise TrainingError(f"{self.source.name} does not say which dense model it came from; name it as teacher.")
        teacher: nn.Module = load_model(open_checkpoint(name), dtype=getattr(torch, self.settings.dtype))
        return teacher

    def _save(self, trainer: SharingTrainer) -> None:
        """What was trained, as a checkpoint in the Trainer's folder."""
        folder = self.work / "trained"
        with quiet():
            if self.settings.learning.lora:
                whole = without_adapters(trainer.accelerator.unwrap_model(trainer.model))
                if trainer.args.should_save:
                    whole.save_pretrained(folder)
            else:
                trainer.save_model(str(folder))
        if trainer.args.should_save:
            copy_other_files(self.source.path, folder)

    # ---- the end

    def write(self, found: Trained, *, overwrite: bool) -> None:
        """The output: what was trained, shared, in the type that the model came in."""
        code = next(info.dtype for info in self.source.tensors.values() if info.dtype in OUTPUT_DTYPES.values())
        dtype = next(name for name, short in OUTPUT_DTYPES.items() if short == code)
        with open_checkpoint(self.work / "trained") as trained:
            if self.pulls:
                dense = self.source
                if found.best_step:
                    config = {**self.source.config}
                    dense = dataclasses.replace(trained, name=self.source.name, config=config)
                share(dense, self.plan, dtype=dtype).save(self.target, overwrite=overwrite)
                return
            origin = self.source.base_model if self.source.plan is not None else self.source.name
            shared = trained
            if not found.best_step:
                shared = open_checkpoint(self.work / "shared") if self.source.plan is None else self.source
            write_trained(shared, self.target, dtype=dtype, base_model=origin, overwrite=overwrite)


def _plan(source: Checkpoint, settings: TrainSettings) -> SharePlan:
    """The plan that is trained into or with.

    Raises:
        TrainingError: if the method is not for this model or plan.
    """
    if settings.method is Method.RECOVER:
        if source.plan is None:
            raise TrainingError(
                f"{source.name} is not shared, so there is nothing to recover. Share it first, or use --method both."
            )
        if settings.sharing != Sharing():
            raise TrainingError(f"{source.name} is shared already: its plan is not chosen again. Leave sharing out.")
        return check_shared(source)
    if source.plan is not None:
        raise TrainingError(f"{source.name} is shared already. Train it with --method recover.")
    source.require_dense("train it")
    chosen = settings.sharing
    if chosen.plan is not None:
        plan = SharePlan.load(chosen.plan)
    else:
        scores = score_units(source, chosen.match, chosen.parts)
        plan = make_plan(scores, chosen.ratio, parts=chosen.parts, mode=chosen.mode)
    check_fits(plan, source)
    if settings.method is Method.POSTSHARE:
        others = plan.removals or plan.factored or any(one.scale for one in plan.selections)
        if others or settings.learning.lora:
            what = "the plan removes, scales or factors units" if others else "LoRA cannot move weights together"
            raise TrainingError(f"{what}, and PostShare pulls pairs of equal parts together. Use both or recover.")
        if not plan.ties:
            raise PlanError("this plan ties nothing, so there is nothing to pull together. Ask for a larger ratio.")
    return plan


def _arguments(settings: TrainSettings, work: Path) -> TrainingArguments:
    """The Trainer's arguments: ours, the recipe's, and those that were given."""
    given = dict(settings.learning.arguments)
    own = {
        "output_dir": str(work),
        "seed": settings.seed,
        "metric_for_best_model": "eval_shared_loss" if settings.method is Method.POSTSHARE else "eval_loss",
        "greater_is_better": False,
        "load_best_model_at_end": True,
        "eval_on_start": True,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    if taken := sorted(own.keys() & given.keys()):
        raise TrainingError(f"{', '.join(taken)} cannot be given: headshare sets it. Leave it out.")
    part = given.get("eval_steps", 1 / EVALUATIONS)
    every = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": part, "save_steps": part}
    steps = {"logging_steps": 10, "save_total_limit": 2, "per_device_eval_batch_size": 8}
    if settings.text.stream and int(given.get("max_steps", -1)) < 1:
        raise TrainingError("a stream has no known end: say how long to train, with max_steps.")
    try:
        return TrainingArguments(**{**RECIPE, **every, **steps, **given, **own})
    except (TypeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).replace("TrainingArguments.__init__() got an", "there is an")
        raise TrainingError(f"the Trainer does not take these arguments: {reason:.300}") from error


def _work_of(target: Path) -> Path:
    return target.absolute().parent / f".{target.name}.headshare-training"


def _digest(windows: Packed) -> str:
    return hashlib.sha256(windows.tokens.numpy().data).hexdigest()


def _closed(penalty: TiePenalty, before: list[float], *, moved: bool) -> tuple[Closed, ...]:
    after = penalty.distances().tolist() if moved else before
    return tuple(Closed(tie, *each) for (_, tie), *each in zip(penalty.ties, before, after, strict=True))


def _take_up(folder: Path, what: Mapping[str, str], *, restart: bool) -> None:
    """The folder of this run and no other."""
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    file = folder / _WHAT
    if file.is_file():
        try:
            found = json.loads(file.read_bytes())
        except ValueError:
            found = {}
        other = [key for key, value in what.items() if found.get(key) != value]
        if other:
            raise TrainingError(
                f"{folder} holds the state of another run: it had another {' and another '.join(other)}. Go on with "
                "what it had, or throw it away with --restart."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise TrainingError(f"{folder} is in the way and is no state of a run. Move it, or write elsewhere.")
    folder.mkdir(exist_ok=True)
    write_whole(file, json.dumps(what).encode())


@contextmanager
def _room() -> Iterator[None]:
    """Memory that is too small is an error that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        full = not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError)
        if not full and "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            "there is not enough memory for this step. Lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps), lower the context, or set gradient_checkpointing or bf16. What was saved "
            "before is kept: the same command goes on from there."
        ) from error
