"""The Hugging Face Trainer with what sharing adds: the penalty, distillation, and the loss of the shared model.

Everything else is the Trainer's: its arguments, logging, resuming, mixed precision and engines.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from headshare.errors import TrainingError
from headshare.integrations.transformers.quantizer import HeadshareQuantizer
from headshare.progress import say
from headshare.training.penalty import TiePenalty, in_zero_parts
from headshare.training.settings import Loss
from headshare.training.state import note_digests

SHARED = "shared"


class SharingTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """The Trainer that minimises lm x language-model loss + gamma x penalty.

    This is equation 5 of the paper (Cao, Yang and Zhao, arXiv 2402.11819). `penalty` is that of the model that is
    trained; without one, the language-model loss alone is left. `teacher` gives the predictions that `loss.distill`
    needs, and is not trained.

    Evaluation measures the plain language-model loss. With a penalty it also measures `eval_shared_loss`, the loss that
    sharing at this step would give: recipients' numbers are overwritten by their donors'. `tasks` measures the model
    with these weights too, on the first process.

    The penalty is added once an optimiser step, at its last batch, times the batches that the Trainer divides by.
    """

    def __init__(
        self,
        *args: Any,
        penalty: TiePenalty | None = None,
        loss: Loss | None = None,
        teacher: nn.Module | None = None,
        tasks: Callable[[Any], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tasks = tasks
        self.model_accepts_loss_kwargs = False  # every window has as many tokens: batches count by their windows
        self._windows = 0
        self.penalty = penalty
        self.loss = loss or Loss()
        self.teacher = teacher
        self._hooks: list[Any] = []
        if teacher is not None:
            self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        for printing in (PrinterCallback, ProgressCallback):  # they write to standard output, which is for results
            self.remove_callback(printing)
        self.add_callback(_Lines())
        self.add_callback(_LogWhereSaved())
        self.add_callback(_Digests())

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Batches of an optimiser step, whose windows are counted."""
        samples = super().get_batch_samples(*args, **kwargs)
        self._windows = sum(len(batch["input_ids"]) for batch in samples[0])
        return samples

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002 - the Trainer's own signature
    ) -> Any:
        """The loss that is minimised, while training; the plain language-model loss otherwise."""
        outputs = model(**inputs)
        loss = outputs["loss"]
        if model.training:
            if self.teacher is not None and self.loss.distill:
                apart = self._divergence(inputs["input_ids"], outputs["logits"])
                loss = (1 - self.loss.distill) * loss + self.loss.distill * apart
            # the Trainer divides by the batches of a step: undone here, so that every window of the step counts alike
            batches = getattr(self, "current_gradient_accumulation_steps", 1)
            windows = len(inputs["input_ids"])
            loss = self.loss.lm * loss * (batches * windows / (self._windows or windows))
            if self.penalty is not None and self.loss.gamma and self.accelerator.sync_gradients:
                loss = loss + self.loss.gamma * batches * self._pulled(self.penalty).to(loss.device)
            self._check(loss)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one batch forward and backward, then remove the hooks of the penalty."""
        try:
            return super().training_step(*args, **kwargs)
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def _pulled(self, penalty: TiePenalty) -> Float[Tensor, ""]:
        """The penalty, ready for the backward pass.

        ZeRO-3 shards parameters again after each module, so that autograd has nothing to add to. There, hooks add the
        derivative to the gradients as they come.
        """
        parameters = penalty.parameters()
        if not in_zero_parts(parameters[0]):
            return penalty()
        if self.accelerator.mixed_precision == "fp16":
            raise TrainingError("float16 scales gradients, which ZeRO-3 hides from the penalty. Use bf16, or ZeRO-2.")
        value, derivatives = penalty.derivatives()
        for parameter, derivative in zip(parameters, derivatives, strict=True):
            term = self.loss.gamma * derivative
            self._hooks.append(parameter.register_hook(partial(torch.add, term)))  # type: ignore[no-untyped-call]
        return value

    def _divergence(self, tokens: Tensor, logits: Float[Tensor, "batch context words"]) -> Float[Tensor, ""]:
        """KL(teacher | model) of the next token, in nats times the square of the temperature.

        The factor keeps gradients at one scale (Hinton, Vinyals and Dean, "Distilling the knowledge in a neural
        network", 2015).
        """
        assert self.teacher is not None
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(input_ids=tokens, use_cache=False).logits
        heat = self.loss.temperature
        own, wanted = (
            (each[:, :-1].float() / heat).log_softmax(dim=-1).flatten(0, 1)
            for each in (logits, wanted.to(logits.device))
        )
        return heat**2 * functional.kl_div(own, wanted, reduction="batchmean", log_target=True)

    def _check(self, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss.detach())):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}. Training stopped; what was saved "
                f"before is in {self.args.output_dir}. Lower the learning rate and run again: it goes on from there. "
                "Or train in float32 from the beginning, with --restart."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of a checkpoint, with the learning rate that is asked for now."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        before = max(getattr(schedule, "base_lrs", None) or [0.0])
        if checkpoint is None or not before or before == self.args.learning_rate:
            return
        change = self.args.learning_rate / before
        schedule.base_lrs = [rate * change for rate in schedule.base_lrs]
        schedule._last_lr = [rate * change for rate in schedule._last_lr]
        for group in self.optimizer.param_groups:
            group["lr"] *= change
            if "initial_lr" in group:
                group["initial_lr"] *= change

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        """Save the weights that the engine put together, for shared models too."""
        model = self.accelerator.unwrap_model(self.model)
        quantizer = getattr(model, "hf_quantizer", None)
        with (
            quantizer.saving(state_dict) if isinstance(quantizer, HeadshareQuantizer) else nullcontext(),
            _as_loaded(model) if str(output_dir).rpartition("/")[2].startswith("checkpoint-") else nullcontext(),
        ):
            super()._save(output_dir, state_dict)

    # ---- measuring

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The loader of all windows, whatever is dropped in training."""
        dropped = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = dropped

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The loss and the metrics of tasks.

        With a penalty they include the loss that sharing would give and the mean distance of ties, and tasks are
        measured as the shared model does them.
        """
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self._check_measured(output.metrics[f"{metric_key_prefix}_loss"])
        if self.penalty is None:
            output.metrics.update(self._on_tasks(metric_key_prefix))
            return output
        with self.penalty.closed():
            shared = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            output.metrics.update(self._on_tasks(metric_key_prefix))
        output.metrics[f"{metric_key_prefix}_{SHARED}_loss"] = shared.metrics[f"{metric_key_prefix}_loss"]
        output.metrics[f"{metric_key_prefix}_distance"] = self.penalty.distances().mean().item()
        return output

    def _check_measured(self, loss: float) -> None:
        """Refuse a loss that is not finite; measuring comes before saving, so such weights are not saved."""
        step = self.state.global_step
        if math.isfinite(loss):
            return
        if not step:
            raise TrainingError(f"the loss on the text held out is {loss} before the first step. Train in float32.")
        raise TrainingError(
            f"the loss on the text held out is {loss} after step {step}. Training stopped; what was saved before is in "
            f"{self.args.output_dir}. Lower the learning rate and run again: it goes on from there."
        )

    def _on_tasks(self, prefix: str) -> dict[str, float]:
        if self.tasks is None or not self.is_world_process_zero():
            return {}
        measured = self.tasks(self.accelerator.unwrap_model(self.model))
        return {f"{prefix}_{name}": value for name, value in measured.items()}


@contextmanager
def _as_loaded(model: Any) -> Iterator[None]:
    """Let `save_pretrained` keep the names and shapes of modules within this block.

    The Trainer loads its own checkpoints in these. Files of models with experts have others.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


class _LogWhereSaved(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """A callback that logs before each checkpoint.

    The Trainer keeps no sum of losses in checkpoints. Without this, a run that goes on from one would log another mean
    at its next line.
    """

    def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
        control.should_log = control.should_log or control.should_save


class _Digests(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """A callback that notes the digests of a checkpoint's files once all processes have written theirs."""

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            note_digests(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _Lines(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """A callback that writes a line on standard error for every log, from one process."""

    def on_log(self, _: Any, state: Any, *__: Any, logs: Mapping[str, float] | None = None, **___: Any) -> None:
        shown = {key: value for key, value in (logs or {}).items() if not key.endswith(_SPEEDS)}
        if state.is_world_process_zero and shown:
            words = ", ".join(f"{key} {value:.6g}" for key, value in shown.items() if isinstance(value, int | float))
            say(f"step {state.global_step} of {state.max_steps}: {words}")


_SPEEDS = ("_runtime", "_per_second", "total_flos", "epoch")
