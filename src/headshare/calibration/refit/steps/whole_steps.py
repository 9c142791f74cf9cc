"""Gradient steps on all layers of a shared model together, towards the next-token predictions of the dense one.

A layer's own error says little of what becomes of it further on. These steps see that: Adam on the Kullback-Leibler
divergence from the dense model (distillation, Hinton et al., arXiv 1503.02531), on tokens that need no labels. They
need both models in memory: 22 bytes for each number of the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headshare.calibration import processes
from headshare.calibration.refit.steps.descent import BETAS, drawn, is_look, share_of_rate
from headshare.calibration.refit.steps.divergence import divergences
from headshare.calibration.refit.steps.whole_model import WholeModel
from headshare.progress import track

# the most logits in memory at once
LOGITS = 2**27
LARGEST_GRADIENT = 1.0
MOMENTS = ("exp_avg", "exp_avg_sq")
# of a descent in progress, beside its tensors
NUMBERS = ("step", "best_step", "before", "least")


@dataclass(frozen=True)
class WholeSteps:
    """So many steps of so many tokens each, at rates up to `rate`."""

    steps: int
    tokens: int
    rate: float


@dataclass
class Descent:
    """A descent in progress: the weights, Adam's moments, the best weights so far, and the held-out divergences.

    `step` is the number of the last step taken. Divergences are in nats a token: before the first step, and of the
    best weights, which are those after the step `best_step`.
    """

    weights: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Adam
    best: dict[str, Tensor]
    before: float
    least: float
    step: int = 0
    best_step: int = 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """All that a stopped descent needs to go on, as tensors and as numbers."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best.items()}
        for name, weight in self.weights.items():
            tensors |= {f"{moment}.{name}": self.optimizer.state[weight][moment] for moment in MOMENTS}
        numbers = {name: float(getattr(self, name)) for name in NUMBERS}
        return tensors, numbers

    @torch.no_grad()
    def take_up(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Go on from the state of a stopped descent of the same arguments.

        Raises:
            KeyError: if something is missing in it.
        """
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            self.best[name] = tensors[f"best.{name}"].to(weight)
            moments = {moment: tensors[f"{moment}.{name}"].to(weight) for moment in MOMENTS}
            self.optimizer.state[weight] = {"step": torch.tensor(float(numbers["step"])), **moments}
        self.step = int(numbers["step"])
        self.best_step = int(numbers["best_step"])
        self.before = float(numbers["before"])
        self.least = float(numbers["least"])


@dataclass(frozen=True)
class Tokens:
    """This process's windows: the first `fitted` are fitted to, the others are held out."""

    windows: Int[Tensor, "windows window"]
    fitted: int
    vocabulary: int

    @property
    def window(self) -> int:
        """The tokens of a window."""
        return self.windows.shape[1]

    def held_out(self) -> Int[Tensor, "held window"]:
        """The windows held out."""
        return self.windows[self.fitted :]

    def pieces(self, windows: Int[Tensor, "some window"]) -> tuple[Tensor, ...]:
        """These windows, in batches whose logits fit in memory."""
        return torch.split(windows, max(1, LOGITS // (self.vocabulary * self.window))) if len(windows) else ()


def begun(
    student: WholeModel, dense: WholeModel, tokens: Tokens, weights: Mapping[str, nn.Parameter], rate: float
) -> Descent:
    """A descent before its first step."""
    for weight in weights.values():
        weight.requires_grad_()
    before = _held_out(student, dense, tokens)
    best = {name: weight.detach().clone() for name, weight in weights.items()}
    return Descent(weights, torch.optim.Adam(weights.values(), rate, BETAS), best, before, before)


def descend(
    student: WholeModel,
    dense: WholeModel,
    tokens: Tokens,
    descent: Descent,
    own: Mapping[str, Bool[Tensor, "..."]],
    wanted: WholeSteps,
    *,
    seed: int,
) -> Iterator[int]:
    """Take the steps from where the descent is, on windows drawn by the seed.

    Only those numbers change that are a layer's `own`. Yields the number of each step after which the held-out text was
    looked at.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    size = max(1, wanted.tokens // tokens.window)
    all_steps = list(drawn(tokens.fitted, size, wanted.steps, generator))
    remaining = track(all_steps[descent.step :], "steps on the whole model", wanted.steps - descent.step)
    for step, (at, windows) in enumerate(remaining, start=descent.step + 1):
        for group in descent.optimizer.param_groups:
            group["lr"] = wanted.rate * share_of_rate(step - 1, wanted.steps)
        _add_gradients(student, dense, tokens, tokens.windows[at], windows)
        _mask(descent.weights, own)
        torch.nn.utils.clip_grad_norm_(descent.weights.values(), LARGEST_GRADIENT)
        descent.optimizer.step()
        descent.optimizer.zero_grad()
        descent.step = step

        # The steps may fit the text and nothing else, so held-out tokens choose among the looks; the weights before the
        # first step are a choice too.
        if is_look(step, wanted.steps):
            now = _held_out(student, dense, tokens)
            if now < descent.least:
                descent.best = {name: weight.detach().clone() for name, weight in descent.weights.items()}
                descent.least = now
                descent.best_step = step
            yield step


def _add_gradients(
    student: WholeModel, dense: WholeModel, tokens: Tokens, own: Int[Tensor, "some window"], windows: int
) -> None:
    """Add the gradients of the mean divergence over so many windows, of which these are this process's own."""
    for batch in tokens.pieces(own):
        with torch.no_grad():
            wanted = dense.logits(batch)
        with torch.enable_grad():
            lost = divergences(wanted, student.logits(batch)).sum() / (windows * tokens.window)
            torch.autograd.backward(lost)


def _mask(weights: Mapping[str, nn.Parameter], own: Mapping[str, Tensor]) -> None:
    """Add gradients up over the processes, and leave those of numbers out that others use too."""
    for name, weight in weights.items():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad = processes.summed(gradient) * own[name]


@torch.no_grad()
def _held_out(student: WholeModel, dense: WholeModel, tokens: Tokens) -> float:
    """The divergence on the held-out windows of all processes, in nats a token."""
    held = tokens.held_out()
    lost = torch.zeros((), dtype=torch.float64)
    for batch in tokens.pieces(held):
        lost += divergences(dense.logits(batch), student.logits(batch)).double().sum().cpu()
    return float(processes.summed(lost)) / processes.total(held.numel())
