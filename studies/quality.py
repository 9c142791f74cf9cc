"""Quality at equal stored bytes: sharing in every form and its controls, the same refit for all; a table and a figure.

    python -m studies.quality MODEL --text TEST --calibration VALIDATION --ratios 0.1,0.2,0.3,0.4,0.5 --out DIR
    python -m studies.quality MODEL --text TEST --calibration VALIDATION --ratios "" --saves 0.02,0.05,0.1 --out DIR

At each ratio all rows save what sharing q, k and v of int(ratio x units) units saves, or a little more (the table says
how much). Prices are nats a token. The divergence is that of the predictions on the test text from the dense model's,
KL(dense | model), nats a token. Every setting is chosen on the calibration text; the test text is only measured on.
`--text self` has the model write one, with the next seed; `--text articles` takes every sixth article out of the
calibration text (of WikiText, where titles stand between equals signs), to choose methods by. `--out` keeps each row
as it is done, `--kept` (the same folder unless given) prices and refits, and what is there is not done again: with
another `--text` and `--out`, what is kept is measured on that text. The figure needs matplotlib.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headshare as hs
from benchmarks.machine import machine
from headshare.architecture.modules import module_path
from headshare.calibration.allocate import plan_for_bytes, plan_for_units
from headshare.calibration.costs.actions import AUTO_ACTIONS, LOW_RANK, QKV, QKVO, REMOVE, Action
from headshare.calibration.costs.curves import CostCurves
from headshare.calibration.costs.kept import SavedCurves
from headshare.calibration.costs.local import price_units
from headshare.calibration.costs.measured import probe_prices
from headshare.calibration.costs.to_plan import Budgeted
from headshare.calibration.refit.run import refit_readouts
from headshare.checkpoint.checkpoint import Checkpoint
from headshare.checkpoint.fingerprint import fingerprint
from headshare.errors import CalibrationError, PlanError
from headshare.evaluation.perplexity import Predictions, losses_and_divergences, perplexity
from headshare.experiments.controls import overwrite_recipients, with_random_donors
from headshare.files.resume import ResumableRun
from headshare.files.state_files import Workspace, key_of
from headshare.integrations.transformers.loading import load_model, load_tokenizer
from headshare.matching.estimate import estimate
from headshare.matching.pairing import units_at
from headshare.plan.plan import SharePlan
from headshare.plan.units import Sublayer
from headshare.progress import shown
from headshare.sharing.size import estimate_plan
from headshare.text.tokens import Calibration
from headshare.text.windows import Windows, read_text, windows_of
from studies.products import parsed

CONTROL = "deletion of units"
CHEAPEST = "whatever costs least"
PAPER, RANDOM = "sharing q,k,v, the paper's pairs", "sharing q,k,v, random donors"
CONTROLS = (CONTROL, PAPER, RANDOM, "removal of neurons")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
SCALED = 0.999  # what scales leave of the bytes that deletion saves, and a little less
EXTRAS = ("tie_scale", "factor_in", "factor_out")


@dataclass(frozen=True)
class Row:
    """One method at one budget. `price` is what the planner predicted, where it did; `losses` and `divergences` are
    those of each window."""

    budget: str
    method: str
    saved_bytes: int
    saved_fraction: float
    perplexity: float
    against_dense: float
    price: float | None
    refit_s: float
    losses: list[float]
    divergences: list[float] = field(default_factory=list)  # none in rows from before they were measured

    @property
    def cell(self) -> tuple[str, str]:
        """What it is a row of."""
        return self.budget, self.method


@dataclass(frozen=True)
class Cell:
    """What is to be measured: a method at a budget, and how its plan is made."""

    budget: str
    method: str
    plan: Callable[[], tuple[SharePlan, float | None]]


class Bench:
    """A model, what it is calibrated and measured on, and its prices, each set of actions worked out once."""

    def __init__(
        self,
        dense: Checkpoint,
        calibration: Calibration,
        windows: Windows,
        kept: Path,
        work: Workspace,
        *,
        ffn: bool,
        steps: int,
        probe: bool,
        device: str,
    ) -> None:
        self.dense, self.calibration, self.windows, self.device = dense, calibration, windows, device
        self.ffn, self.steps = ffn, steps
        self.kept, self.work, self.probe = kept, work, probe
        stock = load_model(dense)
        self.predictions = Predictions(stock, windows)
        self.dense_perplexity = perplexity(stock, windows).perplexity
        self.layout = dense.layouts.attention
        self._prices: dict[tuple[tuple[Action, ...], Sublayer], CostCurves] = {}

    def prices(self, actions: tuple[Action, ...], kind: Sublayer = Sublayer.ATTENTION) -> CostCurves:
        """The prices of these actions, in nats, of one half of each layer; of removals too where ties follow those."""
        if (actions, kind) not in self._prices:
            words = "-".join(map(str, actions))
            rough = SavedCurves(self.work, key_of("priced", words))
            found = price_units(self.dense, self.calibration, actions, device=self.device, done=rough)
            found = replace(found, curves=tuple(path for path in found.curves if path.kind is kind))
            if self.probe:
                fine = SavedCurves(self.work, key_of("probed", words, kind, self.ffn))
                found = probe_prices(self.dense, self.calibration, found, ffn=self.ffn, device=self.device, done=fine)
            self._prices[actions, kind] = found
        return self._prices[actions, kind]

    def both(self) -> CostCurves:
        """The prices of ties and removals of units, and of removals of neurons."""
        units, neurons = self.prices(AUTO_ACTIONS), self.prices((REMOVE,), Sublayer.FFN)
        return replace(units, curves=units.curves + neurons.curves)

    def measure(self, cell: Cell) -> Row:
        """Plan, refit, and the perplexity of a stock model with the same numbers in place."""
        plan, price = cell.plan()
        tensors, seconds = self.refitted(cell, plan)
        model = load_model(self.dense)
        overwrite_recipients(model, plan)
        put(model, tensors)
        losses, divergences = losses_and_divergences(model, self.predictions)
        found = estimate_plan(self.dense, plan)
        value = losses.mean().exp().item()
        return Row(
            cell.budget,
            cell.method,
            found.saved_bytes,
            found.saved_fraction,
            value,
            value / self.dense_perplexity,
            price,
            seconds,
            [round(loss, 6) for loss in losses.tolist()],
            [round(one, 6) for one in divergences.tolist()],
        )

    def refitted(self, cell: Cell, plan: SharePlan) -> tuple[Mapping[str, Tensor], float]:
        """The readouts of this plan, refitted or as they were kept, and the seconds that took."""
        words = re.sub(r"\W+", "-", f"{cell.budget} {cell.method}" + (f" {self.steps} steps" if self.steps else ""))
        file, digest = self.kept / f"refit-{words}.safetensors", plan.digest
        if file.is_file():
            with safe_open(file, "pt") as kept:
                found = kept.metadata()
            if found["plan"] == digest:
                return load_file(file), float(found["seconds"])
        begun = time.perf_counter()
        tensors = refit_readouts(
            self.dense, plan, self.calibration, ffn=self.ffn, refine=self.steps, device=self.device
        ).tensors
        seconds = round(time.perf_counter() - begun, 1)
        named = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, file, {"plan": digest, "seconds": str(seconds)})
        return tensors, seconds


def at_ratio(bench: Bench, ratio: float, seed: int) -> Iterator[Cell]:
    """At no fewer bytes than sharing q,k,v saves: deletion of units; sharing with o factored; of these and of q,k,v,o
    with scales whatever costs least. Then q,k,v,o with scales at the bytes that deletion saved, less its scales, and
    with deletion only in layer 0, which has no donors; q,k,v alone, by output; the paper's pairs, and its recipients
    with random donors. And, neurons included, whatever costs least."""
    budget, units = f"{ratio:g}", units_at(ratio, bench.layout.units)
    least = estimate(bench.dense, ratio, parts="qkv").saved_bytes

    def paper() -> SharePlan:
        return hs.make_plan(hs.score_units(bench.dense, "qk", "qkv"), ratio)

    def saving(*actions: Action) -> tuple[SharePlan, float]:
        return priced(plan_for_bytes(bench.prices(AUTO_ACTIONS).only(actions), least))

    def scaled() -> tuple[SharePlan, float]:
        prices = bench.prices(AUTO_ACTIONS)
        deleted = plan_for_bytes(prices.only((REMOVE,)), least)
        ties = [path for path in prices.curves if path.actions == {REMOVE if path.layer == 0 else QKVO}]
        return priced(plan_for_bytes(replace(prices, curves=tuple(ties)), int(SCALED * deleted.saved_bytes)))

    yield Cell(budget, CONTROL, lambda: saving(REMOVE))
    yield Cell(budget, "sharing, o factored", lambda: saving(LOW_RANK))
    yield Cell(budget, "sharing or deletion", lambda: saving(*AUTO_ACTIONS, REMOVE))
    yield Cell(budget, CHEAPEST, lambda: priced(plan_for_bytes(bench.both(), least)))
    yield Cell(budget, "sharing q,k,v,o with scales", scaled)
    yield Cell(budget, "sharing q,k,v, by output", lambda: priced(plan_for_units(bench.prices((QKV,)), units)))
    yield Cell(budget, PAPER, lambda: (paper(), None))
    yield Cell(budget, RANDOM, lambda: (with_random_donors(paper(), seed), None))


def at_share(bench: Bench, share: float) -> Iterator[Cell]:
    """A share of the whole model: units only, neurons only, sharing only, and whatever costs least."""
    wanted = int(share * estimate_plan(bench.dense, SharePlan()).dense_bytes)

    def saving(prices: CostCurves, *actions: Action) -> tuple[SharePlan, float]:
        return priced(plan_for_bytes(prices.only(actions), wanted))

    budget = f"{share:.0%}"
    yield Cell(budget, CONTROL, lambda: saving(bench.prices(AUTO_ACTIONS), REMOVE))
    yield Cell(budget, "removal of neurons", lambda: saving(bench.prices((REMOVE,), Sublayer.FFN), REMOVE))
    yield Cell(budget, "sharing, o factored", lambda: saving(bench.prices(AUTO_ACTIONS), LOW_RANK))
    yield Cell(budget, CHEAPEST, lambda: saving(bench.both(), *AUTO_ACTIONS, REMOVE))


def priced(found: Budgeted) -> tuple[SharePlan, float]:
    """The plan and its price."""
    return found.plan, found.price


def table(rows: list[Row]) -> str:
    """All rows as Markdown, by budget, each against the control too: means of the differences of the same windows'
    losses and divergences, and their standard errors."""
    controls = {row.budget: row for row in rows if row.method == CONTROL}
    rows = sorted(rows, key=lambda row: float(row.budget.rstrip("%")))
    lines = [
        f"| budget | method | saved | perplexity | over dense | more loss than {CONTROL}, nats (error) | price | "
        "divergence | more than that of deletion (error) |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.budget} | {row.method} | {row.saved_fraction:.2%} | {row.perplexity:.3f} | {row.against_dense:.4f} | "
        f"{more(row, controls.get(row.budget), 'losses')} | {'' if row.price is None else f'{row.price:.4f}'} | "
        f"{mean(row.divergences)} | {more(row, controls.get(row.budget), 'divergences')} |"
        for row in rows
    ]
    return "\n".join(lines)


def mean(values: list[float]) -> str:
    """As a cell; empty where there are none."""
    return f"{sum(values) / len(values):.4f}" if values else ""


def more(row: Row, control: Row | None, what: str) -> str:
    """How much more a row loses, or diverges, than its control, and the standard error over windows."""
    if control is None or control is row or not (getattr(row, what) and getattr(control, what)):
        return ""
    found = torch.tensor(getattr(row, what)) - torch.tensor(getattr(control, what))
    return f"{found.mean().item():+.4f} ({found.std().item() / len(found) ** 0.5:.4f})"


def draw(rows: list[Row], path: Path) -> None:
    """Perplexity above dense against the bytes that are saved, a line for each method, controls dashed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.stderr.write("no figure: pip install matplotlib\n")
        return
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for method in dict.fromkeys(row.method for row in rows):
        points = sorted((row.saved_fraction, row.against_dense) for row in rows if row.method == method)
        style = "--" if method in CONTROLS else "-"
        saved, above = [100 * one for one, _ in points], [100 * (against - 1) for _, against in points]
        axes.plot(saved, above, style, marker="o", markersize=4, label=method)
    axes.set(xlabel="saved, % of the model's bytes", ylabel="perplexity above dense, %", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy refitted tensors into a stock model by their names in the checkpoint; what a plan adds is left out."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in EXTRAS:
            getattr(model.get_submodule(module_path(model, f"{path}.weight")), leaf).copy_(tensor)


def test_windows(dense: Checkpoint, args: argparse.Namespace) -> Windows:
    """What is measured on."""
    if args.text == "self":
        text = Calibration.load("self", dense, tokens=args.tokens, window=args.window, seed=args.seed + 1)
        return Windows(text.tokens, text.bos)
    text = read_text(args.text)
    if Path(args.text).suffix == ".jsonl":
        text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines())
    return windows_of(load_tokenizer(dense), text, window=args.window, limit=args.tokens)


