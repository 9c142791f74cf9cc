"""Checks before training starts: plan, engine, optimiser and memory."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from headshare.architecture.config import text_config
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.fingerprint import check_origin
from headshare.checkpoint.opening import open_base, open_checkpoint
from headshare.errors import PlanError, TrainingError
from headshare.files.failures import in_one_line
from headshare.files.untrusted import foreign, wants_memory
from headshare.matching.pairing import make_plan
from headshare.matching.similarity import score_units
from headshare.plan.plan import SharePlan
from headshare.progress import say
from headshare.sharing.fits import fit_plan, open_shared
from headshare.training.choices import TrainingMethod
from headshare.training.settings import Loss, Sharing, TrainSettings
from headshare.training.trainer import SharingTrainer


def plan_to_train(source: Checkpoint, settings: TrainSettings) -> SharePlan:
    """The plan of this training: the one to pull pairs together by, or the one to train with.

    Raises:
        TrainingError: if the method is not for this model or plan.
    """
    if source.sharing is not None and source.sharing.packing is not None:
        raise TrainingError(f"the matrices of {source.name} are rounded, and those are not trained. Train it before.")
    # a shared model brings its plan
    if settings.method is TrainingMethod.RECOVER:
        if source.plan is None:
            raise TrainingError(
                f"{source.name} is not shared, so there is nothing to recover. Share it first, or use --method both."
            )
        if settings.sharing != Sharing():
            raise TrainingError(f"{source.name} is shared already: its plan is not chosen again. Leave sharing out.")
        return open_shared(source).plan
    if source.plan is not None:
        raise TrainingError(f"{source.name} is shared already. Train it with --method recover.")
    # all other methods begin with a dense model
    source.require_dense("train it")
    chosen = settings.sharing
    if settings.method is TrainingMethod.DENSE:
        if chosen != Sharing():
            raise TrainingError("a dense model is trained as it is, and no plan is chosen. Leave sharing out.")
        return SharePlan()
    if chosen.plan is not None:
        plan = SharePlan.load(chosen.plan)
    else:
        scores = score_units(source, chosen.match, chosen.parts)
        plan = make_plan(scores, chosen.ratio, parts=chosen.parts, mode=chosen.mode)
    fit_plan(plan, source)
    # the penalty compares equal parts of pairs, so ties are all that it can pull together
    if settings.method is TrainingMethod.POSTSHARE:
        if not plan.only_ties or settings.learning.lora:
            what = (
                "the plan removes, scales or factors units"
                if not plan.only_ties
                else "LoRA cannot move weights together"
            )
            raise TrainingError(f"{what}, and PostShare pulls pairs of equal parts together. Use both or recover.")
        if not plan.ties:
            raise PlanError("this plan ties nothing, so there is nothing to pull together. Ask for a larger ratio.")
    return plan


def open_teacher(source: Checkpoint, loss: Loss) -> Checkpoint | None:
    """Open the dense model to distil from: the one that is named, or that the trained model is or came from.

    Raises:
        TrainingError: if nothing names one, it has other words, or the engine would take it apart.
        CheckpointError: if it cannot be opened, or is another than the trained model came from and was not named.
    """
    if not loss.distill:
        return None
    if is_deepspeed_zero3_enabled():
        raise TrainingError("ZeRO-3 would take the teacher apart too. Distil with FSDP2, ZeRO-2 or DDP.")
    if loss.teacher is not None:
        teacher = open_checkpoint(loss.teacher)
    elif source.sharing is None:
        return source
    else:
        base = open_base(source)
        if base is None:
            raise TrainingError(f"{source.name} does not say which dense model it came from; name it as teacher.")
        teacher = base
        if note := check_origin(source, teacher, "name it as teacher"):
            say(note)
    words = [text_config(model.config).get("vocab_size") for model in (source, teacher)]
    if words[0] != words[1]:
        raise TrainingError(f"the teacher {teacher.name} has {words[1]} words and the model {words[0]}; name another.")
    return teacher


def check_engine(trainer: SharingTrainer, *, lora: bool, tasks: bool) -> None:
    """Refuse settings at which an engine would fail only after training.

    Raises:
        TrainingError: naming what to set.
    """
    state = trainer.accelerator.state
    folder = str(trainer.args.output_dir)
    if trainer.is_deepspeed_enabled and folder != glob.escape(folder):
        raise TrainingError(f"DeepSpeed takes brackets, * and ? in {folder} for a pattern. Write to a folder without.")
    in_parts = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
    if lora and in_parts:
        raise TrainingError("LoRA's products cannot be added to weights that lie in parts. Use DDP, or train in full.")
    if tasks and in_parts:
        raise TrainingError(
            "weights lie in parts, and tasks want a whole model. Leave tasks out, or use DDP or ZeRO-2."
        )
    if trainer.is_fsdp_enabled:
        plugin = state.fsdp_plugin
        if plugin.fsdp_version != 2 or "FULL" not in str(plugin.state_dict_type):
            raise TrainingError("FSDP needs fsdp_version 2 and fsdp_state_dict_type FULL_STATE_DICT here; set both.")
    if is_deepspeed_zero3_enabled():
        key = "stage3_gather_16bit_weights_on_model_save"
        if not state.deepspeed_plugin.deepspeed_config["zero_optimization"].get(key):
            raise TrainingError(f"ZeRO-3 saves no whole weights unless {key} (zero3_save_16bit_model) is true; set it.")


@contextmanager
def explained_set_up() -> Iterator[None]:
    """Turn the Trainer's complaints about its arguments, or about missing packages, into one error."""
    try:
        yield
    except OSError:  # of the disk and not of the arguments: `enough_room` explains it
        raise
    except Exception:
        with foreign("the Trainer cannot begin with these arguments", TrainingError):
            raise


def try_optimizer(trainer: SharingTrainer) -> None:
    """Make the optimiser for a single number, so that wrong arguments come out before anything is trained."""
    if not trainer.is_deepspeed_enabled:
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        if "params" not in options and "model" not in options and "optimizer_dict" not in options:
            kind([nn.Parameter(torch.zeros(1))], **options)


@contextmanager
def enough_room(work: Path) -> Iterator[None]:
    """Turn failures for want of memory or of room on the disk into an error that says what to do.

    `work` is the Trainer's folder, whose files it writes by several libraries with errors of their own. This is not the
    door to what others wrote: any other error of a step is the Trainer's or ours, and must come out as it is.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError, SafetensorError) as error:
        if cause := _why_unwritten(error):
            raise TrainingError(
                f"the state of training could not be written in {work}: {cause}. Free some room and run again: it goes "
                "on from the last whole checkpoint there, if there is one."
            ) from error
        if not wants_memory(error):
            raise
        raise TrainingError(
            "there is not enough memory for this step. Lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps) or per_device_eval_batch_size, or set gradient_checkpointing or bf16. What "
            "was saved before is kept: run again, and it goes on from there. A shorter context needs --restart."
        ) from error


def _why_unwritten(error: BaseException) -> str | None:
    """The reason why a file could not be written, in one line; None where the error is of something else."""
    reason = " ".join(str(error).split())
    if isinstance(error, OSError):
        return in_one_line(error).rstrip(".")
    if isinstance(error, SafetensorError):
        return reason if "os error" in reason.lower() or "i/o error" in reason.lower() else None
    # torch's writer of zip files says where in its source it failed, and nothing of the disk
    return "the disk is full or fails" if "PytorchStreamWriter" in reason or "inline_container" in reason else None
