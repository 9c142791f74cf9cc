"""After the refit, some hundred gradient steps for each layer on what it gives: what would that gain?

    python -m studies.refine MODEL --plan PLAN.json --calibration TEXT --text OTHER --steps 100,400 --rates 1e-4

The steps are those of `headshare share --refine`; `--train readouts` changes W_o and W_down alone, `matrices` every
matrix, `all` norms and biases too. Measured on another text, in pairs with the refit alone: loss and KL(dense | model),
nats a token, errors over windows. With `--at LAYER` only that layer is refined, and its held-out error is all that is
printed: some minutes, to choose settings by.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import headshare as hs
from benchmarks.machine import machine
from headshare.calibration.layerwise.layers import Layers
from headshare.calibration.refit.layer_fit import LayerFit, Streams
from headshare.calibration.refit.refinement import Refinement
from headshare.calibration.refit.refitter import Refitter
from headshare.calibration.refit.steps.block_weights import BlockWeights
from headshare.evaluation.perplexity import Predictions, losses_and_divergences
from headshare.experiments.controls import overwrite_recipients
from headshare.integrations.transformers.loading import load_model
from headshare.plan.plan import SharePlan
from headshare.plan.units import READOUTS, Part
from headshare.progress import shown, track
from headshare.text.tokens import Calibration
from headshare.text.windows import Windows
from studies.products import parsed
from studies.quality import put

TRAINED = {"readouts": READOUTS, "matrices": tuple(Part), "all": None}


def trained(parts: tuple[Part, ...] | None) -> Callable[..., BlockWeights]:
    """A maker of a block's weights that leaves only the matrices of these parts, or all weights for None."""

    def of(layers: Layers, layer: int, *rest: Any, **more: Any) -> BlockWeights:
        block = WHOLE(layers, layer, *rest, **more)
        if parts is None:
            return block
        places = [one.parts for one in (layers.attention, layers.ffn) if one is not None]
        wanted = {layers.tensor(part, layer) for each in places for part in each if part in parts}
        return BlockWeights({name: one for name, one in block.weights.items() if name in wanted}, block.columns)

    return of


WHOLE = BlockWeights.of


def main() -> None:
    """Refit, refine, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--plan", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--text", help="a text file, or 'self'")
    parser.add_argument("--at", type=int, help="refine this layer alone, and look at its held-out error")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", default="100", help="comma-separated")
    parser.add_argument("--step-tokens", default="4096", help="comma-separated")
    parser.add_argument("--rates", default="3e-4", help="comma-separated")
    parser.add_argument("--train", default="all", help=f"comma-separated: {', '.join(TRAINED)}")
    parser.add_argument("--seed", type=int, default=0)
    args = parsed(parser)
    dense, plan = hs.open_checkpoint(args.model), SharePlan.load(args.plan)

    def calibration(source: str, tokens: int, seed: int):  # type: ignore[no-untyped-def]
        return Calibration.load(source, dense, tokens=tokens, window=args.window, seed=seed)

    cells: list[tuple[str, Refinement | None]] = [
        (name, Refinement(int(steps), int(tokens), float(rate)))
        for name in args.train.split(",")
        for steps in args.steps.split(",")
        for tokens in args.step_tokens.split(",")
        for rate in args.rates.split(",")
    ]
    fitted = calibration(args.calibration, args.calibration_tokens, args.seed)
    if args.at is not None:
        print(json.dumps({**machine(), "products": args.products}))
        look_at(Refitter(dense, plan, fitted, refinement=cells[0][1]), args.at, cells)
        return
    held = calibration(args.text, args.tokens, args.seed + 1)
    windows = Windows(held.tokens, held.bos)
    rows = []
    base: tuple[Tensor, Tensor] | None = None
    with shown():
        predictions = Predictions(load_model(dense), windows)
        cells.insert(0, ("refit alone", None))
        for name, refinement in cells:
            begun = time.process_time()
            BlockWeights.of = trained(TRAINED.get(name))  # type: ignore[method-assign]
            one = Refitter(dense, plan, fitted, refinement=refinement)
            for _ in track(one.advance(), name, one.layers.count):
                pass
            seconds = time.process_time() - begun
            model = load_model(dense)
            overwrite_recipients(model, plan)
            put(model, one.result.tensors)
            losses, divergences = losses_and_divergences(model, predictions)
            base = base or (losses, divergences)
            closed = [1 - step.error_after / step.error_before for step in one.result.steps if "gradient" in step.note]
            less = sum(closed) / len(closed) if closed else 0.0
            rows.append(
                f"| {name} | {words(refinement)} | {less:.1%} | {losses.mean():.4f} | "
                f"{difference(losses, base[0])} | {divergences.mean():.4f} | {difference(divergences, base[1])} | "
                f"{seconds:.0f} |"
            )
            print(rows[-1], flush=True)
    print(json.dumps({**machine(), "products": args.products}))
    print(
        f"\n{dense.name}, calibrated on "
        f"{fitted.tokens.numel()} tokens of {Path(args.calibration).name}, measured on {windows.tokens.numel()} of "
        f"{Path(args.text).name}\n"
    )
    print(
        "| trained | steps | tokens of each | rate | less error a layer | loss, nats | against refit | divergence | "
        "against refit | CPU seconds |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    print("\n".join(rows))


def look_at(refitter: Refitter, at: int, cells: list[tuple[str, Refinement | None]]) -> None:
    """Refit the layers up to this one, and print what each refinement makes of its held-out error."""
    fit = refitter.layer_fit
    refined = LayerFit.refine
    print(
        "| trained | steps | tokens of each | rate | held-out error before | after | less | best step | CPU seconds |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")

    def each(layer: int, module: nn.Module, streams: Streams) -> None:
        for name, refinement in cells if layer == at else ():
            begun = time.process_time()
            BlockWeights.of = trained(TRAINED.get(name))  # type: ignore[method-assign]
            copied = copy.deepcopy(module)
            fit.refinement = refinement
            refined(fit, layer, copied, streams)
            step = fit.result.steps[-1]
            print(
                f"| {name} | {words(refinement)} | {step.error_before:.5f} | {step.error_after:.5f} | "
                f"{1 - step.error_after / step.error_before:.1%} | {step.note.split()[-1]} | "
                f"{time.process_time() - begun:.0f} |",
                flush=True,
            )

    fit.refine = each  # type: ignore[method-assign]
    for layer in refitter.advance():
        if layer == at:
            break


def words(refinement: Refinement | None) -> str:
    """The cells of a row that say how the layers were refined."""
    return " | | " if refinement is None else f"{refinement.steps} | {refinement.tokens} | {refinement.rate:g}"


def difference(found: Tensor, base: Tensor) -> str:
    """The mean of paired differences and its standard error."""
    more = found - base
    return "" if found is base else f"{more.mean():+.4f} ({more.std() / len(more) ** 0.5:.4f})"


if __name__ == "__main__":
    main()
