"""Short runs of training, the losses that they log, and runs that are killed."""

import os
import signal
from pathlib import Path as Folder
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback

import headshare as hs
from headshare.plan.plan import SharePlan
from headshare.training import SharingTrainer, TrainSettings

CONTEXT = 16
RHYME = "w1 w5 w2 w7 w3 " * 120
PLAIN = {"use_cpu": True, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}


def settings(text: Folder, method: str = "postshare", /, **more: Any) -> TrainSettings:
    """Four steps of eight windows, unless told otherwise."""
    arguments = {**PLAIN, "max_steps": 4, **more.pop("arguments", {})}
    learning = {"arguments": arguments, **more.pop("learning", {})}
    text_ = {"data": str(text), "context": CONTEXT, "held_out": 4, **more.pop("text", {})}
    return TrainSettings.made({"method": method, "text": text_, "learning": learning, **more})


def states_close(found: Any, wanted: Any, **close: float) -> None:
    expected = wanted.state_dict()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], **close)


def losses_of(curve: Any) -> list[tuple[int, float]]:
    return [(one["step"], one["loss"]) for one in curve if "loss" in one]


def curve_of(found: Any) -> list[tuple[int, float]]:
    return losses_of(found.curve)


def killed_after(last: int) -> None:
    """From now on, training in this process is killed after this step."""

    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == last:
                os.kill(os.getpid(), signal.SIGKILL)

    real = SharingTrainer.__init__

    def init(self: Any, *args: Any, callbacks: Any = (), **kwargs: Any) -> None:
        real(self, *args, callbacks=[*callbacks, Killed()], **kwargs)

    SharingTrainer.__init__ = init  # type: ignore[method-assign]


LONGER = {"max_steps": 10, "logging_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}


def plan_of(model: Folder, ratio: float = 0.3) -> SharePlan:
    dense = hs.open_checkpoint(model)
    return hs.make_plan(hs.score_units(dense), ratio)


def language_loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