def split_articles(text: Path, out: Path) -> tuple[Path, Path]:
    """Every sixth article of a text in the style of WikiText, and all others, as files in this folder."""
    articles = re.split(r"(?m)^(?= = [^=].*[^=] = \n)", text.read_text())
    measured, fitted = out / "measured.txt", out / "fitted.txt"
    measured.write_text("".join(articles[4::6]))
    fitted.write_text("".join(article for at, article in enumerate(articles) if at % 6 != 4))
    return measured, fitted


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
    parser.add_argument("--refine", type=int, default=0, help="gradient steps a layer after the refit, for all rows")
    parser.add_argument(
        "--probe", action=argparse.BooleanOptionalAction, default=True, help="price by measured predictions"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder for rows, table and figure")
    parser.add_argument("--kept", type=Path, help="folder for prices and refits; the same unless given")
    args = parsed(parser)
    dense = hs.open_checkpoint(args.model)
    args.kept = args.kept or args.out
    for folder in (args.out, args.kept):
        folder.mkdir(parents=True, exist_ok=True)
    if args.text == "articles":
        args.text, args.calibration = split_articles(Path(args.calibration), args.out)
    windows = test_windows(dense, args)
    calibration = Calibration.load(
        args.calibration, dense, tokens=args.calibration_tokens, window=args.window, seed=args.seed
    )
    kept = args.out / (f"rows-{args.refine}-steps.jsonl" if args.refine else "rows.jsonl")
    rows = [Row(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.is_file() else []
    identity = {"model": fingerprint(dense), "text": f"{calibration.digest} {calibration.seed}"}
    prices = ResumableRun(args.kept / "prices", identity, refused=CalibrationError, kept=True)
    with shown(), prices as run:
        bench = Bench(
            dense,
            calibration,
            windows,
            args.kept,
            run.workspace,
            ffn=not args.attention_only,
            steps=args.refine,
            probe=args.probe,
            device=args.device,
        )
        cells = [cell for ratio in args.ratios for cell in at_ratio(bench, ratio, args.seed)]
        cells += [cell for share in args.saves for cell in at_share(bench, share)]
        wanted = args.methods.split(";") if args.methods else {cell.method for cell in cells}
        for cell in (one for one in cells if one.method in wanted):
            if any(row.cell == (cell.budget, cell.method) for row in rows):
                continue
            try:
                rows.append(bench.measure(cell))
            except PlanError as error:
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
