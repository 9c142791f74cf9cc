"""Quality at equal stored bytes: sharing in every form and its controls, the same refit for all; a table and a figure.

    python benchmarks/quality.py MODEL --text TEST --calibration VALIDATION --ratios 0.1,0.2,0.3,0.4,0.5 --out DIR
    python benchmarks/quality.py MODEL --text TEST --calibration VALIDATION --ratios "" --saves 0.02,0.05,0.1 --out DIR

At each ratio all rows save what sharing q, k and v of int(ratio x units) units saves, or a little more (the table says
how much). Every setting is chosen on the calibration text; the test text is only measured on. `--out` keeps each row as
it is done, and what is there is not done again. The figure needs matplotlib.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import headshare as hs
from headshare.accounting import estimate_plan
from headshare.budget import Budgeted, plan_for_bytes, plan_for_units
from headshare.calibration import Calibration, calibration_from
from headshare.checkpoints import Checkpoint
from headshare.configuration import text_config
from headshare.controls import overwrite_recipients, with_random_donors
from headshare.evaluation import Windows, perplexity, read_text, windows_of
from headshare.integrations.transformers import module_path
from headshare.models import load_model, load_tokenizer
from headshare.paths import Form, Prices
from headshare.planning import units_at
from headshare.plans import SharePlan
from headshare.pricing import price_units
from headshare.progress import shown
from headshare.recognition import attention_layout
from headshare.refitting import refit
from headshare.units import Kind
from machine import machine

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
SHARING = (Form.QK, Form.QKV, Form.FACTORED)
EXTRAS = ("tie_scale", "factor_in", "factor_out")


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


@dataclass(frozen=True)
class Cell:
    """What is to be measured: a method at a budget, and how its plan is made."""

    budget: str
    method: str
    plan: Callable[[], tuple[SharePlan, float | None]]


class Bench:
    """A model, what it is calibrated and measured on, and its prices, each set of forms worked out once."""

    def __init__(
        self, dense: Checkpoint, calibration: Calibration, windows: Windows, *, ffn: bool, device: str
    ) -> None:
        self.dense, self.calibration, self.windows, self.ffn, self.device = dense, calibration, windows, ffn, device
        self.dense_perplexity = perplexity(load_model(dense), windows).perplexity
        self.layout = attention_layout(text_config(dense.config), dense.shapes)
        self._prices: dict[tuple[Form, ...], Prices] = {}

    def prices(self, forms: tuple[Form, ...], kind: Kind | None = None) -> Prices:
        """The prices of these forms, of both halves of each layer or of one."""
        if forms not in self._prices:
            self._prices[forms] = price_units(self.dense, self.calibration, forms, device=self.device)
        found = self._prices[forms]
        paths = tuple(path for path in found.paths if kind in (None, path.kind))
        return Prices(found.model_type, found.layouts, paths, found.neurons)

    def measure(self, cell: Cell) -> Row:
        """Plan, refit, and the perplexity of a stock model with the same numbers in place."""
        plan, price = cell.plan()
        begun = time.perf_counter()
        tensors = refit(self.dense, plan, self.calibration, ffn=self.ffn, device=self.device).tensors
        seconds = time.perf_counter() - begun
        model = load_model(self.dense)
        overwrite_recipients(model, plan)
        with torch.no_grad():
            for name, tensor in tensors.items():
                path, _, leaf = name.rpartition(".")
                if leaf not in EXTRAS:
                    getattr(model.get_submodule(module_path(model, f"{path}.weight")), leaf).copy_(tensor)
        value, found = perplexity(model, self.windows).perplexity, estimate_plan(self.dense, plan)
        against = value / self.dense_perplexity
        return Row(
            cell.budget, cell.method, found.saved_bytes, found.saved_fraction, value, against, price, round(seconds, 1)
        )


def at_ratio(bench: Bench, ratio: float, seed: int) -> Iterator[Cell]:
    """Plain sharing by output, then at its bytes deletion of units and the other forms of sharing; then the paper's
    pairs, and its recipients with random donors."""
    budget, units = f"{ratio:g}", units_at(ratio, bench.layout.units)

    def plain() -> Budgeted:
        return plan_for_units(bench.prices((Form.QKV,)), units)

    def paper() -> SharePlan:
        return hs.make_plan(hs.score_units(bench.dense, "qk", "qkv"), ratio)

    def at_its_bytes(*forms: Form) -> Callable[[], tuple[SharePlan, float | None]]:
        return lambda: priced(plan_for_bytes(bench.prices(forms, Kind.ATTENTION), plain().saved_bytes))

    yield Cell(budget, "deletion of units", at_its_bytes(Form.REMOVE))
    yield Cell(budget, "q,k,v, o factored", at_its_bytes(Form.FACTORED))
    yield Cell(budget, "cheapest of qk, qkv, factored", at_its_bytes(*SHARING))
    yield Cell(budget, "q,k,v", lambda: priced(plain()))
    yield Cell(budget, "q,k,v,o scaled", at_its_bytes(Form.QKVO))
    yield Cell(budget, "paper's pairs, q,k,v", lambda: (paper(), None))
    yield Cell(budget, "random donors, q,k,v", lambda: (with_random_donors(paper(), seed), None))


def at_share(bench: Bench, share: float) -> Iterator[Cell]:
    """A share of the whole model: units only, neurons only, sharing only, and whatever costs least."""
    wanted = int(share * estimate_plan(bench.dense, SharePlan()).dense_bytes)
    for method, forms, kind in (
        ("deletion of units", (Form.REMOVE,), Kind.ATTENTION),
        ("removal of neurons", (Form.REMOVE,), Kind.FFN),
        ("sharing", SHARING, None),
        ("whatever costs least", (*SHARING, Form.REMOVE), None),
    ):
        yield Cell(
            f"{share:.0%}",
            method,
            lambda forms=forms, kind=kind: priced(plan_for_bytes(bench.prices(forms, kind), wanted)),
        )


def priced(found: Budgeted) -> tuple[SharePlan, float]:
    """The plan and its price."""
    return found.plan, found.price


def table(rows: list[Row]) -> str:
    """All rows as Markdown."""
    lines = ["| budget | method | saved | perplexity | against dense | price |", "|--:|---|--:|--:|--:|--:|"]
    lines += [
        f"| {row.budget} | {row.method} | {row.saved_fraction:.2%} | {row.perplexity:.3f} | {row.against_dense:.4f} | "
        f"{'' if row.price is None else f'{row.price:.4f}'} |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Perplexity over dense against the bytes that are left, a line for each method."""
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.stderr.write("no figure: pip install matplotlib\n")
        return
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for method in dict.fromkeys(row.method for row in rows):
        points = sorted((row.saved_fraction, row.against_dense) for row in rows if row.method == method)
        axes.plot([100 * saved for saved, _ in points], [against for _, against in points], marker="o", label=method)
    axes.set(xlabel="saved, % of the model's bytes", ylabel="perplexity / dense", yscale="log")
    axes.legend()
    figure.savefig(path)


