"""A gate for each tied unit, or for each head there is, set by the gradient of the loss: what would that gain?

    python -m studies.gates MODEL --calibration TEXT [--tokens 114688] [--products bfloat16]

MODEL is dense or shared. A gate multiplies a unit's inputs of W_o, so it costs no bytes. All are set by one Newton step
from 1 on the first 5/7 of the windows: the gradient is that of the loss, the curvature the Fisher matrix with labels
that the model draws itself, summed over windows, plus `damping` times its mean diagonal. What the loss then is, is
measured on the other windows, which are no part of the fit, in pairs, with the standard error over windows.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import headshare as hs
from benchmarks.machine import machine
from headshare.architecture.config import text_config
from headshare.architecture.modules import module_path
from headshare.evaluation.perplexity import window_losses
from headshare.experiments.controls import recipients_of
from headshare.integrations.transformers.loading import load_model
from headshare.plan.units import Kind, Part
from headshare.progress import shown, track
from headshare.text.tokens import Calibration
from headshare.text.windows import Windows
from studies.products import parsed

BATCH = 4
DAMPINGS = (10.0, 1.0, 0.1)


class Gated:
    """A model whose inputs of W_o can be multiplied, channel by channel."""

    def __init__(self, checkpoint: hs.Checkpoint) -> None:
        self.model = load_model(checkpoint, storage="owner").eval().requires_grad_(False)
        layout = checkpoint.layouts.attention
        place = layout.parts[Part.O]
        self.readouts = [
            self.model.get_submodule(module_path(self.model, place.name(layer)).removesuffix(".weight"))
            for layer in range(layout.layers)
        ]
        self.width = place.rows * layout.groups

    @contextmanager
    def by(self, gates: Float[Tensor, "*batch layers channels"]) -> Iterator[Any]:
        """The model with these gates."""
        hooks = [
            readout.register_forward_pre_hook(lambda _, args, at=at: (args[0] * gates[..., at, :][..., None, :],))
            for at, readout in enumerate(self.readouts)
        ]
        try:
            yield self.model
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class Slopes:
    """Derivatives of each window's mean loss by each gate, and of the same with labels the model draws."""

    real: Float[Tensor, "windows layers channels"]
    drawn: Float[Tensor, "windows layers channels"]
    tokens: int

    @classmethod
    def of(cls, gated: Gated, calibration: Calibration, seed: int) -> "Slopes":
        """By two passes backwards for each batch of windows."""
        generator = torch.Generator().manual_seed(seed)
        real, drawn = [], []
        batches = calibration.tokens.split(BATCH)
        for tokens in track(batches, "batches", len(batches)):
            gates = torch.ones(len(tokens), len(gated.readouts), gated.width, requires_grad=True)
            with gated.by(gates) as model:
                logs = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)
            with torch.no_grad():
                labels = torch.multinomial(logs.exp().flatten(0, 1), 1, generator=generator).view_as(tokens[:, 1:])
            for kept, wanted in ((real, tokens[:, 1:]), (drawn, labels)):
                loss = -logs.gather(-1, wanted[..., None]).mean(dim=1).sum()
                kept += torch.autograd.grad(loss, gates, retain_graph=kept is real)
        return cls(torch.cat(real).double(), torch.cat(drawn).double(), calibration.tokens.shape[1] - 1)

    def step(self, gates: Float[Tensor, "gates layers channels"], damping: float) -> Float[Tensor, " gates"]:
        """The Newton step of these gates, each over the channels where it is 1."""
        chosen = gates.flatten(1).double()
        real, drawn = self.real.flatten(1) @ chosen.T, self.drawn.flatten(1) @ chosen.T
        fisher = self.tokens * drawn.T @ drawn / len(drawn)
        fisher.diagonal().add_(damping * fisher.diagonal().mean())
        found: Tensor = -torch.linalg.solve(fisher, real.mean(dim=0))
        return found


def gates_of(checkpoint: hs.Checkpoint) -> dict[str, Float[Tensor, "gates layers channels"]]:
    """Which channels each gate is over: a head's, or a tied unit's."""
    layout = checkpoint.layouts.attention
    rows = layout.parts[Part.O].rows
    width = rows * layout.groups
    head = text_config(checkpoint.config).get("head_dim") or layout.parts[Part.K].rows
    heads = torch.eye(layout.layers * width // head).repeat_interleave(head, dim=1)
    found = {"every head": heads.view(-1, layout.layers, width)}
    tied = [] if checkpoint.plan is None else recipients_of(checkpoint.plan).get(Kind.ATTENTION, [])
    if tied:
        units = torch.zeros(len(tied), layout.layers, width)
        for number, (layer, group) in enumerate(tied):
            units[number, layer, group * rows : (group + 1) * rows] = 1
        found = {"every tied unit": units, **found}
    return found


def main() -> None:
    """Set gates, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--tokens", type=int, default=114_688)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parsed(parser)
    checkpoint = hs.open_checkpoint(args.model)
    calibration = Calibration.load(
        args.calibration, checkpoint, tokens=args.tokens, window=args.window, seed=args.seed
    ).mixed()
    fitted, held = calibration.split(2 / 7)
    gated, windows = Gated(checkpoint), Windows(held.tokens, held.bos)
    with shown():
        slopes, before = Slopes.of(gated, fitted, args.seed), window_losses(gated.model, windows)
        lines = ["| gates | damping | least and most | loss, nats (error) |", "|---|--:|--:|--:|"]
        for name, chosen in gates_of(checkpoint).items():
            for damping in DAMPINGS:
                step = slopes.step(chosen, damping)
                changed = 1 + torch.einsum("g,glc->lc", step.float(), chosen)
                with gated.by(changed) as model:
                    more = window_losses(model, windows) - before
                error = more.std().item() / len(more) ** 0.5
                lines.append(
                    f"| {name} ({len(chosen)}) | {damping:g} | {1 + step.min():.2f}, {1 + step.max():.2f} | "
                    f"{more.mean():+.4f} ({error:.4f}) |"
                )
    print(json.dumps({**machine(), "products": args.products}))
    print(
        f"\n{checkpoint.name}: {before.mean():.4f} nats on {windows.tokens.numel()} tokens, gates set on "
        f"{fitted.tokens.numel()} others of {Path(args.calibration).name}\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
