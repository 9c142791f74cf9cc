"""Quality at equal stored bytes: sharing in every form, its controls, the same refit for all, one table.

    python benchmarks/quality.py MODEL --text TEST --calibration VALIDATION --ratios 0.1,0.2,0.3,0.4,0.5

At each ratio, all rows but the first save the bytes that sharing q, k, v of int(ratio x units) units saves (at least;
the table says how many). Every setting is chosen on the calibration text; the test text is only measured on.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from machine import machine

import headshare as hs
from headshare.accounting import estimate_plan
from headshare.budget import plan_for_bytes, plan_for_units
from headshare.calibration import Calibration, calibration_from
from headshare.checkpoints import Checkpoint
from headshare.controls import overwrite_recipients, with_random_donors
from headshare.evaluation import Windows, perplexity, read_text, windows_of
from headshare.integrations.transformers import module_path
from headshare.models import load_model, load_tokenizer
from headshare.paths import Form, Prices
from headshare.planning import units_at
from headshare.plans import SharePlan
from headshare.pricing import price_units
from headshare.progress import shown
from headshare.refitting import refit
from headshare.units import Kind

SHARING = (Form.QK, Form.QKV, Form.FACTORED)
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Row:
    """One method at one budget. `price` is what the planner predicted, where it did."""

    budget: str
    method: str
    saved_bytes: int
    saved_fraction: float
    perplexity: float
    against_dense: float
    price: float | None
    refit_s: float


class Grid:
    """A model, its calibration and test text, and the prices of each set of forms, worked out once."""

    def __init__(
        self, dense: Checkpoint, calibration: Calibration, windows: Windows, *, ffn: bool, device: str
    ) -> None:
        self.dense, self.calibration, self.windows, self.ffn, self.device = dense, calibration, windows, ffn, device
        self.dense_perplexity = perplexity(load_model(dense), windows).perplexity
        self._prices: dict[tuple[Form, ...], Prices] = {}

    def prices(self, *forms: Form) -> Prices:
        if forms not in self._prices:
            self._prices[forms] = price_units(self.dense, self.calibration, forms, device=self.device)
        return self._prices[forms]

    def row(self, budget: str, method: str, plan: SharePlan, price: float | None = None) -> Row:
        begun = time.perf_counter()
        tensors = refit(self.dense, plan, self.calibration, ffn=self.ffn, device=self.device).tensors
        seconds = time.perf_counter() - begun
        model = load_model(self.dense)
        overwrite_recipients(model, plan)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if not name.endswith(("tie_scale", "factor_in", "factor_out")):
                    module = model.get_submodule(module_path(model, name.rpartition(".")[0] + ".weight"))
                    getattr(module, name.rpartition(".")[2]).copy_(tensor)
        value = perplexity(model, self.windows).perplexity
        found = estimate_plan(self.dense, plan)
        ratio = value / self.dense_perplexity
        return Row(budget, method, found.saved_bytes, found.saved_fraction, value, ratio, price, seconds)


def only(prices: Prices, kind: Kind, *, first: int = 0) -> Prices:
    """The paths of one half of the layers, from this layer on."""
    paths = tuple(path for path in prices.paths if path.kind is kind and path.layer >= first)
    return Prices(prices.model_type, prices.layouts, paths, prices.neurons)


def at_ratio(grid: Grid, ratio: float, seed: int) -> Iterator[Row]:
    """The paper's pairs, its recipients with random donors, pairs by output; and at the same bytes deletion, scaled
    sharing of q, k, v, o, and whichever forms of sharing cost least."""
    layout = next(iter(hs.score_units(grid.dense, "qk", "qkv").tables)).layout
    plain = plan_for_units(grid.prices(Form.QKV), units_at(ratio, layout.units))
    yield grid.row(f"{ratio:g}", "by output, q,k,v", plain.plan, plain.price)
    for method, prices in (
        ("deletion of units", only(grid.prices(Form.REMOVE), Kind.ATTENTION)),
        ("by output, q,k,v, factored o", grid.prices(Form.FACTORED)),
        ("by output, scaled q,k,v,o", grid.prices(Form.QKVO)),
        ("by output, cheapest of qk, qkv, factored", grid.prices(*SHARING)),
    ):
        found = plan_for_bytes(prices, plain.saved_bytes)
        yield grid.row(f"{ratio:g}", method, found.plan, found.price)
    paper = hs.make_plan(hs.score_units(grid.dense, "qk", "qkv"), ratio)
    yield grid.row(f"{ratio:g}", "paper's pairs, q,k,v", paper)
    yield grid.row(f"{ratio:g}", "random donors, q,k,v", with_random_donors(paper, seed))


def at_share(grid: Grid, share: float) -> Iterator[Row]:
    """Whole-model budgets: units only, neurons only, sharing only, and whatever costs least."""
    whole = estimate_plan(grid.dense, SharePlan()).dense_bytes
    removal = grid.prices(Form.REMOVE)
    everything = grid.prices(*SHARING, Form.REMOVE)
    for method, prices in (
        ("deletion of units", only(removal, Kind.ATTENTION)),
        ("removal of neurons", only(removal, Kind.FFN)),
        ("sharing, cheapest forms", grid.prices(*SHARING)),
        ("whatever costs least", everything),
    ):
        try:
            found = plan_for_bytes(prices, int(share * whole))
        except hs.PlanError as error:
            sys.stderr.write(f"{share:.0%}, {method}: {error}\n")
            continue
        yield grid.row(f"{share:.0%}", method, found.plan, found.price)


def table(rows: list[Row]) -> str:
    lines = ["| budget | method | saved | perplexity | against dense | price |", "|--:|---|--:|--:|--:|--:|"]
    lines += [
        f"| {row.budget} | {row.method} | {row.saved_fraction:.2%} | {row.perplexity:.3f} | {row.against_dense:.4f} | "
        f"{'' if row.price is None else f'{row.price:.4f}'} |"
        for row in rows
    ]
    return "\n".join(lines)


def numbers(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    return lambda text: [kind(word) for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of the test text")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--ratios", type=numbers(float), default=list(RATIOS))
    parser.add_argument("--saves", type=numbers(float), default=[], help="shares of the whole model, such as 0.02,0.1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attention-only", action="store_true", help="refit W_o alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--products", choices=["float32", "bfloat16"], default="float32", help="on a CPU with such units"
    )
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines here, and go on from what is there")
    args = parser.parse_args()
    if args.products == "bfloat16":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    dense = hs.open_checkpoint(args.model)
    windows = windows_of(load_tokenizer(dense), read_text(args.text), window=args.window, limit=args.tokens)
    calibration = calibration_from(
        args.calibration, dense, tokens=args.calibration_tokens, window=args.window, seed=args.seed
    )
    print(machine(), f"products {args.products}, calibration {calibration.tokens.numel()} tokens, {calibration.source}")
    rows = []
    with shown():
        grid = Grid(dense, calibration, windows, ffn=not args.attention_only, device=args.device)
        print(f"dense {grid.dense_perplexity:.4f} on {windows.tokens.numel()} tokens in windows of {windows.length}")
        found = [at_ratio(grid, ratio, args.seed) for ratio in args.ratios] + [at_share(grid, s) for s in args.saves]
        for some in found:
            for row in some:
                rows.append(row)
                sys.stderr.write(f"{row}\n")
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(asdict(row)) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