def numbers(text: str) -> list[float]:
    """Comma-separated numbers."""
    return [float(word) for word in text.split(",") if word]


def main() -> None:
    """Measure every cell, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of the test text")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--ratios", type=numbers, default=list(RATIOS))
    parser.add_argument("--saves", type=numbers, default=[], help="shares of the whole model, such as 0.02,0.1")
    parser.add_argument("--methods", help="only these rows, joined by ;, such as 'deletion of units;q,k,v'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attention-only", action="store_true", help="refit W_o alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--products", choices=["float32", "bfloat16"], default="float32", help="of float32 matrices, CPU"
    )
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder for rows, table and figure")
    args = parser.parse_args()
    if args.products == "bfloat16":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    dense = hs.open_checkpoint(args.model)
    windows = windows_of(load_tokenizer(dense), read_text(args.text), window=args.window, limit=args.tokens)
    calibration = calibration_from(
        args.calibration, dense, tokens=args.calibration_tokens, window=args.window, seed=args.seed
    )
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "rows.jsonl"
    rows = [Row(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.is_file() else []
    with shown():
        bench = Bench(dense, calibration, windows, ffn=not args.attention_only, device=args.device)
        cells = [cell for ratio in args.ratios for cell in at_ratio(bench, ratio, args.seed)]
        cells += [cell for share in args.saves for cell in at_share(bench, share)]
        wanted = args.methods.split(";") if args.methods else {cell.method for cell in cells}
        for cell in (one for one in cells if one.method in wanted):
            if any((row.budget, row.method) == (cell.budget, cell.method) for row in rows):
                continue
            try:
                rows.append(bench.measure(cell))
            except hs.PlanError as error:
                sys.stderr.write(f"{cell.budget}, {cell.method}: {error}\n")
                continue
            with kept.open("a") as file:
                file.write(json.dumps(asdict(rows[-1])) + "\n")
            sys.stderr.write(f"{rows[-1]}\n")
    words = [
        json.dumps({**machine(), "products": args.products}),
        f"dense {bench.dense_perplexity:.4f} on {windows.tokens.numel()} tokens in windows of {windows.length}; "
        f"calibrated on {calibration.tokens.numel()} tokens of {Path(calibration.source).name}, seed {args.seed}",
        table(rows),
    ]
    sys.stdout.write("\n\n".join(words) + "\n")
    (args.out / "table.md").write_text("\n\n".join(words) + "\n")
    draw(rows, args.out / "quality.svg")


if __name__ == "__main__":
    main()
