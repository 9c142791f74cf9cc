"""After the refit, some hundred gradient steps for each layer on what it gives: what would that gain?

    python -m studies.reconstruct MODEL --plan PLAN.json --calibration TEXT --text OTHER --steps 200 --rates 1e-4

The steps are those of `headshare share --reconstruct`; `--train v` changes W_v and W_o alone, `all` every matrix.
Measured on another text, in pairs with the refit alone: loss and KL(dense | model), nats a token, errors over windows.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

import headshare as hs
from benchmarks.machine import machine
from headshare.calibration.refit.layer_fit import LayerFit
from headshare.calibration.refit.refitter import Refitter
from headshare.evaluation.perplexity import Predictions, losses_and_divergences
from headshare.experiments.controls import overwrite_recipients
from headshare.integrations.transformers.loading import load_model
from headshare.plan.plan import SharePlan
from headshare.plan.units import Part
from headshare.progress import shown, track
from headshare.text.tokens import Calibration
from headshare.text.windows import Windows
from studies.products import parsed
from studies.quality import put

TRAINED = {"v": (Part.V, Part.O), "all": tuple(Part)}


@dataclass
class Chosen(LayerFit):
    """A layer's fits whose gradient steps change only some parts of it."""

    parts: tuple[Part, ...] = tuple(Part)

    def _matrices(self, layer: int, module: nn.Module) -> dict[str, nn.Parameter]:
        places = [one.parts for one in (self.layers.attention, self.layers.ffn) if one is not None]
        wanted = {self.layers.tensor(part, layer) for parts in places for part in parts if part in self.parts}
        return {name: weight for name, weight in super()._matrices(layer, module).items() if name in wanted}


def main() -> None:
    """Refit, reconstruct, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--plan", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--text", required=True, help="a text file, or 'self'")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", default="1e-4", help="comma-separated")
    parser.add_argument("--train", default="v,all", help="comma-separated: v, all")
    parser.add_argument("--seed", type=int, default=0)
    args = parsed(parser)
    dense, plan = hs.open_checkpoint(args.model), SharePlan.load(args.plan)

    def calibration(source: str, tokens: int, seed: int):  # type: ignore[no-untyped-def]
        return Calibration.load(source, dense, tokens=tokens, window=args.window, seed=seed)

    fitted, held = (
        calibration(args.calibration, args.calibration_tokens, args.seed),
        calibration(args.text, args.tokens, args.seed + 1),
    )
    windows = Windows(held.tokens, held.bos)
    rows = []
    base: tuple[Tensor, Tensor] | None = None
    with shown():
        predictions = Predictions(load_model(dense), windows)
        cells = [("refit alone", 0, 0.0)]
        cells += [(name, args.steps, float(rate)) for name in args.train.split(",") for rate in args.rates.split(",")]
        for name, steps, rate in cells:
            begun = time.perf_counter()
            one = Refitter(dense, plan, fitted, steps=steps)
            one.layer_fit = Chosen(**{**vars(one.layer_fit), "rate": rate, "parts": TRAINED.get(name, ())})
            for _ in track(one.advance(), name, one.layers.count):
                pass
            seconds = time.perf_counter() - begun
            model = load_model(dense)
            overwrite_recipients(model, plan)
            put(model, one.result.tensors)
            losses, divergences = losses_and_divergences(model, predictions)
            base = base or (losses, divergences)
            closed = [1 - step.error_after / step.error_before for step in one.result.steps if "gradient" in step.note]
            rows.append(
                f"| {name} | {rate:g} | {sum(closed) / len(closed) if closed else 0:.1%} | {losses.mean():.4f} | "
                f"{difference(losses, base[0])} | {divergences.mean():.4f} | {difference(divergences, base[1])} | "
                f"{seconds:.0f} |"
            )
            print(rows[-1], flush=True)
    print(json.dumps({**machine(), "products": args.products}))
    print(
        f"\n{dense.name}, {args.steps} steps a layer, calibrated on "
        f"{fitted.tokens.numel()} tokens of {Path(args.calibration).name}, measured on {windows.tokens.numel()} of "
        f"{Path(args.text).name}\n"
    )
    print("| trained | rate | less error a layer | loss, nats | against refit | divergence | against refit | seconds |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    print("\n".join(rows))


def difference(found: Tensor, base: Tensor) -> str:
    """The mean of paired differences and its standard error."""
    more = found - base
    return "" if found is base else f"{more.mean():+.4f} ({more.std() / len(more) ** 0.5:.4f})"


if __name__ == "__main__":
    main()
