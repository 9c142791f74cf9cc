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
from headshare.calibration.refit.refinement import Refinement
from headshare.calibration.refit.steps.descent import BETAS, Best, drawn, is_look, share_of_rate
from headshare.calibration.refit.steps.divergence import divergences
from headshare.calibration.refit.steps.whole_model import WholeModel
from headshare.progress import track

# the most logits in memory at once
LOGITS = 2**27
LARGEST_GRADIENT = 1.0
# the rate of a descent that begins at this divergence, in nats a token, or further away; and the least rate of any
RATE, FAR, LEAST_RATE = 2e-4, 0.2, 2e-5
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Descent:
    """A descent in progress: the weights, Adam's moments, the best weights so far, and the number of the last step.

    Errors are divergences in nats a token.
    """

    weights: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Adam
    best: Best
    step: int = 0

    def state(self) -> dict[str, Tensor]:
        """All that a stopped descent needs to go on, as tensors."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best.weights.items()}
        for name, weight in self.weights.items():
            tensors |= {f"{moment}.{name}": self.optimizer.state[weight][moment] for moment in MOMENTS}
        numbers = [self.step, self.best.step, self.best.error_before, self.best.error_after]
        return {**tensors, "numbers": torch.tensor(numbers, dtype=torch.float64)}

    @classmethod
    @torch.no_grad()
    def taken_up(
        cls, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Adam, state: Mapping[str, Tensor]
    ) -> "Descent":
        """The stopped descent of this state, in these weights.

        Raises:
            KeyError, RuntimeError, ValueError: if the state is not one of these weights.
        """
        step, best_step, before, least = state["numbers"].tolist()
        best = {}
        for name, weight in weights.items():
            weight.copy_(state[f"weight.{name}"])
            best[name] = state[f"best.{name}"].to(weight)
            moments = {moment: state[f"{moment}.{name}"].to(weight) for moment in MOMENTS}
            optimizer.state[weight] = {"step": torch.tensor(float(step)), **moments}
        return cls(weights, optimizer, Best(best, before, least, int(best_step)), int(step))


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


def highest_rate(divergence: float) -> float:
    """The highest rate of a descent that begins at this divergence, in nats a token.

    The less there is to be learnt, the more the noise of a step weighs against it. SmolLM2-135M, 64 steps
    (docs/experiments.md): at 20 % and 30 % of its bytes `RATE` is good; at 10 %, half as far from the dense model, a
    quarter of it takes a quarter off the loss, and the whole of it next to nothing. So the rate goes with the square.
    """
    return max(RATE * min(divergence / FAR, 1.0) ** 2, LEAST_RATE)


def begun(
    student: WholeModel,
    dense: WholeModel,
    tokens: Tokens,
    weights: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor] | None = None,
) -> Descent:
    """A descent before its first step; with the `state` of a stopped one, after its last.

    Raises:
        KeyError, RuntimeError, ValueError: if the state is of another descent.
    """
    for weight in weights.values():
        weight.requires_grad_()
    optimizer = torch.optim.Adam(weights.values(), betas=BETAS)  # each step sets its rate
    if state is not None:
        return Descent.taken_up(weights, optimizer, state)
    return Descent(weights, optimizer, Best.of(weights, _held_out(student, dense, tokens)))


def descend(
    student: WholeModel,
    dense: WholeModel,
    tokens: Tokens,
    descent: Descent,
    own: Mapping[str, Bool[Tensor, "..."]],
    wanted: Refinement,
    *,
    seed: int,
) -> Iterator[int]:
    """Take the refinement's steps on the whole model from where the descent is, on windows drawn by the seed.

    Only those numbers change that are a layer's `own`. Yields the number of each step after which the held-out text was
    looked at.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    size = max(1, wanted.tokens // tokens.window)
    all_steps = list(drawn(tokens.fitted, size, wanted.whole, generator))
    highest = highest_rate(descent.best.error_before) if wanted.whole_rate is None else wanted.whole_rate
    remaining = track(all_steps[descent.step :], "steps on the whole model", wanted.whole - descent.step)
    for step, (at, windows) in enumerate(remaining, start=descent.step + 1):
        for group in descent.optimizer.param_groups:
            group["lr"] = highest * share_of_rate(step - 1, wanted.whole)
        _add_gradients(student, dense, tokens, tokens.windows[at], windows)
        _mask(descent.weights, own)
        torch.nn.utils.clip_grad_norm_(descent.weights.values(), LARGEST_GRADIENT)
        descent.optimizer.step()
        descent.optimizer.zero_grad()
        descent.step = step

        if is_look(step, wanted.whole):
            descent.best.look(step, descent.weights, _held_out(student, dense, tokens))
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
